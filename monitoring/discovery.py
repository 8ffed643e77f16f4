"""What Prometheus shall scrape on this node, as a file for its `file_sd_configs`, always whole.

https://prometheus.io/docs/guides/file-sd/. Each group carries `role` (prometheus.yml sorts the jobs by it) and `node`;
a replica's carries its `slot` and `replica` too, so that vLLM's own series can be told apart and joined with ours.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

from balancer.readings import ReplicaReading
from monitoring.exposition import replica_tag

# prometheus.yml names this folder; the same in and outside of the container.
FOLDER = Path("/tmp/splitwiser")


class TargetGroup(TypedDict):
    targets: list[str]
    labels: dict[str, str]


@dataclass(frozen=True, slots=True)
class ReplicaTarget:
    """Where a replica serves vLLM's native metrics: `host:port` of its own, not of the public address."""

    address: str
    slot: int
    replica_id: str

    @staticmethod
    def of(reading: ReplicaReading, address: str) -> ReplicaTarget:
        return ReplicaTarget(address, reading.slot, reading.replica_id)


def targets_file(run_id: str, folder: Path = FOLDER) -> Path:
    """The file of one run; Prometheus reads every `*.json` of the folder."""
    return folder / f"{run_id}.json"


def groups(
    node: str, exporter: str, replicas: Iterable[ReplicaTarget], haproxy: str | None = None
) -> list[TargetGroup]:
    """The target groups of one node; addresses are `host:port`. Without HAProxy its group is left out."""
    found: list[TargetGroup] = [_group(node, "exporter", exporter)]
    for replica in sorted(replicas, key=lambda r: r.slot):
        tag = replica_tag(replica.replica_id)
        found.append(_group(node, "replica", replica.address, slot=str(replica.slot), replica=tag))
    if haproxy is not None:
        found.append(_group(node, "haproxy", haproxy))
    return found


def _group(node: str, role: str, address: str, **labels: str) -> TargetGroup:
    return {"targets": [address], "labels": {"role": role, "node": node, **labels}}


def write(path: Path, found: list[TargetGroup]) -> None:
    """Replace the file in one step, readable by all, because Prometheus runs as a user of its own.

    Raises OSError when the folder belongs to somebody else.
    """
    path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    # The name must not end in .json, or Prometheus would read it half-written.
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.stem}-", suffix=".new", dir=path.parent)
    try:
        with os.fdopen(descriptor, "w") as file:
            json.dump(found, file, indent=2)
            file.write("\n")
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def remove(path: Path) -> None:
    """Nothing of this run is to be scraped any more; that it was never written is no error."""
    path.unlink(missing_ok=True)
