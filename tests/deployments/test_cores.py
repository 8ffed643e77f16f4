"""Cores for replicas: equal disjoint shares where there are enough, and every thread really moves."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from deployments.cores import pin, shares, siblings, words


@pytest.mark.parametrize(
    ("cores", "replicas", "expected"),
    [
        (16, 4, [(2, 3, 4), (5, 6, 7), (8, 9, 10), (11, 12, 13)]),
        (8, 2, [(2, 3, 4), (5, 6, 7)]),
        (7, 2, []),
        (2, 1, []),
        (5, 1, [(2, 3, 4)]),
    ],
)
def test_shares_are_equal_or_there_are_none(cores: int, replicas: int, expected: list[tuple[int, ...]]) -> None:
    """Two cores stay for the rest of the system, and a replica with fewer than three would be slower, not faster."""
    assert shares(range(cores), replicas, str) == expected


def test_only_cores_that_may_be_used_are_shared() -> None:
    """In a container the numbers have gaps."""
    assert shares([9, 1, 4, 6, 30], 1, str) == [(6, 9, 30)]


@pytest.mark.parametrize(
    ("threads", "apart", "replicas", "expected"),
    [
        (16, 1, 3, [(2, 3, 4, 5), (6, 7, 8, 9), (10, 11, 12, 13)]),
        (16, 8, 3, [(1, 2, 9, 10), (3, 4, 11, 12), (5, 6, 13, 14)]),
        (16, 1, 4, []),
    ],
)
def test_a_physical_core_belongs_to_one_replica(
    threads: int, apart: int, replicas: int, expected: list[tuple[int, ...]]
) -> None:
    """Whether its two threads are numbered side by side or far apart; seven are too few for four replicas."""
    physical = (lambda core: str(core // 2)) if apart == 1 else (lambda core: str(core % apart))
    assert shares(range(threads), replicas, physical) == expected


def test_threads_of_one_physical_core_are_told_by_the_kernel(tmp_path: Path) -> None:
    """Where it says nothing, as in some containers, each is taken for a core of its own."""
    topology = tmp_path / "cpu3" / "topology"
    topology.mkdir(parents=True)
    (topology / "thread_siblings_list").write_text("3,11\n")
    assert [siblings(core, tmp_path) for core in (3, 4)] == ["3,11", "4"]


def test_every_thread_of_a_process_is_pinned() -> None:
    """Linux keeps affinity for each thread; those that exist are moved, and those they start inherit it."""
    before = os.sched_getaffinity(0)
    one = min(before)
    release, seen = threading.Event(), []

    def work() -> None:
        release.wait(20)
        seen.append(os.sched_getaffinity(0))

    thread = threading.Thread(target=work)
    thread.start()
    try:
        pin([os.getpid()], [one])
        assert os.sched_getaffinity(0) == {one}
        release.set()
        thread.join(20)
        assert seen == [{one}]
    finally:
        pin([os.getpid()], sorted(before))
    assert os.sched_getaffinity(0) == before


def test_a_process_that_has_ended_is_no_error(tmp_path: Path) -> None:
    """An engine may die while it is being pinned."""
    pin([1 << 22], [0], proc=tmp_path)


def test_cores_are_said_shortly() -> None:
    """A range as a range, anything else one by one."""
    assert [words(cores) for cores in ((2, 3, 4), (2, 5, 9), (7,))] == ["2-4", "2,5,9", "7"]
