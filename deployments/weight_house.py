"""The device manager's side of shared weights: starts the weight host, adopts one that lives, ends it."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from balancer.board import Owner
from deployments import processes, weights
from deployments.weights import SHARED_FORMAT, WeightStatus

_ROOT = Path(__file__).parent.parent
_WAIT_FOR_HOST_S = 600.0


def lifeline(run: str) -> Owner:
    """The process with which a run's hosts end: its supervisor, or, without one, this process."""
    if processes.run_alive(run):
        pid, _, ticks = run.partition("-")
        return Owner(int(pid), int(ticks))
    return Owner.me()


def folder_of(run: str) -> Path:
    """The run's private folder, made where only a bare `serve run` could have."""
    folder = processes.runs_folder() / run
    for made in (folder.parent, folder):
        made.mkdir(mode=0o700, exist_ok=True)
        if made.stat().st_uid != os.geteuid():
            raise weights.WeightsError(f"{made} belongs to another user; ask them to remove it")
    return folder


def engine_arguments(host_socket: Path, engine: Mapping[str, Any], wait_s: float = _WAIT_FOR_HOST_S) -> dict[str, Any]:
    """The engine arguments by which a replica finds its host; the user's own format is kept for private loading."""
    extra = {
        "socket": str(host_socket),
        "wait_s": wait_s,
        "load_format": engine.get("load_format") or "auto",
        "extra": engine.get("model_loader_extra_config") or {},
    }
    return {"load_format": SHARED_FORMAT, "model_loader_extra_config": extra}


@dataclass
class WeightHouse:
    """One weight host: of one model, on one GPU, for one run.

    Its socket is named after what it holds, so that a manager that comes back finds it again, and one with another
    model does not mistake it for its own.
    """

    folder: Path
    args: Mapping[str, Any]
    model: str
    engine: Mapping[str, Any]
    lifeline: Owner = field(default_factory=Owner.me)
    command: tuple[str, ...] = (sys.executable, "-m", "deployments.weight_host")

    @property
    def socket(self) -> Path:
        named = json.dumps([self.args, self.model, self.engine], sort_keys=True, default=str)
        return self.folder / f"weights-{hashlib.blake2b(named.encode(), digest_size=6).hexdigest()}.sock"

    def status(self) -> WeightStatus | None:
        """What the host says of itself; None while there is none that lives."""
        found = weights.read_status(self.socket.with_suffix(".json"))
        return found if found is not None and Owner(found.pid, found.start_ticks).alive() else None

    def refused(self) -> str | None:
        """Why the host will not share this model, once it has found out."""
        status = self.status()
        return status.why if status is not None and status.state == "refused" else None

    def ensure(self, environment: Mapping[str, str]) -> None:
        """A host lives, or is started with `environment` on top of this process's. Returns at once: followers wait."""
        if self.status() is not None:
            return
        self.socket.unlink(missing_ok=True)
        owner = _detached(self.command, _host_environment(environment), json.dumps(self._spec()) + "\n")
        weights.write_status(self.socket.with_suffix(".json"), WeightStatus("loading", owner.pid, owner.start_ticks))

    def arguments(self) -> dict[str, Any]:
        """What a replica's engine is given to find the host."""
        return engine_arguments(self.socket, {**self.args.get("engine", {}), **self.engine})

    def dismiss(self) -> None:
        """Tells the host to end once its followers have left; it sees to that by itself."""
        if (status := self.status()) is not None:
            self._signal(Owner(status.pid, status.start_ticks), signal.SIGTERM)

    def stop(self, limit_s: float) -> None:
        """Ends the host, whoever started it; it lets its followers leave first, for as long as `limit_s` allows."""
        status = self.status()
        if status is not None:
            owner = Owner(status.pid, status.start_ticks)
            self._signal(owner, signal.SIGTERM)
            if not self._wait(owner, limit_s):
                self._signal(owner, signal.SIGKILL)
                self._wait(owner, limit_s)
        for path in (self.socket, self.socket.with_suffix(".json")):
            path.unlink(missing_ok=True)

    def _spec(self) -> dict[str, Any]:
        return {
            "args": dict(self.args),
            "model": self.model,
            "settings": dict(self.engine),
            "socket": str(self.socket),
            "lifeline_pid": self.lifeline.pid,
            "lifeline_ticks": self.lifeline.start_ticks,
        }

    def _signal(self, owner: Owner, number: signal.Signals) -> None:
        if owner.alive():
            with contextlib.suppress(ProcessLookupError):
                os.kill(owner.pid, number)

    def _wait(self, owner: Owner, limit_s: float) -> bool:
        deadline_s = time.monotonic() + limit_s
        while owner.alive():
            if time.monotonic() > deadline_s:
                return False
            time.sleep(0.05)
        return True


# Forks, says the child's PID, and leaves it in a session of its own, with everything else as it was.
_LAUNCHER = """
import os, sys
writing = int(sys.argv[1])
child = os.fork()
if child:
    os.write(writing, b"%d\\n" % child)
    os._exit(0)
os.close(writing)
os.setsid()
os.execv(sys.argv[2], sys.argv[2:])
"""


def _detached(command: Sequence[str], environment: Mapping[str, str], order: str) -> Owner:
    """Starts a process that is no child of this one: Ray kills the children of a worker that ends."""
    reading, writing = os.pipe()
    with os.fdopen(reading) as said:
        launcher = subprocess.Popen(
            [sys.executable, "-S", "-E", "-c", _LAUNCHER, str(writing), *command],
            stdin=subprocess.PIPE,
            env=dict(environment),
            pass_fds=[writing],
            text=True,
        )
        os.close(writing)
        assert launcher.stdin is not None
        with launcher.stdin, contextlib.suppress(BrokenPipeError):
            launcher.stdin.write(order)
        launcher.wait()
        return Owner.of(int(said.readline()))


def _host_environment(environment: Mapping[str, str]) -> dict[str, str]:
    inherited = {k: v for k, v in os.environ.items() if k != processes.ENGINE_VARIABLE}
    paths = [str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**inherited, **environment, "PYTHONPATH": os.pathsep.join(paths)}
