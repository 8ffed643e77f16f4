"""Late binding: a request is bound to a replica only when there is room for it; until then it waits here.

One bounded queue: higher priority first, then first come. A request that fits may pass one that does not, but only so
often and so long (`Knobs.overtake_*`); one that has waited half its deadline goes first whatever its priority.

Routers side by side see one another through `on_the_way_*` and `in_flight_*` alone. Two that decide on snapshots taken
before the other's assignment was written may both use the same last room: each then exceeds a KV cache by at most what
it assigned within the age of one snapshot (well under a millisecond), which `kv_reserve_ratio` is there to absorb.
"""

from __future__ import annotations

import math
import random
from collections import OrderedDict, deque
from collections.abc import Iterator
from dataclasses import dataclass

from balancer.explain import Record
from balancer.gpu_aware import GpuAware
from balancer.knobs import Knobs
from balancer.policies import Policy, decide, make_policy
from balancer.readings import Decision, RequestCost, Snapshot, reject, wait

# How far behind a request that does not fit others are looked at, at each release: bounds the time of a decision.
OVERTAKE_WINDOW = 16
RECENT_DECISIONS = 256
# Retry-After is at least what HTTP can say and at most what a person would wait.
RETRY_AT_LEAST_S = 1.0
RETRY_AT_MOST_S = 60.0
# The drain rate forgets half of the past in about this time: longer than most answers, shorter than most crowds.
DRAIN_MEMORY_S = 10.0


class Waiting:
    """A queued request."""

    __slots__ = ("cost", "overtaken", "request_id", "since_s")

    def __init__(self, request_id: str, cost: RequestCost, since_s: float) -> None:
        self.request_id = request_id
        self.cost = cost
        self.since_s = since_s
        self.overtaken = 0


Decided = tuple[Waiting, Decision]


class WaitingRoom:
    """Queued requests by priority and arrival. Every operation but `overtakers` is O(1) for each priority."""

    def __init__(self) -> None:
        self._by_priority: dict[int, OrderedDict[str, Waiting]] = {}
        self._arrivals: OrderedDict[str, Waiting] = OrderedDict()

    def __len__(self) -> int:
        return len(self._arrivals)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._arrivals

    def add(self, entry: Waiting) -> None:
        self._arrivals[entry.request_id] = entry
        self._by_priority.setdefault(entry.cost.priority, OrderedDict())[entry.request_id] = entry

    def remove(self, request_id: str) -> Waiting | None:
        entry = self._arrivals.pop(request_id, None)
        if entry is not None:
            line = self._by_priority[entry.cost.priority]
            del line[request_id]
            if not line:
                del self._by_priority[entry.cost.priority]
        return entry

    def oldest(self) -> Waiting | None:
        return next(iter(self._arrivals.values()), None)

    def first(self, now_s: float, promote_after_s: float) -> Waiting | None:
        """Whose turn it is: who has waited longest once that is too long, else the first of the highest priority."""
        oldest = self.oldest()
        if oldest is None or now_s - oldest.since_s >= promote_after_s:
            return oldest
        return next(iter(self._by_priority[max(self._by_priority)].values()))

    def overtakers(self, head: Waiting) -> Iterator[Waiting]:
        """Those next in line behind `head`, at most OVERTAKE_WINDOW."""
        found = 0
        for priority in sorted(self._by_priority, reverse=True):
            for entry in self._by_priority[priority].values():
                if entry is not head:
                    yield entry
                    found += 1
                if found >= OVERTAKE_WINDOW:
                    return


@dataclass(slots=True)
class DrainRate:
    """Requests finished each second, over all replicas, as an exponential mean."""

    per_s: float = 0.0
    _counted_s: float = -math.inf
    _finished: dict[tuple[int, str], int] | None = None

    def follow(self, snapshot: Snapshot) -> None:
        gap_s = snapshot.now_s - self._counted_s
        if gap_s < 0.25:
            return
        finished = {(r.slot, r.replica_id): r.finished_total for r in snapshot.replicas}
        if self._finished is not None:
            done = sum(max(0, n - self._finished.get(key, n)) for key, n in finished.items())
            self.per_s += -math.expm1(-gap_s / DRAIN_MEMORY_S) * (done / gap_s - self.per_s)
        self._counted_s, self._finished = snapshot.now_s, finished

    def retry_after_s(self, ahead: int) -> float:
        """When the queue ahead will have drained at this rate, within the bounds."""
        seconds = (ahead + 1) / self.per_s if self.per_s > 0.0 else RETRY_AT_MOST_S
        return min(RETRY_AT_MOST_S, max(RETRY_AT_LEAST_S, math.ceil(round(seconds, 3))))


class Dispatcher:
    """Every request of one router passes through here exactly once: assigned, rejected or cancelled.

    Not thread-safe. `gpu_aware` queues; the other policies assign at once, as the field does. Snapshots must not go
    back in time.
    """

    def __init__(self, knobs: Knobs, rng: random.Random) -> None:
        self._rng = rng
        self._room = WaitingRoom()
        self._drain = DrainRate()
        self._aware = GpuAware(knobs, rng)
        self._simple: Policy | None = None
        self.recent: deque[Record] = deque(maxlen=RECENT_DECISIONS)
        self.reconfigure(knobs)

    @property
    def waiting(self) -> int:
        return len(self._room)

    @property
    def active(self) -> tuple[int, ...]:
        """Slots that receive new work now (of the last snapshot seen)."""
        return self._active if self._simple else self._aware.active

    def reconfigure(self, knobs: Knobs) -> None:
        """Take new knobs from the next decision on; queued requests stay, under the new deadline and limit."""
        self.knobs = knobs
        self._aware.reconfigure(knobs)
        self._simple = None if knobs.policy == GpuAware.name else make_policy(knobs)
        self._active: tuple[int, ...] = ()

    def submit(self, request_id: str, cost: RequestCost, snapshot: Snapshot) -> Decision:
        """Assign, queue (WAIT) or turn away a new request. Raises ValueError when `request_id` already waits."""
        if request_id in self._room:
            raise ValueError(f"request {request_id!r} is already waiting; submit each id once")
        decision = self._submit(request_id, cost, snapshot)
        self.recent.append(Record(snapshot.now_s, request_id, cost, decision, snapshot))
        return decision

    def _submit(self, request_id: str, cost: RequestCost, snapshot: Snapshot) -> Decision:
        self._drain.follow(snapshot)
        if self._simple is not None:
            return self._decide_simply(self._simple, cost, snapshot)
        self._aware.refresh(snapshot, len(self._room), arriving=1)
        if not self._aware.any_ready and not snapshot.torn_slots:
            return self._unavailable()
        placed = self._place_newcomer(cost, snapshot.now_s)
        if placed is not None:
            return placed
        if len(self._room) >= self.knobs.queue_limit:
            return reject(429, "queue_full", self._drain.retry_after_s(len(self._room)))
        self._room.add(Waiting(request_id, cost, snapshot.now_s))
        return wait("no_room")

    def _place_newcomer(self, cost: RequestCost, now_s: float) -> Decision | None:
        head = self._first(now_s)
        if head is None:
            return self._aware.place(cost)
        if cost.priority <= head.cost.priority and not self._may_be_passed(head, now_s):
            return None
        placed = self._aware.place(cost)
        head.overtaken += placed is not None
        return placed

    def release(self, snapshot: Snapshot) -> list[tuple[str, Decision]]:
        """Queued requests that are decided now: assigned in their order, or past their deadline."""
        self._drain.follow(snapshot)
        self._refresh_for_release(snapshot)
        decided = self._expired(snapshot)
        decided += self._all_simply(snapshot) if self._simple is not None else self._assigned(snapshot.now_s)
        self.recent.extend(Record(snapshot.now_s, e.request_id, e.cost, choice, snapshot) for e, choice in decided)
        return [(entry.request_id, choice) for entry, choice in decided]

    def expect(self, sequences: int, snapshot: Snapshot) -> None:
        """So many sequences are about to be submitted, one part of a batch after the other: let the active set know."""
        if self._simple is None:
            self._aware.refresh(snapshot, len(self._room), arriving=sequences)

    def cancel(self, request_id: str) -> None:
        """Forget a queued request; one that does not wait (any more) is no error."""
        self._room.remove(request_id)

    def _refresh_for_release(self, snapshot: Snapshot) -> None:
        if self._simple is None:
            self._aware.refresh(snapshot, len(self._room))

    def _expired(self, snapshot: Snapshot) -> list[Decided]:
        decided = []
        while (entry := self._room.oldest()) and snapshot.now_s - entry.since_s >= self.knobs.queue_deadline_s:
            self._room.remove(entry.request_id)
            decided.append((entry, self._too_late(snapshot)))
        return decided

    def _too_late(self, snapshot: Snapshot) -> Decision:
        if not snapshot.ready(self.knobs.stale_after_s):
            return self._unavailable()
        return reject(429, "queue_deadline", self._drain.retry_after_s(len(self._room)))

    def _assigned(self, now_s: float) -> list[Decided]:
        decided: list[Decided] = []
        while (head := self._first(now_s)) is not None:
            placed = self._aware.place(head.cost)
            if placed is None:
                return decided + self._overtaking(head, now_s)
            self._room.remove(head.request_id)
            decided.append((head, placed))
        return decided

    def _overtaking(self, head: Waiting, now_s: float) -> list[Decided]:
        decided: list[Decided] = []
        room = self._aware.largest_room()
        for entry in list(self._room.overtakers(head)) if room else ():
            if not self._may_be_passed(head, now_s):
                break
            placed = self._aware.place(entry.cost) if entry.cost.tokens <= room else None
            if placed is not None:
                head.overtaken += 1
                self._room.remove(entry.request_id)
                decided.append((entry, placed))
        return decided

    def _first(self, now_s: float) -> Waiting | None:
        return self._room.first(now_s, self.knobs.queue_deadline_s / 2)

    def _may_be_passed(self, head: Waiting, now_s: float) -> bool:
        patient = now_s - head.since_s < self.knobs.overtake_patience_s
        return patient and head.overtaken < self.knobs.overtake_limit

    def _all_simply(self, snapshot: Snapshot) -> list[Decided]:
        """What waited under `gpu_aware` when the policy was changed to one without a queue."""
        assert self._simple is not None
        decided = []
        while snapshot.ready(self.knobs.stale_after_s) and (entry := self._room.oldest()):
            self._room.remove(entry.request_id)
            decided.append((entry, self._decide_simply(self._simple, entry.cost, snapshot)))
        return decided

    def _decide_simply(self, policy: Policy, cost: RequestCost, snapshot: Snapshot) -> Decision:
        self._active = tuple(r.slot for r in snapshot.ready(self.knobs.stale_after_s))
        return decide(policy, self.knobs, cost, snapshot)

    def _unavailable(self) -> Decision:
        return reject(503, "no_replica_ready", RETRY_AT_LEAST_S)
