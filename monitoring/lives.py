"""Lives of replicas, as seen on the board: how many began in each slot, and how long the last one took to be ready."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from balancer.readings import ReplicaReading, ReplicaState, Snapshot


@dataclass(frozen=True, slots=True)
class ReplicaLife:
    """`starts` counts every replica seen in the slot. `load_s` is NaN until one was seen both starting and ready."""

    replica_id: str = ""
    starts: int = 0
    began_s: float = math.nan
    load_s: float = math.nan


NO_LIFE = ReplicaLife()


class LifeWatch:
    """Follows snapshots; times are as fine as they come. A replica that is ready when first seen has no load time."""

    def __init__(self) -> None:
        self._lives: dict[int, ReplicaLife] = {}

    def look(self, snapshot: Snapshot) -> Mapping[int, ReplicaLife]:
        """The lives of all slots ever seen occupied, this snapshot included."""
        for replica in snapshot.replicas:
            self._lives[replica.slot] = _follow(self._lives.get(replica.slot, NO_LIFE), replica, snapshot.now_s)
        return self._lives


def _follow(life: ReplicaLife, replica: ReplicaReading, now_s: float) -> ReplicaLife:
    starting = replica.state is ReplicaState.STARTING
    if replica.replica_id != life.replica_id:
        began_s = now_s if starting else math.nan
        return ReplicaLife(replica.replica_id, life.starts + 1, began_s)
    if replica.state is ReplicaState.READY and math.isnan(life.load_s):
        return ReplicaLife(life.replica_id, life.starts, life.began_s, now_s - life.began_s)
    return life
