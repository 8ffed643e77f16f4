"""A closed-loop load generator for any OpenAI completions server: `python -m benchmarks.load --help`.

`--concurrency` requests are always under way, over `--processes` client processes (one Python client reads about
30,000 streamed tokens a second, less than a GPU writes). Prompts are random token ids from a seed, sampling is at
temperature 1 with `ignore_eos`, so every answer has exactly the length asked for.
"""

from __future__ import annotations

import argparse
import collections
import json
import random
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import client
from benchmarks.client import Answer, Target, Wish


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


def run(load: Load, processes: int = 1) -> list[Answer]:
    """Send everything and return every answer. Raises nothing for failed requests: they are answers too."""
    target = Target(load.url, load.model, load.stream, load.headers)
    return client.run(target, wishes(load), load.concurrency, processes)


def wishes(load: Load) -> list[Wish]:
    """The load's requests: random token ids from its seed, all due at once."""
    rng = random.Random(load.seed)
    prompts = [tuple(rng.choices(range(10, load.vocabulary), k=load.prompt_tokens)) for _ in range(load.requests)]
    return [Wish(0.0, prompt, load.output_tokens) for prompt in prompts]


def summary(answers: Sequence[Answer]) -> dict[str, Any]:
    """Throughput from the first request's start to the last one's end; latencies of the successful ones."""
    good = [a for a in answers if a.ok]
    wall_s = max(a.ended_s for a in answers) - min(a.started_s for a in answers)
    shares = collections.Counter(a.replica for a in good)
    return {
        "requests": len(answers),
        "failed": len(answers) - len(good),
        "statuses": dict(collections.Counter(a.status for a in answers)),
        "wall_s": round(wall_s, 4),
        "requests_per_s": round(len(good) / wall_s, 2),
        "output_tokens_per_s": round(sum(a.output_tokens for a in good) / wall_s, 1),
        "e2e_s": _spread([a.ended_s - a.started_s for a in good]),
        "ttft_s": _spread([a.first_token_s - a.started_s for a in good if a.first_token_s]),
        "replicas": dict(sorted(shares.items())),
    }


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
