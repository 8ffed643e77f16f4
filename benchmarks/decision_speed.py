"""How long one decision takes: 64 replicas, 1,000 waiting requests, one core.

    python -m benchmarks.decision_speed

Between two decisions `changed` of the 64 replicas wrote anew, as at 1,500 decisions a second and steps of 5 ms they
would. Each decision sees a new snapshot; making it is not timed (`balancer.board` has its own budget). Times are CPU
times of the thread: what else runs on the machine is not counted.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from balancer.admission import Dispatcher
from balancer.knobs import Knobs
from balancer.readings import ReplicaReading, ReplicaState, RequestCost, Snapshot, Verdict

REPLICAS = 64
WAITING = 1000
INTERVAL_S = 1 / 1500


def replica(slot: int, now_s: float, load: int) -> ReplicaReading:
    return ReplicaReading(
        slot, f"replica-{slot}", slot // 8, ReplicaState.READY, now_s, load, load * 700, 0, 0, load, 0, load * 40,
        16384, 16, 256, 0.005, 1000, 1000, 0, 100, 100,
    )  # fmt: skip


def snapshots(full: bool, changed: int, rng: random.Random) -> Iterator[Snapshot]:
    """Snapshots a decision apart; `full` replicas have no room."""
    now_s = 1000.0
    readings = [replica(slot, now_s, 256 if full else rng.randrange(50, 200)) for slot in range(REPLICAS)]
    steps = 0
    while True:
        now_s += INTERVAL_S
        for _ in range(changed):
            slot = steps % REPLICAS
            steps += 1
            old = readings[slot]
            readings[slot] = replace(old, written_at_s=now_s, output_tokens_total=old.output_tokens_total + 100)
        yield Snapshot(now_s, tuple(readings))


def costs(rng: random.Random) -> Iterator[RequestCost]:
    while True:
        yield RequestCost(rng.randrange(50, 2000), rng.randrange(20, 500), prefix=rng.randrange(1, 5000))


def measure(changed: int, decisions: int, waiting: int = WAITING, seed: int = 1) -> dict[str, dict[str, float]]:
    """p50 and p99 in microseconds of: an assignment, a request that must queue, a release that can place none, and
    each decision of a release that places one."""
    rng = random.Random(seed)
    knobs = Knobs(active_set=8, queue_limit=1 << 20, queue_deadline_s=1e9)
    return {
        "submit, assigned": _submits(Dispatcher(knobs, rng), snapshots(False, changed, rng), rng, decisions),
        "submit, queued": _submits(_crowded(knobs, waiting, rng), snapshots(True, changed, rng), rng, decisions),
        "release, no room": _releases(_crowded(knobs, waiting, rng), changed, rng, decisions, room=False),
        "release, one placed": _releases(
            _crowded(knobs, waiting, rng), changed, rng, min(decisions, waiting // 2), room=True
        ),
    }


def _crowded(knobs: Knobs, waiting: int, rng: random.Random) -> Dispatcher:
    dispatcher = Dispatcher(knobs, rng)
    stream, sizes = snapshots(True, REPLICAS, rng), costs(rng)
    for i in range(waiting):
        assert dispatcher.submit(f"w{i}", next(sizes), next(stream)).verdict is Verdict.WAIT
    return dispatcher


def _submits(
    dispatcher: Dispatcher, stream: Iterator[Snapshot], rng: random.Random, decisions: int
) -> dict[str, float]:
    sizes, times = costs(rng), []
    for i in range(decisions):
        snapshot, cost = next(stream), next(sizes)
        began = time.thread_time()
        dispatcher.submit(f"s{i}", cost, snapshot)
        times.append(time.thread_time() - began)
        dispatcher.cancel(f"s{i}")
    return quantiles(times)


def _releases(dispatcher: Dispatcher, changed: int, rng: random.Random, decisions: int, room: bool) -> dict[str, float]:
    stream, times = snapshots(True, changed, rng), []
    for i in range(decisions):
        snapshot = next(stream)
        if room:
            slot = i % 8
            freed = replace(snapshot.replicas[slot], in_flight_requests=255, in_flight_tokens=170_000)
            replicas = (*snapshot.replicas[:slot], freed, *snapshot.replicas[slot + 1 :])
            snapshot = Snapshot(snapshot.now_s, replicas)
        began = time.thread_time()
        decided = dispatcher.release(snapshot)
        times.append((time.thread_time() - began) / max(1, len(decided)))
    return quantiles(times)


def quantiles(times: Sequence[float]) -> dict[str, float]:
    ordered = sorted(times)
    return {
        "p50_us": round(ordered[len(ordered) // 2] * 1e6, 1),
        "p99_us": round(ordered[int(len(ordered) * 0.99)] * 1e6, 1),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Time the decisions of the dispatcher.")
    parser.add_argument("--decisions", type=int, default=5000)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(arguments)
    found: dict[str, Any] = {}
    for changed in (8, REPLICAS):
        title = f"{changed:2} of {REPLICAS} changed"
        found[title] = measure(changed, args.decisions)
        for what, times in found[title].items():
            print(f"{title} | {what:20} | p50 {times['p50_us']:6} us | p99 {times['p99_us']:6} us")
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
