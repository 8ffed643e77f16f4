"""Around vLLM's application: counts what comes and goes, answers what the router turned away, names who served."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from balancer import explain
from balancer.ticket import DIRECT, HEADER, Ticket
from deployments import errors
from deployments.routes import PROBE_PATH
from deployments.slot import Slot

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

# Others may serve at once; when all replicas of a GPU are lost, a model has to be loaded first.
_LOST_RETRY_S = 5.0
_HEADER = HEADER.encode()
_EXPLAINED = explain.HEADER.encode()
_DIRECT = DIRECT.policy.encode()


class Door:
    """An ASGI application in front of `app`.

    `tickets_required`: HAProxy is in front, so a POST without a router's ticket slipped past the policy. That happens
    for about a second after start, while HAProxy knows the replicas but not yet the router; such a request is
    refused with 503 and `Retry-After`, so that whatever is answered was routed by the policy.

    `managed` gets what the router sent here to be managed only, not to be counted as work: batches that it splits.
    """

    def __init__(
        self, app: App, slot: Slot, name: str, policy: str, tickets_required: bool, managed: App | None = None
    ) -> None:
        self._app = app
        self._managed = managed or app
        self._slot = slot
        self._name = name.encode()
        self._policy = policy
        self._tickets_required = tickets_required
        self._closed = ""

    def close(self, why: str) -> None:
        """From now on answer every POST with 503 and `why`: there is no engine behind this door any more."""
        self._closed = why

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
        elif scope["method"] != "POST":
            await self._app(scope, receive, self._signed(send, "none"))
        else:
            await self._post(scope, receive, send)

    async def _post(self, scope: Scope, receive: Receive, send: Send) -> None:
        ticket = self._ticket(scope)
        if ticket is None:
            await _answer(send, *_error(503, "starting", "the router is not connected yet; try again", 1.0))
            return
        signed = self._signed(send, ticket.policy, _header(scope, _EXPLAINED))
        if self._tickets_required and not ticket.sequences and ticket.status == 200 and not self._closed:
            await self._managed(scope, receive, signed)
            return
        number = self._slot.received(ticket)
        try:
            await self._serve(ticket, scope, receive, signed)
        finally:
            self._slot.finished(number)

    async def _serve(self, ticket: Ticket, scope: Scope, receive: Receive, send: Send) -> None:
        if ticket.status != 200:
            await _answer(send, *_refusal(ticket))
        elif ticket.probe:
            reply = {"replica": self._name.decode()} if scope["path"] == PROBE_PATH else {}
            await _answer(send, 200 if reply else 400, reply, [])
        elif self._closed:
            await _answer(send, *_error(503, "replica_lost", f"{self._closed}; try again", _LOST_RETRY_S))
        else:
            await self._hand_on(ticket, scope, receive, send)

    async def _hand_on(self, ticket: Ticket, scope: Scope, receive: Receive, send: Send) -> None:
        """To vLLM, which leaves the usage of a whole answer in the request's state "to report to middleware"."""
        state: dict[str, Any] = {**scope.get("state", {})}
        await self._app({**scope, "state": state}, receive, send)
        tokens = _output_tokens(state)
        if ticket.output_tokens and tokens:
            self._slot.answered(ticket, tokens)

    def _ticket(self, scope: Scope) -> Ticket | None:
        text = _header(scope, _HEADER)
        if text == _DIRECT:
            return DIRECT
        if text is not None:
            with contextlib.suppress(ValueError):
                return Ticket.decode(text.decode("latin-1"))
        return None if self._tickets_required else Ticket(self._policy, "proxy")

    def _signed(self, send: Send, policy: str, explained: bytes | None = None) -> Send:
        headers = [(b"x-splitwiser-replica", self._name), (b"x-splitwiser-policy", policy.encode())]
        if explained is not None:
            headers.append((b"x-splitwiser-decision", explained))

        async def signed(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), *headers]
            await send(message)

        return signed


def _output_tokens(state: dict[str, Any]) -> int:
    """The tokens of all sequences of an answer; 0 where none came to its end, or its kind of answer reports none."""
    usage = getattr(state.get("request_metadata"), "final_usage_info", None)
    return (usage.completion_tokens or 0) if usage else 0


def _header(scope: Scope, wanted: bytes) -> bytes | None:
    return next((value for name, value in scope["headers"] if name == wanted), None)


_REFUSED = "the request cannot be served"
_REASONS = {
    429: "the server is full; try again later",
    503: "no replica can take the request now; try again later",
}


def _refusal(ticket: Ticket) -> tuple[int, Any, list[tuple[bytes, bytes]]]:
    message = errors.WORDS.get(ticket.reason) or _REASONS.get(ticket.status, _REFUSED)
    return _error(ticket.status, ticket.reason, message, ticket.retry_after_s)


def _error(status: int, reason: str, message: str, retry_after_s: float) -> tuple[int, Any, list[tuple[bytes, bytes]]]:
    return errors.error(status, reason, message, retry_after_s)


async def _answer(send: Send, status: int, body: Any, headers: list[tuple[bytes, bytes]]) -> None:
    payload = json.dumps(body).encode()
    length = (b"content-length", str(len(payload)).encode())
    start = {"type": "http.response.start", "status": status}
    await send({**start, "headers": [(b"content-type", b"application/json"), length, *headers]})
    await send({"type": "http.response.body", "body": payload})
