"""What becomes of the parts' answers: one document, or one stream of events, and how either tells a failure."""

from __future__ import annotations

import asyncio
import json
from typing import Any, Protocol

import aiohttp

from balancer.batches import Batch, Part
from balancer.cost import parse
from balancer.merge import Identity, MergedStream, MergeError, PartStream, merge_answers
from deployments.middleware import Send, _answer

# Not about the request itself, though 4xx: it may go better elsewhere or later.
PASSING = (408, 425, 429)


class PartLost(Exception):  # noqa: N818 - what became of a part, not a mistake of anybody
    """A part was not answered in full. `sent`: some of it has reached the client already."""

    def __init__(self, reason: str, sent: bool = False) -> None:
        super().__init__(reason)
        self.sent = sent


class AskWhole(Exception):  # noqa: N818 - see PartLost
    """An engine refuses the body, or a part of it: what it says to the whole is the answer."""


class Output(Protocol):
    """Where the parts' answers go. `begun`: some bytes are with the client."""

    begun: bool

    async def take(self, part: Part, answer: aiohttp.ClientResponse, checked: asyncio.Event) -> None:
        """Take a part's answer in. Raises PartLost, aiohttp.ClientError or OSError."""

    async def end(self, parts: int) -> None:
        """All parts have been taken."""

    async def fail(self, reason: str) -> None:
        """Tell the client that the batch has failed."""


class WholeOutput:
    """The batch's answer in one document."""

    begun = False

    def __init__(self, batch: Batch, identity: Identity, send: Send) -> None:
        self._n = batch.n
        self._identity = identity
        self._send = send
        self._answers: list[tuple[Part, dict[str, Any]]] = []

    async def take(self, part: Part, answer: aiohttp.ClientResponse, checked: asyncio.Event) -> None:
        document = parse(await answer.read())
        merge_answers([(part, document)], self._n, self._identity)  # raises here, while the part can be tried again
        self._answers.append((part, document))

    async def end(self, parts: int) -> None:
        body = merge_answers(self._answers, self._n, self._identity)
        await _answer(self._send, 200, body, [(b"x-splitwiser-parts", str(parts).encode())])

    async def fail(self, reason: str) -> None:
        await _answer(self._send, 500, _failure(reason), [])


class StreamOutput:
    """The batch's answer as one stream of events, which begins when vLLM has found no fault with the whole body."""

    def __init__(self, batch: Batch, identity: Identity, send: Send) -> None:
        self._n = batch.n
        self._merged = MergedStream(identity)
        self._send = send
        self._one_at_a_time = asyncio.Lock()
        self.begun = False

    async def take(self, part: Part, answer: aiohttp.ClientResponse, checked: asyncio.Event) -> None:
        await checked.wait()
        stream, sent = PartStream(part, self._n, self._merged), False
        try:
            async for data in answer.content.iter_any():
                passage = stream.feed(data)
                if passage.send:
                    await self._write(passage.send)
                    sent = True
                if passage.done:
                    stream.commit()
                    return
                if passage.error:
                    raise _met(passage.error, sent)
        except (aiohttp.ClientError, OSError, MergeError) as error:
            raise PartLost(str(error) or type(error).__name__, sent) from None
        raise PartLost("its stream ended early", sent)

    async def end(self, parts: int) -> None:
        await self._write(self._merged.end())
        await self._send({"type": "http.response.body", "body": b""})

    async def fail(self, reason: str) -> None:
        """An error event and no [DONE]; before the first byte an ordinary error."""
        if not self.begun:
            await _answer(self._send, 500, _failure(reason), [])
            return
        await self._write(b"data: " + json.dumps(_failure(reason)).encode() + b"\n\n")
        await self._send({"type": "http.response.body", "body": b""})

    async def _write(self, data: bytes) -> None:
        async with self._one_at_a_time:
            if not self.begun:
                self.begun = True
                headers = [(b"content-type", b"text/event-stream; charset=utf-8")]
                await self._send({"type": "http.response.start", "status": 200, "headers": headers})
            await self._send({"type": "http.response.body", "body": data, "more_body": True})


def _failure(reason: str) -> dict[str, Any]:
    return {"error": {"message": reason, "type": "InternalServerError", "param": None, "code": 500}}


def _met(event: bytes, sent: bool) -> Exception:
    """What an error event in a part's stream means: a refusal, which vLLM makes so once it has begun to stream, or a
    failure."""
    error = parse(event.removeprefix(b"data: ")).get("error")
    status = error.get("code") if isinstance(error, dict) else 500
    reason = reason_of(status if isinstance(status, int) else 500, event.removeprefix(b"data: "))
    if isinstance(status, int) and 400 <= status < 500 and status not in PASSING:
        return AskWhole(reason)
    return PartLost(reason, sent)


def reason_of(status: int, body: bytes) -> str:
    """One clause from an error's status and body."""
    error = parse(body).get("error")
    message = error.get("message") if isinstance(error, dict) else None
    return f"it answered {status}" + (f" ({message})" if message else "")
