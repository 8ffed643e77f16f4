"""Stand-ins for the batch door's tests: an engine that repeats its prompts, replicas of it that fail as real ones do,
and a router that takes them in turn. All on loopback, in the test's own event loop."""

from __future__ import annotations

import asyncio
import json
from typing import Any
from urllib.parse import parse_qs

from aiohttp import web

from balancer import hint
from balancer.ticket import HEADER, Ticket

BAD = "bad prompt"
REFUSAL = {"error": {"message": "a prompt is bad", "type": "BadRequestError", "param": "prompt", "code": 400}}


def document(body: dict[str, Any]) -> dict[str, Any]:
    """The engine's answer: each choice repeats its prompt."""
    n, prompts = body.get("n", 1), body["prompt"]
    texts = [f"{prompt} {k}" for prompt in prompts for k in range(n)]
    choices = [{"index": i, "text": text, "finish_reason": "length"} for i, text in enumerate(texts)]
    return {"id": "cmpl-part", "object": "text_completion", "created": 1, "model": "m", "choices": choices,
            "usage": _usage(len(prompts), len(texts))}  # fmt: skip


def events(body: dict[str, Any]) -> list[bytes]:
    """The same as a stream, three chunks for each choice."""
    whole = document(body)
    head = {key: whole[key] for key in ("id", "object", "created", "model")}
    chunks = [
        {**head, "choices": [{"index": choice["index"], "text": piece}]}
        for k in range(3)
        for choice in whole["choices"]
        for piece in [choice["text"][k::3]]
    ]
    return [*map(_event, chunks), _event({**head, "choices": [], "usage": whole["usage"]}), b"data: [DONE]\n\n"]


def _usage(prompts: int, choices: int) -> dict[str, int]:
    return {"prompt_tokens": 2 * prompts, "completion_tokens": choices, "total_tokens": 2 * prompts + choices}


def _event(chunk: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(chunk, separators=(",", ":")).encode() + b"\n\n"


class Replica:
    """One replica's HTTP side. `faults` are met by the next requests, one each: 500, busy, refuse, cut, cut early,
    error event, refusal event, bad event, hang; then it works."""

    def __init__(self, *faults: str) -> None:
        self.faults = list(faults)
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.working = 0

    async def complete(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.bodies.append(body)
        self.headers.append({name.lower(): value for name, value in request.headers.items()})
        self.working += 1
        try:
            return await self._answer(request, body, self.faults.pop(0) if self.faults else "")
        finally:
            self.working -= 1

    async def _answer(self, request: web.Request, body: dict[str, Any], fault: str) -> web.StreamResponse:
        if BAD in body["prompt"]:
            return web.json_response(REFUSAL, status=400)
        if fault in ("500", "busy"):
            status = 500 if fault == "500" else 503
            return web.json_response({"error": {"message": "EngineDeadError"}}, status=status)
        if fault == "refuse":
            assert request.transport is not None
            request.transport.abort()
        if fault == "hang":
            await asyncio.Event().wait()
        if not body.get("stream"):
            return web.json_response({} if fault == "bad event" else document(body))
        return await self._stream(request, events(body), fault)

    async def _stream(self, request: web.Request, chunks: list[bytes], fault: str) -> web.StreamResponse:
        answer = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await answer.prepare(request)
        broken = {
            "error event": [b'data: {"error": {"message": "Internal server error", "code": 500}}\n\n'],
            "refusal event": [b'data: {"error": {"message": "too many logprobs", "code": 400}}\n\n'],
            "bad event": [b"data: {\n\n"],
            "cut early": [],
            "cut": chunks[: len(chunks) // 2],
            "hang later": chunks[:1],
        }
        for chunk in broken.get(fault, chunks):
            await answer.write(chunk)
        if fault == "hang later":
            await asyncio.Event().wait()
        if fault.startswith("cut"):
            assert request.transport is not None
            request.transport.close()
        return answer


class Router:
    """Names the replicas in turn; `refusals` are tickets given out instead, in order."""

    def __init__(self, addresses: dict[str, str]) -> None:
        self.addresses = addresses
        self.refusals: list[Ticket | None] = []
        self.hints: list[dict[str, list[str]]] = []
        self._turn = 0

    async def route(self, request: web.Request) -> web.Response:
        await request.read()
        self.hints.append(parse_qs(request.headers[hint.HEADER]))
        refusal = self.refusals.pop(0) if self.refusals else None
        name = list(self.addresses)[self._turn % len(self.addresses)]
        self._turn += 1
        ticket = refusal or Ticket("stand_in", "turn", row=0, tokens=9)
        return web.json_response(
            {"replica_id": name, "request_headers": {HEADER: ticket.encode()}, "address": self.addresses[name]}
        )


class House:
    """Replicas and a router on ports of their own, for as long as the context lasts."""

    def __init__(self, *replicas: Replica) -> None:
        self.replicas = replicas
        self._runners: list[web.AppRunner] = []

    async def __aenter__(self) -> House:
        addresses = {f"r{k}": await self._serve("/v1/completions", r.complete) for k, r in enumerate(self.replicas)}
        self.router = Router(addresses)
        self.address = await self._serve("/internal/route", self.router.route)
        return self

    async def __aexit__(self, *error: object) -> None:
        for runner in self._runners:
            await runner.cleanup()

    async def _serve(self, path: str, handler: Any) -> str:
        application = web.Application(client_max_size=1 << 26)
        application.router.add_post(path, handler)
        runner = web.AppRunner(application, handler_cancellation=True, shutdown_timeout=0.1)
        self._runners.append(runner)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        host, port = runner.addresses[0][:2]
        return f"{host}:{port}"


class OwnEngine:
    """The manager's own vLLM application: checks bodies, and answers whole ones."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        body = json.loads((await receive())["body"])
        self.asked.append(scope["path"])
        bad = BAD in body["prompt"]
        answer = REFUSAL if bad else [] if scope["path"].endswith("/render") else document(body)
        await send({"type": "http.response.start", "status": 400 if bad else 200, "headers": []})
        await send({"type": "http.response.body", "body": json.dumps(answer).encode()})
