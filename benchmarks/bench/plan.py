"""What the bench runs on a machine: systems, workloads, rounds in order of value, and what is left out, and why. Pure.

A *stage* starts all its processes once and then measures round after round on them, while those that a round does not
use wait idle: engines take half a minute to start, a round takes seconds. There are three: processes without MPS, the
same as MPS clients, and the served system. A *cell* is one system with one number of processes under one workload; a
*round* is one run of it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

SYSTEMS = (
    "vllm-single",
    "vllm-mp",
    "vllm-mps",
    "vllm-mixed-off",
    "hf-sequential",
    "hf-split",
    "hf-split-mps",
    "splitwiser-serve",
)
WITH_MPS = frozenset({"vllm-mps", "hf-split-mps"})


class Stage(StrEnum):
    APART = "apart"
    MPS = "mps"
    SERVED = "served"


class Kind(StrEnum):
    BATCH = "batch"
    CLOSED = "closed loop"
    TRACE = "trace"


@dataclass(frozen=True, slots=True)
class Workload:
    """What is asked. A batch is sent at once, or as a row of batches, at most `limit` requests under way; a closed loop
    keeps `limit` under way; a trace has its times.

    Lengths in tokens; of a closed loop the means, of a trace the greatest. `tier` 1 is measured first.
    """

    name: str
    kind: Kind
    requests: int
    prompt_tokens: int
    output_tokens: int
    tier: int = 1
    limit: int | None = None
    radiology: bool = False

    @property
    def at_once(self) -> int:
        return min(self.requests, self.limit or self.requests)


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much is asked. The seed's own sizes, or, with `--quick`, what two CPU cores do in minutes.

    `long_batches` maps each batch of the seed's second workload to its tier.
    """

    radiology_requests: int = 160
    radiology_prompt: int = 512
    radiology_output: int = 20
    batch: int = 20
    long_tokens: int = 1024
    long_batches: Mapping[int, int] = field(default_factory=lambda: {10: 1, 160: 1, 40: 2, 80: 3, 20: 3})
    closed_clients: int = 64
    closed_requests: int = 256
    closed_prompt: int = 256
    closed_output: int = 256
    trace_seconds: float = 10.0
    trace_speed: float = 8.0
    trace_scale: float = 1.0
    max_model_len: int = 2048
    vllm_processes: tuple[int, ...] = (2, 4)
    hf_processes: tuple[int, ...] = (2, 4, 8)
    replicas: int = 4
    hf_round_limit_s: float = 15.0


FULL = Sizes()
QUICK = Sizes(
    radiology_requests=40,
    radiology_prompt=256,
    long_tokens=96,
    long_batches={10: 1, 40: 1},
    closed_clients=8,
    closed_requests=32,
    closed_prompt=64,
    closed_output=32,
    trace_seconds=8.0,
    trace_speed=3.0,
    trace_scale=0.1,
    max_model_len=1024,
    vllm_processes=(2,),
    hf_processes=(2, 4),
    replicas=2,
)


@dataclass(frozen=True, slots=True)
class Cost:
    """Rough costs of one process, only to know how long a round takes before it was run once; starts in seconds."""

    prefill_tokens_per_s: float
    step_s: float
    step_s_per_sequence: float
    hf_step_s: float
    hf_step_s_per_sequence: float
    start_s: Mapping[Stage, float]
    hf_prefill_tokens_per_s: float = 400_000.0
    round_s: float = 0.4


H200 = Cost(400_000, 0.0025, 2.5e-5, 0.012, 5e-5, {Stage.APART: 45, Stage.MPS: 45, Stage.SERVED: 150})
TWO_CORES = Cost(15_000, 0.015, 5e-4, 0.02, 1e-3, {Stage.APART: 100, Stage.MPS: 0, Stage.SERVED: 150}, 8_000.0)


@dataclass(frozen=True, slots=True)
class Machine:
    """What is there. `no_mps`, `no_hf` and `no_vllm` say what is missing; None: it is there."""

    gpu: str | None = None
    cores: int = 2
    no_mps: str | None = None
    no_hf: str | None = None
    no_vllm: str | None = None


@dataclass(frozen=True, slots=True)
class Cell:
    system: str
    processes: int
    workload: Workload

    @property
    def stage(self) -> Stage:
        if self.system == "splitwiser-serve":
            return Stage.SERVED
        return Stage.MPS if self.system in WITH_MPS else Stage.APART

    @property
    def is_hf(self) -> bool:
        return self.system.startswith("hf-")

    def share(self, rank: int) -> int:
        """Requests of process `rank`, dealt one by one."""
        return len(range(rank, self.workload.requests, self.processes))

    def facts(self) -> dict[str, Any]:
        w = self.workload
        lengths = {"requests": w.requests, "prompt_tokens": w.prompt_tokens, "output_tokens_each": w.output_tokens}
        name = {"system": self.system, "processes": self.processes, "mps": self.stage is Stage.MPS}
        return {**name, "workload": w.name, "workload_kind": str(w.kind), "limit": w.limit, **lengths}


def group_of(cell: Cell) -> str:
    """Which of a stage's groups of alike processes a cell uses: `vllm`, `unmixed` or `hf`."""
    if cell.is_hf:
        return "hf"
    return "unmixed" if cell.system == "vllm-mixed-off" else "vllm"


@dataclass(frozen=True, slots=True)
class Round:
    cell: Cell
    repeat: int
    tier: int

    def facts(self) -> dict[str, Any]:
        return {**self.cell.facts(), "repeat": self.repeat, "tier": self.tier}


@dataclass(frozen=True, slots=True)
class Skip:
    """A cell that is not run, and why."""

    facts: Mapping[str, Any]
    reason: str


@dataclass(frozen=True, slots=True)
class Plan:
    """Rounds by stage, in the order in which they are run, and what is left out."""

    stages: Mapping[Stage, tuple[Round, ...]]
    skipped: tuple[Skip, ...]


def workloads(sizes: Sizes, trace_requests: int) -> list[Workload]:
    """`trace_requests` 0: no trace was given."""
    s = sizes
    radiology = Workload(
        f"radiology {s.radiology_prompt}/{s.radiology_output}",
        Kind.BATCH,
        s.radiology_requests,
        s.radiology_prompt,
        s.radiology_output,
        limit=s.batch,
        radiology=True,
    )
    long = [
        Workload(f"{s.long_tokens}/{s.long_tokens}, batch {batch}", Kind.BATCH, batch, s.long_tokens, s.long_tokens, t)
        for batch, t in s.long_batches.items()
    ]
    name = f"closed loop, {s.closed_clients} clients"
    closed = Workload(name, Kind.CLOSED, s.closed_requests, s.closed_prompt, s.closed_output, 2, s.closed_clients)
    trace = Workload("Azure trace", Kind.TRACE, trace_requests, s.max_model_len // 2, s.max_model_len // 2, 2)
    return [radiology, *long, closed, trace]


def make_plan(
    machine: Machine, sizes: Sizes, cost: Cost, systems: Sequence[str], repeats: int, trace_requests: int = 0
) -> Plan:
    """The rounds of the wanted systems. Within a stage lower tiers go first, and repeats of a tier go round by round,
    so that whatever the time ends, every cell before it has as many repeats as its neighbours."""
    cells: list[Cell] = []
    skipped: list[Skip] = []
    for cell in _cells(sizes, systems, trace_requests):
        reason = why_not(cell, machine, sizes, cost)
        if reason is None:
            cells.append(cell)
        else:
            skipped.append(Skip(cell.facts(), reason))
    stages = {stage: tuple(_rounds([c for c in cells if c.stage is stage], repeats)) for stage in Stage}
    return Plan(stages, tuple(skipped))


def _cells(sizes: Sizes, systems: Sequence[str], trace_requests: int) -> Iterator[Cell]:
    numbers = {
        "vllm-mp": sizes.vllm_processes,
        "vllm-mps": sizes.vllm_processes,
        "hf-split": sizes.hf_processes,
        "hf-split-mps": sizes.hf_processes,
        "splitwiser-serve": (sizes.replicas,),
    }
    for system, workload in itertools.product(systems, workloads(sizes, trace_requests)):
        yield from (Cell(system, number, workload) for number in numbers.get(system, (1,)))


def why_not(cell: Cell, machine: Machine, sizes: Sizes, cost: Cost) -> str | None:
    """Why this cell is not run here, or None."""
    if cell.system in WITH_MPS and machine.no_mps:
        return machine.no_mps
    if cell.is_hf and machine.no_hf:
        return machine.no_hf
    if not cell.is_hf and machine.no_vllm:
        return machine.no_vllm
    if cell.workload.kind is Kind.TRACE and not cell.workload.requests:
        return "no trace was given (--trace FILE)"
    if cell.is_hf and cell.workload.kind is not Kind.BATCH:
        return "Hugging Face `generate` runs a batch from its first to its last token: nothing can join it"
    if cell.workload.kind is Kind.TRACE and 1 < cell.processes < max(sizes.vllm_processes):
        return "the trace is replayed on one engine and on the most"
    if cell.is_hf and (seconds := estimate_s(cell, cost, sizes)) > sizes.hf_round_limit_s:
        return f"one round would take about {seconds:.0f} s; a Hugging Face round may take {sizes.hf_round_limit_s:g} s"
    if cell.workload.at_once < cell.processes:
        return f"{cell.workload.at_once} requests leave some of {cell.processes} processes without work"
    return None


def _rounds(cells: Iterable[Cell], repeats: int) -> list[Round]:
    cells = list(cells)
    rounds = [Round(cell, repeat, tier(cell, cells)) for repeat in range(repeats) for cell in cells]
    return sorted(rounds, key=lambda r: (r.tier, r.repeat))


def tier(cell: Cell, among: Sequence[Cell]) -> int:
    """When a cell's turn comes: its workload's tier, but
    closed loops and the trace come first where they are served, which is what they are for;
    without mixed batching only the radiology and the largest long batch come early;
    Hugging Face's long batches, slow as they are, come late, the smallest before the others."""
    w = cell.workload
    if cell.is_hf and not w.radiology:
        return 3 if w.requests == min(c.workload.requests for c in among if c.system == cell.system) else 4
    if cell.stage is Stage.SERVED and w.kind is not Kind.BATCH:
        return 1
    if cell.system != "vllm-mixed-off" or w.radiology:
        return w.tier
    mine = [c.workload for c in among if c.system == cell.system and c.workload.kind is Kind.BATCH]
    return w.tier if w == max(mine, key=lambda m: m.requests * m.output_tokens) else 3


def estimate_s(cell: Cell, cost: Cost, sizes: Sizes) -> float:
    """About how long one round takes."""
    w = cell.workload
    if w.kind is Kind.TRACE:
        return sizes.trace_seconds + 2.0 + cost.round_s
    if not cell.is_hf:
        steps = w.requests / w.at_once * w.output_tokens
        step_s = cost.step_s + cost.step_s_per_sequence * w.at_once
        return w.requests * w.prompt_tokens / cost.prefill_tokens_per_s + steps * step_s + cost.round_s
    pairs = max(1, cell.processes // 2)
    size = min(sizes.batch, -(-w.requests // pairs))
    waves = -(-w.requests // (size * pairs))
    prompt_s = size * w.prompt_tokens / cost.hf_prefill_tokens_per_s
    return waves * (prompt_s + w.output_tokens * (cost.hf_step_s + cost.hf_step_s_per_sequence * size)) + cost.round_s


def reserve_s(plan: Plan, after: Stage, cost: Cost, sizes: Sizes) -> float:
    """What the stages after one need for their starts and the rounds of their first tier."""
    later = [stage for stage in list(Stage)[list(Stage).index(after) + 1 :] if plan.stages[stage]]
    rounds_s = [estimate_s(r.cell, cost, sizes) for stage in later for r in plan.stages[stage] if r.tier == 1]
    return sum(cost.start_s[stage] for stage in later) + sum(rounds_s)


def plan_s(plan: Plan, cost: Cost, sizes: Sizes, tier: int) -> float:
    """About how long the plan takes down to a tier."""
    rounds = [r for rounds in plan.stages.values() for r in rounds if r.tier <= tier]
    starts = {r.cell.stage for r in rounds}
    return sum(cost.start_s[s] for s in starts) + sum(estimate_s(r.cell, cost, sizes) for r in rounds)


def kv_tokens(rounds: Iterable[Round], rank: int) -> int:
    """The most KV tokens that engine `rank` of vllm-single, -mp and -mps holds at once, so that batches and
    closed loops never preempt. A trace takes what is there."""
    shares = [
        (-(-c.workload.at_once // c.processes) * (c.workload.prompt_tokens + c.workload.output_tokens))
        for c in (r.cell for r in rounds)
        if not c.is_hf and rank < c.processes and c.workload.kind is not Kind.TRACE
    ]
    return max(shares, default=0)
