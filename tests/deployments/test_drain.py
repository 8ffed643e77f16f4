"""The grace period before a stop."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from balancer import stopping
from balancer.readings import ReplicaState
from balancer.ticket import Ticket
from deployments import drain
from deployments.slot import Slot

TICKET = Ticket("gpu_aware", "any", row=0, tokens=10, slot=0)


@pytest.fixture
def slot(tmp_path: Path) -> Iterator[Slot]:
    slot = Slot(tmp_path / "board", "app#Replica#x", 0, time.monotonic)
    slot.set_state(ReplicaState.READY)
    yield slot
    slot.close()


def test_without_a_board_there_is_nothing_to_wait_for(tmp_path: Path) -> None:
    """Before the first replica, and after the last: nobody is asked, and no file is made."""
    assert not drain.busy(tmp_path / "board")
    drain.drain(tmp_path / "board", 100.0, lambda: False)
    assert not list(tmp_path.iterdir())


def test_an_idle_system_stops_at_once(slot: Slot, tmp_path: Path) -> None:
    """It is asked to admit nothing, given the time to notice, and not kept longer."""
    began_s = time.monotonic()
    drain.drain(tmp_path / "board", 100.0, lambda: False)
    assert time.monotonic() - began_s < 50.0
    assert stopping.asked(tmp_path / "board") is not None


def test_what_runs_is_waited_for(slot: Slot, tmp_path: Path) -> None:
    """The wait ends with the last request, not with the grace period."""
    number = slot.received(TICKET)
    assert drain.busy(tmp_path / "board")
    waiting = threading.Thread(target=drain.drain, args=(tmp_path / "board", 100.0, lambda: False))
    waiting.start()
    for _ in range(10):
        time.sleep(0.1)
        slot.publish()
    assert waiting.is_alive()
    slot.finished(number)
    waiting.join(50.0)
    assert not waiting.is_alive()


def test_whoever_is_in_a_hurry_does_not_wait(slot: Slot, tmp_path: Path) -> None:
    """A second Ctrl-C ends the grace period while a request still runs."""
    number = slot.received(TICKET)
    drain.drain(tmp_path / "board", 1000.0, lambda: True)
    slot.finished(number)


def test_the_grace_period_ends(slot: Slot, tmp_path: Path) -> None:
    """A request that does not end is left to its door, which ends it at the moment that everybody was told."""
    number = slot.received(TICKET)
    keep = threading.Event()

    def beat() -> None:
        while not keep.wait(0.05):
            slot.publish()

    beating = threading.Thread(target=beat)
    beating.start()
    drain.drain(tmp_path / "board", 0.0, lambda: False)
    keep.set()
    beating.join()
    slot.finished(number)
    assert (stopping.asked(tmp_path / "board") or 0.0) <= time.monotonic()
