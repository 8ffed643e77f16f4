"""What the measured steps of replicas on one GPU say about steps at any batch and any number of replicas.

Five numbers, none negative, are fitted to observations:

    step = own + own_sequence * batch + crowding * (shared + shared_sequence * batch + shared_prompt * prompts)

`own` is what a replica does beside the others (its CPU loop), `shared` what all of them ask of the one device. While
the device is mostly idle, replicas seldom meet there and crowding is near 1; once it is full, it grows by one for each
further replica. Both follow from the ratio of own to shared alone, by mean value analysis of a closed queueing network
(Reiser and Lavenberg, JACM 1980), see `crowding`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

Vector = list[float]
TERMS = 5
OWN_TERMS = 2
_UPPER = [(i, j) for i in range(TERMS) for j in range(i, TERMS)]
# The newest window weighs a quarter: four windows, one second, until a cell has forgotten.
CELL_BLEND = 0.25
# One cell counts at most as much as this many windows, so that a long stay in one place cannot drown the others.
CELL_MASS = 8.0
# What the SM reading says of the shared part of a step weighs as much as two windows: it decides while little else is
# known, and gives way to measured times, because it counts a device busy where few SMs work.
SM_MASS = 2.0
# Crowding follows from the terms and the terms from crowding: so many rounds at each fit, begun from the last answer.
ROUNDS = 2
# With several replicas at work the reading hides how much they wait for one another: then it only says how much they
# ask of the device at least (the utilization law: busy time = completions times demand).
SM_TELLS_UP_TO = 1.5
# Before anything is known, what part of a step each term is: mostly what grows with the batch, half of it shared. With
# it, one replica asks for a second wherever the SMs are busy less than about two thirds of the time, and so finds out.
# Where the reading of the weights was foreseen, its terms tell the parts.
PRIOR_SHARES = (0.1, 0.4, 0.1, 0.4, 0.0)
# The prior weighs as much as half a window.
PRIOR_MASS = 0.5
# An engine's own part of a step before any was measured: vLLM's loop takes 2 to 3 ms and about 20 us for each sequence.
UNMEASURED_OWN_S = 2.5e-3
# Until a fit: the cost of a sequence and of a prompt token of a small model; only their ratio matters before that.
UNMEASURED_SEQUENCE_S = 2e-5
UNMEASURED_PROMPT_S = 2e-6


def crowding(own_s: float, shared_s: float, replicas: float) -> float:
    """How many times `shared_s` a replica's step spends on the device, with `replicas` of them taking turns there."""
    if own_s <= 0.0 or shared_s <= 0.0:
        return max(1.0, replicas)
    times, before, queue = 1.0, 1.0, 0.0
    for n in range(1, math.ceil(replicas) + 1):
        before, times = times, 1.0 + queue
        queue = n * times * shared_s / (own_s + times * shared_s)
    return times - (times - before) * (math.ceil(replicas) - replicas) if replicas > 1.0 else 1.0


def features(batch: float, prompts: float) -> Vector:
    """One row of the fit for a replica alone; `prompts` is prompt tokens for each step."""
    return [1.0, batch, 1.0, batch, prompts]


class Cell:
    """The blended observations of one neighbourhood (replicas busy, size of batch), each row over its step time."""

    __slots__ = ("crowd", "mass", "moments", "replicas", "target")

    def __init__(self) -> None:
        self.mass = 0.0
        self.crowd = 1.0
        self.replicas = 1.0
        self.moments: Vector = [0.0] * len(_UPPER)
        self.target: Vector = [0.0] * TERMS

    def add(self, row: Vector, value: float, replicas: float = 1.0) -> None:
        """Blend in that `row` times the terms was `value`, with so many replicas busy."""
        blend = max(CELL_BLEND, 1.0 / (1.0 + self.mass))
        self.moments = [old + blend * (row[i] * row[j] - old) for old, (i, j) in zip(self.moments, _UPPER, strict=True)]
        self.target = [old + blend * (x * value - old) for old, x in zip(self.target, row, strict=True)]
        self.replicas += blend * (replicas - self.replicas) if self.mass else replicas - self.replicas
        self.mass = min(CELL_MASS, self.mass + 1.0)

    def fitted(self, terms: Vector) -> tuple[float, float]:
        """(own, shared) share of the steps seen here, by these terms, for a replica alone."""
        parts = [term * x for term, x in zip(terms, self.target, strict=True)]
        return sum(parts[:OWN_TERMS]), sum(parts[OWN_TERMS:])

    def weighted(self) -> Vector:
        """Moments and targets by mass, with the shared terms as crowded as the replicas are."""
        scale = [1.0] * OWN_TERMS + [self.crowd] * (TERMS - OWN_TERMS)
        moments = [self.mass * m * scale[i] * scale[j] for m, (i, j) in zip(self.moments, _UPPER, strict=True)]
        return moments + [self.mass * t * x for t, x in zip(self.target, scale, strict=True)]


def cell_key(replicas: float, batch: float) -> tuple[int, int]:
    """Cells are half an octave of batch wide."""
    return round(replicas), round(2 * math.log2(max(1.0, batch)))


@dataclass(slots=True)
class StepModel:
    """Non-negative least squares of relative errors: 10 % of a short step weighs like 10 % of a long one."""

    cells: dict[tuple[int, int], Cell] = field(default_factory=dict)
    sm: Cell = field(default_factory=Cell)
    sm_at_least: Cell = field(default_factory=Cell)
    prior: Vector | None = None
    terms: Vector = field(default_factory=lambda: [0.0] * TERMS)
    # No fit goes below these: what physics says, where noise and few observations would say less.
    least: Vector = field(default_factory=lambda: [0.0] * TERMS)
    most_replicas_seen: int = 0

    @staticmethod
    def foreseen(weights_read_s: float) -> StepModel:
        """Before anything was measured: a device that does no more at each step than read the weights."""
        own, sequence = UNMEASURED_OWN_S, UNMEASURED_SEQUENCE_S
        terms = [own, sequence, weights_read_s, 0.0, UNMEASURED_PROMPT_S]
        return StepModel(prior=terms, terms=list(terms), least=[0.0, 0.0, weights_read_s, 0.0, 0.0])

    def observe(self, batch: float, replicas: float, prompts: float, step_s: float, sm_ratio: float | None) -> None:
        """One window of one replica; `sm_ratio` None when no honest reading of the SMs is at hand."""
        row = [x / step_s for x in features(batch, prompts)]
        self.cells.setdefault(cell_key(replicas, batch), Cell()).add(row, 1.0, replicas)
        asked = [0.0, 0.0, *(replicas * x for x in row[OWN_TERMS:])]
        if sm_ratio is not None and replicas < SM_TELLS_UP_TO:
            self.sm.add(asked, sm_ratio)
        elif sm_ratio:
            self.sm_at_least.add([x / sm_ratio for x in asked], 1.0)
        self.most_replicas_seen = max(self.most_replicas_seen, round(replicas))

    def fit(self) -> None:
        """Refit all terms to all cells: projected Gauss-Seidel, started from the last answer."""
        for _ in range(ROUNDS if self.cells else 0):
            for cell in self.cells.values():
                cell.crowd = crowding(*cell.fitted(self.terms), cell.replicas)
            self._solve()

    def _solve(self) -> None:
        sums = [sum(column) for column in zip(*(c.weighted() for c in self.cells.values()), strict=True)]
        for told in self._told():
            sums = [total + SM_MASS * m for total, m in zip(sums, (*told.moments, *told.target), strict=True)]
        mass = sum(c.mass for c in self.cells.values())
        matrix = [[0.0] * TERMS for _ in range(TERMS)]
        for (i, j), value in zip(_UPPER, sums, strict=False):
            matrix[i][j] = matrix[j][i] = value
        target = sums[len(_UPPER) :]
        typical = [math.sqrt(matrix[i][i] / mass) for i in range(TERMS)]
        for i, share in enumerate(self._prior_shares(typical)):
            matrix[i][i] += PRIOR_MASS * typical[i] * typical[i] + 1e-12
            target[i] += PRIOR_MASS * typical[i] * share
        self.terms = _bounded(matrix, target, self.terms, self.least)

    def _told(self) -> list[Cell]:
        """What the SM reading adds to the fit; where it is only a bound, it counts while the terms are below it."""
        told = [self.sm] if self.sm.mass else []
        low = self.sm_at_least.mass > 0.0 and self.sm_at_least.fitted(self.terms)[1] < 1.0
        return [*told, self.sm_at_least] if low else told

    def _prior_shares(self, typical: Vector) -> Vector:
        """Which part of a typical step each term is expected to be."""
        if self.prior is None:
            return list(PRIOR_SHARES)
        parts = [term * x for term, x in zip(self.prior, typical, strict=True)]
        return [part / sum(parts) for part in parts]

    def step_s(self, batch: float, replicas: float, prompts: float) -> float:
        """The fit, corrected by what was measured in the same cell."""
        own, own_sequence, shared, shared_sequence, shared_prompt = self.terms
        own_s, shared_s = own + own_sequence * batch, shared + shared_sequence * batch + shared_prompt * prompts
        fitted = own_s + crowding(own_s, shared_s, replicas) * shared_s
        return fitted * self._correction(cell_key(replicas, batch))

    def _correction(self, key: tuple[int, int]) -> float:
        cell = self.cells.get(key)
        if cell is None:
            return 1.0
        own, shared = cell.fitted(self.terms)
        trust = cell.mass / (cell.mass + 1.0)
        return 1.0 + trust * (1.0 / max(own + cell.crowd * shared, 0.1) - 1.0)

    def measured(self, replicas: int) -> bool:
        """Whether this number of replicas was ever seen at work."""
        return any(k == replicas for k, _ in self.cells)

    @property
    def sequence_s(self) -> float:
        """What one more sequence adds to a replica's own step while it alone is busy."""
        return self.terms[1] + self.terms[3] or UNMEASURED_SEQUENCE_S

    @property
    def prompt_s(self) -> float:
        """What one prompt token adds to a step."""
        return self.terms[4] or UNMEASURED_PROMPT_S


def _bounded(matrix: list[Vector], target: Vector, start: Vector, least: Vector, sweeps: int = 12) -> Vector:
    x = list(start)
    for _ in range(sweeps):
        for i, row in enumerate(matrix):
            rest = sum(a * b for a, b in zip(row, x, strict=True)) - row[i] * x[i]
            x[i] = max(least[i], (target[i] - rest) / row[i])
    return x
