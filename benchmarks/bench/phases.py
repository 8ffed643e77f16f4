"""From when each request began, had its first token and ended: phases, throughput, latency. Pure arithmetic.

Times are monotonic seconds. The phases are Splitwiser's: a request is in its *prompt* phase from `begun_s` to its
first token and in its *token* phase from there to its end; a system is in a phase while any of its requests is. Under
mixed batching, or with several processes, both phases run at once, and then prompt + token is longer than the whole.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

Span = tuple[float, float]
STEADY_PART = (0.25, 0.75)
"""Steady state: this part of a run, which leaves out filling and draining."""


@dataclass(frozen=True, slots=True)
class Served:
    """One request, failed where `tokens` is 0. It should have gone out at `due_s`; work could begin at `begun_s`."""

    due_s: float
    begun_s: float
    first_s: float
    ended_s: float
    tokens: int

    @property
    def ttft_s(self) -> float:
        return self.first_s - self.due_s

    @property
    def tpot_s(self) -> float | None:
        """Seconds for each token after the first; None where there is none."""
        return (self.ended_s - self.first_s) / (self.tokens - 1) if self.tokens > 1 else None


@dataclass(frozen=True, slots=True)
class Limits:
    """What an answer must keep to count as good (goodput: good answers in a second)."""

    ttft_s: float = 1.0
    tpot_s: float = 0.05

    def kept(self, request: Served) -> bool:
        return request.ttft_s <= self.ttft_s and (request.tpot_s or 0.0) <= self.tpot_s


USUAL_LIMITS = Limits()


def covered_s(spans: Iterable[Span]) -> float:
    """Length of the union of the spans."""
    total, end = 0.0, -math.inf
    for start, stop in sorted(spans):
        total += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return total


def prompt_spans(requests: Iterable[Served]) -> list[Span]:
    return [(r.begun_s, r.first_s) for r in requests]


def token_spans(requests: Iterable[Served]) -> list[Span]:
    return [(r.first_s, r.ended_s) for r in requests]


def steady_tokens_per_s(made: Sequence[tuple[float, int]], start_s: float, end_s: float) -> float:
    """Output tokens a second in the STEADY_PART of [start, end]; `made` lists (when, how many)."""
    length_s = end_s - start_s
    begin, stop = (start_s + part * length_s for part in STEADY_PART)
    return sum(count for at, count in made if begin < at <= stop) / (stop - begin)


def quantile(values: Sequence[float], q: float) -> float | None:
    """The value that `q` of the values do not exceed (nearest rank); None of nothing."""
    return sorted(values)[max(0, math.ceil(q * len(values)) - 1)] if values else None


def measured(
    requests: Sequence[Served], made: Sequence[tuple[float, int]], go_s: float, limits: Limits
) -> dict[str, Any]:
    """The measured part of a row.

    wall_s                  from `go_s` to the last answer: end-to-end time
    prompt_s, token_s       how long the system was in that phase; overlap_s: in both at once
    output_tokens_per_s     all output tokens over wall_s
    steady_tokens_per_s     see STEADY_PART
    ttft_s_*, tpot_s_*      of the answered requests, by nearest rank
    goodput_per_s           answers within `limits` a second
    """
    good = [r for r in requests if r.tokens]
    wall_s = max(r.ended_s for r in requests) - go_s
    prompt_s, token_s = covered_s(prompt_spans(good)), covered_s(token_spans(good))
    either_s = covered_s([*prompt_spans(good), *token_spans(good)])
    tpots = [t for r in good if (t := r.tpot_s) is not None]
    ttfts = [r.ttft_s for r in good]
    return {
        "requests": len(requests),
        "failed": len(requests) - len(good),
        "wall_s": wall_s,
        "prompt_s": prompt_s,
        "token_s": token_s,
        "overlap_s": prompt_s + token_s - either_s,
        "output_tokens": sum(r.tokens for r in good),
        "requests_per_s": len(good) / wall_s,
        "output_tokens_per_s": sum(r.tokens for r in good) / wall_s,
        "steady_tokens_per_s": steady_tokens_per_s(made, go_s, go_s + wall_s),
        "ttft_s_p50": quantile(ttfts, 0.5),
        "ttft_s_p99": quantile(ttfts, 0.99),
        "tpot_s_p50": quantile(tpots, 0.5),
        "tpot_s_p99": quantile(tpots, 0.99),
        "goodput_per_s": sum(limits.kept(r) for r in good) / wall_s,
    }


@dataclass(frozen=True, slots=True)
class Spread:
    """The median of several runs, with the least and the greatest."""

    median: float
    low: float
    high: float
    runs: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Raises ValueError of no values."""
        return cls(statistics.median(values), min(values), max(values), len(values))


def saved(base_s: float, other_s: float) -> float:
    """The part of `base_s` that the other system does not need; negative where it needs more."""
    return 1.0 - other_s / base_s
