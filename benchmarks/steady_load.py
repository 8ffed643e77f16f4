"""Clients that go on and on while something breaks, and keep account of what each request met."""

from __future__ import annotations

import asyncio
import collections
import enum
import json
import random
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import aiohttp

# Beyond the router's own deadline for a waiting request (30 s) and an answer's length.
HANG_S = 45.0
# After an error a client waits, as one that heeds Retry-After would; else 503s come by the thousand.
_PAUSE_S = 0.5


class Outcome(enum.StrEnum):
    OK = "ok"
    EXPLICIT = "explicit error"  # an HTTP status with an OpenAI error body, or an error event in a stream
    BARE = "error without a body"
    CUT = "cut"  # the connection or the stream ended without a word
    HANG = "hang"


@dataclass(frozen=True, slots=True)
class Met:
    """One request's end. Times are monotonic seconds; `status` 0: none was received."""

    outcome: Outcome
    status: int
    began_s: float
    ended_s: float
    detail: str = ""


class SteadyLoad:
    """`clients` closed loops in a thread of their own, every other one streaming; a context manager."""

    def __init__(self, url: str, model: str, clients: int, prompt_tokens: int, output_tokens: int) -> None:
        self.met: list[Met] = []
        self._url = f"{url}/v1/completions"
        self._wish = {"model": model, "max_tokens": output_tokens, "temperature": 1.0, "ignore_eos": True}
        self._clients = clients
        self._prompt_tokens = prompt_tokens
        self._stop = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), daemon=True)

    def __enter__(self) -> SteadyLoad:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(HANG_S + 5)

    def between(self, began_s: float, ended_s: float) -> list[Met]:
        """What ended in this time."""
        return [met for met in list(self.met) if began_s <= met.ended_s < ended_s]

    async def _run(self) -> None:
        timeout = aiohttp.ClientTimeout(total=HANG_S)
        async with aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0)) as session:
            await asyncio.gather(*(self._client(session, k) for k in range(self._clients)))

    async def _client(self, session: aiohttp.ClientSession, number: int) -> None:
        rng = random.Random(number)
        while not self._stop.is_set():
            prompt = [rng.randrange(10, 250) for _ in range(self._prompt_tokens)]
            met = await send(session, self._url, {**self._wish, "prompt": prompt, "stream": number % 2 == 1})
            self.met.append(met)
            if met.outcome is not Outcome.OK:
                await asyncio.sleep(_PAUSE_S)


async def send(session: aiohttp.ClientSession, url: str, wish: dict[str, Any]) -> Met:
    """One request to its end, whatever that is."""
    began_s, status = time.monotonic(), 0
    try:
        async with session.post(url, json=wish) as response:
            status = response.status
            body = await response.read()
    except TimeoutError:
        return Met(Outcome.HANG, status, began_s, time.monotonic())
    except (aiohttp.ClientError, ConnectionError) as error:
        return Met(Outcome.CUT, status, began_s, time.monotonic(), type(error).__name__)
    outcome, detail = judge(status, body, bool(wish.get("stream")))
    return Met(outcome, status, began_s, time.monotonic(), detail)


def judge(status: int, body: bytes, stream: bool) -> tuple[Outcome, str]:
    """What a complete answer is, and its error's code or message."""
    if status != 200:
        error = _error(body)
        return (Outcome.EXPLICIT, error) if error else (Outcome.BARE, body[:80].decode(errors="replace"))
    if not stream:
        return Outcome.OK, ""
    events = [line[6:] for line in body.split(b"\n") if line.startswith(b"data: ")]
    errors = [error for event in events if (error := _error(event))]
    if errors:
        return Outcome.EXPLICIT, errors[0]
    return (Outcome.OK, "") if events and events[-1].strip() == b"[DONE]" else (Outcome.CUT, "no [DONE]")


def _error(text: bytes) -> str:
    try:
        error = json.loads(text)["error"]
        return str(error.get("code") or "") + ": " + str(error["message"])[:100]
    except (ValueError, KeyError, TypeError, AttributeError):
        return ""


def counts(met: Iterable[Met]) -> dict[str, Any]:
    """How many of each outcome and status, and examples of what was not OK."""
    found = list(met)
    bad = [one for one in found if one.outcome is not Outcome.OK]
    return {
        "outcomes": dict(collections.Counter(one.outcome.value for one in found)),
        "statuses": dict(collections.Counter(str(one.status) for one in found)),
        "details": sorted({one.detail for one in bad})[:6],
        "longest_s": round(max((one.ended_s - one.began_s for one in found), default=0.0), 2),
    }
