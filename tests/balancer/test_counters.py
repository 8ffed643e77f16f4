"""The routers' counters beside the board: exact, shared, and outliving a router."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from balancer import counters as module
from balancer.board import ROUTER_ROWS, BoardError
from balancer.counters import CHOICES, REJECTIONS, CountersReader, RouterCounters, counters_path

AWARE = ("gpu_aware", "shortest_wait")


@pytest.fixture
def board(tmp_path: Path) -> Path:
    return tmp_path / "board"


@pytest.fixture
def router(board: Path) -> Iterator[RouterCounters]:
    made = RouterCounters.open(board, 0)
    yield made
    made.leave()


def test_without_a_router_everything_is_zero_and_no_file_is_made(board: Path) -> None:
    """Reading is not writing."""
    totals = CountersReader(board).read()
    assert not any(map(any, totals.decisions))
    assert totals.routers == 0
    assert not counters_path(board).exists()


def test_nothing_is_seen_before_it_is_published(board: Path, router: RouterCounters) -> None:
    """One write for all that a decision changes."""
    reader = CountersReader(board)
    router.count_decision(3, *AWARE, 1e-4)
    assert sum(map(sum, reader.read().decisions)) == 0
    router.publish(1.0)
    assert reader.read().decisions[3][CHOICES.index(AWARE)] == 1


def test_reasons_outside_the_closed_sets_count_as_other(board: Path, router: RouterCounters) -> None:
    """No request is lost from the sums because a policy gave a new reason."""
    router.count_decision(0, "gpu_aware", "a whim", 1e-4)
    router.count_decision(0, "round_robin", "affinity", 1e-4)
    router.count_rejection("a whim")
    router.count_ejection("a whim")
    router.publish(1.0)
    totals = CountersReader(board).read()
    assert totals.decisions[0][-1] == 2
    assert totals.rejections[-1] == 1
    assert totals.ejections[-1] == 1


@settings(max_examples=40, deadline=None)
@given(
    events=st.lists(
        st.tuples(
            st.integers(0, 2),
            st.integers(0, 63),
            st.sampled_from(CHOICES),
            st.floats(0, 1),
            st.sampled_from(REJECTIONS),
        ),
        max_size=40,
    )
)
def test_sums_over_routers_equal_what_was_counted(events: list[tuple[int, int, tuple[str, str], float, str]]) -> None:
    """Whatever order three routers count in."""
    board = Path(f"/dev/shm/test-counters-{os.getpid()}")
    routers = [RouterCounters.open(board, row) for row in range(3)]
    try:
        for row, slot, choice, seconds, rejection in events:
            routers[row].count_decision(slot, *choice, seconds)
            routers[row].count_rejection(rejection)
            routers[row].publish(1.0)
        totals = CountersReader(board).read()
    finally:
        for router in routers:
            router.leave()
    for slot in range(64):
        for index, choice in enumerate(CHOICES):
            assert totals.decisions[slot][index] == sum(e[1] == slot and e[2] == choice for e in events)
    assert totals.rejections == tuple(sum(e[4] == reason for e in events) for reason in REJECTIONS)
    assert totals.decision.count == len(events)
    assert totals.decision.sum_s == pytest.approx(sum(e[3] for e in events), abs=1e-6)
    assert not counters_path(board).exists()


def test_a_successor_in_the_row_goes_on_counting_but_starts_with_an_empty_queue(board: Path) -> None:
    """The sum never falls while another router keeps the file, or Prometheus would take it for a restart of all."""
    keeper, first = RouterCounters.open(board, 0), RouterCounters.open(board, 1)
    first.count_decision(0, *AWARE, 1e-4)
    first.set_queue(7)
    first.set_active([0, 63])
    first.publish(1.0)
    reader = CountersReader(board)
    assert (reader.read().queue_length, reader.read().active) == (7, frozenset({0, 63}))
    first.leave()
    left = reader.read()
    assert (sum(left.decisions[0]), left.queue_length, left.active, left.routers) == (1, 0, frozenset(), 1)
    second = RouterCounters.open(board, 1)
    second.count_decision(0, *AWARE, 1e-4)
    second.publish(1.0)
    totals = reader.read()
    assert (sum(totals.decisions[0]), totals.queue_length, totals.routers) == (2, 0, 2)
    second.leave()
    keeper.leave()


def test_a_router_that_was_killed_keeps_its_counts_and_loses_its_queue(board: Path) -> None:
    """Its process is gone without a word: what it did still happened, what waited does not wait any more."""
    program = (
        "import sys, os; from pathlib import Path; from balancer.counters import RouterCounters\n"
        "c = RouterCounters.open(Path(sys.argv[1]), 5)\n"
        "c.count_decision(1, 'gpu_aware', 'affinity', 1e-4); c.set_queue(9); c.publish(1.0); os._exit(1)"
    )
    subprocess.run([sys.executable, "-c", program, str(board)], check=False, timeout=30)
    totals = CountersReader(board).read()
    assert sum(totals.decisions[1]) == 1
    assert totals.queue_length == 0
    assert totals.routers == 0
    RouterCounters.open(board, 5).leave()
    assert not counters_path(board).exists()


def test_the_last_router_removes_the_file_and_only_the_last(board: Path) -> None:
    """Nothing is left behind in shared memory."""
    first, second = RouterCounters.open(board, 0), RouterCounters.open(board, 1)
    first.leave()
    assert counters_path(board).exists()
    second.leave()
    assert list(board.parent.iterdir()) == []


def test_only_its_owner_may_read_the_file(board: Path, router: RouterCounters) -> None:
    """Mode 0600, like the board."""
    assert counters_path(board).stat().st_mode & 0o777 == 0o600


@pytest.mark.usefixtures("threads_take_quick_turns")
def test_a_reader_never_takes_a_torn_record_for_a_whole_one(board: Path, router: RouterCounters) -> None:
    """Decisions and their histogram are written together, so at every moment they agree."""
    reader = CountersReader(board)
    stop = threading.Event()

    def count() -> None:
        while not stop.is_set():
            router.count_decision(0, *AWARE, 1e-4)
            router.publish(1.0)

    writer = threading.Thread(target=count)
    writer.start()
    try:
        seen = [reader.read() for _ in range(500)]
    finally:
        stop.set()
        writer.join()
    assert all(totals.decision.count == sum(totals.decisions[0]) for totals in seen)
    counts = [totals.decision.count for totals in seen]
    assert counts == sorted(counts)


def test_a_record_left_half_written_shows_its_last_whole_content(board: Path, router: RouterCounters) -> None:
    """A router that died in the middle of a write does not make the sums fall."""
    router.count_decision(0, *AWARE, 1e-4)
    router.publish(1.0)
    reader = CountersReader(board)
    reader.read()
    with counters_path(board).open("r+b") as file:
        file.seek(module._HEADER_BYTES)
        (sequence,) = module._SEQUENCE.unpack(file.read(8))
        file.seek(module._HEADER_BYTES)
        file.write(module._SEQUENCE.pack(sequence + 1))
    assert sum(reader.read().decisions[0]) == 1


def test_a_file_of_another_layout_is_replaced_and_not_changed(board: Path) -> None:
    """Who has mapped it goes on with what it has."""
    path = counters_path(board)
    path.write_bytes(b"another release's counters")
    with path.open("rb") as old:
        router = RouterCounters.open(board, 0)
        assert old.read() == b"another release's counters"
    assert CountersReader(board).read().routers == 1
    router.leave()


def test_a_row_that_the_board_does_not_have_is_refused(board: Path) -> None:
    """One sentence, and no file."""
    with pytest.raises(BoardError, match="claim one first"):
        RouterCounters.open(board, ROUTER_ROWS)
    assert not counters_path(board).exists()


def test_a_link_in_the_files_place_is_refused(board: Path, tmp_path: Path) -> None:
    """Nobody can make the router write elsewhere."""
    counters_path(board).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(BoardError, match="remove that file"):
        RouterCounters.open(board, 0)
    assert not (tmp_path / "elsewhere").exists()
