"""`splitwiser restart SLOT`: asks one replica, and says so when there is none or it does not hear."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from balancer.board import Board
from balancer.readings import ReplicaState
from deployments import notices, restart_command
from deployments.config import ConfigError
from deployments.restart_command import restart


@pytest.fixture
def board(tmp_path: Path) -> Iterator[Path]:
    """A board with one ready replica in slot 0; afterwards no wish is left beside it."""
    path = tmp_path / "board"
    opened = Board.open(path)
    slot = opened.claim_slot("a")
    slot.fields.state = ReplicaState.READY
    slot.publish(time.monotonic())
    yield path
    slot.release()
    opened.leave()
    assert list(tmp_path.iterdir()) == []


def test_a_replica_that_hears_is_restarted(board: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The command ends when the replica has taken note."""
    heard = threading.Event()

    def hear() -> None:
        while not notices.restart_asked(board, 0):
            time.sleep(0.005)
        heard.set()

    thread = threading.Thread(target=hear)
    thread.start()
    assert restart(board, 0) == 0
    thread.join(20)
    assert heard.is_set()
    assert capsys.readouterr().out == "the replica in slot 0 drains, and another takes its place\n"


def test_a_slot_without_a_ready_replica_is_refused(board: Path) -> None:
    """The sentence names those that are ready."""
    with pytest.raises(ConfigError, match="no ready replica is in slot 7; ready are 0"):
        restart(board, 7)


def test_a_deaf_replica_is_said_and_the_wish_taken_back(board: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wish that is heard an hour later would surprise."""
    monkeypatch.setattr(restart_command, "_TAKEN_NOTE_WITHIN_S", 0.1)
    with pytest.raises(ConfigError, match="the replica in slot 0 does not react"):
        restart(board, 0)


def test_without_a_run_there_is_nothing_to_restart(tmp_path: Path) -> None:
    """No board is made on the way."""
    with pytest.raises(ConfigError, match="no run is going on"):
        restart(tmp_path / "none", 0)
    assert list(tmp_path.iterdir()) == []
