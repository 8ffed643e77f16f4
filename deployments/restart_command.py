"""`splitwiser restart SLOT`: a planned stop of one replica; Serve starts another in its place."""

from __future__ import annotations

import time
from pathlib import Path

from balancer.board import Board
from balancer.readings import ReplicaState
from deployments import notices
from deployments.config import ConfigError

_TAKEN_NOTE_WITHIN_S = 5.0


def restart(board_file: Path, slot: int) -> int:
    """Ask the replica in `slot` to drain and stop. Raises ConfigError when there is none, or it does not hear."""
    if not board_file.exists():
        raise ConfigError("no run is going on; start one with `splitwiser serve`")
    board = Board.open(board_file)
    ready = {r.slot for r in board.snapshot(time.monotonic()).replicas if r.state is ReplicaState.READY}
    board.close()
    if slot not in ready:
        raise ConfigError(
            f"no ready replica is in slot {slot}; ready are {', '.join(map(str, sorted(ready))) or 'none'}"
        )
    asked = notices.ask_restart(board_file, slot)
    deadline_s = time.monotonic() + _TAKEN_NOTE_WITHIN_S
    while asked.exists():
        if time.monotonic() > deadline_s:
            asked.unlink(missing_ok=True)
            raise ConfigError(f"the replica in slot {slot} does not react; see its log in /tmp/ray/session_latest/logs")
        time.sleep(0.05)
    print(f"the replica in slot {slot} drains, and another takes its place")
    return 0
