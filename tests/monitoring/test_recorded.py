"""Recorded runs of the real system, replayed: the exporter says what it said then, and the dashboards show it."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from balancer.counters import CountersReader, RouterTotals
from benchmarks.dashboard_images import draw
from benchmarks.recording import Recording, Sample, Scrape, load
from benchmarks.replayed_prometheus import Replay, replayed
from monitoring import metrics
from monitoring.exposition import MpsView, NodeView, render
from tests.monitoring import prometheus_checks as checks

DATA = Path(__file__).parents[1] / "data"
_SLOT = re.compile(r'slot="(\d+)"')
# What a scrape knows from the board alone.
GROWING = tuple(
    metric.name
    for metric in metrics.DECLARED
    if metric.kind is metrics.Kind.COUNTER and metric.labels == ("slot",) and metric is not metrics.REPLICA_STARTS
)
CONSTANT = (
    "splitwiser_replica_info", "splitwiser_replica_kv_size_tokens", "splitwiser_replica_batch_limit_requests",
    "splitwiser_gpu_memory_size_bytes", "splitwiser_gpu_memory_reserve_bytes", "splitwiser_gpu_source",
    "splitwiser_replica_state", "splitwiser_board_up",
)  # fmt: skip
# Prefix caching was switched off for this benchmark, and Ray's own metrics had no series yet when this was recorded.
NOT_RECORDED = {
    "h200_opt125m_four_replicas.jsonl.gz": {
        "overview / Memory by holder / C", "overview / Prefix cache / A", "overview / Server errors / A",
        "overview / Answers by status / A", *(f"overview / Latency at the ingress / {ref}" for ref in "ABC"),
    },
}  # fmt: skip


@pytest.fixture(scope="module", params=sorted(DATA.glob("*.jsonl.gz")), ids=lambda path: path.name)
def recording(request: pytest.FixtureRequest) -> Recording:
    return load(request.param)


@pytest.fixture(scope="module")
def replay(recording: Recording, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Replay]:
    with replayed(recording, tmp_path_factory.mktemp("replay")) as replay:
        yield replay


def of_exporter(recording: Recording) -> list[Scrape]:
    return [scrape for scrape in recording.scrapes if scrape.target.labels.get("role") == "exporter"]


def around(recording: Recording, scrape: Scrape) -> tuple[Sample, Sample] | None:
    """The samples before the scrape began and after it had ended."""
    times = [sample.snapshot.now_s for sample in recording.samples]
    before = bisect_right(times, scrape.at_s) - 1
    after = bisect_right(times, scrape.at_s + scrape.took_s)
    if before < 0 or after >= len(times):
        return None
    return recording.samples[before], recording.samples[after]


def exposed(sample: Sample, scrape: Scrape, nothing: RouterTotals) -> dict[str, str]:
    """What the exporter says of this sample, with the slots that the recorded one showed."""
    slots = {int(slot) for series in scrape.series for slot in _SLOT.findall(series)}
    view = NodeView(sample.snapshot, nothing, {}, desired=1, mps=MpsView(), slots=tuple(sorted(slots)))
    lines = (line.rpartition(" ") for line in render(view).splitlines() if not line.startswith("#"))
    return {series: value for series, _, value in lines}


def without_version(series: Mapping[str, str]) -> set[str]:
    return {name for name in series if not name.startswith("splitwiser_build_info")}


def test_the_exporter_was_scraped_every_second(recording: Recording) -> None:
    scrapes = of_exporter(recording)
    assert len(scrapes) > 30
    assert all(scrape.up and scrape.series for scrape in scrapes)


def test_the_same_board_yields_the_same_series_as_then(recording: Recording, tmp_path: Path) -> None:
    """No series went or changed its name (later ones may have come), and what does not change has the same value."""
    nothing = CountersReader(tmp_path / "none").read()
    for scrape in of_exporter(recording):
        if found := around(recording, scrape):
            now = exposed(found[0], scrape, nothing)
            assert without_version(scrape.series) <= without_version(now)
            fixed = {series for series in scrape.series if series.startswith(CONSTANT)}
            assert {s: now[s] for s in fixed} == {s: scrape.series[s] for s in fixed}


def test_counters_as_scraped_lie_between_the_board_before_and_after(recording: Recording, tmp_path: Path) -> None:
    """To the unit: the exporter neither loses nor invents."""
    nothing = CountersReader(tmp_path / "none").read()
    compared = 0
    for scrape in of_exporter(recording):
        if found := around(recording, scrape):
            low, high = (exposed(sample, scrape, nothing) for sample in found)
            for series in (series for series in scrape.series if series.startswith(GROWING)):
                assert float(low[series]) <= float(scrape.series[series]) <= float(high[series]), series
                compared += 1
    assert compared > 1000


def test_the_routers_counters_only_grow(recording: Recording) -> None:
    """Decisions, refusals and histograms, over the whole minute."""
    last: dict[str, float] = {}
    for scrape in of_exporter(recording):
        for series, value in scrape.series.items():
            if series.startswith("splitwiser_router") and re.search(r"_(total|bucket|sum|count)\b", series):
                assert float(value) >= last.get(series, 0.0), series
                last[series] = float(value)
    assert last


def test_the_overview_answers_the_four_questions_from_the_recording(recording: Recording, replay: Replay) -> None:
    """How many work, which is slowest, what was refused, how far from the limit: as the readings themselves say."""
    tiles = {panel["title"]: panel["targets"] for panel in checks.panels(checks.documents()["overview"])}

    def ask(title: str, number: int = 0) -> dict[str, float]:
        expr = checks.concrete(tiles[title][number]["expr"], {**checks.VARIABLES, "$__rate_interval": "5s"})
        return {" ".join(s.labels.values()): s.points[-1][1] for s in replay.at_the_end(expr) if s.points}

    last = recording.samples[-1].snapshot
    assert list(ask("Replicas").values()) == [len(last.replicas)]
    steps = {str(replica.slot): replica.step_time_s for replica in last.replicas}
    assert set(ask("Slowest replica")) <= set(steps)
    assert set(ask("Refused in the last 5 minutes")) >= {"no_replica_ready", "other", "queue_deadline", "queue_full"}
    (nearest,) = ask("GPU: nearest limit").values()
    assert 0.0 < nearest <= 1.0


def test_every_panel_shows_something_of_the_recording(replay: Replay, request: pytest.FixtureRequest) -> None:
    """With the same few exceptions as in a live system; and what did not happen here."""

    def found(expr: str) -> bool:
        rate = "40s" if "ray_" in expr else "5s"
        concrete = checks.concrete(expr, {**checks.VARIABLES, "$__rate_interval": rate})
        return any(series.points for series in replay.over_time(concrete))

    empty = {
        f"{name} / {panel['title']} / {target['refId']}"
        for name, document in checks.documents().items()
        for panel in checks.panels(document)
        for target in panel["targets"]
        if not found(target["expr"])
    }
    not_recorded = next((why for name, why in NOT_RECORDED.items() if name in request.node.name), set())
    assert empty <= set(checks.ALLOWED_EMPTY) | not_recorded


def test_a_picture_of_a_dashboard_can_be_drawn(replay: Replay, tmp_path: Path) -> None:
    path = tmp_path / "replica.png"
    draw(checks.documents()["replica"], replay, "0", "a recording", path)
    assert path.read_bytes().startswith(b"\x89PNG")
    assert path.stat().st_size > 50_000
