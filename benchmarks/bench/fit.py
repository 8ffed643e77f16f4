"""Leaves out the largest workloads where the processes of a stage would not fit into the GPU's memory. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.bench.plan import Kind, Plan, Round, Skip, Stage, group_of, kv_tokens

GIB = 1 << 30
# Beyond its KV cache an OPT-125m engine took 1.8 to 2.3 GiB on an H200, 0.25 GiB of it weights.
ENGINE_BYTES = 2.1 * GIB
HF_BYTES = 0.8 * GIB
USABLE_RATIO = 0.93


@dataclass(frozen=True, slots=True)
class Room:
    """The device's memory and what a model takes of it, in bytes."""

    total_bytes: int
    weights_bytes: int
    kv_bytes_per_token: int


def needed_bytes(rounds: Sequence[Round], room: Room) -> float:
    """What a stage's processes hold once all are started: engines, their KV caches, Hugging Face processes."""
    needed = 0.0
    for group in ("vllm", "unmixed"):
        mine = [r for r in rounds if group_of(r.cell) == group]
        for rank in range(max((r.cell.processes for r in mine), default=0)):
            needed += ENGINE_BYTES + room.weights_bytes + kv_tokens(mine, rank) * room.kv_bytes_per_token
    hf = max((r.cell.processes for r in rounds if r.cell.is_hf), default=0)
    return needed + hf * (HF_BYTES + room.weights_bytes)


def fitted(plan: Plan, room: Room) -> Plan:
    """The plan without the batches that are too large for this GPU, the largest first. What cannot be helped so stays:
    an engine that finds no memory says so itself."""
    stages = dict(plan.stages)
    skipped = list(plan.skipped)
    usable_bytes = USABLE_RATIO * room.total_bytes
    for stage in (Stage.APART, Stage.MPS):
        while (needed := needed_bytes(stages[stage], room)) > usable_bytes and (largest := _largest(stages[stage])):
            reason = f"the stage would need {needed / GIB:.0f} GiB of GPU memory, {usable_bytes / GIB:.0f} may be used"
            dropped = {r.cell for r in stages[stage] if r.cell.workload.name == largest}
            skipped += [Skip(cell.facts(), reason) for cell in sorted(dropped, key=lambda c: (c.system, c.processes))]
            stages[stage] = tuple(r for r in stages[stage] if r.cell not in dropped)
    return Plan(stages, tuple(skipped))


def _largest(rounds: Sequence[Round]) -> str | None:
    """The engines' batch or closed loop that holds the most tokens, while there is a smaller one."""
    sizes = {
        r.cell.workload.name: r.cell.workload.at_once * (r.cell.workload.prompt_tokens + r.cell.workload.output_tokens)
        for r in rounds
        if not r.cell.is_hf and r.cell.workload.kind is not Kind.TRACE
    }
    return max(sizes, key=lambda name: sizes[name]) if len(sizes) > 1 else None
