"""Short messages beside the board, one file each, between the device manager, its replicas and the supervisor.

Files, because they are read ten times a second by replicas whose manager may be dead: a look costs one `stat`.
"""

from __future__ import annotations

import contextlib
import json
import os
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Losses:
    """How often each GPU's engines were lost together, and why the last time."""

    epochs: dict[int, int] = field(default_factory=dict)
    why: str = ""

    def epoch(self, gpu: int) -> int:
        return self.epochs.get(gpu, 0)


class LossFile:
    """Where the device manager says that all engines of a GPU are lost. One writer; `read` is cheap when unchanged."""

    def __init__(self, board: Path) -> None:
        self._path = _beside(board, "gpu")
        # What was read, and when it was written: in one, as threads share it.
        self._seen = (0, Losses())

    def read(self) -> Losses:
        try:
            changed_ns = self._path.stat().st_mtime_ns
        except FileNotFoundError:
            return self._seen[1]
        seen_ns, losses = self._seen
        if changed_ns != seen_ns:
            found = json.loads(self._path.read_text())
            losses = Losses({int(gpu): epoch for gpu, epoch in found["epochs"].items()}, found["why"])
            self._seen = changed_ns, losses
        return losses

    def lose(self, gpus: list[int], why: str) -> None:
        """Every engine that started on `gpus` before now is lost."""
        before = self.read()
        epochs = {**before.epochs, **{gpu: before.epoch(gpu) + 1 for gpu in gpus}}
        _write(self._path, json.dumps({"epochs": epochs, "why": why}))


def stop(board: Path, why: str) -> None:
    """Tell the supervisor that nothing is left that could serve."""
    _write(stop_file(board), why)


def stop_file(board: Path) -> Path:
    return _beside(board, "stop")


def stop_reason(board: Path) -> str:
    """Why the run must end; empty while it need not."""
    with contextlib.suppress(FileNotFoundError):
        return stop_file(board).read_text()
    return ""


def ask_restart(board: Path, slot: int) -> Path:
    """Ask the replica in `slot` to drain, stop and be replaced; the file is gone once the replica has begun."""
    path = _beside(board, f"restart-{slot}")
    _write(path, "")
    return path


def restart_asked(board: Path, slot: int) -> bool:
    """Whether somebody asked; asking is taken note of once."""
    try:
        _beside(board, f"restart-{slot}").unlink()
    except FileNotFoundError:
        return False
    return True


def _beside(board: Path, what: str) -> Path:
    return board.with_name(f"{board.name}.{what}")


def _write(path: Path, text: str) -> None:
    half = path.with_name(f"{path.name}.{os.getpid()}")
    half.write_text(text)
    half.chmod(0o600)
    half.rename(path)
