"""How every request ended, counted where it cannot be lost: a file of 8-byte words beside the board.

One page for each router and each replica, written only by its owner. A word is stored by one instruction, so a writer
that is killed between two of them leaves nothing half-written: what entered and did not end is then known to have
failed, and the page's next owner (or, before there is one, the reader) books it so. Pages outlive their owners, so that
sums never fall.

A request that came through a router enters there, and ends there or is handed over; a replica's door takes it from
there. What was handed over and never reached a door was lost on the way. `entered` is therefore always the sum of the
four ends and of what is still open.
"""

from __future__ import annotations

import enum
import fcntl
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from mmap import mmap
from pathlib import Path

from balancer.board import REPLICA_SLOTS, ROUTER_ROWS, BoardError, Owner


class End(enum.IntEnum):
    """The four ways a request ends; the numbers are their words on a page.

    A client error (4xx) is REJECTED, a server error or a broken stream FAILED, a client that left CANCELLED.
    """

    COMPLETED = 0
    CANCELLED = 1
    REJECTED = 2
    FAILED = 3


ENDS = tuple(end.name.lower() for end in End)
# After the ends: came in at all; came in without a router; given to a replica; came although another was chosen.
_ENTERED, _DIRECT, _HANDED_OVER, _REDIRECTED, _PID, _TICKS = range(len(End), len(End) + 6)
_WORDS = 16
_PAGES = REPLICA_SLOTS + ROUTER_ROWS
_HEAD = struct.pack("@8sII48x", b"SPLTLDG1", _WORDS, _PAGES)
_BYTES = len(_HEAD) + _PAGES * _WORDS * 8


def ledger_path(board: Path) -> Path:
    """Where the ledger of those on `board` lies."""
    return board.with_name(board.name + ".ledger")


class Page:
    """The pen of one replica or router; every `enter` is followed by exactly one `end` or `hand_over`."""

    def __init__(self, path: Path, memory: mmap, number: int) -> None:
        self._path = path
        self._map = memory
        self._words = memoryview(memory).cast("Q")
        self._at = len(_HEAD) // 8 + number * _WORDS
        self._take_over()

    @classmethod
    def of_replica(cls, board: Path) -> Page:
        """A page of its own for a replica on `board`.

        Raises BoardError when the file cannot be made, is another user's, or all pages belong to living replicas.
        """
        return cls._claim(ledger_path(board), range(REPLICA_SLOTS))

    @classmethod
    def of_router(cls, board: Path) -> Page:
        """The same for a router."""
        return cls._claim(ledger_path(board), range(REPLICA_SLOTS, _PAGES))

    @classmethod
    def _claim(cls, path: Path, numbers: range) -> Page:
        with _held(path) as descriptor:
            for number in numbers:
                if not _owner(descriptor, number).alive():
                    return cls(path, mmap(descriptor, _BYTES), number)
        raise BoardError(f"all {len(numbers)} pages of the ledger {path} are taken; run fewer, or remove the file")

    def enter(self, direct: bool = False) -> None:
        """A request has come in; `direct`: without having entered at a router before."""
        if direct:
            self._words[self._at + _DIRECT] += 1
        self._words[self._at + _ENTERED] += 1

    def end(self, end: End) -> None:
        self._words[self._at + end] += 1

    def hand_over(self) -> None:
        """The request goes to a replica, whose door it enters next."""
        self._words[self._at + _HANDED_OVER] += 1

    def redirected(self) -> None:
        """A request came although another replica was chosen: HAProxy could not connect to that one."""
        self._words[self._at + _REDIRECTED] += 1

    def leave(self) -> None:
        """What is still open has failed. The last living owner of a page removes the file."""
        if self._map.closed:
            return
        self._book_open()
        self._words[self._at + _PID] = 0
        self._words.release()
        self._map.close()
        with _held(self._path) as descriptor:
            if not any(_owner(descriptor, number).alive() for number in range(_PAGES)):
                self._path.unlink()

    def _take_over(self) -> None:
        self._book_open()
        me = Owner.me()
        self._words[self._at + _TICKS] = me.start_ticks
        self._words[self._at + _PID] = me.pid

    def _book_open(self) -> None:
        page = list(self._words[self._at : self._at + _WORDS])
        self._words[self._at + End.FAILED] += _open_on(page)


@dataclass(frozen=True, slots=True)
class Totals:
    """All pages together. `entered` is the sum of `completed`, `cancelled`, `rejected`, `failed` and `open`.

    `open` is what living replicas and routers work at, or what is on its way between them.
    """

    entered: int = 0
    completed: int = 0
    cancelled: int = 0
    rejected: int = 0
    failed: int = 0
    open: int = 0
    on_the_way: int = 0
    redirected: int = 0

    @property
    def ends(self) -> tuple[int, int, int, int]:
        """In the order of ENDS."""
        return self.completed, self.cancelled, self.rejected, self.failed


NOTHING = Totals()


def read(board: Path) -> Totals:
    """The sums now; zeros where nobody has counted yet. Raises BoardError when the file may not be read."""
    try:
        content = ledger_path(board).read_bytes()
    except FileNotFoundError:
        return NOTHING
    except OSError as error:
        raise BoardError(f"cannot read {ledger_path(board)}: {error.strerror}; run as the user who serves") from error
    if len(content) != _BYTES or content[: len(_HEAD)] != _HEAD:
        return NOTHING
    words = memoryview(content[len(_HEAD) :]).cast("Q").tolist()
    return _totals([words[at : at + _WORDS] for at in range(0, len(words), _WORDS)])


def _totals(pages: list[list[int]]) -> Totals:
    """Whether what is between router and door is on its way or lost shows only in time; `settled` says lost."""
    for page in pages:
        if page[_ENTERED] and not Owner(page[_PID], page[_TICKS]).alive():
            page[End.FAILED] += _open_on(page)
    doors, routers = pages[:REPLICA_SLOTS], pages[REPLICA_SLOTS:]
    direct = sum(page[_DIRECT] for page in doors)
    on_the_way = sum(page[_HANDED_OVER] for page in routers) - sum(page[_ENTERED] for page in doors) + direct
    completed, cancelled, rejected, failed = (sum(page[end] for page in pages) for end in End)
    working = sum(map(_open_on, pages))
    return Totals(
        sum(page[_ENTERED] for page in routers) + direct,
        completed,
        cancelled,
        rejected,
        failed,
        open=working + max(0, on_the_way),
        on_the_way=max(0, on_the_way),
        redirected=sum(page[_REDIRECTED] for page in doors),
    )


def settled(totals: Totals) -> Totals:
    """The same when nothing runs any more: what is still on its way was lost, which is a failure."""
    lost = totals.on_the_way
    return replace(totals, failed=totals.failed + lost, open=totals.open - lost, on_the_way=0)


def _open_on(page: list[int]) -> int:
    return page[_ENTERED] - page[_HANDED_OVER] - sum(page[: len(End)])


def _owner(descriptor: int, number: int) -> Owner:
    return Owner(*struct.unpack("@QQ", os.pread(descriptor, 16, len(_HEAD) + (number * _WORDS + _PID) * 8)))


@contextmanager
def _held(path: Path) -> Iterator[int]:
    """The ledger, locked; made where it is missing or of another layout (others may have mapped that one)."""
    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            raise BoardError(f"cannot open the ledger {path}: {error.strerror}; remove that file") from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            if _made_ready(path, descriptor):
                yield descriptor
                return
        finally:
            fcntl.flock(descriptor, fcntl.LOCK_UN)  # said aloud: a mapping shares the descriptor, and with it the lock
            os.close(descriptor)


def _made_ready(path: Path, descriptor: int) -> bool:
    found = os.fstat(descriptor)
    if found.st_uid != os.geteuid():
        raise BoardError(f"the ledger {path} belongs to another user; have that file removed")
    if not found.st_nlink:
        return False
    if not found.st_size:
        _initialise(path, descriptor)
    elif found.st_size != _BYTES or os.pread(descriptor, len(_HEAD), 0) != _HEAD:
        path.unlink()
        return False
    return True


def _initialise(path: Path, descriptor: int) -> None:
    try:
        os.posix_fallocate(descriptor, 0, _BYTES)
    except OSError as error:
        os.ftruncate(descriptor, 0)
        wanted = f"cannot make the ledger {path} of {_BYTES} bytes"
        raise BoardError(f"{wanted}: {error.strerror}; free shared memory") from error
    os.pwrite(descriptor, _HEAD, 0)
