"""Runs the batches of the shared store: one replica at a time holds the lock, and another takes over when it is gone.

Each line is sent as an ordinary request to the public address, at the lowest priority and a few at once, so that
whatever people wait for goes first. A line's result is written before the next one takes its place: a restart goes on
with the lines that have none.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import itertools
import json
import logging
import os
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import aiohttp

from balancer.hint import CLIENT_HEADERS, MOST_PRIORITY
from deployments.batch_lines import Line, result_line
from deployments.batch_store import UNFINISHED, BatchStore

logger = logging.getLogger(__name__)

# How soon a new or cancelled batch is noticed, and how soon another replica takes over.
_POLL_S = 0.5
_TAKE_OVER_S = 2.0
_PURGE_EVERY_S = 600.0
# A full or starting system is asked again after its Retry-After, or this; at most so much later each time.
_RETRY_S = 1.0
_LONGEST_RETRY_S = 30.0
# A request that breaks its server every time must not go on for ever.
_SERVER_ERRORS = 3
_PRIORITY = {CLIENT_HEADERS["priority"]: str(-MOST_PRIORITY)}


@dataclass(frozen=True, slots=True)
class Reply:
    """What the public address answered."""

    status: int
    request_id: str
    body: Any
    retry_after_s: float | None = None


Sender = Callable[[str, Any], Awaitable[Reply]]


class BatchRunner:
    """Use `run` as a task; cancelling it leaves everything so that another runner can go on.

    `send(url, body)` asks the public address, and raises OSError or aiohttp.ClientError when nobody is there.
    """

    def __init__(self, store: BatchStore, send: Sender, concurrency: int, clock: Callable[[], float]) -> None:
        self._store = store
        self._send = send
        self._places = asyncio.Semaphore(concurrency)
        self._clock = clock
        self._running: dict[str, asyncio.Task[None]] = {}

    async def run(self) -> None:
        """Wait for the lock, then run batches until cancelled."""
        while True:
            try:
                await self._try()
            except Exception:  # a full disk, say: it must not end this for ever, nor the replica beside it
                logger.exception("the runner of batches in %s stopped; beginning again", self._store.folder)
            await asyncio.sleep(_TAKE_OVER_S)

    async def _try(self) -> None:
        if self._store.exists:
            with _lock(self._store) as held:
                if held:
                    await self._run_all()

    async def _run_all(self) -> None:
        purged_s = -_PURGE_EVERY_S
        try:
            while True:
                if self._clock() - purged_s >= _PURGE_EVERY_S:
                    purged_s = self._clock()
                    await asyncio.to_thread(self._store.purge)
                for batch_id in await asyncio.to_thread(self._store.unfinished):
                    if batch_id not in self._running:
                        self._running[batch_id] = asyncio.create_task(self._process(batch_id))
                await asyncio.sleep(_POLL_S)
                self._reap()
        finally:
            await _end(self._running.values())
            self._running.clear()

    def _reap(self) -> None:
        for batch_id, task in list(self._running.items()):
            if task.done():
                del self._running[batch_id]
                if error := task.exception():  # it is still unfinished, and will be begun again
                    logger.error("the batch %s stopped: %r; going on with it", batch_id, error)

    async def _process(self, batch_id: str) -> None:
        """Bring one batch to its end, from wherever it was left."""
        if await self._status(batch_id) == "validating":
            await asyncio.to_thread(self._store.validate, batch_id)
        if await self._status(batch_id) == "in_progress":
            await self._until_stopped(batch_id)
        if await self._status(batch_id) in UNFINISHED:
            await asyncio.to_thread(self._store.finish, batch_id)

    async def _status(self, batch_id: str) -> str:
        return await asyncio.to_thread(self._store.status, batch_id)

    async def _until_stopped(self, batch_id: str) -> None:
        """Send all lines unless the batch is cancelled or its time is over. Raises what ended it otherwise."""
        batch = await asyncio.to_thread(self._store.batch, batch_id)
        task = asyncio.create_task(self._all_lines(batch_id, batch["input_file_id"]))
        try:
            while not task.done() and self._clock() < batch["expires_at"]:
                await asyncio.wait({task}, timeout=_POLL_S)
                if await self._status(batch_id) != "in_progress":
                    break
            if task.done():
                task.result()
        finally:
            await _end([task])

    async def _all_lines(self, batch_id: str, input_file_id: str) -> None:
        async with asyncio.TaskGroup() as group:
            for line in await asyncio.to_thread(self._store.pending, batch_id):
                await self._places.acquire()
                task = group.create_task(self._line(batch_id, input_file_id, line))
                task.add_done_callback(lambda _: self._places.release())

    async def _line(self, batch_id: str, input_file_id: str, line: Line) -> None:
        request = await asyncio.to_thread(self._store.request, input_file_id, line)
        reply = await self._answer(request["url"], request["body"])
        result = result_line(line.custom_id, reply.status, reply.request_id, reply.body)
        ok = reply.status == 200
        await asyncio.to_thread(self._store.record, batch_id, line, ok, result, _usage(reply.body))

    async def _answer(self, url: str, body: Any) -> Reply:
        """The last word on a request: asked again while the system is full, starting or gone, and a few times when it
        answers with an error of its own."""
        errors = 0
        for attempt in itertools.count():
            pause_s: float | None = None
            try:
                reply = await self._send(url, body)
            except (aiohttp.ClientError, OSError) as error:
                logger.info("nobody answers a line of a batch (%r); trying again", error)
            else:
                errors += reply.status >= 500 and reply.status != 503
                if (reply.status not in (429, 503) and reply.status < 500) or errors >= _SERVER_ERRORS:
                    return reply
                pause_s = reply.retry_after_s
            await asyncio.sleep(min(_LONGEST_RETRY_S, pause_s or _RETRY_S * 2 ** min(attempt, 10)))
        raise AssertionError("unreachable")


class PublicAddress:
    """Sends requests to the system as its clients do, at the lowest priority. `key` is the server's own API key."""

    def __init__(self, url: str, key: str | None, client: aiohttp.ClientSession) -> None:
        self._url = url
        self._headers: Mapping[str, str] = {**_PRIORITY, **({"authorization": f"Bearer {key}"} if key else {})}
        self._client = client

    async def send(self, url: str, body: Any) -> Reply:
        async with self._client.post(self._url + url, json=body, headers=self._headers) as answer:
            text = await answer.text()
            request_id = answer.headers.get("x-request-id", "")
            return Reply(answer.status, request_id, _json(text), _seconds(answer.headers.get("retry-after")))


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return {"error": {"message": text, "type": "server_error", "param": None, "code": None}}


def _seconds(text: str | None) -> float | None:
    return float(text) if text and text.isdigit() else None


def _usage(body: Any) -> tuple[int, int]:
    """Prompt and output tokens of an answer, by either of OpenAI's names."""
    usage = body.get("usage") if isinstance(body, dict) else None
    if not isinstance(usage, dict):
        return 0, 0
    prompt = usage.get("prompt_tokens") or usage.get("input_tokens") or 0
    return prompt, usage.get("completion_tokens") or usage.get("output_tokens") or 0


@contextlib.contextmanager
def _lock(store: BatchStore) -> Iterator[bool]:
    """Whether this process runs the batches; the kernel lets go of the lock when its holder dies."""
    descriptor = os.open(store.lock_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        yield False
    else:
        yield True
    finally:
        os.close(descriptor)


async def _end(tasks: Any) -> None:
    tasks = list(tasks)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
