"""The report's plots. Matplotlib is imported here alone: without it a report has tables only."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.bench.phases import Spread
from benchmarks.bench.summary import PHASES, Key, Summary, baseline, steady_by_processes, time_saved, workloads

_COLOURS = {
    "vllm-single": "#4c72b0", "vllm-mp": "#dd8452", "vllm-mps": "#55a868", "vllm-mixed-off": "#8172b3",
    "hf-sequential": "#937860", "hf-split": "#da8bc3", "hf-split-mps": "#8c8c8c", "splitwiser-serve": "#c44e52",
}  # fmt: skip
Cells = dict[Key, Summary]


def draw(cells: Cells, folder: Path) -> list[tuple[str, str]]:
    """Writes the PNG files; (file name, caption) of each that had something to show. Raises ImportError."""
    import matplotlib

    matplotlib.use("Agg")
    plots: list[tuple[str, str, Callable[[Any, str, Cells], bool]]] = [
        ("throughput.png", "Output tokens a second (median; bars reach from the least to the greatest run).", _bars),
        (
            "steady.png",
            "Steady-state throughput against the number of processes.",
            _steady,
        ),
        ("saved.png", "Time saved in each phase against one process of the same software (below 0: lost).", _saved),
        ("utilization.png", "SM and DRAM utilization over a round (without a GPU: of the CPUs).", _utilization),
    ]
    return [(name, text) for name, text, panel in plots if _figure(cells, folder / name, panel)]


def _figure(cells: Cells, file: Path, panel: Callable[[Any, str, Cells], bool]) -> bool:
    """One panel for each workload that has something to show; no file where none has."""
    import matplotlib.pyplot as plt

    names = workloads(cells.values())
    columns = min(3, max(1, len(names)))
    rows = -(-len(names) // columns) or 1
    figure, axes = plt.subplots(rows, columns, figsize=(5.2 * columns, 3.6 * rows), squeeze=False)
    shown = 0
    for axis, name in zip(axes.flat, [*names, *[""] * (rows * columns - len(names))], strict=True):
        drawn = bool(name) and panel(axis, name, cells)
        shown += drawn
        axis.set_visible(drawn)
        axis.set_title(name, fontsize=10)
    figure.tight_layout()
    if shown:
        figure.savefig(file, dpi=80)
    plt.close(figure)
    return shown > 0


def _of(name: str, cells: Cells) -> list[Summary]:
    return [cell for cell in cells.values() if cell.workload == name]


def _bars(axis: Any, name: str, cells: Cells) -> bool:
    mine = _of(name, cells)
    spreads = [s for cell in mine if (s := cell.spread("output_tokens_per_s"))]
    axis.barh(range(len(mine)), [s.median for s in spreads], xerr=_reach(spreads), color=_colours(mine), capsize=2)
    axis.set_yticks(range(len(mine)), [cell.label for cell in mine], fontsize=8)
    axis.invert_yaxis()
    axis.set_xlabel("output tokens/s")
    return bool(mine)


def _reach(spreads: Sequence[Spread]) -> list[list[float]]:
    return [[s.median - s.low for s in spreads], [s.high - s.median for s in spreads]]


def _colours(cells: Sequence[Summary]) -> list[str]:
    return [_COLOURS.get(cell.system, "#333333") for cell in cells]


def _steady(axis: Any, name: str, cells: Cells) -> bool:
    lines = steady_by_processes(name, cells)
    for system, points in lines.items():
        x, spreads = [p for p, _ in points], [s for _, s in points]
        axis.errorbar(
            x, [s.median for s in spreads], yerr=_reach(spreads), marker="o", capsize=2, label=system,
            color=_COLOURS.get(system),
        )  # fmt: skip
    axis.set_xlabel("processes")
    axis.set_ylabel("tokens/s, steady state")
    axis.set_ylim(bottom=0)
    if lines:
        axis.set_xticks(sorted({p for points in lines.values() for p, _ in points}))
        axis.legend(fontsize=7)
    return bool(lines)


def _saved(axis: Any, name: str, cells: Cells) -> bool:
    found = [(cell, part) for cell in _of(name, cells) if (part := time_saved(cell, baseline(cell, cells)))]
    if not found or found[0][0].kind != "batch":
        return False
    for shift, phase in enumerate(PHASES):
        places = [k + (shift - 1) * 0.27 for k in range(len(found))]
        axis.bar(places, [100 * part.get(phase, 0.0) for _, part in found], width=0.25, label=phase)
    axis.set_xticks(range(len(found)), [cell.label for cell, _ in found], rotation=30, ha="right", fontsize=7)
    axis.axhline(0, color="black", linewidth=0.8)
    axis.set_ylabel("time saved, %")
    axis.legend(fontsize=7)
    return True


def _utilization(axis: Any, name: str, cells: Cells) -> bool:
    mine = [cell for cell in _of(name, cells) if cell.median("device.sm_ratio") is not None]
    for shift, (key, label) in enumerate((("sm_ratio", "SM"), ("dram_bandwidth_ratio", "DRAM bandwidth"))):
        values = [100 * (cell.median(f"device.{key}") or 0.0) for cell in mine]
        if any(values):
            axis.bar([k + (shift - 0.5) * 0.4 for k in range(len(mine))], values, width=0.38, label=label)
    if not mine:
        return False
    axis.set_xticks(range(len(mine)), [cell.label for cell in mine], rotation=30, ha="right", fontsize=7)
    axis.set_ylabel("%")
    axis.set_ylim(0, 105)
    axis.legend(fontsize=7)
    return True
