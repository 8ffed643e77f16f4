"""The serving path without an engine: replicas that answer at once, behind the same door, board and router.

`import_path: benchmarks.echo_app:build` takes the same arguments as the real application. For measuring the data plane
and for testing it in seconds; a request's `max_tokens` chunks are streamed without any pause.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from ray import serve
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from balancer.readings import ReplicaState
from deployments import entrance, privacy
from deployments.app import assemble
from deployments.config import parse_args
from deployments.gate import Gate
from deployments.middleware import Door
from deployments.slot import Slot


def build(args: dict[str, Any]) -> serve.Application:
    return assemble(args, parse_args(args), "cpu", EchoReplica)


@serve.ingress()
class EchoReplica:
    """A replica whose engine is an echo; the slot says that it has room for everything."""

    def __init__(self, raw_args: dict[str, Any], board_path: str, haproxy: bool, manager: Any) -> None:
        privacy.keep_grpc_on_loopback()
        self._args = parse_args(raw_args)
        self._haproxy = haproxy
        context = serve.get_replica_context()
        self._tag = context.replica_tag
        self._slot = Slot(Path(board_path), context.replica_id.to_full_id_str(), 0, time.monotonic)
        self._slot.engine_ready(blocks=1 << 20, block_tokens=16, max_running_requests=1 << 20)

    async def __serve_build_asgi_app__(self) -> Gate:
        self._beat = asyncio.create_task(self._slot.beat())
        self._slot.set_state(ReplicaState.READY)
        posts = Route("/v1/completions", _complete, methods=["POST"])
        app = Starlette(routes=[posts, Route("/v1/models", _models), Route("/health", _health)])
        door = Door(app, self._slot, self._tag, self._args.balancer.policy, tickets_required=self._haproxy)
        return entrance.gate(door, self._args, self._haproxy, time.monotonic)

    async def __del__(self) -> None:
        self._beat.cancel()
        self._slot.close()


async def _health(request: Request) -> Response:
    return Response()


async def _models(request: Request) -> Response:
    return JSONResponse({"object": "list", "data": []})


async def _complete(request: Request) -> Response:
    wish = await request.json()
    tokens = int(wish.get("max_tokens", 16))
    if wish.get("stream"):
        return StreamingResponse(_chunks(tokens), media_type="text/event-stream")
    return JSONResponse({"choices": [{"index": 0, "text": "x" * tokens}], "usage": {"completion_tokens": tokens}})


async def _chunks(tokens: int) -> AsyncIterator[str]:
    chunk = json.dumps({"choices": [{"index": 0, "text": "x"}]})
    for _ in range(tokens):
        yield f"data: {chunk}\n\n"
    yield "data: [DONE]\n\n"
