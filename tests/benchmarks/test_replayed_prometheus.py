"""A recording in a real Prometheus answers as if it had been scraped live, recording rules included."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from benchmarks.dashboard_images import _in_unit
from benchmarks.recording import Recording, Scrape, Target
from benchmarks.replayed_prometheus import Replay, open_metrics, replayed

TARGET = Target({"job": "splitwiser", "node": "node", "instance": "127.0.0.1:9410", "role": "exporter"})
SECONDS = 40
# In flight on the two replicas, both active.
HELD = {"0": 6, "1": 2}


def scrape(second: int) -> Scrape:
    """A second in which replica 0 made 100 tokens; at second 20 nobody answered."""
    series = {'splitwiser_replica_output_tokens_total{slot="0"}': str(100 * second)}
    for slot, held in HELD.items():
        series[f'splitwiser_replica_in_flight_requests{{slot="{slot}"}}'] = str(held)
        series[f'splitwiser_replica_active{{slot="{slot}"}}'] = "1"
        series[f'splitwiser_replica_kv_used_tokens{{slot="{slot}"}}'] = "NaN" if held == 2 else "250"
        series[f'splitwiser_replica_kv_size_tokens{{slot="{slot}"}}'] = "1000"
    return Scrape(500.0 + second, TARGET, 0.01, second != 20, {} if second == 20 else series)


RECORDING = Recording("made up", 1.7e9, {}, (), tuple(map(scrape, range(SECONDS))))


@pytest.fixture(scope="module")
def replay(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Replay]:
    with replayed(RECORDING, tmp_path_factory.mktemp("replay")) as replay:
        yield replay


def test_rates_over_time_are_those_of_the_recorded_counters(replay: Replay) -> None:
    (series,) = replay.over_time('rate(splitwiser_replica_output_tokens_total{job="splitwiser"}[10s])')
    assert dict(series.labels) == {**TARGET.labels, "slot": "0"}
    whole = [value for at_s, value in series.points if at_s >= replay.start_s + 10]
    assert {round(value) for value in whole} == {100}
    assert series.points[-1][0] == replay.end_s == 1.7e9 + 500 + SECONDS - 1


def test_recording_rules_hold_even_those_over_other_rules(replay: Replay) -> None:
    """A quarter of a cache; and the fullest of 6 and 2 over their mean."""
    (kv,) = [series for series in replay.at_the_end("splitwiser:kv_use:ratio") if series.points]
    assert (kv.labels["slot"], kv.points[-1][1]) == ("0", 0.25)
    (imbalance,) = replay.at_the_end("splitwiser:imbalance:ratio")
    assert imbalance.points[-1][1] == 1.5


def test_a_scrape_without_an_answer_is_a_target_that_was_down(replay: Replay) -> None:
    (up,) = replay.over_time("up")
    downs = [at_s - replay.start_s for at_s, value in up.points if value == 0]
    assert downs == [20.0]


def test_not_a_number_is_left_out(replay: Replay) -> None:
    """A picture has no place for it."""
    found = {
        series.labels["slot"]: len(series.points) for series in replay.over_time("splitwiser_replica_kv_used_tokens")
    }
    assert found["0"] > 30
    assert found["1"] == 0


def test_labels_of_target_and_series_stand_together() -> None:
    text = open_metrics(RECORDING).splitlines()
    assert text[0].startswith(
        'up{job="splitwiser",node="node",instance="127.0.0.1:9410",role="exporter"} 1 1700000500.000'
    )
    assert text[2].startswith('splitwiser_replica_output_tokens_total{job="splitwiser",')
    assert 'role="exporter",slot="0"} 0 1700000500.000' in text[2]
    assert text[-1] == "# EOF"


@pytest.mark.parametrize(
    ("value", "unit", "words"),
    [
        (0.0, "s", "0"), (0.0125, "s", "12.5 ms"), (25e-6, "s", "25 us"), (3.0, "s", "3 s"),
        (0.755, "percentunit", "75.5 %"), (20 * 2.0**30, "bytes", "20 GiB"), (1870.4, "reqps", "1870 req/s"),
        (43_700.0, "suffix: tok/s", "43.7 k tok/s"), (1.98e9, "hertz", "1.98 GHz"), (512.4, "watt", "512 W"),
        (-0.2, "percentunit", "-20 %"),
    ],
)  # fmt: skip
def test_numbers_are_written_in_their_unit(value: float, unit: str, words: str) -> None:
    assert _in_unit(value, unit) == words
