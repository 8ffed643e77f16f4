"""Recorded runs of the real system, replayed: the readings hold together, and decisions follow from them alone."""

from __future__ import annotations

import random
from collections import defaultdict
from itertools import pairwise
from pathlib import Path

import pytest

from balancer.gpu_aware import GpuAware
from balancer.knobs import Knobs
from balancer.readings import GpuReading, GpuSource, ReplicaReading, ReplicaState, RequestCost, Snapshot
from benchmarks.recording import Recording, load

DATA = Path(__file__).parents[1] / "data"
COUNTERS = (
    "prompt_tokens_total", "output_tokens_total", "preemptions_total", "received_total", "finished_total",
    "predicted_tokens_total", "answered_tokens_total", "estimate_error_tokens_total",
)  # fmt: skip
COST = RequestCost(prompt_tokens=200, output_tokens=100)


@pytest.fixture(scope="module", params=[path.name for path in sorted(DATA.glob("*.jsonl.gz"))])
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def recording(name: str) -> Recording:
    return load(DATA / name)


def by_replica(recording: Recording) -> dict[str, list[ReplicaReading]]:
    found = defaultdict(list)
    for sample in recording.samples:
        for replica in sample.snapshot.replicas:
            found[replica.replica_id].append(replica)
    return found


def test_there_is_a_recording() -> None:
    """Otherwise nothing below would run."""
    assert list(DATA.glob("*.jsonl.gz"))


def test_the_recording_is_of_a_busy_device(name: str, recording: Recording) -> None:
    """Otherwise what follows proves little: tens of seconds, several replicas, tokens; on a GPU, counted SMs."""
    times = [sample.snapshot.now_s for sample in recording.samples]
    assert times[-1] - times[0] > 30
    lives = by_replica(recording)
    assert len(lives) > 1
    assert sum(life[-1].output_tokens_total - life[0].output_tokens_total for life in lives.values()) > 5_000
    source = GpuSource.HOST if name.startswith("cpu") else GpuSource.GPM
    assert {gpu.source for sample in recording.samples for gpu in sample.snapshot.gpus} == {source}


def test_no_reading_is_torn_and_none_is_old(recording: Recording) -> None:
    """Writers wrote in the middle of the reads, thousands of times. A reading may be younger than its snapshot's time,
    which is taken first."""
    for before, sample in pairwise(recording.samples):
        snapshot = sample.snapshot
        assert snapshot.torn_slots == ()
        assert snapshot.now_s > before.snapshot.now_s
        written_s = [r.written_at_s for r in snapshot.replicas] + [gpu.taken_at_s for gpu in snapshot.gpus]
        assert all(-0.1 < snapshot.now_s - at_s < Knobs().stale_after_s for at_s in written_s)


def test_gpu_readings_are_ratios_and_bytes_that_fit(recording: Recording) -> None:
    def check(gpu: GpuReading) -> None:
        for ratio in (gpu.sm_ratio, gpu.sm_occupancy_ratio, gpu.dram_bandwidth_ratio):
            assert ratio is None or 0.0 <= ratio <= 1.0
        assert 0 < gpu.memory_used_bytes <= gpu.memory_total_bytes - gpu.memory_reserve_bytes

    gpus = [gpu for sample in recording.samples for gpu in sample.snapshot.gpus]
    for gpu in gpus:
        check(gpu)
    assert max(gpu.sm_ratio or 0.0 for gpu in gpus) > 0.2


def test_what_each_replica_says_of_itself_adds_up(recording: Recording) -> None:
    """In flight is what came less what went, to the unit, in every single reading."""
    for replica in (r for sample in recording.samples for r in sample.snapshot.replicas):
        assert replica.in_flight_requests == replica.received_total - replica.finished_total
        assert 0 <= replica.kv_blocks_used <= replica.kv_blocks_total
        assert 0 <= replica.running_requests <= replica.max_running_requests
        assert sum(replica.received_by_router) <= replica.received_total
        assert replica.state is ReplicaState.READY


def test_counters_only_grow(recording: Recording) -> None:
    for life in by_replica(recording).values():
        for before, after in pairwise(life):
            assert after.written_at_s >= before.written_at_s
            assert all(getattr(after, name) >= getattr(before, name) for name in COUNTERS)


def replay(recording: Recording) -> list[tuple[tuple[int, ...], int | None]]:
    """The active set at each sample, and where a request of middling size would have gone."""
    policy = GpuAware(Knobs(), random.Random(1))
    found = []
    for sample in recording.samples:
        policy.refresh(sample.snapshot, waiting=sample.queue_length)
        decision = policy.place(COST)
        found.append((policy.active, decision.slot if decision else None))
    return found


def test_the_same_readings_lead_to_the_same_decisions(recording: Recording) -> None:
    """Nothing in the policy reads a clock or an own source of randomness."""
    first = replay(recording)
    assert first == replay(recording)
    assert any(slot is not None for _, slot in first)


def test_the_active_set_stays_within_what_is_ready(recording: Recording) -> None:
    """Replayed, and as it was while it was recorded; and requests go to active replicas only."""

    def ready(snapshot: Snapshot) -> set[int]:
        return {replica.slot for replica in snapshot.ready(Knobs().stale_after_s)}

    for sample, (active, slot) in zip(recording.samples, replay(recording), strict=True):
        assert 1 <= len(active) <= len(ready(sample.snapshot))
        assert set(active) <= ready(sample.snapshot)
        assert slot is None or slot in active
        assert 1 <= len(sample.active) <= len(ready(sample.snapshot))
        assert sample.active <= ready(sample.snapshot)


def test_the_active_set_does_not_flap(recording: Recording) -> None:
    """Changes of size are counted over a minute: hysteresis keeps them few."""
    sizes = [len(active) for active, _ in replay(recording)]
    seconds = recording.samples[-1].snapshot.now_s - recording.samples[0].snapshot.now_s
    assert sum(one != other for one, other in pairwise(sizes)) <= seconds / 2
