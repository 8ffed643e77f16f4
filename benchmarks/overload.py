"""More work than fits, on real CPU engines: `python -m benchmarks.overload --out rows.jsonl`.

Two engines of the demo model with a KV cache of a few thousand tokens; `--clients` clients in a closed loop ask for
long streamed answers. Each policy is started in turn with the same seed. A row holds what became of every request
(answered, turned away with 429 or 503 and whether with Retry-After, lost), how often the engines preempted (from the
board), and how many answers were without a token for more than a second: in all, and while others of the same replica
had theirs (without these, an engine was stopped as a whole, or the machine was). Where it may, the client runs at a
real-time priority (`client_first`): beside busy engines the kernel kept it, and its answers, waiting for seconds.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import contextlib
import itertools
import json
import os
import random
import sys
import time
from bisect import bisect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp

from balancer.board import Board, board_path
from benchmarks.serving import serving
from deployments.processes import runs_folder

KV_TOKENS = 4096
KV_BYTES_PER_TOKEN = 4096  # the demo model: 4 layers of 256, keys and values, 2 bytes each
LONG_GAP_S = 1.0
QUEUE = {"queue_limit": 24, "queue_deadline_s": 20.0}


@dataclass(frozen=True, slots=True)
class Outcome:
    status: int
    retry_after: bool
    seconds: float
    replica: str = ""
    moments_s: tuple[float, ...] = ()  # at which its tokens came


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.overload", description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--policies", nargs="+", default=["gpu_aware", "round_robin"])
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--requests", type=int, default=400)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args(arguments)
    for policy in options.policies:
        row = measure(policy, options.clients, options.requests, options.seed)
        print(json.dumps(row), flush=True)
        with options.out.open("a") as file:
            file.write(json.dumps(row) + "\n")
    return 0


def measure(policy: str, clients: int, requests: int, seed: int) -> dict[str, Any]:
    """Start the system under `policy`, overload it, and count."""
    with serving({"import_path": "deployments.app:build", "args": arguments_for(policy)}) as url:
        began_s = time.monotonic()
        with _first_of_all() as client_first:
            outcomes = asyncio.run(_clients(url, clients, requests, seed))
        wall_s = time.monotonic() - began_s
        preemptions, finished = _counters()
    statuses = collections.Counter(o.status for o in outcomes)
    refused = [o for o in outcomes if o.status in (429, 503)]
    answered = sorted(o.seconds for o in outcomes if o.status == 200)
    return {
        "policy": policy,
        "clients": clients,
        "client_first": client_first,
        "seed": seed,
        "requests": len(outcomes),
        "statuses": {str(status): count for status, count in sorted(statuses.items())},
        "lost": statuses[0],
        "refused_without_retry_after": sum(not o.retry_after for o in refused),
        "preemptions": preemptions,
        "preemptions_per_answer": round(preemptions / max(1, len(answered)), 3),
        "requests_served_by_replicas": finished,
        "answers_per_s": round(len(answered) / wall_s, 2),
        "answer_p50_s": round(answered[len(answered) // 2], 2) if answered else None,
        **gaps([o for o in outcomes if o.status == 200]),
        "wall_s": round(wall_s, 1),
    }


@contextlib.contextmanager
def _first_of_all() -> Iterator[bool]:
    """This process before all others that want a core, if it may; it wants a twentieth of one."""
    try:
        os.sched_setscheduler(0, os.SCHED_RR | os.SCHED_RESET_ON_FORK, os.sched_param(1))
    except PermissionError:
        yield False
        return
    try:
        yield True
    finally:
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))


def gaps(answered: Sequence[Outcome]) -> dict[str, Any]:
    """The longest time between two tokens of an answer, and how many answers had one of more than a second: in all, and
    passed over, which means that another answer of the same replica went on in the middle half of it."""
    longest = [max(itertools.pairwise(o.moments_s), key=_seconds, default=(0.0, 0.0)) for o in answered]
    heard: dict[str, list[float]] = collections.defaultdict(list)
    for o in answered:
        heard[o.replica] += o.moments_s
    for moments_s in heard.values():
        moments_s.sort()
    long = [(o, start, end) for o, (start, end) in zip(answered, longest, strict=True) if end - start > LONG_GAP_S]
    return {
        "longest_gap_s": round(max(map(_seconds, longest), default=0.0), 2),
        "over_a_second_without_a_token": len(long),
        "passed_over": sum(_others_went_on(heard[o.replica], start, end) for o, start, end in long),
    }


def _seconds(gap: tuple[float, float]) -> float:
    return gap[1] - gap[0]


def _others_went_on(moments_s: Sequence[float], start_s: float, end_s: float) -> bool:
    quarter_s = (end_s - start_s) / 4
    return bisect(moments_s, start_s + quarter_s) < bisect(moments_s, end_s - quarter_s)


def arguments_for(policy: str) -> dict[str, Any]:
    """The application's `args`: an engine with room for about ten of the requests below."""
    engine = {
        "max_model_len": 1024,
        "max_num_seqs": 64,
        "dtype": "bfloat16",
        "enforce_eager": True,
        "enable_prefix_caching": False,
        "kv_cache_memory_bytes": KV_TOKENS * KV_BYTES_PER_TOKEN,
    }
    balancer = {"policy": policy, **(QUEUE if policy == "gpu_aware" else {})}
    return {"model": "demo", "replicas": 2, "engine": engine, "balancer": balancer}


async def _clients(url: str, clients: int, requests: int, seed: int) -> list[Outcome]:
    rng = random.Random(seed)
    wishes = iter([_wish(rng) for _ in range(requests)])
    outcomes: list[Outcome] = []
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=300)) as session:

        async def client() -> None:
            for wish in wishes:
                outcome = await _ask(session, url, wish)
                outcomes.append(outcome)
                if outcome.status != 200:
                    await asyncio.sleep(1.0)  # what Retry-After asks for at least

        await asyncio.gather(*(client() for _ in range(clients)))
    return outcomes


def _wish(rng: random.Random) -> dict[str, Any]:
    prompt = [rng.randrange(10, 1000) for _ in range(rng.randrange(20, 200))]
    return {
        "model": "demo",
        "prompt": prompt,
        "max_tokens": rng.randrange(100, 500),
        "ignore_eos": True,
        "stream": True,
    }


async def _ask(session: aiohttp.ClientSession, url: str, wish: dict[str, Any]) -> Outcome:
    began_s = time.monotonic()
    try:
        async with session.post(f"{url}/v1/completions", json=wish) as answer:
            pieces = [(time.monotonic(), piece) async for piece in answer.content.iter_any()]
            whole = answer.status != 200 or pieces[-1][1].endswith(b"data: [DONE]\n\n")
            status, taken_s = answer.status if whole else 0, time.monotonic() - began_s
            replica, moments_s = answer.headers.get("x-splitwiser-replica", ""), tuple(moment for moment, _ in pieces)
            return Outcome(status, "retry-after" in answer.headers, taken_s, replica, moments_s)
    except (aiohttp.ClientError, TimeoutError):
        return Outcome(0, False, time.monotonic() - began_s)


def _counters() -> tuple[int, int]:
    """Preemptions, and requests that the replicas served to their end, over all replicas."""
    newest = max(runs_folder().glob("*-*"), key=lambda folder: folder.stat().st_mtime)
    board = Board.open(board_path(newest.name))
    replicas = board.snapshot(time.monotonic()).replicas
    board.close()
    return sum(r.preemptions_total for r in replicas), sum(r.finished_total for r in replicas)


if __name__ == "__main__":
    sys.exit(main())
