"""An HTTP client for any OpenAI completions server: requests at their times or in a closed loop, every answer timed.

A failed request is an answer too: `Answer.ok` is false for any status but 200, for a connection that broke (status 0),
for an error event inside a stream and for a stream that ended without `[DONE]`.
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import aiohttp

# Client processes begin together: until then each gets its requests and writes their bodies.
PREPARE_S = 0.5


@dataclass(frozen=True, slots=True)
class Wish:
    """One request, due `at_s` after the start."""

    at_s: float
    prompt: tuple[int, ...]
    output_tokens: int


@dataclass(frozen=True, slots=True)
class Target:
    """Where requests go and how. `limit_s` is for one request, connect to last byte."""

    url: str
    model: str
    stream: bool = True
    headers: dict[str, str] = field(default_factory=dict)
    limit_s: float = 600.0


@dataclass(frozen=True, slots=True)
class Answer:
    """One request's outcome; times in monotonic seconds, `first_token_s` 0 where nothing was streamed.

    `token_times_s` has the arrival of each streamed chunk: one token, or several where the server's front end lags.
    """

    status: int
    started_s: float
    ended_s: float
    first_token_s: float
    output_tokens: int
    replica: str = ""
    due_s: float = 0.0
    ok: bool = True
    token_times_s: tuple[float, ...] = ()


class Clients:
    """Client processes, started once for any number of runs; one "process" is this one."""

    def __init__(self, processes: int) -> None:
        self._processes = processes
        self._pool = multiprocessing.get_context("spawn").Pool(processes) if processes > 1 else None
        if self._pool:  # all are there, and have imported aiohttp, before any request is due
            self._pool.map(_nothing, range(processes), chunksize=1)

    def __enter__(self) -> Clients:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool:
            self._pool.terminate()
            self._pool.join()

    def run(self, target: Target, wishes: Sequence[Wish], concurrency: int | None = None) -> list[Answer]:
        """Send every wish when it is due, at most `concurrency` at once (None: without limit)."""
        if self._pool is None:
            return asyncio.run(drive(target, wishes, concurrency, time.perf_counter()))
        n, start_s = self._processes, time.perf_counter() + PREPARE_S
        parts = [(target, wishes[k::n], share(concurrency, n, k), start_s) for k in range(n)]
        return [answer for answers in self._pool.starmap(_drive, parts, chunksize=1) for answer in answers]


def run(target: Target, wishes: Sequence[Wish], concurrency: int | None = None, processes: int = 1) -> list[Answer]:
    """One run of `Clients`."""
    with Clients(processes) as clients:
        return clients.run(target, wishes, concurrency)


def _nothing(_: int) -> None:
    return None


def share(total: int | None, parts: int, k: int) -> int | None:
    """Part `k` of `total`, as equal as whole numbers allow."""
    return None if total is None else total // parts + (k < total % parts)


def _drive(target: Target, wishes: Sequence[Wish], concurrency: int | None, start_s: float) -> list[Answer]:
    return asyncio.run(drive(target, wishes, concurrency, start_s))


async def drive(target: Target, wishes: Sequence[Wish], concurrency: int | None, start_s: float) -> list[Answer]:
    """Answers in the order in which they ended. A request held back by `concurrency` is due once it may go."""
    waiting = iter([(wish, _body(target, wish)) for wish in sorted(wishes, key=lambda w: w.at_s)])
    await asyncio.sleep(max(0.0, start_s - time.perf_counter()))
    answers: list[Answer] = []
    clients = len(wishes) if concurrency is None else min(concurrency, len(wishes))
    connector = aiohttp.TCPConnector(limit=0)
    timeout = aiohttp.ClientTimeout(total=target.limit_s)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:

        async def client() -> None:
            for wish, body in waiting:
                due_s = max(start_s + wish.at_s, time.perf_counter() if concurrency else 0.0)
                await asyncio.sleep(max(0.0, due_s - time.perf_counter()))
                answers.append(replace(await _send(session, target, body), due_s=due_s))

        await asyncio.gather(*(client() for _ in range(clients)))
    return answers


def _body(target: Target, wish: Wish) -> bytes:
    body: dict[str, Any] = {"model": target.model, "prompt": wish.prompt, "max_tokens": wish.output_tokens}
    body |= {"temperature": 1.0, "ignore_eos": True, "stream": target.stream}
    if target.stream:
        body["stream_options"] = {"include_usage": True}
    return json.dumps(body).encode()


async def _send(session: aiohttp.ClientSession, target: Target, body: bytes) -> Answer:
    started_s = time.perf_counter()
    headers = {"content-type": "application/json", **target.headers}
    try:
        async with session.post(f"{target.url}/v1/completions", data=body, headers=headers) as response:
            times_s, tokens = await _read(response, target.stream)
            replica = response.headers.get("x-splitwiser-replica", "")
            first_s, ended_s = times_s[0] if times_s else 0.0, time.perf_counter()
            return Answer(
                response.status, started_s, ended_s, first_s, tokens, replica, ok=tokens > 0, token_times_s=times_s
            )
    except (aiohttp.ClientError, TimeoutError, ConnectionError):
        return Answer(0, started_s, time.perf_counter(), 0.0, 0, ok=False)


async def _read(response: aiohttp.ClientResponse, stream: bool) -> tuple[tuple[float, ...], int]:
    """When chunks came, and the answer's tokens: 0 of an answer that failed."""
    if response.status != 200 or not stream:
        content = await response.read()
        return (), _usage(content) or 0 if response.status == 200 else 0
    times_s: list[float] = []
    last, done = b"", False
    async for line in response.content:  # to its end, or the connection could not be used again
        if line.startswith(b"data: {"):
            last = line[6:]
            times_s.append(time.perf_counter())
        done = done or line.startswith(b"data: [DONE]")
    return _counted(times_s, last) if done else ((), 0)


def _counted(times_s: list[float], last: bytes) -> tuple[tuple[float, ...], int]:
    """The last event of a stream holds the usage, with a server that knows `include_usage`, or an error."""
    if not times_s or b'"error"' in last:
        return (), 0
    tokens = _usage(last)
    return (tuple(times_s), len(times_s)) if tokens is None else (tuple(times_s[:-1]), tokens)


def _usage(content: bytes) -> int | None:
    usage = json.loads(content).get("usage")
    return int(usage["completion_tokens"]) if usage else None


def token_events(answers: Sequence[Answer]) -> Iterator[tuple[float, int]]:
    """(when, how many) of every streamed chunk; tokens that came in one chunk are spread evenly over the chunks."""
    for answer in answers:
        left = answer.output_tokens
        for k, at_s in enumerate(answer.token_times_s):
            count = left // (len(answer.token_times_s) - k)
            left -= count
            yield at_s, count
