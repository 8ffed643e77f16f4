"""The grace period before a stop: nothing new is admitted, and what runs may end."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from balancer import stopping
from balancer.board import Board, BoardError
from balancer.counters import CountersReader

# Routers and replicas look for the wish to stop at least ten times a second: after this nothing new can come in.
_NOTICED_S = 0.3
# What is ended at the end of the grace period gets an error of its own, which must reach its client.
_LAST_WORDS_S = 1.0
_LOOK_EVERY_S = 0.05


def busy(board: Path) -> bool:
    """Whether a request is queued, on its way or being answered."""
    if not board.exists():
        return False
    try:
        queued = CountersReader(board).read().queue_length
        opened = Board.open(board)
    except BoardError:
        return False
    found = opened.snapshot(time.monotonic()).ready(stale_after_s=2.0)
    opened.close()
    return bool(queued or any(replica.assigned_requests for replica in found))


def drain(board: Path, grace_s: float, hurry: Callable[[], bool]) -> None:
    """Ask everybody on `board` to stop, and wait for what runs: at most `grace_s`, or until `hurry` says so."""
    if not board.exists():
        return
    began_s = time.monotonic()
    stopping.ask(board, began_s + grace_s)
    while time.monotonic() < began_s + grace_s + _LAST_WORDS_S and not hurry():
        if time.monotonic() >= began_s + _NOTICED_S and not busy(board):
            return
        time.sleep(_LOOK_EVERY_S)
