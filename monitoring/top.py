"""The board in a terminal: `splitwiser top`, a live view, and `splitwiser status`, the same once as data."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from rich.bar import Bar
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from balancer.board import Board, BoardError
from balancer.counters import CHOICES, EJECTIONS, REJECTIONS, CountersReader, RouterTotals
from balancer.readings import GpuReading, GpuSource, ReplicaReading, ReplicaState, Snapshot
from monitoring.exposition import replica_tag

# Replicas write four times a second, the sampler 25 times: what is older than this is not true any more.
STALE_AFTER_S = 2.0
_GIB = 1 << 30
_BAR_CELLS = 20
_STATE_STYLE = {
    ReplicaState.READY: "green",
    ReplicaState.STARTING: "yellow",
    ReplicaState.DRAINING: "yellow",
    ReplicaState.FAILED: "bold red",
}


@dataclass(frozen=True, slots=True)
class Frame:
    """What is on the board at one moment."""

    snapshot: Snapshot
    totals: RouterTotals


@contextmanager
def watching(board_path: Path, clock: Callable[[], float]) -> Iterator[Callable[[], Frame]]:
    """A function that looks at the board. Raises BoardError, here or from it, when there is none (any more)."""
    _require(board_path)
    board, counters = Board.open(board_path), CountersReader(board_path)

    def look() -> Frame:
        if board.replaced():
            raise BoardError(f"the board {board_path} is gone: the system was stopped or started anew")
        return Frame(board.snapshot(clock()), counters.read())

    try:
        yield look
    finally:
        board.close()


def _require(board_path: Path) -> None:
    if not board_path.exists():
        raise BoardError(f"there is no board at {board_path}: start the system with `splitwiser serve` first")


def status(board_path: Path, clock: Callable[[], float] = time.monotonic) -> dict[str, Any]:
    """GPUs, replicas and routers as data for JSON, None for what is unknown. Raises BoardError without a board."""
    with watching(board_path, clock) as look:
        frame = look()
    now_s = frame.snapshot.now_s
    return {
        "board": str(board_path),
        "ready": len(frame.snapshot.ready(STALE_AFTER_S)),
        "gpus": [_gpu_status(gpu, now_s) for gpu in frame.snapshot.gpus],
        "replicas": [_replica_status(r, now_s, frame.totals) for r in frame.snapshot.replicas],
        "torn_slots": list(frame.snapshot.torn_slots),
        "router": _router_status(frame.totals),
    }


def _gpu_status(gpu: GpuReading, now_s: float) -> dict[str, Any]:
    return {
        "gpu": gpu.index,
        "source": gpu.source.name.lower(),
        "sm_ratio": gpu.sm_ratio,
        "sm_occupancy_ratio": gpu.sm_occupancy_ratio,
        "dram_bandwidth_ratio": gpu.dram_bandwidth_ratio,
        "memory_used_bytes": gpu.memory_used_bytes,
        "memory_size_bytes": gpu.memory_total_bytes,
        "memory_reserve_bytes": gpu.memory_reserve_bytes,
        "power_watts": gpu.power_w,
        "temperature_celsius": gpu.temperature_c,
        "sm_clock_hertz": gpu.sm_clock_hz,
        "age_seconds": round(now_s - gpu.taken_at_s, 3),
    }


def _replica_status(replica: ReplicaReading, now_s: float, totals: RouterTotals) -> dict[str, Any]:
    age_s = now_s - replica.written_at_s
    return {
        "slot": replica.slot,
        "replica_id": replica.replica_id,
        "gpu": replica.gpu,
        "state": replica.state.name.lower(),
        "stale": age_s > STALE_AFTER_S,
        "age_seconds": round(age_s, 3),
        "active": replica.slot in totals.active,
        "in_flight_requests": replica.in_flight_requests,
        "on_the_way_requests": replica.on_the_way_requests,
        "running_requests": replica.running_requests,
        "waiting_requests": replica.waiting_requests,
        "kv_ratio": round(replica.kv_ratio, 4),
        "kv_size_tokens": replica.kv_tokens_total,
        "step_seconds": replica.step_time_s,
        "prompt_tokens_total": replica.prompt_tokens_total,
        "output_tokens_total": replica.output_tokens_total,
        "preemptions_total": replica.preemptions_total,
        "received_requests_total": replica.received_total,
        "finished_requests_total": replica.finished_total,
        "gpu_memory_bytes": replica.gpu_memory_bytes,
    }


def _router_status(totals: RouterTotals) -> dict[str, Any]:
    return {
        "routers": totals.routers,
        "queue_requests": totals.queue_length,
        "decisions_total": decided(totals),
        "decisions_by_reason": {
            f"{policy}/{reason}": sum(counts[choice] for counts in totals.decisions)
            for choice, (policy, reason) in enumerate(CHOICES)
        },
        "rejections_total": dict(zip(REJECTIONS, totals.rejections, strict=True)),
        "ejections_total": dict(zip(EJECTIONS, totals.ejections, strict=True)),
        "lost_total": totals.lost,
        "cancelled_total": totals.cancelled,
        "active_slots": sorted(totals.active),
    }


def decided(totals: RouterTotals) -> int:
    """Requests assigned, by all routers to all slots."""
    return sum(map(sum, totals.decisions))


def top(
    board_path: Path,
    interval_s: float = 1.0,
    *,
    frames: int | None = None,
    console: Console | None = None,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Redraw every `interval_s` until Ctrl-C (or for so many `frames`). Raises BoardError without a board."""
    with watching(board_path, clock) as look, Live(console=console, auto_refresh=False) as live:
        before = look()
        try:
            for number in count(1):
                now = look()
                live.update(draw(now, before), refresh=True)
                before = now
                if number == frames:
                    return
                sleep(interval_s)
        except KeyboardInterrupt:
            return


def draw(now: Frame, before: Frame) -> RenderableType:
    """One picture; rates are taken between the two frames."""
    gpus = [_gpu_table(gpu, now.snapshot.now_s) for gpu in now.snapshot.gpus]
    none = [] if gpus else [Text("no GPU reading: the sampler has not written yet", style="yellow")]
    return Group(*gpus, *none, _replica_table(now, before), _router_line(now, before))


def _gpu_table(gpu: GpuReading, now_s: float) -> Table:
    name = "host" if gpu.source is GpuSource.HOST else f"GPU {gpu.index}"
    age_s = now_s - gpu.taken_at_s
    table = Table.grid(padding=(0, 1))
    table.add_row(Text(name, style="bold"), *_meter("CPU" if gpu.source is GpuSource.HOST else "SM", gpu.sm_ratio))
    if gpu.dram_bandwidth_ratio is not None:
        table.add_row("", *_meter("DRAM", gpu.dram_bandwidth_ratio))
    used = gpu.memory_used_bytes / gpu.memory_total_bytes if gpu.memory_total_bytes else None
    table.add_row("", *_meter("memory", used), _memory_words(gpu))
    facts = (("W", gpu.power_w), ("°C", gpu.temperature_c), ("MHz", gpu.sm_clock_hz and gpu.sm_clock_hz / 1e6))
    known = [f"{value:.0f} {unit}" for unit, value in facts if value is not None]
    old = [Text(f"stale: {age_s:.0f} s old", style="bold red")] if age_s > STALE_AFTER_S else []
    table.add_row("", gpu.source.name.lower(), Text(" · ".join(known)), *old)
    return table


def _meter(name: str, ratio: float | None) -> tuple[RenderableType, ...]:
    if ratio is None:
        return name, Text("unknown", style="dim")
    colour = "red" if ratio > 0.95 else "yellow" if ratio > 0.8 else "green"
    return name, Bar(1.0, 0.0, ratio, width=_BAR_CELLS, color=colour), f"{ratio:4.0%}"


def _memory_words(gpu: GpuReading) -> Text:
    spare = gpu.memory_free_bytes - gpu.memory_reserve_bytes
    words = f"{gpu.memory_used_bytes / _GIB:.1f} of {gpu.memory_total_bytes / _GIB:.1f} GiB"
    if spare < 0:
        return Text(f"{words}, reserve breached by {-spare / _GIB:.1f} GiB", style="bold red")
    return Text(f"{words}, {spare / _GIB:.1f} GiB above the reserve")


def _replica_table(now: Frame, before: Frame) -> Table:
    table = Table(box=None, header_style="dim", pad_edge=False)
    for heading in ("slot", "replica", "state"):
        table.add_column(heading)
    for heading in ("run", "wait", "flight", "KV", "step", "tok/s", "preempt", "GiB"):
        table.add_column(heading, justify="right")
    for replica in now.snapshot.replicas:
        table.add_row(*_replica_cells(replica, now, before))
    for slot in now.snapshot.torn_slots:
        table.add_row(str(slot), "", Text("torn", style="bold red"))
    return table


def _replica_cells(replica: ReplicaReading, now: Frame, before: Frame) -> tuple[RenderableType, ...]:
    spared = replica.state is ReplicaState.READY and now.totals.active and replica.slot not in now.totals.active
    mark = " (spared)" if spared else ""
    return (
        str(replica.slot),
        replica_tag(replica.replica_id),
        _state_words(replica, now.snapshot.now_s) + Text(mark, style="dim"),
        str(replica.running_requests),
        str(replica.waiting_requests),
        f"{replica.in_flight_requests}+{replica.on_the_way_requests}",
        Text(f"{replica.kv_ratio:.0%}", style="red" if replica.kv_ratio > 0.95 else ""),
        f"{replica.step_time_s * 1e3:.1f} ms",
        _token_rate(replica, now, before),
        str(replica.preemptions_total),
        f"{replica.gpu_memory_bytes / _GIB:.1f}",
    )


def _state_words(replica: ReplicaReading, now_s: float) -> Text:
    age_s = now_s - replica.written_at_s
    if age_s > STALE_AFTER_S:
        return Text(f"silent for {age_s:.0f} s", style="bold red")
    return Text(replica.state.name.lower(), style=_STATE_STYLE.get(replica.state, ""))


def _token_rate(replica: ReplicaReading, now: Frame, before: Frame) -> str:
    gap_s = now.snapshot.now_s - before.snapshot.now_s
    same = next((r for r in before.snapshot.replicas if r.replica_id == replica.replica_id), None)
    if same is None or gap_s <= 0:
        return "-"
    return f"{(replica.output_tokens_total - same.output_tokens_total) / gap_s:.0f}"


def _router_line(now: Frame, before: Frame) -> Text:
    gap_s = now.snapshot.now_s - before.snapshot.now_s
    rate = f"{(decided(now.totals) - decided(before.totals)) / gap_s:.1f}" if gap_s > 0 else "-"
    line = Text(f"{now.totals.routers} routers · {rate} requests/s · {now.totals.queue_length} waiting · refused: ")
    refused = [f"{n} {reason}" for reason, n in zip(REJECTIONS, now.totals.rejections, strict=True) if n]
    return line.append(", ".join(refused) or "none", style="red" if refused else "green")
