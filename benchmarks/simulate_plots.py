"""Pictures of simulated runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt

from benchmarks.goals import FIXED, RIVALS, Results
from benchmarks.simulation import Result

# The policies keep one colour each in every picture; fixed numbers are greys.
COLOURS = {"gpu_aware": "#c0392b", "round_robin": "#2980b9", "power_of_two": "#27ae60", "least_queue": "#8e44ad"}
NAMES = {"opt": "OPT-125m, 8 replicas", "qwen05": "Qwen2.5-0.5B, 8 replicas", "llama8b": "Llama-3-8B, 4 replicas"}
SMOOTH_SAMPLES = 5


def run_plot(results: dict[str, Result], path: Path) -> None:
    """Throughput, active replicas, KV cache and queue over time, for each contender."""
    figure, axes = plt.subplots(4, 1, figsize=(10, 10), sharex=True)
    titles = ("output tokens/s", "active replicas", "KV cache in use", "requests waiting in the router")
    for axis, column, title in zip(axes, (2, 1, 3, 4), titles, strict=True):
        for name, result in results.items():
            times = [row[0] for row in result.timeline]
            values = _smooth([float(row[column]) for row in result.timeline], SMOOTH_SAMPLES if column == 2 else 1)
            axis.plot(times, values, label=name, color=COLOURS.get(name, "#999999"), linewidth=1)
        axis.set_ylabel(title)
        axis.set_ylim(bottom=0)
    axes[0].legend(ncols=3, fontsize=8)
    axes[-1].set_xlabel("simulated seconds")
    _save(figure, path)


def goal_plots(results: Results, out: Path) -> None:
    """One picture of throughput and p99 TTFT against load for each loop, and one of the steps in load."""
    for loop in ("closed", "open"):
        _against_load(results, loop, out / f"{loop}.png")
    stepped = {model: results["step", model, "gpu_aware"] for model in NAMES if ("step", model, "gpu_aware") in results}
    _steps(stepped, out / "steps.png")


def _against_load(results: Results, loop: str, path: Path) -> None:
    figure, axes = plt.subplots(2, len(NAMES), figsize=(5 * len(NAMES), 7), squeeze=False)
    for column, (model, title) in enumerate(NAMES.items()):
        for row, (key, label) in enumerate((("throughput", "output tokens/s"), ("ttft_p99", "p99 TTFT, s"))):
            axis = axes[row][column]
            _curves(axis, results, loop, model, key)
            axis.set_xscale("log", base=2)
            axis.set_yscale("log")
            axis.set_ylabel(label)
            axis.set_title(f"{title}, {loop} loop", fontsize=9)
    axes[-1][0].set_xlabel("load (requests in flight)")
    axes[0][0].legend(fontsize=7)
    _save(figure, path)


def _curves(axis: Any, results: Results, loop: str, model: str, key: str) -> None:
    names = [*(f"fixed {k}" for k in FIXED), *RIVALS, "gpu_aware"]
    for i, name in enumerate(names):
        mine = [(k, r) for k, r in results.items() if k[:2] == (loop, model) and k[-1] == name]
        points = sorted((int(k[2]), getattr(r, key)) for k, r in mine)
        if points:
            colour = COLOURS.get(name, str(0.3 + 0.08 * i))
            width = 2.0 if name == "gpu_aware" else 1.0
            axis.plot(*zip(*points, strict=True), label=name, color=colour, linewidth=width, marker=".")


def _steps(stepped: dict[str, Result], path: Path) -> None:
    columns = max(1, len(stepped))
    figure, axes = plt.subplots(2, columns, figsize=(5 * columns, 5), sharex=True, squeeze=False)
    for column, (model, result) in enumerate(stepped.items()):
        times = [row[0] for row in result.timeline]
        rates = _smooth([row[2] for row in result.timeline], SMOOTH_SAMPLES)
        axes[0][column].plot(times, rates, color=COLOURS["gpu_aware"])
        axes[0][column].set_title(f"{NAMES[model]}: x8 up, x8 down", fontsize=9)
        axes[0][column].set_ylabel("output tokens/s")
        axes[1][column].step(times, [row[1] for row in result.timeline], color="black", where="post")
        axes[1][column].set_ylabel("active replicas")
        axes[1][column].set_xlabel("simulated seconds")
    _save(figure, path)


def _smooth(values: list[float], width: int) -> list[float]:
    return [sum(values[max(0, i - width + 1) : i + 1]) / min(width, i + 1) for i in range(len(values))]


def _save(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
