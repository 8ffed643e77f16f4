"""What a router has assigned and the replica has not yet received: counted exactly, and never for ever."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Protocol

from balancer.readings import ReplicaReading, Snapshot

# A request goes from the router to its replica in about a millisecond. One that needs longer than this has lost its
# client or its replica in between, and must not keep looking like work.
LOST_AFTER_S = 5.0

Weight = tuple[int, int]  # sequences, tokens


class Row(Protocol):
    """The router's own row of the board."""

    @property
    def index(self) -> int: ...

    def add(self, slot: int, requests: int, tokens: int) -> None: ...

    def publish(self, now_s: float) -> None: ...


class OnTheWay:
    """One router's ledger of assignments under way; what it holds is what its row of the board says.

    `received` reads from a replica how many of this router's requests have arrived; by default the replica's counter
    for this router's row.
    """

    def __init__(self, row: Row, received: Callable[[ReplicaReading], int] | None = None) -> None:
        self._row = row
        self._count = received or (lambda replica: replica.received_by_router[row.index])
        self._slots: dict[int, _Slot] = {}
        self.lost_total = 0

    def assigned(self, replica: ReplicaReading, tokens: int, now_s: float, sequences: int = 1) -> None:
        """Note one assignment of so many sequences and publish it, so that every router sees it before the replica."""
        self._of(replica).pending.append((now_s, sequences, tokens))
        self._row.add(replica.slot, sequences, tokens)
        self._row.publish(now_s)

    def reconcile(self, snapshot: Snapshot) -> bool:
        """Strike what the replicas have received since, and what has been under way for too long.

        Whether anything was struck: `on_the_way_*` of the replicas in `snapshot` then say too much.
        """
        changed = False
        seen = {replica.slot: replica for replica in snapshot.replicas}
        for slot, state in list(self._slots.items()):
            if slot in snapshot.torn_slots:
                continue
            replica = seen.get(slot)
            gone = replica is None or replica.replica_id != state.replica_id
            struck = state.all() if gone or replica is None else self._received(state, replica, snapshot.now_s)
            if struck:
                changed = True
                self._row.add(slot, -sum(s for s, _ in struck), -sum(tokens for _, tokens in struck))
            if gone:
                del self._slots[slot]
        if changed:
            self._row.publish(snapshot.now_s)
        return changed

    def _of(self, replica: ReplicaReading) -> _Slot:
        state = self._slots.get(replica.slot)
        if state is None or state.replica_id != replica.replica_id:
            state = self._slots[replica.slot] = _Slot(replica.replica_id, self._count(replica))
        return state

    def _received(self, state: _Slot, replica: ReplicaReading, now_s: float) -> list[Weight]:
        struck = state.arrive(self._count(replica))
        lost = state.lose(now_s - LOST_AFTER_S)
        self.lost_total += len(lost)
        return struck + lost


class _Slot:
    """Assignments to one replica, oldest first. Requests are counted exactly, sequences and tokens nearly so.

    An arrival strikes the newest: what stays the oldest for LOST_AFTER_S has been below all that arrived since, which
    is how the lost are told from the busy. Striking the oldest would keep a lost one's place taken for as long as
    others come. One that arrives after it was given up strikes another early, until nothing is under way.
    """

    def __init__(self, replica_id: str, received: int) -> None:
        self.replica_id = replica_id
        self.pending: deque[tuple[float, int, int]] = deque()
        self._received = received

    def all(self) -> list[Weight]:
        return [(sequences, tokens) for _, sequences, tokens in self.pending]

    def arrive(self, received: int) -> list[Weight]:
        arrived = received - self._received
        self._received = received
        return [self.pending.pop()[1:] for _ in range(min(arrived, len(self.pending)))]

    def lose(self, before_s: float) -> list[Weight]:
        lost = []
        while self.pending and self.pending[0][0] < before_s:
            lost.append(self.pending.popleft()[1:])
        return lost
