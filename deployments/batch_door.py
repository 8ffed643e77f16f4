"""A batch split over the replicas: cut into parts, each sent to where the policy finds it a place, merged in order.

It stands in front of vLLM's application on the replica that the router chose to manage the batch. What one engine would
refuse is refused by one engine: the whole body is checked by this replica's own application while the first parts are
already at work, and where that, or a part, says 4xx, the whole is asked from it.
"""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import Callable
from typing import Any

import aiohttp

from balancer.batches import COMPLETIONS, Batch, Part, Room, WorkList, read_batch, sequence_tokens
from balancer.cost import parse
from balancer.merge import Identity, MergeError
from balancer.ticket import Ticket
from deployments.batch_output import PASSING, AskWhole, Output, PartLost, StreamOutput, WholeOutput, reason_of
from deployments.batch_way import Place, RouterGoneError, Way, header, router_address
from deployments.middleware import App, Message, Receive, Scope, Send, _answer, _refusal

_CHECK_PATH = "/v1/completions/render"
# The router holds a part for up to its queue deadline; a batch that nobody wants so often in a row is given up.
_REFUSALS = 3
# A replica that lost a part is named again for as long as the router has not noticed.
_ASKED_ELSEWHERE = 4
_NOTICED_AFTER_S = 0.5


class BatchFailedError(Exception):
    """The whole batch has failed, for the one reason that the message gives."""


class BatchRefusedError(Exception):
    """The router turned the batch away before any of it was begun."""

    def __init__(self, ticket: Ticket) -> None:
        super().__init__(ticket.reason)
        self.ticket = ticket


class ClientGone(Exception):  # noqa: N818 - one end of a batch among others
    """The client has hung up."""


class BatchDoor:
    """An ASGI application in front of `app`, for the requests that the router sends here to be managed.

    `room` is the headroom of the replicas now, `client` the caller's to close. Without a router's address, and for
    whatever is no batch of `threshold` prompts, `app` answers by itself.
    """

    def __init__(self, app: App, room: Callable[[], Room], client: aiohttp.ClientSession, threshold: int) -> None:
        self._app = app
        self._room = room
        self._client = client
        self._threshold = threshold

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        router = router_address(scope)
        if scope["path"] != COMPLETIONS or not router:
            await self._app(scope, receive, send)
            return
        body = await _read(receive)
        batch = read_batch(parse(body), self._threshold)
        if batch is None:
            await self._app(scope, _again(body, receive), send)
            return
        way = Way(self._client, router, {k.decode("latin-1"): v.decode("latin-1") for k, v in scope["headers"]})
        output = (StreamOutput if batch.stream else WholeOutput)(batch, _identity(scope, batch), send)
        run = Run(batch, way, self._room, output)
        try:
            await _run(run, self._check(scope, body, run.checked), receive)
        except AskWhole as refused:
            if output.begun:
                await output.fail(str(refused))
            else:
                await self._app(scope, _again(body, receive), send)
        except BatchRefusedError as refused:
            await _answer(send, *_refusal(refused.ticket))
        except BatchFailedError as failed:
            await output.fail(str(failed))
        except ClientGone:
            return

    async def _check(self, scope: Scope, body: bytes, checked: asyncio.Event) -> None:
        """Let vLLM look at the whole body without running it. Raises AskWhole when it finds fault."""
        status = 0

        async def look(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)

        target = {**scope, "path": _CHECK_PATH, "raw_path": _CHECK_PATH.encode(), "state": {**scope.get("state", {})}}
        await self._app(target, _again(body, _never), look)
        if 400 <= status < 500:
            raise AskWhole("vLLM refuses the batch")
        checked.set()


async def _run(run: Run, check: Any, receive: Receive) -> None:
    """The batch beside its check and its client; the first of them to fail ends all. Raises that failure."""
    failures: tuple[BaseException, ...] = ()
    try:
        async with asyncio.TaskGroup() as group:
            watch = group.create_task(_hung_up(receive))
            checking = group.create_task(check)
            await run.hand_out(group)
            checking.cancel()
            watch.cancel()
    except* Exception as group_of_failures:
        failures = _leaves(group_of_failures)
    for failure in failures:
        raise failure
    await run.end()


class Run:
    """One batch on its way: hands out parts until all are answered."""

    def __init__(self, batch: Batch, way: Way, room: Callable[[], Room], output: Output) -> None:
        self._batch = batch
        self._way = way
        self._room = room
        self._output = output
        self._work = WorkList(sequence_tokens(batch), batch.n)
        self._id = uuid.uuid4().hex
        self._changed = asyncio.Event()
        self._parts = 0
        self._refusals = 0
        self._shunned = ""
        self.checked = asyncio.Event()

    async def hand_out(self, group: asyncio.TaskGroup) -> None:
        """Cut, place and send part after part. Raises BatchRefusedError and BatchFailedError, as do the tasks."""
        while not self._work.finished:
            self._changed.clear()
            part = self._work.cut(self._room())
            if part is None:
                await self._changed.wait()
                continue
            body = json.dumps(self._batch.part(part)).encode()
            place = await self._place(part, body)
            if place.ticket.status == 200:
                self._parts += 1
                self._refusals = 0
                group.create_task(self._serve(part, place, body))
            else:
                self._work.give_back(part)
                await self._refused(place.ticket)

    async def end(self) -> None:
        await self._output.end(self._parts)

    async def _place(self, part: Part, body: bytes) -> Place:
        for _ in range(_ASKED_ELSEWHERE):
            try:
                place = await self._way.place(body)
            except RouterGoneError as gone:
                reason = str(gone)
            else:
                if part.attempt == 1 or place.replica_id != self._shunned:
                    return place
                # What was promised there looks like work on its way for a while, which turns the policy elsewhere.
                reason = f"no other replica than {place.replica_id} takes the part that failed there"
            await asyncio.sleep(_NOTICED_AFTER_S)
        if not self._parts:
            raise BatchRefusedError(Ticket("none", "router_gone", status=503, retry_after_s=1.0))
        raise BatchFailedError(f"{reason}; try again later")

    async def _refused(self, ticket: Ticket) -> None:
        """Wait until something of this batch has ended, or for as long as the router says."""
        if not self._parts:
            raise BatchRefusedError(ticket)
        self._refusals += not self._work.out
        if self._refusals > _REFUSALS:
            raise BatchFailedError(f"no replica had room for the rest of the batch ({ticket.reason}); try again later")
        try:
            await asyncio.wait_for(self._changed.wait(), ticket.retry_after_s)
        except TimeoutError:
            return

    async def _serve(self, part: Part, place: Place, body: bytes) -> None:
        try:
            await self._exchange(part, place, body)
        except (PartLost, MergeError, aiohttp.ClientError, OSError) as error:
            sent = isinstance(error, PartLost) and error.sent
            reason = str(error) or type(error).__name__
            if sent or not self._work.fail(part):
                prompts = f"prompts {part.first} to {part.end - 1}"
                raise BatchFailedError(
                    f"{prompts} of the batch failed on replica {place.replica_id}: {reason}"
                ) from None
            self._shunned = place.replica_id
        else:
            self._work.finish(part)
        self._changed.set()

    async def _exchange(self, part: Part, place: Place, body: bytes) -> None:
        async with self._way.send(place, body, f"{self._id}-{part.number}") as answer:
            if 400 <= answer.status < 500 and answer.status not in PASSING:
                raise AskWhole(reason_of(answer.status, await answer.read()))
            if answer.status != 200:
                raise PartLost(reason_of(answer.status, await answer.read()))
            await self._output.take(part, answer, self.checked)


def _identity(scope: Scope, batch: Batch) -> Identity:
    """As vLLM names answers: by the client's request id where there is one."""
    wished = header(scope, "x-request-id") or batch.body.get("request_id") or uuid.uuid4().hex
    return Identity(f"cmpl-{wished}", int(time.time()))


def _leaves(group: BaseExceptionGroup[Any]) -> tuple[BaseException, ...]:
    leaves: list[BaseException] = []
    for error in group.exceptions:
        leaves += _leaves(error) if isinstance(error, BaseExceptionGroup) else (error,)
    return tuple(leaves)


async def _read(receive: Receive) -> bytes:
    chunks = []
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return b""
        chunks.append(message.get("body", b""))
        if not message.get("more_body"):
            return b"".join(chunks)


def _again(body: bytes, receive: Receive) -> Receive:
    """The body that was read already, then whatever else comes."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def again() -> Message:
        return messages.pop() if messages else await receive()

    return again


async def _hung_up(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    raise ClientGone


async def _never() -> Message:
    await asyncio.Event().wait()
    raise AssertionError
