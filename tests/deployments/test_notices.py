"""The messages beside the board: written by one process, read by others, each exactly once where that matters."""

from __future__ import annotations

from pathlib import Path

import pytest

from deployments import notices
from deployments.notices import LossFile


@pytest.fixture
def board(tmp_path: Path) -> Path:
    return tmp_path / "board"


def test_losses_count_up_on_the_gpus_concerned(board: Path) -> None:
    """Another process sees each loss, with the reason, and other GPUs stay as they were."""
    writer, reader = LossFile(board), LossFile(board)
    assert reader.read().epoch(0) == 0
    writer.lose([0, 1], "the daemon died")
    assert (reader.read().epoch(0), reader.read().why) == (1, "the daemon died")
    writer.lose([1], "a fault")
    assert [reader.read().epoch(gpu) for gpu in (0, 1, 2)] == [1, 2, 0]
    assert reader.read().why == "a fault"
    assert [path.name for path in board.parent.iterdir()] == ["board.gpu"]


def test_a_manager_started_anew_goes_on_counting(board: Path) -> None:
    """An epoch never comes again, or an old engine would be taken for a new one."""
    LossFile(board).lose([0], "first")
    LossFile(board).lose([0], "second")
    assert LossFile(board).read().epoch(0) == 2


def test_a_stop_is_said_with_its_reason(board: Path) -> None:
    """The supervisor reads it until it ends; without one there is no reason to end."""
    assert notices.stop_reason(board) == ""
    notices.stop(board, "no replica is left")
    assert notices.stop_reason(board) == notices.stop_reason(board) == "no replica is left"


def test_a_wish_to_restart_is_heard_once_by_the_replica_it_is_for(board: Path) -> None:
    """The file is gone when the replica has taken note."""
    path = notices.ask_restart(board, 3)
    assert not notices.restart_asked(board, 2)
    assert path.exists()
    assert notices.restart_asked(board, 3)
    assert not notices.restart_asked(board, 3)
    assert not path.exists()
