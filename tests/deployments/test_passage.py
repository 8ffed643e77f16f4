"""One request's way through the application: each way to break is told, and ends as what it is."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from balancer.ledger import End
from deployments.limits import Limits, Watch
from deployments.passage import Passage

SSE = [(b"content-type", b"text/event-stream; charset=utf-8")]
EVENT = b'data: {"choices": []}\n\n'
FOREVER = Limits(1e6, 1e6, 1e6)


class Engine:
    """Counts who waits for it; afterwards nobody may."""

    def __init__(self) -> None:
        self.last_step_s = 0.0
        self.awaiting = 0

    def await_engine(self, requests: int) -> None:
        self.awaiting += requests
        assert self.awaiting in (0, 1)


class Client:
    """Collects what is sent to it; breaks the connection at message `leaves_at`."""

    def __init__(self, leaves_at: int = 1000) -> None:
        self.messages: list[Any] = []
        self._leaves_at = leaves_at

    async def send(self, message: Any) -> None:
        if len(self.messages) >= self._leaves_at:
            raise BrokenPipeError
        self.messages.append(message)

    @property
    def body(self) -> bytes:
        return b"".join(m.get("body", b"") for m in self.messages)

    @property
    def status(self) -> int:
        return int(self.messages[0]["status"])

    @property
    def error(self) -> dict[str, Any]:
        text = self.body.rstrip().rpartition(b"\n")[2].removeprefix(b"data: ")
        return dict(json.loads(text)["error"])

    @property
    def whole(self) -> bool:
        return not self.messages[-1].get("more_body", False)


class App:
    """An application that sends `parts` and then does as `then` says."""

    def __init__(self, parts: list[bytes], then: str = "end", headers: Any = SSE, status: int = 200) -> None:
        self.parts, self.then, self.headers, self.status = parts, then, headers, status

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await receive()
        if self.then == "hang at once":
            await asyncio.Event().wait()
        if self.then == "raise at once":
            raise KeyError("broken")
        await send({"type": "http.response.start", "status": self.status, "headers": self.headers})
        for part in self.parts:
            await send({"type": "http.response.body", "body": part, "more_body": True})
        if self.then == "hang":
            await asyncio.Event().wait()
        if self.then == "raise":
            raise KeyError("broken")
        await send({"type": "http.response.body", "body": b""})


async def receive() -> dict[str, Any]:
    return {"type": "http.request", "body": b"{}"}


def go(app: App, client: Client, limits: Limits = FOREVER, client_s: float = 1e9) -> Passage:
    async def through() -> Passage:
        engine, loop = Engine(), asyncio.get_running_loop()
        passage = Passage(client.send, engine, Watch(limits, loop.time(), client_s), loop.time)
        try:
            await passage.run(app, {"type": "http"}, receive)
        finally:
            assert engine.awaiting == 0
        return passage

    return asyncio.run(through())


def test_a_whole_stream_is_completed_and_unchanged() -> None:
    """Nothing is added to what vLLM says."""
    client = Client()
    passage = go(App([EVENT, b"data: [DONE]\n\n"]), client)
    assert (passage.end, passage.engine_failed) == (End.COMPLETED, False)
    assert client.body == EVENT + b"data: [DONE]\n\n"
    assert client.whole


def test_a_client_error_is_a_rejection_and_no_fault_of_the_engine() -> None:
    """4xx of vLLM's own."""
    passage = go(App([b"{}"], headers=[], status=404), Client())
    assert (passage.end, passage.engine_failed) == (End.REJECTED, False)


def test_a_server_error_is_a_failure_of_the_engine() -> None:
    """5xx of vLLM's own."""
    passage = go(App([b"{}"], headers=[], status=500), Client())
    assert (passage.end, passage.engine_failed) == (End.FAILED, True)


def test_an_exception_before_the_headers_is_an_openai_error() -> None:
    """500, with a body that names it."""
    client = Client()
    passage = go(App([], "raise at once"), client)
    assert (passage.end, passage.engine_failed, client.status) == (End.FAILED, True, 500)
    assert client.error["code"] == "engine_error"


@pytest.mark.parametrize("tokens", [0, 1, 7])
def test_a_stream_that_breaks_ends_with_an_error_event(tokens: int) -> None:
    """After whatever was out already, and never with `[DONE]`."""
    client = Client()
    passage = go(App([EVENT] * tokens, "raise"), client)
    assert (passage.end, passage.engine_failed) == (End.FAILED, True)
    assert client.error["code"] == "engine_error"
    assert client.body.count(EVENT) == tokens
    assert b"[DONE]" not in client.body
    assert client.whole


def test_vllms_own_error_event_is_not_followed_by_done() -> None:
    """vLLM ends a stream that it broke off as if it were whole: the last word is left out."""
    client = Client()
    passage = go(App([EVENT, b'data: {"error": {"code": 500}}\n\n', b"data: [DONE]\n\n"]), client)
    assert (passage.end, passage.engine_failed) == (End.FAILED, True)
    assert client.body == EVENT + b'data: {"error": {"code": 500}}\n\n'
    assert client.whole


def test_half_an_answer_that_is_no_stream_is_cut() -> None:
    """There is no place left to say it: the server must close the connection, which the exception makes it do."""
    with pytest.raises(RuntimeError, match="the connection is cut"):
        go(App([b'{"half"'], "raise", headers=[(b"content-length", b"99")]), Client())


@pytest.mark.parametrize(
    ("app", "limits", "client_s", "code", "blames"),
    [
        (App([], "hang at once"), Limits(0.02, 9e9, 9e9), 9e9, "first_token_timeout", True),
        (App([], "hang"), Limits(0.02, 9e9, 9e9), 9e9, "first_token_timeout", True),
        (App([EVENT] * 5, "hang"), Limits(9e9, 0.02, 9e9), 9e9, "between_tokens_timeout", True),
        (App([EVENT] * 5, "hang"), Limits(9e9, 9e9, 0.02), 9e9, "total_timeout", False),
        (App([EVENT] * 5, "hang"), Limits(9e9, 9e9, 9e9), 0.02, "client_timeout", False),
    ],
)
def test_each_limit_ends_the_answer_by_its_own_name(
    app: App, limits: Limits, client_s: float, code: str, blames: bool
) -> None:
    """As a 504 while there is a status to give, else as the last event; silence alone is the engine's fault."""
    client = Client()
    passage = go(app, client, limits, client_s)
    assert (passage.end, passage.engine_failed) == (End.FAILED, blames)
    assert client.status == (504 if app.then == "hang at once" else 200)
    assert client.error["code"] == code
    assert client.whole


@pytest.mark.parametrize("leaves_at", range(4))
def test_a_client_that_leaves_is_a_cancellation(leaves_at: int) -> None:
    """At whatever message the connection breaks, and the engine is not to blame."""
    client = Client(leaves_at)

    async def through() -> Passage:
        engine, loop = Engine(), asyncio.get_running_loop()
        passage = Passage(client.send, engine, Watch(FOREVER, loop.time()), loop.time)
        with pytest.raises(BrokenPipeError):
            await passage.run(App([EVENT] * 4), {"type": "http"}, receive)
        assert engine.awaiting == 0
        return passage

    passage = asyncio.run(through())
    assert (passage.end, passage.engine_failed) == (End.CANCELLED, False)


def test_a_cancelled_request_is_a_cancellation() -> None:
    """Serve cancels the request of a client that has gone."""

    async def through() -> Passage:
        engine, loop = Engine(), asyncio.get_running_loop()
        passage = Passage(Client().send, engine, Watch(FOREVER, loop.time()), loop.time)
        task = asyncio.create_task(passage.run(App([EVENT], "hang"), {"type": "http"}, receive))
        await asyncio.sleep(0.01)
        assert engine.awaiting == 1
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert engine.awaiting == 0
        return passage

    assert asyncio.run(through()).end is End.CANCELLED


def test_at_the_end_of_the_grace_period_an_answer_says_so() -> None:
    """A stream ends with an error event; stopping twice, or after the end, changes nothing."""
    client = Client()

    async def through() -> Passage:
        engine, loop = Engine(), asyncio.get_running_loop()
        passage = Passage(client.send, engine, Watch(FOREVER, loop.time()), loop.time)
        task = asyncio.create_task(passage.run(App([EVENT], "hang"), {"type": "http"}, receive))
        await asyncio.sleep(0.01)
        passage.stop()
        passage.stop()
        await task
        passage.stop()
        return passage

    passage = asyncio.run(through())
    assert (passage.end, passage.engine_failed) == (End.FAILED, False)
    assert client.error["code"] == "stopping"
    assert client.body.count(b"error") == 1
