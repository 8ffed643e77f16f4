"""The board: what readers see while writers write, die, leave and come back."""

from __future__ import annotations

import json
import mmap
import os
import signal
import stat
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from balancer import board as board_module
from balancer.board import (
    BOARD_BYTES,
    GPU_RECORDS,
    REPLICA_SLOTS,
    ROUTER_ROWS,
    Board,
    BoardError,
    Owner,
    SlotFields,
    SlotWriter,
    board_path,
)
from balancer.on_the_way import LOST_AFTER_S
from balancer.readings import GpuReading, GpuSource, ReplicaReading, ReplicaState

SECONDS = 30.0
READS = 1_000_000
READERS = 2
HOST = GpuReading(0, GpuSource.HOST, 0.5, None, None, 10, 100, 5, None, 41.5, None, taken_at_s=3.0)

# Every counter of a record is the same number, so that half of one write and half of another show.
WRITER = """
import sys, time
from pathlib import Path
from balancer.board import Board, ROUTER_ROWS
from balancer.readings import GpuReading, GpuSource, ReplicaState
board = Board.open(Path(sys.argv[1]))
slot, row, gpu = board.claim_slot("replica-" + sys.argv[2]), board.claim_row(), board.gpu_writer(int(sys.argv[2]))
print(slot.index, flush=True)
kept = {"gpu", "state"}
names = [name for name in slot.fields.__slots__ if name not in kept]
count = 0
while True:
    count += 1
    for name in names:
        setattr(slot.fields, name, count)
    slot.fields.state = ReplicaState.READY
    slot.received_by_router = [count] * ROUTER_ROWS
    slot.publish(count)
    if count % 8:
        continue
    time.sleep(0.000001)  # leaves half of a core to the readers
    row.add(slot.index, 1, 1)
    row.publish(1e12)
    gpu.publish(GpuReading(0, GpuSource.GPM, count, count, count, count, count, count, count, count, count, count))
"""

READER = """
import json, sys
from pathlib import Path
from balancer import board as layout
board, slots, reads = layout.Board.open(Path(sys.argv[1])), json.loads(sys.argv[2]), int(sys.argv[3])
places = [layout._SLOT_AT + slot * layout._SLOT_STRIDE for slot in slots]
wrong, torn, missing, lasts = [], 0, 0, [0.0] * len(slots)

def check(record, numbers):
    if len(numbers) != 1:
        wrong.append(record)

for number in range(reads):
    which = number % len(places)
    missing += not board._words[places[which] // 8]  # a zero says that the record is empty
    try:
        sequence, written_at_s, payload = layout._read(board._map, places[which], layout._SLOT.size)
    except layout.Torn:
        torn += 1
        continue
    missing += not sequence
    check("slot", {written_at_s, *layout._SLOT.unpack(payload)[3:]})
    if written_at_s < lasts[which]:
        wrong.append("went back")
    lasts[which] = written_at_s
    if number % 32 == 0:
        snapshot = board.snapshot(0.0)
        missing += len(slots) - len(snapshot.replicas) - len(snapshot.torn_slots)
        for r in snapshot.replicas:
            check("replica", {r.written_at_s, r.in_flight_requests, r.kv_tokens_peak, *r.received_by_router})
            check("row", {r.on_the_way_requests, r.on_the_way_tokens})
        for g in snapshot.gpus:
            check("gpu", {g.sm_ratio, g.dram_bandwidth_ratio, g.memory_used_bytes, g.sm_clock_hz, g.taken_at_s})
print(json.dumps({"wrong": wrong[:3], "torn": torn, "missing": missing, "moved": min(lasts)}))
"""


@pytest.fixture
def path(tmp_path: Path) -> Iterator[Path]:
    """A place for a board; afterwards no child lives, and no file is left where a test has everybody leave."""
    folder = tmp_path / "shm"
    folder.mkdir()
    yield folder / "board"
    assert psutil.Process().children(recursive=True) == []


@pytest.fixture
def board(path: Path) -> Iterator[Board]:
    board = Board.open(path)
    yield board
    board.leave()
    assert not list(path.parent.iterdir())


@pytest.fixture
def start(path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Runs a script in another process, with the board's path as its first argument."""
    children: list[subprocess.Popen[str]] = []

    def run(script: str, *arguments: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", script, str(path), *arguments]
        children.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        return children[-1]

    yield run
    for child in children:
        child.kill()
        child.communicate()


def first_line(child: subprocess.Popen[str]) -> str:
    assert child.stdout is not None
    return child.stdout.readline().strip()


def only(board: Board, now_s: float = 0.0) -> ReplicaReading:
    (reading,) = board.snapshot(now_s).replicas
    return reading


def test_a_million_reads_beside_writers_never_show_half_a_record(
    path: Path, board: Board, start: Callable[..., subprocess.Popen[str]]
) -> None:
    """Readers in several processes see only whole records, and never take one being written for an empty one."""
    writers = [start(WRITER, str(number)) for number in range(2)]
    slots = [int(first_line(writer)) for writer in writers]
    wait_until(lambda: len(board.snapshot(0.0).replicas) == 2)
    readers = [start(READER, json.dumps(slots), str(READS // READERS)) for _ in range(READERS)]
    results = [json.loads(reader.communicate(timeout=120)[0]) for reader in readers]
    assert [writer.poll() for writer in writers] == [None, None]
    assert [(result["wrong"], result["missing"]) for result in results] == [([], 0)] * READERS
    assert all(result["moved"] > 100 for result in results)
    # A writer that the kernel suspends in the middle of a record is reported as such; most reads must succeed.
    assert sum(result["torn"] for result in results) < READS // 10


def test_what_is_written_is_read(board: Board) -> None:
    """Every field of a slot arrives as it was published, under the name and slot of its replica."""
    slot = board.claim_slot("app#Replica#x1")
    for number, field in enumerate(fields(SlotFields)):
        setattr(slot.fields, field.name, number)
    slot.fields.state = ReplicaState.DRAINING
    slot.received_by_router[3] = 7
    slot.publish(12.5)
    reading = only(board)
    assert (reading.slot, reading.replica_id, reading.written_at_s) == (slot.index, "app#Replica#x1", 12.5)
    expected = {field.name: getattr(slot.fields, field.name) for field in fields(SlotFields)}
    assert {name: getattr(reading, name) for name in expected} == expected
    assert reading.received_by_router == tuple(7 if row == 3 else 0 for row in range(ROUTER_ROWS))
    slot.release()


@pytest.mark.parametrize("known", [{}, {"sm_ratio": None}, {"power_w": 300.0, "temperature_c": None}])
def test_a_gpu_reading_keeps_what_is_unknown_unknown(board: Board, known: dict[str, Any]) -> None:
    """A GPU reading comes back as written; a ratio that its source cannot give stays None."""
    writer, reading = board.gpu_writer(2), replace(HOST, index=2, **known)
    writer.publish(reading)
    assert board.snapshot(0.0).gpus == (reading,)
    writer.release()
    assert board.snapshot(0.0).gpus == ()


def test_a_gpu_beyond_the_records_is_refused(board: Board) -> None:
    """There is no record for GPU 16, and the error says so."""
    with pytest.raises(BoardError, match=f"room for {GPU_RECORDS} GPUs, not for GPU {GPU_RECORDS}"):
        board.gpu_writer(GPU_RECORDS)


def test_the_rows_of_all_routers_are_summed(board: Board) -> None:
    """What two routers have under way to one slot is seen as one sum."""
    slot, first, second = board.claim_slot("a"), board.claim_row(), board.claim_row()
    slot.publish(0.0)
    first.add(slot.index, 2, 30)
    first.publish(0.0)
    second.add(slot.index, 1, 12)
    second.publish(0.0)
    assert (only(board).on_the_way_requests, only(board).on_the_way_tokens) == (3, 42)
    assert board.router_rows() == 2
    first.release()
    assert (only(board).on_the_way_requests, only(board).on_the_way_tokens) == (1, 12)
    for writer in (slot, second):
        writer.release()


def test_a_silent_routers_assignments_end(board: Board) -> None:
    """What a router said is under way counts no longer once it has been silent for as long as a request may take."""
    slot, row = board.claim_slot("a"), board.claim_row()
    slot.publish(100.0)
    row.add(slot.index, 4, 40)
    row.publish(100.0)
    assert only(board, 100.0 + LOST_AFTER_S).on_the_way_requests == 4
    assert only(board, 100.1 + LOST_AFTER_S).on_the_way_requests == 0
    row.publish(200.0)
    assert only(board, 200.0).on_the_way_requests == 4
    for writer in (slot, row):
        writer.release()


def test_a_killed_writer_is_noticed_and_its_slot_taken_again(
    board: Board, start: Callable[..., subprocess.Popen[str]]
) -> None:
    """After SIGKILL the owner is dead, its last reading grows old, and the next replica takes the slot."""
    writer = start(WRITER, "0")
    index = int(first_line(writer))
    wait_until(lambda: bool(board.snapshot(0.0).replicas))
    owner = board.owner(index)
    assert owner is not None
    assert (owner.pid, owner.alive()) == (writer.pid, True)
    with_another = board.claim_slot("other")
    assert with_another.index != index
    os.kill(writer.pid, signal.SIGKILL)
    writer.wait()
    assert not owner.alive()
    last = max(board.snapshot(0.0).replicas, key=lambda r: r.written_at_s, default=None)
    if last is not None:  # else it died in the middle of a record, which then counts as torn
        assert board.snapshot(last.written_at_s + 3.0).ready(stale_after_s=2.0) == []
    heir = board.claim_slot("heir")
    assert heir.index == index
    heir.publish(5.0)
    assert [r.replica_id for r in board.snapshot(0.0).replicas] == ["heir"]
    for taken in (heir, with_another):
        taken.release()


def test_a_recycled_pid_is_not_its_former_owner() -> None:
    """A process is known by its start as well as by its PID."""
    me = Owner.me()
    assert me.alive()
    assert not Owner(me.pid, me.start_ticks - 1).alive()
    assert not Owner(0, 0).alive()


def test_a_zombie_is_dead(start: Callable[..., subprocess.Popen[str]]) -> None:
    """A process that ended and was not yet waited for writes no more, so it counts as dead."""
    child = start("")
    wait_until(lambda: psutil.Process(child.pid).status() == psutil.STATUS_ZOMBIE)
    assert not Owner.of(child.pid).alive()


@pytest.mark.parametrize("way", ["odd", "other payload"])
def test_a_half_written_record_is_named_and_never_shown(board: Board, path: Path, way: str) -> None:
    """A record left in the middle of a write is a torn slot, not a value; the next whole write mends it."""
    torn, whole = board.claim_slot("torn"), board.claim_slot("whole")
    for slot in (torn, whole):
        slot.publish(1.0)
    with path.open("r+b") as file, mmap.mmap(file.fileno(), BOARD_BYTES) as memory:
        at = board_module._SLOT_AT + torn.index * board_module._SLOT_STRIDE
        (sequence,) = struct.unpack_from("@Q", memory, at)
        struct.pack_into("@Q", memory, at, sequence + (1 if way == "odd" else 2))
        if way == "other payload":
            memory[at + 200] ^= 0xFF
    for _ in range(2):
        snapshot = board.snapshot(1.0)
        assert snapshot.torn_slots == (torn.index,)
        assert [r.replica_id for r in snapshot.replicas] == ["whole"]
    torn.publish(2.0)
    torn.publish(3.0)
    assert {r.replica_id for r in board.snapshot(3.0).replicas} == {"torn", "whole"}
    for slot in (torn, whole):
        slot.release()


def test_a_slot_taken_over_is_never_shown_as_its_former_owner(path: Path, board: Board) -> None:
    """A reader that did not look while a slot changed hands sees the new replica, however often each has written."""
    reader = Board.open(path)
    for life in range(4):
        slot = board.claim_slot(f"life-{life}")
        slot.publish(1.0)
        assert [r.replica_id for r in reader.snapshot(0.0).replicas] == [f"life-{life}"]
        slot.release()
    assert reader.snapshot(0.0).replicas == ()
    reader.close()


def test_slots_and_rows_run_out_with_a_sentence(board: Board) -> None:
    """Every slot taken by a living replica: the next is refused, and told what to do."""
    slots = [board.claim_slot(f"r{number}") for number in range(REPLICA_SLOTS)]
    assert [slot.index for slot in slots] == list(range(REPLICA_SLOTS))
    with pytest.raises(BoardError, match=f"all {REPLICA_SLOTS} replica slots of .* are taken; run fewer"):
        board.claim_slot("one too many")
    rows = [board.claim_row() for _ in range(ROUTER_ROWS)]
    with pytest.raises(BoardError, match=f"all {ROUTER_ROWS} router rows"):
        board.claim_row()
    for slot in slots:
        slot.release()
    for row in rows:
        row.release()


def test_a_name_that_does_not_fit_is_refused(board: Board) -> None:
    """A replica id beyond 96 bytes is refused rather than cut short: HAProxy would not know it."""
    with pytest.raises(BoardError, match="longer than 96 bytes"):
        board.claim_slot("ä" * 49)
    longest = board.claim_slot("ä" * 48)
    longest.publish(0.0)
    assert only(board).replica_id == "ä" * 48
    longest.release()


def test_only_its_user_may_read_the_file(board: Board, path: Path) -> None:
    """The board's file has mode 0600 and its full size from the start, so that writing can never fail for space."""
    found = path.stat()
    assert stat.S_IMODE(found.st_mode) == 0o600
    assert found.st_size == BOARD_BYTES
    assert found.st_blocks * 512 >= BOARD_BYTES


@pytest.mark.parametrize("kind", ["directory", "symlink", "fifo"])
def test_what_is_no_regular_file_is_refused(path: Path, kind: str) -> None:
    """Something else in the board's place is left alone, with an error that names it."""
    target = path.parent / "target"
    if kind == "directory":
        path.mkdir()
    elif kind == "symlink":
        target.write_text("precious")
        path.symlink_to(target)
    else:
        os.mkfifo(path)
    with pytest.raises(BoardError, match=f"cannot open the board {path}: .*; remove"):
        Board.open(path)
    assert kind != "symlink" or target.read_text() == "precious"


def test_a_board_of_another_user_is_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that belongs to somebody else is not written to."""
    path.write_bytes(b"theirs")
    monkeypatch.setattr(os, "geteuid", lambda: path.stat().st_uid + 1)
    with pytest.raises(BoardError, match=f"the board {path} belongs to another user; remove it"):
        Board.open(path)
    assert path.read_bytes() == b"theirs"


@pytest.mark.parametrize("content", [b"x", b"SPLTWSR1" + bytes(4096), bytes(BOARD_BYTES)], ids=["cut", "old", "blank"])
def test_a_file_of_another_layout_is_made_anew(path: Path, content: bytes) -> None:
    """A file that this version cannot read is replaced, and not under the feet of whoever has it mapped."""
    path.write_bytes(content)
    with path.open("rb") as old:
        board = Board.open(path)
        assert old.read() == content
    assert board.snapshot(0.0).replicas == ()
    slot = board.claim_slot("a")
    slot.publish(0.0)
    assert only(board).replica_id == "a"
    slot.release()
    board.leave()
    assert not path.exists()


def test_a_living_board_is_shared_not_made_anew(path: Path, board: Board) -> None:
    """Who opens second sees what the first has written."""
    slot = board.claim_slot("a")
    slot.publish(0.0)
    second = Board.open(path)
    assert not board.replaced()
    assert only(second).replica_id == "a"
    second.leave()
    slot.release()


def test_the_last_to_leave_removes_the_file(path: Path, start: Callable[..., subprocess.Popen[str]]) -> None:
    """The file stays while anybody alive writes on the board, in whatever process, and goes with the last."""
    writer = start(WRITER, "0")
    first_line(writer)
    first, second = Board.open(path), Board.open(path)
    slot = second.claim_slot("a")
    first.leave()
    assert path.exists()
    slot.release()
    second.leave()
    assert path.exists()
    writer.kill()
    writer.wait()
    Board.open(path).leave()
    assert not list(path.parent.iterdir())


def test_leaving_twice_at_once_is_no_error(path: Path) -> None:
    """Two that leave find the file removed by the other, and a new board in its place stays."""
    first, second, third = (Board.open(path) for _ in range(3))
    first.leave()
    second.leave()
    assert not path.exists()
    new = Board.open(path)
    third.leave()
    assert path.exists()
    assert not new.replaced()
    new.leave()


def test_a_removed_board_is_noticed(path: Path) -> None:
    """Who holds a board sees that its file was removed, or removed and made anew; claiming on it is refused."""
    old = Board.open(path)
    assert not old.replaced()
    path.unlink()
    assert old.replaced()
    with pytest.raises(BoardError, match="was removed since it was opened; open it again"):
        old.claim_slot("a")
    new = Board.open(path)
    assert (old.replaced(), new.replaced()) == (True, False)
    with pytest.raises(BoardError, match="was removed since it was opened"):
        old.claim_row()
    old.close()
    new.leave()


def test_a_full_file_system_is_named(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No room for the board: a sentence, and no half-made file that the next one would trust."""

    def full(*_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(BoardError, match="No space left on device; free shared memory"):
        Board.open(path)
    monkeypatch.undo()
    board = Board.open(path)
    assert path.stat().st_size == BOARD_BYTES
    board.leave()


def test_a_path_is_safe_whatever_the_application_is_called(tmp_path: Path) -> None:
    """The board's file lies directly in the folder, under a name without separators."""
    path = board_path("../my app/1", tmp_path)
    assert path.parent == tmp_path
    assert path.name.endswith("-___my_app_1")
    assert board_path("a", tmp_path) != board_path("b", tmp_path)


def test_writing_a_slot_takes_one_sequence_step_of_two(board: Board) -> None:
    """The sequence number only grows, by two a write, and is even when nobody writes."""
    slot = board.claim_slot("a")
    seen = []
    for _ in range(3):
        slot.publish(0.0)
        seen.append(sequence_of(board, slot))
    assert [seen[1] - seen[0], seen[2] - seen[1]] == [2, 2]
    assert all(sequence % 2 == 0 for sequence in seen)
    slot.release()


def sequence_of(board: Board, slot: SlotWriter) -> int:
    return int(board._words[(board_module._SLOT_AT + slot.index * board_module._SLOT_STRIDE) // 8])


def wait_until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SECONDS
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)
