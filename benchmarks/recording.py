"""A recording of a running node: the board many times a second, and what its scrape targets said each second.

JSON lines, gzipped. The first line tells what was recorded and names the columns; then come, in the order of time,
samples of the board (`{"t", "gpus", "replicas", "torn", "active", "queue"}`) and scrapes (`{"t", "target", "took_s",
"up", "names", "changed"}`), which carry only what changed: `changed` pairs the number of a series with its new value,
and `names` gives the next numbers to series not seen before. `t` is `time.monotonic()` of the machine recorded.
"""

from __future__ import annotations

import dataclasses
import gzip
import json
import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from balancer.readings import GpuReading, GpuSource, ReplicaReading, ReplicaState, Snapshot

FORMAT = 1
_GPU_FIELDS = tuple(f.name for f in dataclasses.fields(GpuReading))
_REPLICA_FIELDS = tuple(f.name for f in dataclasses.fields(ReplicaReading))


@dataclass(frozen=True, slots=True)
class Target:
    """Something that Prometheus would scrape: the labels that its series get, and the `host:port` where it was."""

    labels: Mapping[str, str]
    address: str = ""


@dataclass(frozen=True, slots=True)
class Sample:
    """The board at one moment, with the slots that the living routers send work to and the requests that wait."""

    snapshot: Snapshot
    active: frozenset[int]
    queue_length: int


@dataclass(frozen=True, slots=True)
class Scrape:
    """What the target said at `at_s`, if it answered: its series (`name{labels}`) and their values as text."""

    at_s: float
    target: Target
    took_s: float
    up: bool
    series: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Recording:
    """`note` says on what and under which load; add `wall_offset_s` to a time to get seconds since 1970."""

    note: str
    wall_offset_s: float
    versions: Mapping[str, str]
    samples: tuple[Sample, ...]
    scrapes: tuple[Scrape, ...]


class Writer:
    """Writes a recording line by line; threads may share it."""

    def __init__(self, path: Path, note: str, wall_offset_s: float, versions: Mapping[str, str]) -> None:
        self._file = gzip.open(path, "wt", compresslevel=9)  # noqa: SIM115 - `close` closes it
        self._turn = threading.Lock()
        self._known: dict[int, _Known] = {}
        self._targets: list[Target] = []
        columns = {"gpu_fields": _GPU_FIELDS, "replica_fields": _REPLICA_FIELDS}
        head = {"format": FORMAT, "note": note, "wall_offset_s": round(wall_offset_s, 6), "versions": dict(versions)}
        self._write({**head, **columns})

    def sample(self, sample: Sample) -> None:
        snapshot = sample.snapshot
        self._write(
            {
                "t": round(snapshot.now_s, 6),
                "gpus": [_row(gpu, _GPU_FIELDS) for gpu in snapshot.gpus],
                "replicas": [_row(replica, _REPLICA_FIELDS) for replica in snapshot.replicas],
                "torn": snapshot.torn_slots,
                "active": sorted(sample.active),
                "queue": sample.queue_length,
            }
        )

    def scrape(self, scrape: Scrape) -> None:
        with self._turn:
            target = self._target(scrape.target)
            known = self._known.setdefault(int(target["target"]), _Known())
            told = {"took_s": round(scrape.took_s, 6), "up": int(scrape.up)}
            self._put({"t": round(scrape.at_s, 6), **target, **told, **known.changes(scrape.series)})

    def close(self) -> None:
        self._file.close()

    def _target(self, target: Target) -> dict[str, Any]:
        """Its number, and at its first appearance its labels."""
        if target in self._targets:
            return {"target": self._targets.index(target)}
        self._targets.append(target)
        return {"target": len(self._targets) - 1, "labels": dict(target.labels)}

    def _write(self, line: Mapping[str, Any]) -> None:
        with self._turn:
            self._put(line)

    def _put(self, line: Mapping[str, Any]) -> None:
        json.dump(line, self._file, separators=(",", ":"))
        self._file.write("\n")


@dataclass(slots=True)
class _Known:
    """The series of one target: their numbers, and their last values. None stands for one that is gone."""

    numbers: dict[str, int] = field(default_factory=dict)
    values: list[str | None] = field(default_factory=list)

    def changes(self, series: Mapping[str, str]) -> dict[str, Any]:
        new = [name for name in series if name not in self.numbers]
        for name in new:
            self.numbers[name] = len(self.numbers)
            self.values.append(None)
        changed = []
        for name, number in self.numbers.items():
            value = series.get(name)
            if value != self.values[number]:
                self.values[number] = value
                changed.append((number, value))
        return {"names": new, "changed": changed}

    def apply(self, names: Iterable[str], changed: Iterable[tuple[int, str | None]]) -> dict[str, str]:
        for name in names:
            self.numbers[name] = len(self.numbers)
            self.values.append(None)
        for number, value in changed:
            self.values[number] = value
        pairs = zip(self.numbers, self.values, strict=True)
        return {name: value for name, value in pairs if value is not None}


def _row(reading: GpuReading | ReplicaReading, fields: Iterable[str]) -> list[Any]:
    values = (getattr(reading, name) for name in fields)
    return [round(value, 6) if isinstance(value, float) else value for value in values]


def load(path: Path) -> Recording:
    """Raises ValueError when the file is no recording of this format."""
    with gzip.open(path, "rt") as file:
        head = json.loads(file.readline())
        if head.get("format") != FORMAT:
            raise ValueError(f"{path} is no recording of format {FORMAT}: record it anew with benchmarks.record")
        lines = [json.loads(line) for line in file]
    samples = tuple(_sample(line, head) for line in lines if "gpus" in line)
    scrapes = tuple(_scrapes(line for line in lines if "target" in line))
    return Recording(head["note"], head["wall_offset_s"], head["versions"], samples, scrapes)


def _sample(line: Mapping[str, Any], head: Mapping[str, Any]) -> Sample:
    replicas = tuple(_replica(dict(zip(head["replica_fields"], row, strict=True))) for row in line["replicas"])
    gpus = tuple(_gpu(dict(zip(head["gpu_fields"], row, strict=True))) for row in line["gpus"])
    snapshot = Snapshot(line["t"], replicas, gpus, tuple(line["torn"]))
    return Sample(snapshot, frozenset(line["active"]), line["queue"])


def _replica(values: dict[str, Any]) -> ReplicaReading:
    state, received = ReplicaState(values["state"]), tuple(values["received_by_router"])
    return ReplicaReading(**{**values, "state": state, "received_by_router": received})


def _gpu(values: dict[str, Any]) -> GpuReading:
    return GpuReading(**{**values, "source": GpuSource(values["source"])})


def _scrapes(lines: Iterable[Mapping[str, Any]]) -> Iterator[Scrape]:
    targets: list[Target] = []
    known: list[_Known] = []
    for line in lines:
        if "labels" in line:
            targets.append(Target(line["labels"]))
            known.append(_Known())
        number = line["target"]
        series = known[number].apply(line["names"], line["changed"])
        yield Scrape(line["t"], targets[number], line["took_s"], bool(line["up"]), series)
