"""The ledger: every request ends once, whatever happens to those who count."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from balancer.board import REPLICA_SLOTS, BoardError
from balancer.ledger import NOTHING, End, Page, Totals, ledger_path, read, settled


@pytest.fixture
def board(tmp_path: Path) -> Iterator[Path]:
    """Where a board would lie. Afterwards nothing is left beside it."""
    yield tmp_path / "board"
    assert not list(tmp_path.iterdir())


def balanced(totals: Totals) -> bool:
    return totals.entered == sum(totals.ends) + totals.open


def test_without_a_ledger_nothing_has_happened(board: Path) -> None:
    """Reading makes no file."""
    assert read(board) == NOTHING


def test_a_routed_request_enters_once_and_ends_once(board: Path) -> None:
    """It enters at the router, is handed over, and ends at the replica's door."""
    router, replica = Page.of_router(board), Page.of_replica(board)
    router.enter()
    assert read(board) == Totals(entered=1, open=1)
    router.hand_over()
    assert read(board) == Totals(entered=1, open=1, on_the_way=1)
    replica.enter()
    assert read(board) == Totals(entered=1, open=1)
    replica.end(End.COMPLETED)
    assert read(board) == Totals(entered=1, completed=1)
    router.leave()
    replica.leave()


@pytest.mark.parametrize("end", End)
def test_each_end_is_counted_as_what_it_is(board: Path, end: End) -> None:
    """A request that came without a router enters at the door."""
    replica = Page.of_replica(board)
    replica.enter(direct=True)
    replica.end(end)
    found = read(board)
    assert (found.entered, found.ends, found.open) == (1, tuple(int(e is end) for e in End), 0)
    replica.leave()


def test_what_never_reaches_a_door_has_failed(board: Path) -> None:
    """Handed over and never received: on its way while it can be, lost when nothing runs any more."""
    router, replica = Page.of_router(board), Page.of_replica(board)
    router.enter()
    router.hand_over()
    assert settled(read(board)) == Totals(entered=1, failed=1)
    router.leave()
    replica.leave()


def _enter_and_die(board: str, requests: int) -> None:
    page = Page.of_replica(Path(board))
    for _ in range(requests):
        page.enter(direct=True)
    page.end(End.COMPLETED)
    os.kill(os.getpid(), signal.SIGKILL)


def test_what_a_killed_replica_was_answering_has_failed_once(board: Path) -> None:
    """The reader says so at once; the page's next owner writes it down, and it is not counted again."""
    other = Page.of_router(board)
    killed = multiprocessing.get_context("spawn").Process(target=_enter_and_die, args=(str(board), 3))
    killed.start()
    killed.join(60)
    assert killed.exitcode == -signal.SIGKILL
    assert read(board) == Totals(entered=3, completed=1, failed=2)
    successor = Page.of_replica(board)
    assert read(board) == Totals(entered=3, completed=1, failed=2)
    successor.enter(direct=True)
    assert read(board) == Totals(entered=4, completed=1, failed=2, open=1)
    successor.leave()
    other.leave()


def test_leaving_with_requests_open_fails_them(board: Path) -> None:
    """A replica that stops in order and still holds a request has broken it off."""
    other, replica = Page.of_router(board), Page.of_replica(board)
    replica.enter(direct=True)
    replica.leave()
    replica.leave()
    assert read(board) == Totals(entered=1, failed=1)
    other.leave()


def test_pages_run_out_by_name(board: Path) -> None:
    """There are as many pages as slots; one more replica is refused in a sentence."""
    pages = [Page.of_replica(board) for _ in range(REPLICA_SLOTS)]
    with pytest.raises(BoardError, match=r"64 pages of the ledger .* are taken; run fewer"):
        Page.of_replica(board)
    for page in pages:
        page.leave()


def test_a_file_of_another_layout_is_made_anew(board: Path) -> None:
    """Whoever mapped the old one keeps it."""
    ledger_path(board).write_bytes(b"something else")
    page = Page.of_replica(board)
    page.enter(direct=True)
    assert read(board).entered == 1
    assert ledger_path(board).stat().st_mode & 0o777 == 0o600
    page.leave()


def test_a_link_is_not_followed(board: Path, tmp_path: Path) -> None:
    """Somebody who can write beside the board must not have another file overwritten."""
    target = tmp_path / "victim"
    target.write_text("mine")
    ledger_path(board).symlink_to(target)
    with pytest.raises(BoardError, match="cannot open the ledger"):
        Page.of_replica(board)
    assert target.read_text() == "mine"
    ledger_path(board).unlink()
    target.unlink()


@settings(deadline=None, max_examples=40)
@given(st.lists(st.sampled_from(["direct", "enter", "hand", *End]), max_size=60))
def test_at_every_moment_the_sums_agree(tmp_path_factory: pytest.TempPathFactory, story: list[object]) -> None:
    """Whatever happens in whatever order that can happen: entered is what ended and what is open."""
    folder = tmp_path_factory.mktemp("ledger")
    router, replica = Page.of_router(folder / "board"), Page.of_replica(folder / "board")
    at_router = on_the_way = at_door = 0
    for event in story:
        if event == "enter":
            router.enter()
            at_router += 1
        elif event == "hand" and at_router:
            router.hand_over()
            at_router, on_the_way = at_router - 1, on_the_way + 1
        elif event == "direct" or (on_the_way and event == "hand"):
            replica.enter(direct=event == "direct")
            at_door, on_the_way = at_door + 1, on_the_way - (event != "direct")
        elif isinstance(event, End) and at_door:
            replica.end(event)
            at_door -= 1
        found = read(folder / "board")
        assert balanced(found)
        assert found.open == at_router + on_the_way + at_door
    router.leave()
    replica.leave()
    folder.rmdir()


@pytest.mark.usefixtures("threads_take_quick_turns")
def test_a_reader_beside_a_busy_writer_sees_nothing_negative(board: Path) -> None:
    """Ends are read before entries, so that a request is never ended before it entered."""
    page, stop = Page.of_replica(board), threading.Event()

    def write() -> None:
        while not stop.is_set():
            page.enter(direct=True)
            page.end(End.COMPLETED)

    writer = threading.Thread(target=write)
    writer.start()
    seen = [read(board) for _ in range(300)]
    stop.set()
    writer.join()
    assert min(totals.open for totals in seen) >= 0
    assert max(totals.open for totals in seen) <= 1
    page.leave()
