"""Which replicas receive work: one that fails or falls silent leaves the rotation, and comes back gently.

After the outlier detection of Envoy: so many server errors in a row eject a replica for a time that grows with each
ejection, and never the last one. Health is more than an absence of errors: a replica whose requests wait while its
engine makes no step is out until it steps again.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from balancer.knobs import Knobs
from balancer.readings import ReplicaReading, ReplicaState, Snapshot

# Envoy's defaults, which the field has copied: five in a row, thirty seconds more for each time, at most five minutes.
ERRORS_IN_A_ROW = 5
OUT_S = 30.0
OUT_AT_MOST_S = 300.0
# A replica that was in rotation for as long as the longest ejection begins anew.
FORGIVEN_AFTER_S = OUT_AT_MOST_S
# How long a returning replica gets less than its share: a few answers' time, in which five errors show again.
SLOW_START_S = 10.0
# Rotation is judged this often; between two judgements only the verdict is applied.
JUDGED_EVERY_S = 0.05


@dataclass(slots=True)
class _Record:
    """What is remembered of one life of a replica."""

    replica_id: str
    steps: int
    stepped_s: float
    errors_forgiven: int = 0
    ejections: int = 0
    out_until_s: float = -math.inf
    back_s: float = -math.inf
    why_out: str = ""


class Health:
    """One router's view. `look` at every snapshot; `ejected` then tells what has happened since it was last asked."""

    def __init__(self, knobs: Knobs) -> None:
        self.knobs = knobs
        self._records: dict[int, _Record] = {}
        self._judged_s = -math.inf
        self._out: frozenset[int] = frozenset()
        self._returning: frozenset[int] = frozenset()
        self._ejected: list[str] = []

    def look(self, snapshot: Snapshot) -> Snapshot:
        """The snapshot without the replicas that shall receive nothing now."""
        if snapshot.now_s - self._judged_s >= JUDGED_EVERY_S:
            self._judge(snapshot)
        if not self._out and not self._returning:
            return snapshot
        hidden = self._out | self._held_back(snapshot.replicas)
        kept = tuple(r for r in snapshot.replicas if r.slot not in hidden)
        return Snapshot(snapshot.now_s, kept, snapshot.gpus, snapshot.torn_slots)

    def ejected(self) -> list[str]:
        """The reasons of the ejections since the last call: `errors`, `stalled`, `stale` or `failed`."""
        found, self._ejected = self._ejected, []
        return found

    @property
    def out(self) -> frozenset[int]:
        """Slots out of rotation at the last judgement."""
        return self._out

    def _judge(self, snapshot: Snapshot) -> None:
        now_s = self._judged_s = snapshot.now_s
        seen = {replica.slot: self._record(replica, now_s) for replica in snapshot.replicas}
        torn = {slot: self._records[slot] for slot in snapshot.torn_slots if slot in self._records}
        self._records = {**torn, **seen}
        ready = {replica.slot for replica in snapshot.ready(self.knobs.stale_after_s)}
        for replica in snapshot.replicas:
            self._follow(self._records[replica.slot], replica, replica.slot in ready, now_s)
        wanted = {slot for slot in ready if not self._records[slot].why_out}
        for replica in snapshot.replicas:
            if replica.slot in wanted and len(wanted) > 1 and (why := self._complaint(replica, now_s)):
                self._eject(self._records[replica.slot], why, replica, now_s)
                wanted.discard(replica.slot)
        if ready and not wanted:
            wanted.add(self._least_bad(ready))
        self._out = frozenset(ready - wanted)
        slow = (slot for slot in wanted if now_s - self._records[slot].back_s < SLOW_START_S)
        self._returning = frozenset(slow)

    def _record(self, replica: ReplicaReading, now_s: float) -> _Record:
        record = self._records.get(replica.slot)
        if record is None or record.replica_id != replica.replica_id:
            return _Record(replica.replica_id, replica.engine_steps_total, now_s)
        return record

    def _follow(self, record: _Record, replica: ReplicaReading, ready: bool, now_s: float) -> None:
        """Take note of progress, and of the end of an ejection."""
        if replica.engine_steps_total != record.steps or not replica.awaiting_requests:
            record.steps, record.stepped_s = replica.engine_steps_total, now_s
        record.errors_forgiven = min(record.errors_forgiven, replica.server_errors_in_a_row)
        if not ready:
            self._gone(record, replica)
        elif record.why_out and self._may_return(record, now_s):
            record.why_out, record.back_s = "", now_s
            record.errors_forgiven = replica.server_errors_in_a_row
        elif not record.why_out and record.ejections and now_s - record.back_s >= FORGIVEN_AFTER_S:
            record.ejections = 0

    def _gone(self, record: _Record, replica: ReplicaReading) -> None:
        """Routers leave it alone anyway; noted once, when it was in rotation."""
        unasked = replica.state in (ReplicaState.READY, ReplicaState.FAILED)
        why = "failed" if replica.state is ReplicaState.FAILED else "stale"
        if unasked and record.why_out not in ("failed", "stale"):
            record.why_out = why
            self._ejected.append(why)

    def _may_return(self, record: _Record, now_s: float) -> bool:
        match record.why_out:
            case "errors":
                return now_s >= record.out_until_s
            case "stalled":
                return record.stepped_s >= now_s
            case _:
                return True

    def _complaint(self, replica: ReplicaReading, now_s: float) -> str:
        record = self._records[replica.slot]
        if replica.server_errors_in_a_row - record.errors_forgiven >= ERRORS_IN_A_ROW:
            return "errors"
        return "stalled" if now_s - record.stepped_s >= self.knobs.stalled_after_s else ""

    def _eject(self, record: _Record, why: str, replica: ReplicaReading, now_s: float) -> None:
        record.why_out = why
        self._ejected.append(why)
        if why == "errors":
            record.ejections += 1
            record.out_until_s = now_s + min(OUT_AT_MOST_S, OUT_S * record.ejections)

    def _least_bad(self, slots: Iterable[int]) -> int:
        """Somebody must stay: one that would be back first, and rather one that errs than one that is silent."""
        return min(slots, key=lambda s: (self._records[s].why_out == "stalled", self._records[s].out_until_s, s))

    def _held_back(self, replicas: Iterable[ReplicaReading]) -> set[int]:
        """Returning replicas that have their share already: it grows from one request to what the others have."""
        others = [r.assigned_requests for r in replicas if r.slot not in self._returning and r.slot not in self._out]
        most = max(others, default=math.inf)
        return {r.slot for r in replicas if r.slot in self._returning and r.assigned_requests >= self._share(r, most)}

    def _share(self, replica: ReplicaReading, most: float) -> float:
        grown = (self._judged_s - self._records[replica.slot].back_s) / SLOW_START_S
        return max(1.0, grown * most) if most < math.inf else most
