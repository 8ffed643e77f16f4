"""The wish to stop, as everybody on a node can see it: a file beside the board that names the end of the grace time.

Routers admit nothing new from then on; what runs goes on until the end, and is then ended with an error of its own.
"""

from __future__ import annotations

from pathlib import Path

REASON = "stopping"


def stopping_path(board: Path) -> Path:
    return board.with_name(board.name + ".stopping")


def ask(board: Path, ends_at_s: float) -> None:
    """Ask all on `board` to stop: nothing new from now on, and an end at `ends_at_s` (monotonic) for what runs."""
    path = stopping_path(board)
    unfinished = path.with_name(path.name + ".new")
    unfinished.write_text(repr(ends_at_s))
    unfinished.replace(path)


def asked(board: Path) -> float | None:
    """When what runs shall end, once somebody has asked; None before. A file that says nothing clear means now."""
    try:
        return float(stopping_path(board).read_text())
    except FileNotFoundError:
        return None
    except ValueError:
        return 0.0
