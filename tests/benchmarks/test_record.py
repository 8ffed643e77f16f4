"""A recording gives back what was there: the board's samples, and what each scrape target said."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from balancer.readings import ReplicaReading, ReplicaState, Snapshot
from benchmarks import record
from benchmarks.recording import Sample, Scrape, Target, Writer, load
from monitoring import discovery
from monitoring.discovery import ReplicaTarget
from tests.monitoring.stand_in_node import TAGS, gpu_reading, node, replica_id, served

ROOT = Path(__file__).parents[2]


def reading(slot: int, at_s: float) -> ReplicaReading:
    return ReplicaReading(
        slot, replica_id(TAGS[0]), 0, ReplicaState.READY, at_s, 3, 900, 1, 100, 2, 0, 40, 100, 16, 64, 0.0125,
        1000, 2000, 0, 10, 7, 5 << 30, (10, *[0] * 15), 800,
    )  # fmt: skip


def written(path: Path) -> Writer:
    return Writer(path, "a note", 1.7e9, {"ray": "2.60.0"})


def test_samples_come_back_as_they_were_written(tmp_path: Path) -> None:
    path = tmp_path / "recording.jsonl.gz"
    gpus = (gpu_reading(taken_at_s=1.25), gpu_reading(1, sm_ratio=None, taken_at_s=1.5))
    samples = [
        Sample(Snapshot(2.0, (), gpus[:1]), frozenset(), 0),
        Sample(Snapshot(2.05, (reading(0, 2.0), reading(3, 2.04)), gpus, torn_slots=(1,)), frozenset({0, 3}), 4),
    ]
    writer = written(path)
    for sample in samples:
        writer.sample(sample)
    writer.close()
    found = load(path)
    assert found.samples == tuple(samples)
    assert (found.note, found.wall_offset_s, dict(found.versions)) == ("a note", 1.7e9, {"ray": "2.60.0"})


def test_scrapes_come_back_whole_though_only_changes_are_stored(tmp_path: Path) -> None:
    path = tmp_path / "recording.jsonl.gz"
    one, other = Target({"job": "splitwiser", "slot": "0"}), Target({"job": "haproxy"})
    scrapes = [
        Scrape(1.0, one, 0.01, True, {"up": "1", "a{x=\"1\"}": "5"}),
        Scrape(1.1, other, 0.01, True, {}),
        Scrape(2.0, one, 0.02, True, {"up": "1", "a{x=\"1\"}": "6", "late": "NaN"}),
        Scrape(3.0, one, 2.0, False, {}),
        Scrape(4.0, one, 0.02, True, {"up": "1", "late": "2"}),
    ]  # fmt: skip
    writer = written(path)
    for scrape in scrapes:
        writer.scrape(scrape)
    writer.close()
    assert list(load(path).scrapes) == scrapes
    stored = [json.loads(line) for line in gzip.decompress(path.read_bytes()).splitlines()]
    assert stored[3]["names"] == ["late"]
    assert len(stored[3]["changed"]) == 2


def test_another_format_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "recording.jsonl.gz"
    with gzip.open(path, "wt") as file:
        file.write('{"format": 0}\n')
    with pytest.raises(ValueError, match="no recording of format 1"):
        load(path)


def test_a_running_node_is_recorded_with_every_target_that_prometheus_would_find(tmp_path: Path) -> None:
    targets, out = tmp_path / "run.json", tmp_path / "recording.jsonl.gz"
    with node(tmp_path / "board") as made, served(made) as addresses:
        replicas = [
            ReplicaTarget(address, slot, replica_id(tag))
            for slot, (tag, address) in enumerate(zip(TAGS, addresses.replicas, strict=True))
        ]
        groups = discovery.groups("secret-host", addresses.exporter, [*replicas], addresses.haproxy)
        discovery.write(targets, groups)
        found = record.find_targets([targets])
        record.record(made.path, 0.3, 50.0, out, found, "stand-ins")
    recording = load(out)
    assert {replica.slot for sample in recording.samples for replica in sample.snapshot.replicas} == {0, 1}
    assert all(sample.active == {0, 1} for sample in recording.samples)
    assert sorted(scrape.target.labels["job"] for scrape in recording.scrapes) == ["haproxy"] + 3 * ["splitwiser"]
    assert all(scrape.up and scrape.series for scrape in recording.scrapes)
    assert "secret-host" not in gzip.decompress(out.read_bytes()).decode()


def test_an_interrupted_recorder_keeps_what_it_has(tmp_path: Path) -> None:
    """Whoever ends it early has a recording that can be read."""
    out = tmp_path / "recording.jsonl.gz"
    command = [sys.executable, "-m", "benchmarks.record", "--seconds", "600", "--out", str(out), "--targets"]
    with node(tmp_path / "board") as made:
        process = subprocess.Popen([*command, "--board", str(made.path)], cwd=ROOT)
        deadline_s = time.monotonic() + 60
        while not out.exists() and time.monotonic() < deadline_s:
            time.sleep(0.02)
        process.terminate()
        assert process.wait(30) == 0
    assert load(out).scrapes == ()


def test_a_target_that_does_not_answer_is_down() -> None:
    scrape = record.scrape(Target({}, "127.0.0.1:1"), time.monotonic)
    assert (scrape.up, scrape.series) == (False, {})


def test_only_series_that_somebody_asks_for_are_kept() -> None:
    text = [
        "# HELP vllm:num_requests_running x",
        'vllm:request_success_total{finished_reason="stop"} 4.0',
        "python_gc_objects_collected_total 12",
        'ray_serve_num_http_requests_total{NodeAddress="10.1.2.3",route="/"} 3',
    ]
    assert record.parse(text) == {
        'vllm:request_success_total{finished_reason="stop"}': "4.0",
        'ray_serve_num_http_requests_total{NodeAddress="127.0.0.1",route="/"}': "3",
    }


def test_a_machine_without_a_board_is_told_so_in_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert record.main(["--board", str(tmp_path / "none"), "--out", str(tmp_path / "out"), "--targets"]) == 2
    assert "there is no board at" in capsys.readouterr().err
