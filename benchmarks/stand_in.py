"""An OpenAI-compatible stand-in for an engine that misbehaves as it is told: for breadth, where engines take minutes.

A request's `fault` names what it does to the replica that takes it (see FAULTS); chance is the client's affair, so that
the same seed makes the same faults. Behind it is a loop that makes a token for each running request every step, as an
engine does: it has a batch, a queue, and a slot on the board that it writes at every step.

`benchmarks.stand_in_app` serves it through Ray Serve, `benchmarks.plane` without Ray.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections import deque
from collections.abc import AsyncIterator
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from deployments.slot import Slot

FAULTS = {
    "error": "answers 500 at once",
    "refuse": "answers 400 at once",
    "hang": "takes the request and never says a word",
    "stall": "streams `at` tokens and falls silent",
    "cut": "streams `at` tokens and breaks the connection",
    "event": "streams `at` tokens and an error event, then `[DONE]`, as vLLM does",
    "lie": "promises more bytes than it sends",
    "slow": "takes ten times as long",
    "freeze": "stops the engine for `for_s` seconds",
    "die": "kills the replica's process, after `at` tokens if it streams",
}
BLOCK_TOKENS = 16


class StandIn:
    """An engine of `batch` places that makes one token for each running request every `step_s`."""

    def __init__(self, slot: Slot, batch: int = 16, step_s: float = 0.005) -> None:
        self._slot = slot
        self._batch = batch
        self._step_s = step_s
        self._waiting: deque[asyncio.Queue[None]] = deque()
        self._running: list[asyncio.Queue[None]] = []
        self._frozen_until_s = 0.0
        slot.engine_ready(blocks=1 << 16, block_tokens=BLOCK_TOKENS, max_running_requests=batch)

    def app(self) -> Starlette:
        completions = Route("/v1/completions", self._complete, methods=["POST"])
        return Starlette(routes=[completions, Route("/v1/models", _models)])

    async def run(self) -> None:
        """The engine's loop; cancel it to stop."""
        while True:
            await asyncio.sleep(self._step_s)
            if time.monotonic() >= self._frozen_until_s and (self._waiting or self._running):
                self._step()

    def _step(self) -> None:
        while self._waiting and len(self._running) < self._batch:
            self._running.append(self._waiting.popleft())
        for tokens in self._running:
            tokens.put_nowait(None)
        kv_ratio = len(self._running) / (1 << 16)
        self._slot.step(len(self._running), len(self._waiting), kv_ratio, 0, len(self._running), 0, 0)

    async def _generate(self, tokens: int) -> AsyncIterator[int]:
        """Token numbers as the engine makes them; leaving it early aborts the request."""
        queue: asyncio.Queue[None] = asyncio.Queue()
        self._waiting.append(queue)
        try:
            for number in range(tokens):
                await queue.get()
                yield number
        finally:
            (self._running if queue in self._running else self._waiting).remove(queue)

    async def _complete(self, request: Request) -> Response:
        wish = await request.json()
        fault, tokens = wish.get("fault", ""), int(wish.get("max_tokens", 16))
        if fault == "error":
            return JSONResponse({"error": {"message": "asked to fail", "code": 500}}, 500)
        if fault == "refuse":
            return JSONResponse({"error": {"message": "asked to refuse", "code": 400}}, 400)
        if fault == "freeze":
            self._frozen_until_s = time.monotonic() + float(wish.get("for_s", 10.0))
        if wish.get("stream"):
            return StreamingResponse(self._stream(wish, fault, tokens), media_type="text/event-stream")
        await _misbehave_whole(fault)
        made = [token async for token in self._generate(tokens * (10 if fault == "slow" else 1))]
        body = {"id": request.headers.get("x-request-id"), "choices": [{"index": 0, "text": "x" * len(made)}]}
        answer = JSONResponse(body)
        if fault == "lie":
            answer.headers["content-length"] = str(len(answer.body) + 100)
        return answer

    async def _stream(self, wish: dict[str, Any], fault: str, tokens: int) -> AsyncIterator[str]:
        at = int(wish.get("at", 0)) if fault else tokens + 1
        chunk = json.dumps({"choices": [{"index": 0, "text": "x"}]})
        async for number in self._generate(tokens * (10 if fault == "slow" else 1)):
            if number >= at and (event := await _misbehave_in_stream(fault)):
                yield event
                break
            yield f"data: {chunk}\n\n"
        yield "data: [DONE]\n\n"


async def _misbehave_whole(fault: str) -> None:
    if fault == "hang":
        await asyncio.Event().wait()
    if fault == "cut":
        raise RuntimeError("asked to break off")
    if fault == "die":
        os._exit(1)


async def _misbehave_in_stream(fault: str) -> str:
    """What ends the stream, if anything."""
    match fault:
        case "hang" | "stall":
            await asyncio.Event().wait()
        case "cut":
            raise RuntimeError("asked to break off")
        case "die":
            os._exit(1)
        case "event":
            return 'data: {"error": {"message": "asked to fail", "code": 500}}\n\n'
    return ""


async def _models(request: Request) -> Response:
    return JSONResponse({"object": "list", "data": []})
