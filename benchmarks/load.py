"""A closed-loop load generator for any OpenAI completions server: `python -m benchmarks.load --help`.

`--concurrency` requests are always under way, over `--processes` client processes (one Python client reads about
30,000 streamed tokens a second, less than a GPU writes). Prompts are random token ids from a seed, sampling is at
temperature 1 with `ignore_eos`, so every answer has exactly the length asked for.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import json
import multiprocessing
import random
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import aiohttp


@dataclass(frozen=True, slots=True)
class Load:
    """What to send. Lengths in tokens."""

    url: str
    model: str
    concurrency: int
    requests: int
    prompt_tokens: int
    output_tokens: int
    stream: bool
    seed: int = 0
    vocabulary: int = 1000
    headers: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Answer:
    """One request's outcome; times in seconds, `first_token_s` only when streamed. `status` 0: the connection broke."""

    status: int
    started_s: float
    ended_s: float
    first_token_s: float
    output_tokens: int
    replica: str


def run(load: Load, processes: int = 1) -> list[Answer]:
    """Send everything and return every answer. Raises nothing for failed requests: they are answers too."""
    if processes == 1:
        return asyncio.run(_closed_loop(load))
    parts = [_share(load, processes, k) for k in range(processes)]
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        return [answer for answers in pool.map(run, parts) for answer in answers]


def summary(answers: Sequence[Answer]) -> dict[str, Any]:
    """Throughput from the first request's start to the last one's end; latencies of the successful ones."""
    good = [a for a in answers if a.status == 200]
    wall_s = max(a.ended_s for a in answers) - min(a.started_s for a in answers)
    shares = collections.Counter(a.replica for a in good)
    return {
        "requests": len(answers),
        "statuses": dict(collections.Counter(a.status for a in answers)),
        "wall_s": round(wall_s, 4),
        "requests_per_s": round(len(good) / wall_s, 2),
        "output_tokens_per_s": round(sum(a.output_tokens for a in good) / wall_s, 1),
        "e2e_s": _spread([a.ended_s - a.started_s for a in good]),
        "ttft_s": _spread([a.first_token_s - a.started_s for a in good if a.first_token_s]),
        "replicas": dict(sorted(shares.items())),
    }


def _share(load: Load, processes: int, k: int) -> Load:
    part = {
        name: getattr(load, name) // processes + (k < getattr(load, name) % processes)
        for name in ("concurrency", "requests")
    }
    return Load(**{**asdict(load), **part, "seed": load.seed * 1000 + k})


async def _closed_loop(load: Load) -> list[Answer]:
    rng = random.Random(load.seed)
    bodies = iter([_body(load, rng) for _ in range(load.requests)])
    answers: list[Answer] = []
    connector = aiohttp.TCPConnector(limit=load.concurrency)
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=600)) as session:

        async def one_client() -> None:
            for body in bodies:
                answers.append(await _send(session, load, body))

        await asyncio.gather(*(one_client() for _ in range(load.concurrency)))
    return answers


def _body(load: Load, rng: random.Random) -> bytes:
    prompt = [rng.randrange(10, load.vocabulary) for _ in range(load.prompt_tokens)]
    wish: dict[str, Any] = {"model": load.model, "prompt": prompt, "max_tokens": load.output_tokens}
    wish |= {"temperature": 1.0, "ignore_eos": True, "stream": load.stream}
    return json.dumps(wish).encode()


async def _send(session: aiohttp.ClientSession, load: Load, body: bytes) -> Answer:
    started_s = time.perf_counter()
    headers = {"content-type": "application/json", **load.headers}
    try:
        async with session.post(f"{load.url}/v1/completions", data=body, headers=headers) as response:
            first_s, tokens = await _read(response, load, started_s)
            replica = response.headers.get("x-splitwiser-replica", "")
            return Answer(response.status, started_s, time.perf_counter(), first_s, tokens, replica)
    except (aiohttp.ClientError, TimeoutError, ConnectionError):
        return Answer(0, started_s, time.perf_counter(), 0.0, 0, "")


async def _read(response: aiohttp.ClientResponse, load: Load, started_s: float) -> tuple[float, int]:
    if response.status != 200 or not load.stream:
        content = await response.read()
        return 0.0, json.loads(content)["usage"]["completion_tokens"] if response.status == 200 else 0
    first_s = 0.0
    tokens = 0
    async for line in response.content:
        if line.startswith(b"data: {"):
            first_s = first_s or time.perf_counter()
            tokens += 1
    return first_s, load.output_tokens if tokens else 0


def _spread(values: Sequence[float]) -> dict[str, float]:
    if len(values) < 2:
        return {}
    cuts = statistics.quantiles(values, n=100, method="inclusive")
    return {"p50": round(cuts[49], 5), "p90": round(cuts[89], 5), "p99": round(cuts[98], 5)}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.load", description=__doc__)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--model", default="demo")
    for name, default in (("concurrency", 8), ("requests", 64), ("prompt-tokens", 32), ("output-tokens", 16)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--vocabulary", type=int, default=1000)
    parser.add_argument("--stream", action="store_true")
    parser.add_argument("--out", type=Path, help="append one JSON line here")
    o = parser.parse_args(arguments)
    load = Load(
        o.url, o.model, o.concurrency, o.requests, o.prompt_tokens, o.output_tokens, o.stream, o.seed, o.vocabulary
    )
    row = {**asdict(load), "processes": o.processes, **summary(run(load, o.processes))}
    print(json.dumps(row))
    if o.out:
        with o.out.open("a") as file:
            file.write(json.dumps(row) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
