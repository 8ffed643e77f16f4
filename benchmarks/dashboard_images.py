"""The dashboards' data as pictures: `python -m benchmarks.dashboard_images RECORDING --out docs/images`.

Every panel of the committed dashboards stands where Grafana would put it, and shows what its own queries yield in a
Prometheus that was fed the recording. Drawn with matplotlib: it is no screenshot.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
import tempfile
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MultipleLocator

from benchmarks.recording import load
from benchmarks.replayed_prometheus import Replay, Series, replayed
from monitoring.local_prometheus import PrometheusError

DASHBOARDS = Path(__file__).parents[1] / "monitoring" / "grafana" / "dashboards"
COLUMNS = 24
COLUMN_IN, LINE_IN, TOP_IN = 0.75, 0.32, 0.6
DPI = 80
# Grafana makes it four scrape intervals: recordings have one a second, and Ray reports every ten.
RATE, SLOW_RATE = "5s", "40s"
COLOURS = {"green": "#2e8b57", "yellow": "#d49a00", "red": "#c0392b", "blue": "#2980b9", "text": "#7f8c8d"}
_BELOW: dict[str, Any] = {
    "loc": "upper left", "bbox_to_anchor": (-0.02, -0.16), "ncols": 4, "fontsize": 7, "frameon": False,
}  # fmt: skip
NO_DATA = "nothing of this in the recording"
_FIELD = re.compile(r"\{\{(\w+)\}\}")

Panel = Mapping[str, Any]
Found = list[tuple[str, Series]]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.dashboard_images", description=__doc__)
    parser.add_argument("recording", type=Path)
    parser.add_argument("--out", type=Path, default=Path("docs/images"))
    parser.add_argument("--slot", default="0", help="which replica the drill-down shows")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    try:
        recording = load(options.recording)
        with tempfile.TemporaryDirectory() as folder, replayed(recording, Path(folder)) as replay:
            for path in draw_all(replay, recording.note, options.out, options.slot):
                print(path)
    except PrometheusError as error:
        print(f"benchmarks.dashboard_images: {error}", file=sys.stderr)
        return 2
    return 0


def draw_all(replay: Replay, note: str, out: Path, slot: str) -> list[Path]:
    """One picture for each committed dashboard; `note` tells what was recorded."""
    paths = []
    for document in sorted(DASHBOARDS.glob("*.json")):
        path = out / f"dashboard_{document.stem}.png"
        draw(json.loads(document.read_text()), replay, slot, note, path)
        paths.append(path)
    return paths


def draw(document: Mapping[str, Any], replay: Replay, slot: str, note: str, path: Path) -> None:
    """One dashboard as a picture."""
    lines = max(_bottom(panel) for panel in document["panels"])
    size = (COLUMNS * COLUMN_IN, lines * LINE_IN + TOP_IN)
    figure = plt.figure(figsize=size)
    title = f"{document['title']}   ({note}; drawn from a recording with matplotlib)"
    figure.text(0.01, 1 - 0.25 / size[1], title, fontsize=11, weight="bold", va="center")
    for panel in document["panels"]:
        _place(figure, panel, size)(panel, replay, slot)
    figure.savefig(path, dpi=DPI)
    plt.close(figure)


def _bottom(panel: Panel) -> int:
    return int(panel["gridPos"]["y"] + panel["gridPos"]["h"])


def _place(figure: Figure, panel: Panel, size: tuple[float, float]) -> Callable[[Panel, Replay, str], None]:
    """The axes at the panel's place, and what draws in them."""
    at = panel["gridPos"]
    left_in, top_in = at["x"] * COLUMN_IN, TOP_IN + at["y"] * LINE_IN
    margins = _MARGINS_IN[panel["type"]]
    width_in = at["w"] * COLUMN_IN - margins[0] - margins[1]
    height_in = at["h"] * LINE_IN - margins[2] - margins[3]
    bottom_in = size[1] - top_in - at["h"] * LINE_IN + margins[3]
    place = ((left_in + margins[0]) / size[0], bottom_in / size[1], width_in / size[0], height_in / size[1])
    axes = figure.add_axes(place)
    return lambda panel, replay, slot: _DRAWN[panel["type"]](axes, panel, replay, slot)


# Left, right, top, bottom of the axes within a panel.
_MARGINS_IN = {
    "row": (0.1, 0.1, 0.02, 0.02),
    "stat": (0.1, 0.1, 0.3, 0.1),
    "timeseries": (0.75, 0.1, 0.3, 0.62),
    "heatmap": (0.75, 0.1, 0.3, 0.62),
    "state-timeline": (0.75, 0.1, 0.3, 0.62),
}


def _row(axes: Axes, panel: Panel, replay: Replay, slot: str) -> None:
    axes.set_axis_off()
    axes.axhline(0.5, color="#cccccc", zorder=0)
    axes.text(0.0, 0.5, f"{panel['title']}  ", fontsize=11, weight="bold", va="center", backgroundcolor="white")


def _stat(axes: Axes, panel: Panel, replay: Replay, slot: str) -> None:
    _titled(axes, panel)
    axes.set_xticks([])
    axes.set_yticks([])
    found = [(name, series.points[-1][1]) for name, series in _found(panel, slot, replay.at_the_end) if series.points]
    if not found:
        axes.text(0.5, 0.5, panel["fieldConfig"]["defaults"].get("noValue", ""), ha="center", va="center", fontsize=14)
    for number, (name, value) in enumerate(found):
        middle, colour = (number + 0.5) / len(found), _threshold_colour(panel, value)
        words = _in_unit(value, _unit(panel), panel["fieldConfig"]["defaults"].get("decimals"))
        if panel["options"]["textMode"] == "name":
            words, name = name, ""
        axes.text(middle, 0.62, words, ha="center", va="center", fontsize=15, color=colour, weight="bold")
        axes.text(middle, 0.2, name, ha="center", va="center", fontsize=8)


def _timeseries(axes: Axes, panel: Panel, replay: Replay, slot: str) -> None:
    _titled(axes, panel)
    found = [(name, series) for name, series in _found(panel, slot, replay.over_time) if series.points]
    custom = panel["fieldConfig"]["defaults"].get("custom", {})
    if custom.get("stacking", {}).get("mode") == "normal" and found:
        times, layers = _layers([series for _, series in found], replay.start_s)
        axes.stackplot(times, layers, labels=[name or panel["title"] for name, _ in found], alpha=0.75)
    else:
        for name, series in found:
            times, values = zip(*series.points, strict=True)
            axes.plot([at_s - replay.start_s for at_s in times], values, label=name or panel["title"], linewidth=1.2)
    _scaled(axes, panel, replay, max((value for _, series in found for _, value in series.points), default=None))
    if found:
        axes.legend(**_BELOW)


def _heatmap(axes: Axes, panel: Panel, replay: Replay, slot: str) -> None:
    _titled(axes, panel)
    (target,) = panel["targets"]
    found = sorted(replay.over_time(_concrete(target, slot)), key=lambda series: float(series.labels["le"]))
    times, layers = _layers(found, replay.start_s)
    below = [[0.0] * len(times), *layers[:-1]]
    counts = [[high - low for low, high in zip(*pair, strict=True)] for pair in zip(below, layers, strict=True)]
    if times:
        axes.pcolormesh(times, range(len(counts)), counts, cmap="Oranges", shading="nearest")
        bounds = [_in_unit(float(series.labels["le"]), "s") for series in found]
        axes.set_yticks(range(0, len(bounds), 4), bounds[::4])
    axes.set_xlim(0, replay.end_s - replay.start_s)


def _timeline(axes: Axes, panel: Panel, replay: Replay, slot: str) -> None:
    _titled(axes, panel)
    states = panel["fieldConfig"]["defaults"]["mappings"][0]["options"]
    found = _found(panel, slot, replay.over_time)
    for line, (_, series) in enumerate(found):
        for at_s, value in series.points:
            colour = COLOURS[states[str(round(value))]["color"]]
            axes.broken_barh([(at_s - replay.start_s, 1.0)], (line - 0.4, 0.8), color=colour)
    axes.set_yticks(range(len(found)), [name for name, _ in found], fontsize=7)
    axes.set_xlim(0, replay.end_s - replay.start_s)
    seen = {str(round(value)) for _, series in found for _, value in series.points}
    patches = [Patch(color=COLOURS[states[number]["color"]], label=states[number]["text"]) for number in sorted(seen)]
    axes.legend(handles=patches, **_BELOW)


_DRAWN = {"row": _row, "stat": _stat, "timeseries": _timeseries, "heatmap": _heatmap, "state-timeline": _timeline}


def _found(panel: Panel, slot: str, ask: Callable[[str], list[Series]]) -> Found:
    return [
        (_named(target.get("legendFormat", ""), series.labels), series)
        for target in panel["targets"]
        for series in ask(_concrete(target, slot))
    ]


def _concrete(target: Mapping[str, Any], slot: str) -> str:
    """The expression as Grafana would send it."""
    rate = SLOW_RATE if target.get("interval") else RATE
    values = {"$__rate_interval": rate, "$job": ".*", "$node": ".*", "$slot": slot}
    expr = str(target["expr"])
    for name, value in values.items():
        expr = expr.replace(name, value)
    return expr


def _named(legend: str, labels: Mapping[str, str]) -> str:
    return _FIELD.sub(lambda field: labels.get(field[1], ""), legend)


def _layers(found: Sequence[Series], start_s: float) -> tuple[list[float], list[list[float]]]:
    """All series at all times, 0 where one has no value."""
    times = sorted({at_s for series in found for at_s, _ in series.points})
    known = [dict(series.points) for series in found]
    return [at_s - start_s for at_s in times], [[values.get(at_s, 0.0) for at_s in times] for values in known]


def _titled(axes: Axes, panel: Panel) -> None:
    axes.set_title(textwrap.shorten(panel["title"], 60), fontsize=9, loc="left", weight="bold")
    axes.tick_params(labelsize=7)
    for spine in axes.spines.values():
        spine.set_color("#cccccc")


def _scaled(axes: Axes, panel: Panel, replay: Replay, peak: float | None) -> None:
    """`peak` is the highest value drawn, None where there is none."""
    defaults = panel["fieldConfig"]["defaults"]
    axes.set_xlim(0, replay.end_s - replay.start_s)
    axes.set_ylim(bottom=0, top=defaults.get("max") or (axes.get_ylim()[1] * 1.05 if peak else 1.0))
    if _unit(panel) == "bytes":
        axes.yaxis.set_major_locator(MultipleLocator(2.0 ** math.ceil(math.log2(axes.get_ylim()[1] / 5))))
    axes.yaxis.set_major_formatter(lambda value, _: _in_unit(value, _unit(panel)))
    axes.grid(color="#eeeeee")
    if peak is None:
        axes.text(0.5, 0.5, NO_DATA, transform=axes.transAxes, ha="center", va="center", fontsize=8, color="#888888")


def _unit(panel: Panel) -> str:
    return str(panel["fieldConfig"]["defaults"].get("unit", "short"))


def _threshold_colour(panel: Panel, value: float) -> str:
    steps = panel["fieldConfig"]["defaults"]["thresholds"]["steps"]
    reached = [step["color"] for step in steps if step["value"] is None or value >= step["value"]]
    return COLOURS[reached[-1]]


# How large a value has to be for a prefix, largest first, and what is then written.
_SECONDS = ((1.0, 1.0, " s"), (1e-3, 1e3, " ms"), (0.0, 1e6, " us"))
_BYTES = ((2.0**30, 2.0**-30, " GiB"), (2.0**20, 2.0**-20, " MiB"), (0.0, 1.0, " B"))
_PLAIN = ((1e9, 1e-9, " G"), (1e6, 1e-6, " M"), (1e4, 1e-3, " k"), (0.0, 1.0, ""))
_ENDS = {"reqps": " req/s", "ops": " /s", "watt": " W", "celsius": " °C", "hertz": "Hz", "ms": " ms"}


def _in_unit(value: float, unit: str, decimals: int | None = None) -> str:
    if unit == "percentunit":
        return f"{_digits(value * 100, None)} %"
    scale = {"s": _SECONDS, "bytes": _BYTES}.get(unit, _PLAIN)
    _, factor, prefix = next(step for step in scale if abs(value) >= step[0])
    end = unit.removeprefix("suffix:") if unit.startswith("suffix:") else _ENDS.get(unit, "")
    return "0" + end if value == 0 else _digits(value * factor, decimals if factor == 1.0 else None) + prefix + end


def _digits(value: float, decimals: int | None) -> str:
    """Three significant ones where nothing else is asked for, but every whole thousand."""
    if decimals is not None:
        return f"{value:.{decimals}f}"
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


if __name__ == "__main__":
    sys.exit(main())
