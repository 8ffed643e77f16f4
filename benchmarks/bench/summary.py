"""Rows to tables: medians and spreads of every cell, and what each system saves against its baseline. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.bench.phases import Spread, saved

Json = dict[str, Any]
Key = tuple[str, str, int]
"""(workload, system, processes)"""
PHASES = ("prompt", "token", "prompt + token")
_PHASE_KEYS = {"prompt": "prompt_s", "token": "token_s", "prompt + token": "wall_s"}


@dataclass(frozen=True, slots=True)
class Summary:
    """One cell's repeats."""

    workload: str
    kind: str
    system: str
    processes: int
    rows: tuple[Json, ...]

    @property
    def label(self) -> str:
        return self.system if self.processes == 1 else f"{self.system} x{self.processes}"

    def spread(self, name: str) -> Spread | None:
        """Of a measured value over the repeats; `device.sm_ratio` reaches inside. None where nothing was measured."""
        values = [v for row in self.rows if (v := _inside(row, name)) is not None]
        return Spread.of(values) if values else None

    def median(self, name: str) -> float | None:
        spread = self.spread(name)
        return None if spread is None else spread.median


def _inside(row: Json, name: str) -> float | None:
    value: Any = row
    for part in name.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return None if value is None else float(value)


def summaries(rows: Iterable[Json]) -> dict[Key, Summary]:
    """Every measured cell, in the order in which workloads and systems first appear."""
    found: dict[Key, list[Json]] = {}
    for row in rows:
        if row["kind"] == "round":
            found.setdefault((row["workload"], row["system"], row["processes"]), []).append(row)
    return {key: Summary(key[0], cell[0]["workload_kind"], key[1], key[2], tuple(cell)) for key, cell in found.items()}


def workloads(cells: Iterable[Summary]) -> list[str]:
    return list(dict.fromkeys(cell.workload for cell in cells))


def baseline(cell: Summary, cells: dict[Key, Summary]) -> Summary | None:
    """What a cell is compared with: one process of the same software under the same workload."""
    name = "hf-sequential" if cell.system.startswith("hf-") else "vllm-single"
    return cells.get((cell.workload, name, 1))


def gain(cell: Summary, base: Summary | None, name: str = "output_tokens_per_s") -> float | None:
    """How many times the baseline's median."""
    if base is None or not base.median(name) or cell.median(name) is None:
        return None
    return (cell.median(name) or 0.0) / (base.median(name) or 1.0)


def time_saved(cell: Summary, base: Summary | None) -> dict[str, float]:
    """The part of the baseline's median time that is saved in each phase; empty without a baseline."""
    if base is None or cell is base:
        return {}
    pairs = {phase: (base.median(key), cell.median(key)) for phase, key in _PHASE_KEYS.items()}
    return {phase: saved(was, now) for phase, (was, now) in pairs.items() if was and now is not None}


# Tables, as rows of text


def number(value: float | None, digits: int = 3) -> str:
    """At most `digits` significant ones, thousands in full."""
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 10 ** (digits - 1) else f"{value:.{digits}g}"


def spread_text(spread: Spread | None, scale: float = 1.0) -> str:
    """median (least to greatest)"""
    if spread is None:
        return ""
    median = number(spread.median * scale)
    return median if spread.runs == 1 else f"{median} ({number(spread.low * scale)} to {number(spread.high * scale)})"


def percent(value: float | None) -> str:
    return "" if value is None else f"{value:.0%}"


BATCH_COLUMNS = (
    "system", "runs", "end to end, s", "output tokens/s", "of one process", "steady tokens/s", "prompt phase, s",
    "token phase, s", "saved: prompt", "token", "prompt + token", "SM", "SM occupancy", "DRAM", "failed",
)  # fmt: skip


def batch_table(workload: str, cells: dict[Key, Summary]) -> list[list[str]]:
    """The cells of a batch workload, see BATCH_COLUMNS."""
    return [_batch_row(c, baseline(c, cells)) for c in cells.values() if c.workload == workload]


def _batch_row(cell: Summary, base: Summary | None) -> list[str]:
    part = time_saved(cell, base)
    ratio = gain(cell, base)
    return [
        cell.label,
        str(len(cell.rows)),
        spread_text(cell.spread("wall_s")),
        spread_text(cell.spread("output_tokens_per_s")),
        "" if ratio is None else f"{ratio:.2f}x",
        spread_text(cell.spread("steady_tokens_per_s")),
        spread_text(cell.spread("prompt_s")),
        spread_text(cell.spread("token_s")),
        *(percent(part.get(phase)) for phase in PHASES),
        *(percent(cell.median(f"device.{n}_ratio")) for n in ("sm", "sm_occupancy", "dram_bandwidth")),
        _failed(cell),
    ]


STREAM_COLUMNS = (
    "system", "runs", "output tokens/s", "steady tokens/s", "first token p50, ms", "p99, ms", "further token p50, ms",
    "p99, ms", "goodput/s", "SM", "DRAM", "failed",
)  # fmt: skip


def stream_table(workload: str, cells: dict[Key, Summary]) -> list[list[str]]:
    """The cells of a closed loop or a trace, see STREAM_COLUMNS."""
    return [_stream_row(c) for c in cells.values() if c.workload == workload]


def _stream_row(cell: Summary) -> list[str]:
    times = ("ttft_s_p50", "ttft_s_p99", "tpot_s_p50", "tpot_s_p99")
    return [
        cell.label,
        str(len(cell.rows)),
        spread_text(cell.spread("output_tokens_per_s")),
        spread_text(cell.spread("steady_tokens_per_s")),
        *(spread_text(cell.spread(name), 1000.0) for name in times),
        spread_text(cell.spread("goodput_per_s")),
        *(percent(cell.median(f"device.{n}_ratio")) for n in ("sm", "dram_bandwidth")),
        _failed(cell),
    ]


def _failed(cell: Summary) -> str:
    return f"{sum(row['failed'] for row in cell.rows)} of {sum(row['requests'] for row in cell.rows)}"


SKIP_COLUMNS = ("system", "workload", "rounds", "why")


def skip_table(rows: Sequence[Json]) -> list[list[str]]:
    """What was not run, alike reasons together; a cell that was never planned counts as "all"."""
    found: dict[tuple[str, str, str], list[Json]] = {}
    for row in rows:
        if row["kind"] == "skip":
            label = f"{row['system']} x{row['processes']}"
            found.setdefault((label, row["workload"], row["reason"]), []).append(row)
    together: dict[tuple[str, str, str], list[str]] = {}
    for (label, workload, reason), group in found.items():
        count = str(len(group)) if "repeat" in group[0] else "all"
        together.setdefault((label, reason, count), []).append(workload)
    return [[label, "; ".join(names), count, reason] for (label, reason, count), names in together.items()]


def failures(rows: Sequence[Json]) -> list[str]:
    return [f"stage {row['stage']}: {row['error']}" for row in rows if row["kind"] == "failure"]


def steady_by_processes(workload: str, cells: dict[Key, Summary]) -> dict[str, list[tuple[int, Spread]]]:
    """Steady-state throughput against the number of processes, a line for each system, which begins at its baseline.

    The served system has none: one process without HTTP is not its beginning.
    """
    lines: dict[str, list[tuple[int, Spread]]] = {}
    for cell in cells.values():
        spread = cell.spread("steady_tokens_per_s")
        if cell.workload == workload and cell.processes > 1 and spread:
            lines.setdefault(cell.system, []).append((cell.processes, spread))
            base = None if cell.system == "splitwiser-serve" else baseline(cell, cells)
            if base and (first := base.spread("steady_tokens_per_s")) and (1, first) not in lines[cell.system]:
                lines[cell.system].append((1, first))
    return {system: sorted(points, key=lambda point: point[0]) for system, points in lines.items()}
