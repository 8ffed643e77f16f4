"""Before the door: is there such a route, whose key is it, is the body within its limits."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from balancer.access import Access, presented, refusal_of_strangers
from balancer.readings import Decision
from deployments import routes
from deployments.errors import WORDS, Error, error
from deployments.ingress import Entrance
from deployments.routes import Routes

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


class Gate:
    """An ASGI application in front of `app`.

    Every key is looked at here, though the router did too: GETs do not pass the router, and whoever reaches a replica's
    own port can claim to come from it. `meters`: no router counts what keys use, so this gate does.
    """

    def __init__(self, app: App, served: Routes, access: Access, meters: bool, entrance: Entrance) -> None:
        self._app = app
        self._served = served
        self._access = access
        self._meters = meters
        self._entrance = entrance

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        elif scope["type"] != "http":
            await self._app(scope, receive, send)
        elif (refusal := self._refusal(scope)) is not None:
            await answer(send, refusal, close=scope["method"] == "POST")
        else:
            body = Body(receive, send, self._limit(scope["path"]), self._entrance.body_s)
            await self._app(scope, body.receive, body.send)

    def _refusal(self, scope: Scope) -> Error | None:
        path, limit = scope["path"], self._limit(scope["path"])
        if path not in self._served:
            return error(404, None, "there is no such route here")
        if path not in routes.OPEN and (decision := self._stranger_or_greedy(scope)) is not None:
            wait_s = decision.retry_after_s if decision.status == 429 else None
            return error(decision.status, decision.reason, WORDS[decision.reason], wait_s)
        return _too_large(limit) if _announced(scope) > limit else None

    def _stranger_or_greedy(self, scope: Scope) -> Decision | None:
        headers = dict(scope["headers"])
        key = self._access.holder(presented(_text(headers, b"authorization"), _text(headers, b"x-api-key")))
        if key is None:
            return refusal_of_strangers()
        return self._access.admit(key, tokens=0) if self._meters and scope["method"] == "POST" else None

    def _limit(self, path: str) -> int:
        return self._entrance.file_bytes if path == routes.FILES else self._entrance.body_bytes


class Body:
    """Passes messages on until the body breaks a limit: then the application sees its client gone, the client an error.

    A body that announces its length was measured before; this is for one that comes in chunks, and for slow senders.
    """

    def __init__(self, receive: Receive, send: Send, limit_bytes: int, limit_s: float) -> None:
        self._receive = receive
        self._send = send
        self._limit_bytes = limit_bytes
        self._bytes = 0
        self._deadline_s = asyncio.get_running_loop().time() + limit_s
        self._whole = self._answered = self._broken = False

    async def receive(self) -> Message:
        if self._whole:
            return await self._receive()
        try:
            async with asyncio.timeout_at(self._deadline_s):
                message = await self._receive()
        except TimeoutError:
            return await self._break(error(408, "too_slow", "the request did not arrive in time"))
        self._bytes += len(message.get("body", b""))
        self._whole = not message.get("more_body", False)
        return message if self._bytes <= self._limit_bytes else await self._break(_too_large(self._limit_bytes))

    async def send(self, message: Message) -> None:
        """Nothing of what the application says about a body that was broken off reaches the client."""
        if not self._broken:
            self._answered = True
            await self._send(message)

    async def _break(self, why: Error) -> Message:
        self._whole = True
        if not self._answered:  # else the application did not want the body: its answer stands
            self._broken = True
            await answer(self._send, why, close=True)
        return {"type": "http.disconnect"}


async def answer(send: Send, why: Error, close: bool) -> None:
    """A whole JSON response; `close` when the rest of the request is not wanted."""
    status, body, headers = why
    payload = json.dumps(body).encode()
    own = [(b"content-type", b"application/json"), (b"content-length", str(len(payload)).encode())]
    closing = [(b"connection", b"close")] if close else []
    await send({"type": "http.response.start", "status": status, "headers": [*own, *closing, *headers]})
    await send({"type": "http.response.body", "body": payload})


def _too_large(limit_bytes: int) -> Error:
    return error(413, "body_too_large", f"a body may have {limit_bytes} bytes")


def _announced(scope: Scope) -> int:
    """Bytes in `Content-Length`; 0 when it is absent, and nonsense is the HTTP server's to refuse."""
    text = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
    return int(text) if text.isdigit() and len(text) < 20 else 0


def _text(headers: dict[bytes, bytes], name: bytes) -> str:
    return headers.get(name, b"").decode("latin-1")
