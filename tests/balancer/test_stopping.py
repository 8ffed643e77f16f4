"""The wish to stop, as a file beside the board."""

from __future__ import annotations

from pathlib import Path

from balancer import stopping


def test_nobody_has_asked(tmp_path: Path) -> None:
    """Without the file there is no wish."""
    assert stopping.asked(tmp_path / "board") is None


def test_the_end_is_what_was_asked_for(tmp_path: Path) -> None:
    """Asking again moves it, and leaves one file."""
    board = tmp_path / "board"
    stopping.ask(board, 12.25)
    assert stopping.asked(board) == 12.25
    stopping.ask(board, 13.5)
    assert stopping.asked(board) == 13.5
    assert list(tmp_path.iterdir()) == [stopping.stopping_path(board)]


def test_a_file_without_sense_means_now(tmp_path: Path) -> None:
    """Somebody wanted a stop and could not say when."""
    board = tmp_path / "board"
    stopping.stopping_path(board).write_text("soon")
    assert stopping.asked(board) == 0.0
