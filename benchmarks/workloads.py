"""Where simulated requests come from: closed loops, Poisson arrivals, steps and bursts of either, and traces."""

from __future__ import annotations

import csv
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Lengths:
    """Prompt and output lengths: a mixture of (weight, prompt tokens, output tokens), each evenly within `spread`."""

    mixture: tuple[tuple[float, int, int], ...]
    spread: float = 0.5

    def draw(self, rng: random.Random) -> tuple[int, int]:
        _, prompt, output = rng.choices(self.mixture, [weight for weight, _, _ in self.mixture])[0]
        return self._around(prompt, rng), self._around(output, rng)

    def _around(self, mean: int, rng: random.Random) -> int:
        return max(1, round(mean * rng.uniform(1.0 - self.spread, 1.0 + self.spread)))

    def scaled(self, rng: random.Random) -> Lengths:
        """Lengths of the same kind, but each prompt and output up to a half longer or a third shorter."""
        return Lengths(tuple((w, _scale(p, rng), _scale(o, rng)) for w, p, o in self.mixture), self.spread)

    @property
    def mean_output(self) -> float:
        return sum(w * o for w, _, o in self.mixture) / sum(w for w, _, _ in self.mixture)

    @property
    def mean_tokens(self) -> float:
        return sum(w * (p + o) for w, p, o in self.mixture) / sum(w for w, _, _ in self.mixture)


def _scale(tokens: int, rng: random.Random) -> int:
    return max(1, round(tokens * math.pow(1.5, rng.uniform(-1.0, 1.0))))


UNIFORM = Lengths(((1.0, 512, 256),))
# A conversation service: mostly short answers, some long documents, some long answers.
MIXED = Lengths(((0.6, 256, 64), (0.25, 1024, 256), (0.1, 3000, 128), (0.05, 512, 1024)))
# Every fifth request is ten times as large as the rest.
OVERSIZED = Lengths(((0.8, 200, 100), (0.2, 2000, 1000)))
LONG_OUTPUTS = Lengths(((1.0, 256, 1536),), spread=0.3)

Arrival = tuple[float, int, int]
"""(seconds, prompt tokens, output tokens)"""


@dataclass(frozen=True, slots=True)
class Workload:
    """`clients` or `rates` by time, each a tuple of (from second, value); or arrivals listed one by one."""

    name: str
    lengths: Lengths = UNIFORM
    clients: tuple[tuple[float, int], ...] = ()
    rates: tuple[tuple[float, float], ...] = ()
    arrivals: tuple[Arrival, ...] = ()
    shared_prefix_ratio: float = 0.0
    """Share of requests whose prompts begin alike."""

    def open_arrivals(self, seconds: float, rng: random.Random) -> Iterator[Arrival]:
        """Arrivals that do not depend on answers, in order."""
        yield from (a for a in self.arrivals if a[0] < seconds)
        ends = [start for start, _ in self.rates[1:]] + [seconds]
        for (start, rate), end in zip(self.rates, ends, strict=True) if self.rates else ():
            at = start
            while rate > 0.0 and (at := at + rng.expovariate(rate)) < min(end, seconds):
                yield (at, *self.lengths.draw(rng))


def closed(clients: int, lengths: Lengths = UNIFORM) -> Workload:
    return Workload(f"closed {clients}", lengths, clients=((0.0, clients),))


def steps(values: Sequence[tuple[float, int]], lengths: Lengths = UNIFORM) -> Workload:
    return Workload("closed steps", lengths, clients=tuple(values))


def poisson(rate: float, lengths: Lengths = UNIFORM) -> Workload:
    return Workload(f"open {rate:.2f}/s", lengths, rates=((0.0, rate),))


def bursts(
    rate: float, factor: float, every_s: float, length_s: float, seconds: float, lengths: Lengths = UNIFORM
) -> Workload:
    """Poisson arrivals at `rate`, `factor` times that for `length_s` in every `every_s`."""
    starts = [every_s * i for i in range(int(seconds / every_s) + 1)]
    rates = [entry for s in starts for entry in ((s, rate), (s + every_s - length_s, rate * factor))]
    return Workload(f"bursts x{factor:g}", lengths, rates=tuple(rates))


def read_trace(path: Path, speed_up: float = 1.0, limit: int | None = None) -> Workload:
    """A CSV file with TIMESTAMP, ContextTokens, GeneratedTokens, played `speed_up` times as fast.

    Raises ValueError when a column is missing.
    """
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        missing = {"TIMESTAMP", "ContextTokens", "GeneratedTokens"} - set(reader.fieldnames or ())
        if missing:
            raise ValueError(f"the trace {path} lacks the columns {sorted(missing)}; name them in its first line")
        rows = [(_seconds(r["TIMESTAMP"]), int(r["ContextTokens"]), int(r["GeneratedTokens"])) for r in reader]
    rows = sorted(rows)[:limit]
    first = rows[0][0] if rows else 0.0
    arrivals = tuple(((at - first) / speed_up, max(1, prompt), max(1, output)) for at, prompt, output in rows)
    return Workload(f"trace {path.name} x{speed_up:g}", arrivals=arrivals)


def _seconds(stamp: str) -> float:
    """Seconds of a timestamp with up to seven digits of fraction, or of a plain number."""
    try:
        return float(stamp)
    except ValueError:
        whole, _, fraction = stamp.partition(".")
        return datetime.fromisoformat(whole).timestamp() + float(f"0.{fraction or 0}")
