"""Around vLLM's application: counts what comes and goes, answers what the router turned away, names who served."""

from __future__ import annotations

import contextlib
import json
import math
import re
import time
import uuid
from collections.abc import Callable
from typing import Any

from balancer import explain, stopping
from balancer.ledger import End
from balancer.retries import RetryBudget
from balancer.ticket import DIRECT, HEADER, Ticket
from deployments import errors
from deployments.limits import CLIENT_HEADER, Limits, Watch, client_seconds
from deployments.passage import App, Headers, Message, Passage, Receive, Scope, Send, answer, error_body
from deployments.routes import PROBE_PATH
from deployments.slot import Slot

# Others may serve at once; when all replicas of a GPU are lost, a model has to be loaded first.
_LOST_RETRY_S = 5.0
_HEADER = HEADER.encode()
_EXPLAINED = explain.HEADER.encode()
_DIRECT = DIRECT.policy.encode()
_REQUEST_ID = b"x-request-id"
# Long enough for every tracing system's ids, short enough for a log line; HAProxy holds to the same.
REQUEST_ID_PATTERN = "^[A-Za-z0-9._:-]{1,128}$"
_REQUEST_ID_FORM = re.compile(REQUEST_ID_PATTERN.encode())
DEFAULT_LIMITS = Limits()
Refusal = tuple[int, bytes, tuple[tuple[bytes, bytes], ...]]


class Door:
    """An ASGI application in front of `app`.

    `tickets_required`: HAProxy is in front, so a POST without a router's ticket slipped past the policy. That happens
    for about a second after start, while HAProxy knows the replicas but not yet the router; such a request is
    refused with 503 and `Retry-After`, so that whatever is answered was routed by the policy.

    `managed` gets what the router sent here to be managed only, not to be counted as work: batches that it splits.
    """

    def __init__(
        self,
        app: App,
        slot: Slot,
        name: str,
        policy: str,
        tickets_required: bool,
        managed: App | None = None,
        limits: Limits = DEFAULT_LIMITS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._app = app
        self._managed = managed or app
        self._slot = slot
        self._name = name.encode()
        self._policy = policy
        self._tickets_required = tickets_required
        self._limits = limits
        self._clock = clock
        self._retries = RetryBudget()
        self._inside: dict[int, Passage] = {}
        self._closed = ""
        slot.on_overdue(self._stop_all)

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
            self._slot.turned_away()
            await answer(send, *_refused(503, "starting", "the router is not connected yet; try again"))
            return
        if self._tickets_required and not ticket.sequences and ticket.status == 200 and not self._closed:
            await self._managed(scope, receive, self._signed(send, ticket.policy, _header(scope, _EXPLAINED)))
            return
        number, refusal = self._slot.received(ticket), self._refusal(ticket)
        app = _speaking(refusal) if refusal else self._probed if ticket.probe else self._handing_on(ticket)
        signature = self._signature(ticket.policy, _header(scope, _EXPLAINED))
        passage = Passage(send, self._slot, self._watch(scope, ticket), self._clock, signature)
        self._inside[number] = passage
        try:
            await passage.run(app, _with_request_id(scope), receive)
        finally:
            del self._inside[number]
            refused = refusal is not None and passage.end is not End.CANCELLED
            end = End.REJECTED if refused else passage.end
            self._slot.finished(number, end, passage.engine_failed and not refused)

    def _refusal(self, ticket: Ticket) -> Refusal | None:
        if ticket.status != 200:
            return refusal_of(ticket)
        if ticket.probe:
            return None
        if self._closed:
            return _refused(503, "replica_lost", f"{self._closed}; try again", _LOST_RETRY_S)
        if self._slot.stopping and not ticket.routed:
            return _refused(503, stopping.REASON, "the server is stopping; try again later")
        return None if self._may_try(ticket) else _refused(503, "retry_budget", "the replica chosen did not answer")

    def _may_try(self, ticket: Ticket) -> bool:
        """HAProxy sends a request that it could not deliver to another replica, once: a retry, and limited as such."""
        if self._slot.is_foreign(ticket):
            return self._retries.again(self._clock())
        self._retries.first(self._clock())
        return True

    def _watch(self, scope: Scope, ticket: Ticket) -> Watch:
        left_s = client_seconds(_header(scope, CLIENT_HEADER), ticket.waited_s)
        return Watch(self._limits, self._clock(), left_s)

    def _handing_on(self, ticket: Ticket) -> App:
        """To vLLM, which leaves the usage of a whole answer in the request's state "to report to middleware"."""

        async def hand_on(scope: Scope, receive: Receive, send: Send) -> None:
            state: dict[str, Any] = {**scope.get("state", {})}
            await self._app({**scope, "state": state}, receive, send)
            tokens = _output_tokens(state)
            if ticket.output_tokens and tokens:
                self._slot.answered(ticket, tokens)

        return hand_on

    async def _probed(self, scope: Scope, receive: Receive, send: Send) -> None:
        reply = {"replica": self._name.decode()} if scope["path"] == PROBE_PATH else {}
        await answer(send, 200 if reply else 400, json.dumps(reply).encode())

    def _stop_all(self) -> None:
        for passage in list(self._inside.values()):
            passage.stop()

    def _ticket(self, scope: Scope) -> Ticket | None:
        text = _header(scope, _HEADER)
        if text == _DIRECT:
            return DIRECT
        if text is not None:
            with contextlib.suppress(ValueError):
                return Ticket.decode(text.decode("latin-1"))
        return None if self._tickets_required else Ticket(self._policy, "proxy")

    def _signature(self, policy: str, explained: bytes | None) -> Headers:
        headers = [(b"x-splitwiser-replica", self._name), (b"x-splitwiser-policy", policy.encode())]
        return headers if explained is None else [*headers, (b"x-splitwiser-decision", explained)]

    def _signed(self, send: Send, policy: str, explained: bytes | None = None) -> Send:
        headers = self._signature(policy, explained)

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


def refusal_of(ticket: Ticket) -> Refusal:
    """What the router's refusal is to a client."""
    message = errors.WORDS.get(ticket.reason) or _REASONS.get(ticket.status, _REFUSED)
    return _refused(ticket.status, ticket.reason, message, ticket.retry_after_s)


def _refused(status: int, reason: str, message: str, retry_after_s: float = 1.0) -> Refusal:
    header = b"retry-after", str(max(1, math.ceil(retry_after_s))).encode()
    return status, error_body(status, reason, message), (header,)


def _speaking(refusal: Refusal) -> App:
    async def refuse(scope: Scope, receive: Receive, send: Send) -> None:
        await answer(send, *refusal)

    return refuse


def _with_request_id(scope: Scope) -> Scope:
    """The request's id as the engine shall know it: a client's own unless it is none to write into a log."""
    found = [value for name, value in scope["headers"] if name == _REQUEST_ID]
    if len(found) == 1 and _REQUEST_ID_FORM.match(found[0]):
        return scope
    others = [(name, value) for name, value in scope["headers"] if name != _REQUEST_ID]
    return {**scope, "headers": [*others, (_REQUEST_ID, uuid.uuid4().hex.encode())]}
