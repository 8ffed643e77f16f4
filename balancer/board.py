"""The board: one memory-mapped file on which replicas, routers and the GPU sampler write and everybody reads.

Every record has one writer, a sequence number (odd while it is being written) and a checksum, so a reader never
blocks and never takes a torn record for a whole one. Sources: the sequence lock of the Linux kernel, with a CRC in
place of memory barriers, which Python cannot issue.

Layout: a header, `GPU_RECORDS` GPU records, `REPLICA_SLOTS` replica slots, `ROUTER_ROWS` router rows. A router row
holds, for each slot, the requests and tokens which that router assigned and the replica has not yet received.
"""

from __future__ import annotations

import contextlib
import getpass
import math
import mmap
import os
import struct
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from balancer.on_the_way import LOST_AFTER_S
from balancer.readings import GpuReading, GpuSource, ReplicaReading, ReplicaState, Snapshot
from balancer.shared_file import BoardError as BoardError
from balancer.shared_file import Layout, locked, ready

GPU_RECORDS = 16
REPLICA_SLOTS = 64
ROUTER_ROWS = 16

# Native alignment ("@") on purpose: only then does struct store an 8-byte number in one instruction.
_HEADER = struct.Struct("@8sII")
_RECORD = struct.Struct("@QIIQd")  # sequence, CRC of the payload, owner's PID, owner's start ticks, written at
_SEQUENCE = struct.Struct("@Q")
_AFTER_SEQUENCE = struct.Struct("@IIQd")
_GPU = struct.Struct("@ii9d")
_SLOT = struct.Struct(f"@96siiQQQQQQQQdQQQQQQ{ROUTER_ROWS}Q8QdQ")
# Numbers between a slot's tokens in flight and what it received by router row.
_BEFORE_ROWS = 13
_ROW = struct.Struct("@" + "IQ" * REPLICA_SLOTS)

_NOTHING_ON_THE_WAY = (0,) * (2 * REPLICA_SLOTS)

# A slot's sequence number, and the requests and tokens on the way to it.
Seen = tuple[int, tuple[int, int]]
_UNREAD: Seen = (-1, (0, 0))

_MAGIC = b"SPLTWSR1"
_LAYOUT_VERSION = 6
_HEADER_BYTES = 4096
_GPU_STRIDE = 256
_SLOT_STRIDE = 512
_ROW_STRIDE = 2048
_GPU_AT = _HEADER_BYTES
_SLOT_AT = _GPU_AT + GPU_RECORDS * _GPU_STRIDE
_ROW_AT = _SLOT_AT + REPLICA_SLOTS * _SLOT_STRIDE
BOARD_BYTES = _ROW_AT + ROUTER_ROWS * _ROW_STRIDE
_LAYOUT = Layout("board", _HEADER.pack(_MAGIC, _LAYOUT_VERSION, BOARD_BYTES), BOARD_BYTES)

# The same places counted in 8-byte words, to read many sequence numbers in one slice.
_GPU_FIRST_WORD, _GPU_END_WORD, _GPU_WORDS = _GPU_AT // 8, _SLOT_AT // 8, _GPU_STRIDE // 8
_SLOT_FIRST_WORD, _SLOT_END_WORD, _SLOT_WORDS = _SLOT_AT // 8, _ROW_AT // 8, _SLOT_STRIDE // 8
_ROW_FIRST_WORD, _ROW_END_WORD, _ROW_WORDS = _ROW_AT // 8, BOARD_BYTES // 8, _ROW_STRIDE // 8

# A writer holds a record for about 2 us; a reader that met it odd this often met a dead or suspended writer.
_READ_ATTEMPTS = 8


class Torn(Exception):  # noqa: N818 - what a reader met, not a mistake of anybody
    """A record stayed half-written through every attempt to read it: its writer died or is suspended."""


@dataclass(frozen=True, slots=True)
class Owner:
    """A process, named so that a recycled PID is not mistaken for it."""

    pid: int
    start_ticks: int

    @staticmethod
    def of(pid: int) -> Owner:
        return Owner(pid, process_start_ticks(pid) or 0)

    @staticmethod
    def me() -> Owner:
        return Owner.of(os.getpid())

    def alive(self) -> bool:
        return self.pid > 0 and process_start_ticks(self.pid) == self.start_ticks


def process_start_ticks(pid: int) -> int | None:
    """When the process started, in clock ticks since boot; None when it is gone or a zombie."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = stat[stat.rindex(b")") + 2 :].split()
    return None if fields[0] in (b"Z", b"X") else int(fields[19])


def board_path(application: str, directory: Path = Path("/dev/shm")) -> Path:
    """Where the board of `application` of this user lies."""
    safe = "".join(c if c.isalnum() or c in "-_" else "_" for c in application)
    return directory / f"splitwiser-{getpass.getuser()}-{safe}"


class Board:
    """The mapped file. Open it with `Board.open`; readers and writers of any process may come and go."""

    def __init__(self, path: Path, file_descriptor: int) -> None:
        self.path = path
        self._inode = os.fstat(file_descriptor).st_ino
        self._map = mmap.mmap(file_descriptor, BOARD_BYTES)
        self._words = memoryview(self._map).cast("Q")
        self._seen: list[Seen] = [_UNREAD] * REPLICA_SLOTS
        self._readings: list[ReplicaReading | None] = [None] * REPLICA_SLOTS
        self._gpu_sequences: tuple[int, ...] = ()
        self._gpu_readings: tuple[GpuReading, ...] = ()
        self._row_sequences: tuple[int, ...] = ()
        self._ways: list[tuple[int, int]] = []
        self._ways_end_s = math.inf

    @classmethod
    def open(cls, path: Path) -> Board:
        """Map the board at `path`, making it (mode 0600) when it is missing or of another layout.

        Raises BoardError when the file belongs to another user, is no regular file, or the file system is full.
        """
        with ready(path, _LAYOUT) as descriptor:
            return cls(path, descriptor)

    def close(self) -> None:
        self._words.release()
        self._map.close()

    def leave(self) -> None:
        """Close the board, and remove its file if nobody alive writes on it any more. Leaving twice does nothing."""
        if self._map.closed:
            return
        with contextlib.suppress(FileNotFoundError), open(self.path, "rb") as file, locked(file.fileno()):
            if not self.replaced() and not any(self._owner_at(at).alive() for at in _every_record()):
                self.path.unlink()
        self.close()

    def replaced(self) -> bool:
        """Whether the file was removed or made anew since it was mapped; whoever holds it should then open it again."""
        try:
            return os.stat(self.path).st_ino != self._inode
        except FileNotFoundError:
            return True

    def claim_slot(self, replica_id: str) -> SlotWriter:
        """Take a free slot, or one whose owner is dead. Raises BoardError when all are taken by living replicas."""
        if len(replica_id.encode()) > 96:
            raise BoardError(f"the replica id {replica_id!r} is longer than 96 bytes; shorten the application's name")
        index = self._claim(_SLOT_AT, _SLOT_STRIDE, REPLICA_SLOTS, "replica slots")
        return SlotWriter(_RecordWriter(self._map, self._words, _SLOT_AT + index * _SLOT_STRIDE), index, replica_id)

    def claim_row(self) -> RowWriter:
        """Take a router row; the same rules as for slots."""
        index = self._claim(_ROW_AT, _ROW_STRIDE, ROUTER_ROWS, "router rows")
        return RowWriter(_RecordWriter(self._map, self._words, _ROW_AT + index * _ROW_STRIDE), index)

    def gpu_writer(self, index: int) -> GpuWriter:
        """The writer of GPU record `index`; the node's sampler is the only one who asks for it."""
        if not 0 <= index < GPU_RECORDS:
            raise BoardError(f"the board has room for {GPU_RECORDS} GPUs, not for GPU {index}")
        return GpuWriter(_RecordWriter(self._map, self._words, _GPU_AT + index * _GPU_STRIDE))

    def snapshot(self, now_s: float) -> Snapshot:
        """Every occupied record as it is now. Torn slots are named, never guessed at."""
        ways = self._on_the_way(now_s)
        sequences = tuple(self._words[_SLOT_FIRST_WORD:_SLOT_END_WORD:_SLOT_WORDS])
        seen = list(zip(sequences, ways, strict=True))
        torn = []
        for slot in [slot for slot, (new, old) in enumerate(zip(seen, self._seen, strict=True)) if new != old]:
            try:
                seen[slot], self._readings[slot] = self._slot(slot, ways[slot])
            except Torn:
                torn.append(slot)
                seen[slot], self._readings[slot] = _UNREAD, None
        self._seen = seen
        replicas = tuple([reading for reading in self._readings if reading is not None])
        return Snapshot(now_s, replicas, self._gpus(), tuple(torn))

    def owner(self, slot: int) -> Owner | None:
        """Who wrote the slot last, if anybody."""
        _, _, pid, ticks, _ = _RECORD.unpack_from(self._map, _SLOT_AT + slot * _SLOT_STRIDE)
        return Owner(pid, ticks) if pid else None

    def router_rows(self) -> int:
        """How many router rows are held by living routers."""
        return sum(self._owner_at(_ROW_AT + row * _ROW_STRIDE).alive() for row in range(ROUTER_ROWS))

    def _slot(self, slot: int, way: tuple[int, int]) -> tuple[Seen, ReplicaReading | None]:
        sequence, written_at_s, payload = _read(self._map, _SLOT_AT + slot * _SLOT_STRIDE, _SLOT.size)
        return (sequence, way), _decode_slot(slot, written_at_s, payload, *way) if sequence else None

    def _gpus(self) -> tuple[GpuReading, ...]:
        sequences = tuple(self._words[_GPU_FIRST_WORD:_GPU_END_WORD:_GPU_WORDS])
        if sequences != self._gpu_sequences:
            found = [self._gpu(index) for index in range(GPU_RECORDS) if sequences[index]]
            self._gpu_readings = tuple(reading for reading in found if reading is not None)
            self._gpu_sequences = sequences
        return self._gpu_readings

    def _gpu(self, index: int) -> GpuReading | None:
        """None when torn: the sampler writes 25 times a second, so the next snapshot has it."""
        try:
            _, written_at_s, payload = _read(self._map, _GPU_AT + index * _GPU_STRIDE, _GPU.size)
        except Torn:
            return None
        return _decode_gpu(written_at_s, payload)

    def _on_the_way(self, now_s: float) -> list[tuple[int, int]]:
        """For each slot the requests and tokens assigned to it by any router and not yet received.

        What a row says is over LOST_AFTER_S after it was written: its router is idle or dead.
        """
        sequences = tuple(self._words[_ROW_FIRST_WORD:_ROW_END_WORD:_ROW_WORDS])
        if sequences != self._row_sequences or now_s > self._ways_end_s:
            rows = [self._row(row) for row in range(ROUTER_ROWS) if sequences[row]]
            fresh = [(end_s, row) for end_s, row in rows if end_s >= now_s] or [(math.inf, _NOTHING_ON_THE_WAY)]
            first = fresh[0][1]
            sums = first if len(fresh) == 1 else [sum(column) for column in zip(*(r for _, r in fresh), strict=True)]
            self._ways = list(zip(sums[::2], sums[1::2], strict=True))
            self._ways_end_s = min(end_s for end_s, _ in fresh)
            self._row_sequences = sequences
        return self._ways

    def _row(self, row: int) -> tuple[float, tuple[int, ...]]:
        """When the row is over, and its numbers."""
        try:
            sequence, written_at_s, payload = _read(self._map, _ROW_AT + row * _ROW_STRIDE, _ROW.size)
        except Torn:  # its router rewrites it at its next decision; until then it counts for nothing
            sequence, written_at_s = 0, math.inf
        return written_at_s + LOST_AFTER_S, _ROW.unpack(payload) if sequence else _NOTHING_ON_THE_WAY

    def _owner_at(self, at: int) -> Owner:
        _, _, pid, ticks, _ = _RECORD.unpack_from(self._map, at)
        return Owner(pid, ticks)

    @contextlib.contextmanager
    def _held_still(self) -> Iterator[None]:
        """Nobody else claims meanwhile, and the file is still the one that was mapped."""
        try:
            with open(self.path, "rb") as file, locked(file.fileno()):
                if self.replaced():
                    raise FileNotFoundError
                yield
        except FileNotFoundError:
            raise BoardError(f"the board {self.path} was removed since it was opened; open it again") from None

    def _claim(self, first: int, stride: int, count: int, what: str) -> int:
        with self._held_still():
            for index in range(count):
                at = first + index * stride
                if not self._owner_at(at).alive():
                    _RecordWriter(self._map, self._words, at).wipe(stride)
                    return index
        raise BoardError(f"all {count} {what} of {self.path} are taken; run fewer, or remove the file")


def _every_record() -> Iterator[int]:
    yield from range(_GPU_AT, _SLOT_AT, _GPU_STRIDE)
    yield from range(_SLOT_AT, _ROW_AT, _SLOT_STRIDE)
    yield from range(_ROW_AT, BOARD_BYTES, _ROW_STRIDE)


class _RecordWriter:
    """Writes one record; the only writer of it.

    The sequence number is stored through `words`: `struct.pack_into` first fills its target with zeros, and a zero
    says that the record is empty.
    """

    def __init__(self, memory: mmap.mmap, words: memoryview, at: int) -> None:
        self._memory = memory
        self._words = words
        self._at = at
        self._owner = Owner.me()
        # Above whatever an earlier owner wrote, for it grew by 2 a write, so that no reader's cache survives.
        self._sequence = time.monotonic_ns() // 2 * 2

    def wipe(self, stride: int) -> None:
        """Empty the record and take it."""
        empty = bytes(stride - _RECORD.size)
        self._store(0, _AFTER_SEQUENCE.pack(0, self._owner.pid, self._owner.start_ticks, 0.0) + empty)

    def write(self, payload: bytes, now_s: float) -> None:
        sequence = self._sequence = self._sequence + 2
        head = _AFTER_SEQUENCE.pack(zlib.crc32(payload), self._owner.pid, self._owner.start_ticks, now_s)
        self._store(sequence - 1, head + payload)
        self._words[self._at // 8] = sequence

    def release(self) -> None:
        self._store(0, bytes(_AFTER_SEQUENCE.size))

    def _store(self, sequence: int, rest: bytes) -> None:
        self._words[self._at // 8] = sequence
        start = self._at + _SEQUENCE.size
        self._memory[start : start + len(rest)] = rest


@dataclass(slots=True)
class SlotFields:
    """A replica's own working copy of its slot; `SlotWriter.publish` writes it out."""

    gpu: int = 0
    state: ReplicaState = ReplicaState.STARTING
    in_flight_requests: int = 0
    in_flight_tokens: int = 0
    running_requests: int = 0
    waiting_requests: int = 0
    kv_blocks_used: int = 0
    kv_blocks_total: int = 0
    kv_block_tokens: int = 0
    max_running_requests: int = 0
    step_time_s: float = 0.0
    prompt_tokens_total: int = 0
    output_tokens_total: int = 0
    preemptions_total: int = 0
    received_total: int = 0
    finished_total: int = 0
    gpu_memory_bytes: int = 0
    kv_tokens_peak: int = 0
    predicted_tokens_total: int = 0
    answered_tokens_total: int = 0
    estimate_error_tokens_total: int = 0
    engine_steps_total: int = 0
    awaiting_requests: int = 0
    server_errors_total: int = 0
    server_errors_in_a_row: int = 0
    front_end_cpu_s_total: float = 0.0
    ending_requests: int = 0


class SlotWriter:
    """A replica's pen: change `fields` and `received_by_router`, then `publish` (about 3 us)."""

    def __init__(self, record: _RecordWriter, index: int, replica_id: str) -> None:
        self.index = index
        self.fields = SlotFields()
        self.received_by_router = [0] * ROUTER_ROWS
        self._record = record
        self._replica_id = replica_id.encode()

    def publish(self, now_s: float) -> None:
        f = self.fields
        self._record.write(
            _SLOT.pack(
                self._replica_id, f.gpu, f.state, f.in_flight_requests, f.in_flight_tokens, f.running_requests,
                f.waiting_requests, f.kv_blocks_used, f.kv_blocks_total, f.kv_block_tokens, f.max_running_requests,
                f.step_time_s, f.prompt_tokens_total, f.output_tokens_total, f.preemptions_total, f.received_total,
                f.finished_total, f.gpu_memory_bytes, *self.received_by_router, f.kv_tokens_peak,
                f.predicted_tokens_total, f.answered_tokens_total, f.estimate_error_tokens_total,
                f.engine_steps_total, f.awaiting_requests, f.server_errors_total, f.server_errors_in_a_row,
                f.front_end_cpu_s_total, f.ending_requests,
            ),
            now_s,
        )  # fmt: skip

    def release(self) -> None:
        """Give the slot back; readers no longer see it."""
        self._record.release()


class RowWriter:
    """A router's pen: what it has assigned to each slot and not yet seen received."""

    def __init__(self, record: _RecordWriter, index: int) -> None:
        self.index = index
        self._record = record
        self._values = [0] * (2 * REPLICA_SLOTS)

    def add(self, slot: int, requests: int, tokens: int) -> None:
        """Change a slot's sums by `requests` and `tokens` (negative to take back)."""
        self._values[2 * slot] += requests
        self._values[2 * slot + 1] += tokens

    def publish(self, now_s: float) -> None:
        self._record.write(_ROW.pack(*self._values), now_s)

    def release(self) -> None:
        self._record.release()


class GpuWriter:
    """The sampler's pen."""

    def __init__(self, record: _RecordWriter) -> None:
        self._record = record

    def publish(self, reading: GpuReading) -> None:
        self._record.write(_encode_gpu(reading), reading.taken_at_s)

    def release(self) -> None:
        self._record.release()


def _read(memory: mmap.mmap, at: int, size: int) -> tuple[int, float, bytes]:
    """A record's sequence, writing time and payload. Raises Torn when its writer never finished."""
    for _ in range(_READ_ATTEMPTS):
        sequence, crc, _, _, written_at_s = _RECORD.unpack_from(memory, at)
        if sequence % 2:
            continue
        payload = memory[at + _RECORD.size : at + _RECORD.size + size]
        (after,) = _SEQUENCE.unpack_from(memory, at)
        if after == sequence and (sequence == 0 or zlib.crc32(payload) == crc):
            return sequence, written_at_s, payload
    raise Torn(f"record at {at}")


def _decode_slot(slot: int, written_at_s: float, payload: bytes, way_requests: int, way_tokens: int) -> ReplicaReading:
    name, gpu, state, in_flight, in_flight_tokens, *rest = _SLOT.unpack(payload)
    rows = slice(_BEFORE_ROWS, _BEFORE_ROWS + ROUTER_ROWS)
    others = (*rest[: rows.start], tuple(rest[rows]), *rest[rows.stop :])
    return ReplicaReading(
        slot, name.rstrip(b"\0").decode(), gpu, ReplicaState(state), written_at_s,
        in_flight, in_flight_tokens, way_requests, way_tokens, *others,
    )  # fmt: skip


_NONE = -1.0


def _encode_gpu(reading: GpuReading) -> bytes:
    optional: Callable[[float | None], float] = lambda value: _NONE if value is None else value  # noqa: E731
    return _GPU.pack(
        reading.index, reading.source, optional(reading.sm_ratio), optional(reading.sm_occupancy_ratio),
        optional(reading.dram_bandwidth_ratio), float(reading.memory_used_bytes), float(reading.memory_total_bytes),
        float(reading.memory_reserve_bytes), optional(reading.power_w), optional(reading.temperature_c),
        optional(reading.sm_clock_hz),
    )  # fmt: skip


def _decode_gpu(written_at_s: float, payload: bytes) -> GpuReading:
    index, source, sm, occupancy, dram, used, total, reserve, power, temperature, clock = _GPU.unpack(payload)
    optional: Callable[[float], float | None] = lambda value: None if value == _NONE else value  # noqa: E731
    return GpuReading(
        index, GpuSource(source), optional(sm), optional(occupancy), optional(dram), int(used), int(total),
        int(reserve), optional(power), optional(temperature), optional(clock), written_at_s,
    )  # fmt: skip
