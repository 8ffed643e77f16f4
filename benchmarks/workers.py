"""A worker process that speaks JSON lines, and its own end of the pipe. What runs in it is the caller's choice."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

Json = dict[str, Any]


class EngineError(RuntimeError):
    """An engine ended or did not answer in time."""


class Engine:
    """One worker process with its own process group; JSON lines in, JSON lines out, its log in a file."""

    def __init__(self, command: Sequence[str], env: Mapping[str, str], log: Path) -> None:
        self._log = log
        with log.open("w") as sink:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=sink, env=env, start_new_session=True
            )
        self._unread = b""

    def send(self, message: Json) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(message).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError as error:
            raise self._error("took no more orders") from error

    def receive(self, deadline_s: float) -> Json:
        """The next line. Raises EngineError when the process ends or `deadline_s` (monotonic) passes first."""
        while b"\n" not in self._unread:
            self._read_some(deadline_s)
        line, _, self._unread = self._unread.partition(b"\n")
        answer: Json = json.loads(line)
        return answer

    def _read_some(self, deadline_s: float) -> None:
        assert self._process.stdout is not None
        # Short waits: children of a dead worker may hold its end of the pipe, and no end of file comes then.
        ready, _, _ = select.select([self._process.stdout], [], [], 0.2)
        if ready and (data := os.read(self._process.stdout.fileno(), 1 << 16)):
            self._unread += data
        elif self._process.poll() is not None:
            raise self._error(f"ended with status {self._process.returncode}")
        elif time.monotonic() > deadline_s:
            raise self._error("did not answer in time")

    def _error(self, what: str) -> EngineError:
        tail = self._log.read_text(errors="replace")[-1500:]
        return EngineError(f"the engine of {self._log.name} {what}; its log ends: {tail}")

    def close(self) -> None:
        """Ask it to end; its answer to a closed input is to leave."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()

    def end(self, deadline_s: float) -> None:
        """Wait for it until `deadline_s`, then kill whatever is left of its process group."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(max(0.0, deadline_s - time.monotonic()))
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()


def answers_on_stdout() -> Callable[[Json], None]:
    """A worker's own end of the pipe: what it answers with, one JSON line each.

    Libraries write to standard output; from now on that goes to standard error, and the answers have the pipe alone.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(message: Json) -> None:
        answers.write(json.dumps(message) + "\n")
        answers.flush()

    return answer
