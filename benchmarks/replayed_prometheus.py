"""A recording in a real Prometheus, to be asked as Grafana would ask: its scrapes, and what our rules make of them."""

from __future__ import annotations

import json
import math
import subprocess
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.recording import Recording, Scrape
from monitoring import local_prometheus

RULES = local_prometheus.CONFIGURATION.with_name("rules.yml")
STEP_S = 1.0
# Rules that read what other rules recorded find it in the second pass.
_PASSES = 2
# Recordings stay; the default would drop what is older than 15 days.
_KEEP = "--storage.tsdb.retention.time=100y"


@dataclass(frozen=True, slots=True)
class Series:
    """One series of an answer: its labels, and (seconds since 1970, value) in the order of time, NaN left out."""

    labels: Mapping[str, str]
    points: tuple[tuple[float, float], ...]


@dataclass(frozen=True, slots=True)
class Replay:
    """A Prometheus at `url` that knows what happened from `start_s` to `end_s` (seconds since 1970), and no more."""

    url: str
    start_s: float
    end_s: float

    def over_time(self, expr: str) -> list[Series]:
        """A range query over the whole recording, a value a second."""
        answer = self._ask("query_range", query=expr, start=str(self.start_s), end=str(self.end_s), step=str(STEP_S))
        return [Series(found["metric"], _finite(found["values"])) for found in answer]

    def at_the_end(self, expr: str) -> list[Series]:
        """An instant query at the recording's last moment."""
        answer = self._ask("query", query=expr, time=str(self.end_s))
        return [Series(found["metric"], _finite([found["value"]])) for found in answer]

    def _ask(self, what: str, **parameters: str) -> list[dict[str, list[list[float]]]]:
        body = urllib.parse.urlencode(parameters).encode()
        with urllib.request.urlopen(f"{self.url}/api/v1/{what}", data=body, timeout=30) as answer:
            return list(json.load(answer)["data"]["result"])


def _finite(values: list[list[float]]) -> tuple[tuple[float, float], ...]:
    points = ((float(at_s), float(value)) for at_s, value in values)
    return tuple(point for point in points if math.isfinite(point[1]))


@contextmanager
def replayed(recording: Recording, folder: Path) -> Iterator[Replay]:
    """A Prometheus with the recording's scrapes and this project's recording rules; its data in `folder`.

    Raises PrometheusError when Prometheus or promtool is missing or refuses the recording.
    """
    start_s = recording.scrapes[0].at_s + recording.wall_offset_s
    end_s = recording.scrapes[-1].at_s + recording.wall_offset_s
    text, configuration, data = folder / "recording.txt", folder / "prometheus.yml", folder / "data"
    text.write_text(open_metrics(recording))
    configuration.write_text("global: {}\n")
    _promtool("tsdb", "create-blocks-from", "openmetrics", str(text), str(data))
    for _ in range(_PASSES):
        with _prometheus(configuration, folder) as url:
            period = [f"--start={start_s:.0f}", f"--end={end_s:.0f}", f"--eval-interval={STEP_S:.0f}s"]
            where = [f"--url={url}", f"--output-dir={data}"]
            _promtool("tsdb", "create-blocks-from", "rules", *period, *where, str(RULES))
    with _prometheus(configuration, folder) as url:
        yield Replay(url, start_s, end_s)


@contextmanager
def _prometheus(configuration: Path, folder: Path) -> Iterator[str]:
    with local_prometheus.running(configuration, folder, local_prometheus.free_port(), [_KEEP]) as server:
        yield server.url


def _promtool(*arguments: str) -> None:
    command = [local_prometheus.program("promtool"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    if done.returncode:
        raise local_prometheus.PrometheusError(f"promtool refuses the recording: {(done.stdout + done.stderr)[-2000:]}")


def open_metrics(recording: Recording) -> str:
    """Every sample of every scrape with its time, as Prometheus itself would have stored it."""
    lines = [line for scrape in recording.scrapes for line in _lines(scrape, recording.wall_offset_s)]
    return "\n".join([*lines, "# EOF", ""])


def _lines(scrape: Scrape, wall_offset_s: float) -> Iterator[str]:
    labels = ",".join(f'{name}="{value}"' for name, value in scrape.target.labels.items())
    at = f"{scrape.at_s + wall_offset_s:.3f}"
    yield f"up{{{labels}}} {int(scrape.up)} {at}"
    yield f"scrape_duration_seconds{{{labels}}} {scrape.took_s} {at}"
    for series, value in scrape.series.items():
        name, _, own = series.partition("{")
        both = f"{labels},{own.removesuffix('}')}" if own else labels
        yield f"{name}{{{both}}} {value} {at}"
