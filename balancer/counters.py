"""What the routers have decided, counted where others can read it: a file of fixed-size records beside the board.

One record for each router row, written only by the router that holds the row, in the board's manner: a sequence number
(odd while the record is being written) and a checksum, so that a reader never blocks and never takes a torn record for
a whole one. A router that takes a row over goes on counting where the last one stopped, so that the sum over the rows
never falls while the file lives; it is removed when the last living router leaves.

The label sets are closed, and stand here: what is not in them counts as `other`.
"""

from __future__ import annotations

import os
import struct
import zlib
from array import array
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from mmap import mmap
from pathlib import Path

from balancer.board import REPLICA_SLOTS, ROUTER_ROWS, BoardError, Owner
from balancer.shared_file import Layout, locked, opened, ready

OTHER = "other"
# Every reason that a policy gives for an assignment, with the policy that gives it.
CHOICES = (
    ("round_robin", "turn"),
    ("least_queue", "least_queue"),
    ("power_of_two", "of_two"),
    ("gpu_aware", "shortest_wait"),
    ("gpu_aware", "affinity"),
    ("gpu_aware", "most_room"),
    (OTHER, OTHER),
)
REJECTIONS = (
    "no_replica_ready", "queue_full", "queue_deadline", "client_timeout", "stopping", "invalid_api_key", "request_rate",
    "token_rate", "too_many_at_once", OTHER,
)  # fmt: skip
# Why a replica that is on the board stopped receiving work without having asked for it.
EJECTIONS = ("errors", "stalled", "stale", "unreachable", "failed", OTHER)
# A decision takes 20 to 500 us; a wait ends with its deadline, 30 s by default.
DECISION_BOUNDS_S = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 5e-2)
WAIT_BOUNDS_S = (0.001, 0.005, 0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)

_CHOICE = {choice: index for index, choice in enumerate(CHOICES)}
_REJECTION = {reason: index for index, reason in enumerate(REJECTIONS)}
_EJECTION = {reason: index for index, reason in enumerate(EJECTIONS)}

# A record's payload: 8-byte words, section after section. Times are nanoseconds, the active set is a bit mask.
_SECTIONS = {
    "decisions": REPLICA_SLOTS * len(CHOICES),
    "rejections": len(REJECTIONS),
    "ejections": len(EJECTIONS),
    "decision_buckets": len(DECISION_BOUNDS_S) + 1,
    "decision_ns": 1,
    "wait_buckets": len(WAIT_BOUNDS_S) + 1,
    "wait_ns": 1,
    "lost": 1,
    "cancelled": 1,
    "queue": 1,
    "active": 1,
}
_AT = dict(zip(_SECTIONS, accumulate(_SECTIONS.values(), initial=0), strict=False))
_WORDS = sum(_SECTIONS.values())
# They tell of now, not of the past: a router's successor starts without them, and they die with their router.
_GAUGES = ("queue", "active")

_SEQUENCE = struct.Struct("@Q")
_AFTER_SEQUENCE = struct.Struct("@IIQd")
_RECORD = struct.Struct("@QIIQd")  # sequence, CRC of the payload, owner's PID, owner's start ticks, written at
_HEADER = struct.Struct("@8sII")
_HEADER_BYTES = 64
_STRIDE = -(-(_RECORD.size + 8 * _WORDS) // 64) * 64
COUNTERS_BYTES = _HEADER_BYTES + ROUTER_ROWS * _STRIDE
# Another closed set is another layout.
_LABELS = zlib.crc32(repr((CHOICES, REJECTIONS, EJECTIONS, DECISION_BOUNDS_S, WAIT_BOUNDS_S, _SECTIONS)).encode())
_LAYOUT = Layout("counters", _HEADER.pack(b"SPLTCNT1", _LABELS, COUNTERS_BYTES), COUNTERS_BYTES)
_READ_ATTEMPTS = 8


def counters_path(board: Path) -> Path:
    """Where the counters of the routers on `board` lie."""
    return board.with_name(board.name + ".counters")


class RouterCounters:
    """One router's pen: the methods change a working copy, `publish` writes it out (together under 10 us).

    Belongs to one thread. `row` is the index of the router's row on the board, which no other router holds.
    """

    def __init__(self, path: Path, row: int, descriptor: int) -> None:
        self._path = path
        self._map = mmap(descriptor, COUNTERS_BYTES)
        self._numbers = memoryview(self._map).cast("Q")
        self._owner = Owner.me()
        self._at = _HEADER_BYTES + row * _STRIDE
        record = _parse(self._map[self._at : self._at + _STRIDE])
        self._words = array("Q", record.words if record else bytes(8 * _WORDS))
        for gauge in _GAUGES:
            self._words[_AT[gauge]] = 0
        self._sequence = self._numbers[self._at // 8] // 2 * 2

    @classmethod
    def open(cls, board: Path, row: int) -> RouterCounters:
        """Map the counters beside `board`, making the file (mode 0600) when it is missing or of another layout.

        Raises BoardError when the file belongs to another user or shared memory is full.
        """
        if not 0 <= row < ROUTER_ROWS:
            raise BoardError(f"the board has {ROUTER_ROWS} router rows, not a row {row}; claim one first")
        path = counters_path(board)
        with ready(path, _LAYOUT) as descriptor:
            counters = cls(path, row, descriptor)
            counters.publish(0.0)
            return counters

    def count_decision(self, slot: int, policy: str, reason: str, seconds: float) -> None:
        """A request was assigned to `slot`; `seconds` is what it took to decide, waiting not included."""
        choice = _CHOICE.get((policy, reason), len(CHOICES) - 1)
        self._words[slot * len(CHOICES) + choice] += 1
        self._observe("decision_buckets", "decision_ns", DECISION_BOUNDS_S, seconds)

    def count_rejection(self, reason: str) -> None:
        """A request was turned away."""
        self._words[_AT["rejections"] + _REJECTION.get(reason, len(REJECTIONS) - 1)] += 1

    def count_ejection(self, reason: str) -> None:
        """A replica stopped receiving work, for one of the EJECTIONS."""
        self._words[_AT["ejections"] + _EJECTION.get(reason, len(EJECTIONS) - 1)] += 1

    def count_lost(self, requests: int) -> None:
        """Assigned requests never arrived at their replica."""
        self._words[_AT["lost"]] += requests

    def count_cancelled(self) -> None:
        """A waiting request's client went away."""
        self._words[_AT["cancelled"]] += 1

    def observe_wait(self, seconds: float) -> None:
        """A request left the queue, decided or not, after `seconds` in it."""
        self._observe("wait_buckets", "wait_ns", WAIT_BOUNDS_S, seconds)

    def set_queue(self, length: int) -> None:
        """How many requests wait now."""
        self._words[_AT["queue"]] = length

    def set_active(self, slots: Iterable[int]) -> None:
        """Which slots receive new work now."""
        mask = 0
        for slot in slots:
            mask |= 1 << slot
        self._words[_AT["active"]] = mask

    def publish(self, now_s: float) -> None:
        """Write everything out; call it once after each decision or change."""
        self._sequence += 2
        at, owner, payload = self._at, self._owner, self._words.tobytes()
        head = _AFTER_SEQUENCE.pack(zlib.crc32(payload), owner.pid, owner.start_ticks, now_s)
        # Through `numbers`: `struct.pack_into` first fills its target with zeros, which would say that it is empty.
        self._numbers[at // 8] = self._sequence - 1
        self._map[at + _SEQUENCE.size : at + _RECORD.size + len(payload)] = head + payload
        self._numbers[at // 8] = self._sequence

    def leave(self) -> None:
        """Give the row's counters to whoever comes next; the last living router removes the file."""
        self._owner = Owner(0, 0)
        self.publish(0.0)
        with opened(self._path, _LAYOUT) as descriptor, locked(descriptor):
            if os.fstat(descriptor).st_nlink and not any(record.owner.alive() for record in _all(descriptor)):
                self._path.unlink()
        self._numbers.release()
        self._map.close()

    def _observe(self, buckets: str, total_ns: str, bounds_s: Sequence[float], seconds: float) -> None:
        self._words[_AT[buckets] + bisect_left(bounds_s, seconds)] += 1
        self._words[_AT[total_ns]] += max(0, round(seconds * 1e9))


@dataclass(frozen=True, slots=True)
class Observed:
    """A histogram: how many observations fell into each bucket (the last is without bound), and their sum."""

    bounds_s: tuple[float, ...]
    buckets: tuple[int, ...]
    sum_s: float

    @property
    def count(self) -> int:
        return sum(self.buckets)


@dataclass(frozen=True, slots=True)
class RouterTotals:
    """All routers of one board together. `decisions[slot]` follows CHOICES, `rejections` and `ejections` their sets.

    `active` names the slots that any living router sends new work to; `queue_length` adds up living routers' queues.
    """

    decisions: tuple[tuple[int, ...], ...]
    rejections: tuple[int, ...]
    ejections: tuple[int, ...]
    decision: Observed
    wait: Observed
    lost: int
    cancelled: int
    queue_length: int
    active: frozenset[int]
    routers: int


class CountersReader:
    """Reads the counters beside `board`; keeps the last whole record of each row for the moment that one is torn.

    Belongs to one thread.
    """

    def __init__(self, board: Path) -> None:
        self._path = counters_path(board)
        self._inode = 0
        self._last: dict[int, _Read] = {}

    def read(self) -> RouterTotals:
        """The sums over all rows: zeros where no router has counted yet. Raises BoardError when it may not be read."""
        try:
            with open(self._path, "rb") as file:
                self._follow(file.fileno())
        except FileNotFoundError:
            self._last.clear()
        except OSError as error:
            raise BoardError(f"cannot read {self._path}: {error.strerror}; run as the user who serves") from error
        return _totals(list(self._last.values()))

    def _follow(self, descriptor: int) -> None:
        inode = os.fstat(descriptor).st_ino
        if inode != self._inode:
            self._inode = inode
            self._last.clear()
        if os.pread(descriptor, _HEADER.size, 0) != _LAYOUT.head:
            self._last.clear()
            return
        for row in range(ROUTER_ROWS):
            if record := _whole(descriptor, row):
                self._last[row] = record


@dataclass(frozen=True, slots=True)
class _Read:
    owner: Owner
    words: array[int]

    def section(self, name: str) -> array[int]:
        return self.words[_AT[name] : _AT[name] + _SECTIONS[name]]


def _parse(record: bytes) -> _Read | None:
    """None when it is empty or torn."""
    sequence, crc, pid, ticks, _ = _RECORD.unpack_from(record)
    payload = record[_RECORD.size : _RECORD.size + 8 * _WORDS]
    if sequence == 0 or sequence % 2 or zlib.crc32(payload) != crc:
        return None
    return _Read(Owner(pid, ticks), array("Q", payload))


def _whole(descriptor: int, row: int) -> _Read | None:
    at = _HEADER_BYTES + row * _STRIDE
    if not any(os.pread(descriptor, _SEQUENCE.size, at)):
        return None
    for _ in range(_READ_ATTEMPTS):
        if record := _parse(os.pread(descriptor, _STRIDE, at)):
            return record
    return None


def _all(descriptor: int) -> Iterator[_Read]:
    for row in range(ROUTER_ROWS):
        if record := _whole(descriptor, row):
            yield record


def _totals(records: Sequence[_Read]) -> RouterTotals:
    alive = [record for record in records if record.owner.alive()]
    sums = {name: _columns(records, name) for name in _SECTIONS}
    decisions, choices = sums["decisions"], len(CHOICES)
    mask = 0
    for record in alive:
        mask |= record.section("active")[0]
    return RouterTotals(
        decisions=tuple(decisions[slot * choices : (slot + 1) * choices] for slot in range(REPLICA_SLOTS)),
        rejections=sums["rejections"],
        ejections=sums["ejections"],
        decision=Observed(DECISION_BOUNDS_S, sums["decision_buckets"], sums["decision_ns"][0] / 1e9),
        wait=Observed(WAIT_BOUNDS_S, sums["wait_buckets"], sums["wait_ns"][0] / 1e9),
        lost=sums["lost"][0],
        cancelled=sums["cancelled"][0],
        queue_length=sum(record.section("queue")[0] for record in alive),
        active=frozenset(slot for slot in range(REPLICA_SLOTS) if mask >> slot & 1),
        routers=len(alive),
    )


def _columns(records: Sequence[_Read], section: str) -> tuple[int, ...]:
    columns = zip(*(record.section(section) for record in records), strict=True)
    return tuple(map(sum, columns)) or (0,) * _SECTIONS[section]
