"""One request's way through the application behind the door: what has gone out, what ran out, and how it ended."""

from __future__ import annotations

import asyncio
import json
import logging
import math
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, Protocol

from balancer import stopping
from balancer.ledger import End
from deployments import errors
from deployments.limits import Watch

logger = logging.getLogger(__name__)

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]
Headers = list[tuple[bytes, bytes]]

# vLLM reports an error in the middle of a stream as one event, and then ends the stream as if all were well.
_ERROR_EVENT = b'data: {"error"'
_DONE = b"data: [DONE]"
_ENGINE_ERROR = (500, "engine_error", "the engine failed while it answered; the request may be sent again")


class Engine(Protocol):
    """What is known of the engine behind the door; `deployments.slot.Slot` is one."""

    @property
    def last_step_s(self) -> float: ...

    def await_engine(self, requests: int) -> None:
        """So many more (or fewer) requests wait for the engine's next word."""
        ...


class Passage:
    """`run` it once; then `end` says how it ended, and `engine_failed` whether the engine is to blame.

    `signature`: headers that the answer gets. What is done for each part is little: a stream has ten thousand a second.
    """

    def __init__(
        self, send: Send, engine: Engine, watch: Watch, clock: Callable[[], float], signature: Headers | None = None
    ) -> None:
        self._send = send
        self._signature = signature or []
        self._engine = engine
        self._watch = watch
        self._clock = clock
        self._loop = asyncio.get_running_loop()
        self._timeout = asyncio.timeout(None)
        self._timer: asyncio.TimerHandle | None = None
        self._broken_off: tuple[int, str, str] | None = None
        self._status = 0
        self._streams = self._tokens = self._finished = self._broken = self._client_gone = self._awaits = False
        self.engine_failed = False

    async def run(self, app: App, scope: Scope, receive: Receive) -> None:
        """Pass the request to `app` and its answer on; what breaks is said to the client as long as that is possible.

        Raises CancelledError or OSError when the client has gone, and RuntimeError where only cutting the connection
        shows that the answer is not whole.
        """
        self._set_timer()
        try:
            async with self._timeout:
                await app(scope, self._receiving(receive), self._sending)
        except Exception as error:
            if self._client_gone:
                raise
            if self._broken_off is None:
                self.engine_failed = True
                logger.error("the application raised %r", error, exc_info=error)
            await self._say(*(self._broken_off or _ENGINE_ERROR))
        finally:
            if self._timer:
                self._timer.cancel()
            self._await_engine(False)

    def stop(self) -> None:
        """The grace period is over: end the answer with an error of its own."""
        self._break_off(503, stopping.REASON, "the server is stopping and could not finish this answer")

    @property
    def end(self) -> End:
        if self._broken or self._broken_off or self.engine_failed or self._status >= 500:
            return End.FAILED
        if self._client_gone or not self._finished:
            return End.CANCELLED
        return End.REJECTED if self._status >= 400 else End.COMPLETED

    def _look(self) -> None:
        """Called when a limit could have run out, not once for each token."""
        if not self._streams:
            self._watch.engine_stepped(self._engine.last_step_s)
        limit = self._watch.over(self._clock())
        if limit is None:
            self._set_timer()
        else:
            self.engine_failed = limit.blames_engine
            self._break_off(504, limit.code, limit.message)

    def _set_timer(self) -> None:
        if self._timer:
            self._timer.cancel()
        next_s = self._watch.next_s
        if next_s < math.inf:
            self._timer = self._loop.call_later(max(0.001, next_s - self._clock()), self._look)

    def _break_off(self, status: int, code: str, message: str) -> None:
        if self._broken_off is None and not self._finished:
            self._broken_off = status, code, message
            self._timeout.reschedule(self._loop.time())

    async def _say(self, status: int, code: str, message: str) -> None:
        started, self._status = bool(self._status), self._status or status
        if self._finished:
            return
        body = error_body(status, code, message)
        if not started:
            await answer(self._send, status, body, tuple(self._signature))
        elif self._streams:
            await self._send({"type": "http.response.body", "body": b"data: " + body + b"\n\n"})
        else:
            raise RuntimeError(f"{message}: the connection is cut, for the headers of an answer are out")

    def _receiving(self, receive: Receive) -> Receive:
        async def received() -> Message:
            message = await receive()
            if message["type"] == "http.request" and not message.get("more_body"):
                self._await_engine(True)
            return message

        return received

    async def _sending(self, message: Message) -> None:
        first = not self._tokens
        if message["type"] == "http.response.start":
            self._started(message)
        else:
            message = self._checked(message)
        self._await_engine(False)
        self._watch.hold()
        try:
            await self._send(message)
        except OSError:
            self._client_gone = True
            raise
        self._watch.go_on(self._clock(), self._tokens)
        self._await_engine(not self._finished)
        if first:
            self._set_timer()

    def _started(self, message: Message) -> None:
        message["headers"] = [*message.get("headers", ()), *self._signature]
        self._status = message["status"]
        self.engine_failed = self.engine_failed or self._status >= 500
        kind = next((value for name, value in message.get("headers", ()) if name.lower() == b"content-type"), b"")
        self._streams = kind.startswith(b"text/event-stream")
        if self._streams:
            self._watch.streams()

    def _checked(self, message: Message) -> Message:
        body = message.get("body", b"")
        self._tokens = self._tokens or bool(body)
        self._finished = not message.get("more_body", False)
        if self._streams and body.startswith(_ERROR_EVENT):
            self._broken = self.engine_failed = True
        return {**message, "body": b""} if self._broken and body.startswith(_DONE) else message

    def _await_engine(self, awaits: bool) -> None:
        if awaits is not self._awaits:
            self._awaits = awaits
            self._engine.await_engine(1 if awaits else -1)


def error_body(status: int, code: str, message: str) -> bytes:
    """An error as OpenAI words it."""
    return json.dumps(errors.body(status, message, code)).encode()


async def answer(send: Send, status: int, body: bytes, headers: tuple[tuple[bytes, bytes], ...] = ()) -> None:
    """A whole answer in JSON."""
    length = (b"content-length", str(len(body)).encode())
    start = {"type": "http.response.start", "status": status}
    await send({**start, "headers": [(b"content-type", b"application/json"), length, *headers]})
    await send({"type": "http.response.body", "body": body})
