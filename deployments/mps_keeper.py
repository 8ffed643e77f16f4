"""Keeps MPS usable while replicas come and go: sees a fatal fault and the daemon's death, and heals both.

All MPS clients of a GPU share one fault domain: after a fatal fault the server takes no new clients until every old
one has exited ("Multi-Process Service" guide, "Error Containment"). So all of that GPU's engines are declared lost,
which their replicas answer with explicit errors, and the daemon is made usable before any replica may start again.
"""

from __future__ import annotations

import logging
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from deployments import mps
from deployments.notices import LossFile

LOOK_EVERY_S = 0.5
# A killed CUDA process takes up to a second or two to give its memory back.
_EXIT_GRACE_S = 3.0
_EXIT_LIMIT_S = 15.0
_CLEAN_LIMIT_S = 10.0
_ATTEMPTS = 3


@dataclass(frozen=True, slots=True)
class Trouble:
    """What happened to the GPUs' engines; `gpus` empty: to all of them."""

    why: str
    gpus: tuple[int, ...] = ()


class MpsKeeper:
    """Owns a node's MPS daemon. `engines` names the engine processes on these GPUs, starting ones included.

    `look` is called by one thread, twice a second, and returns when what it found is healed; it reads /proc and two
    log files and asks the daemon nothing while all is well. `healing`, `given_up` and `faults` (fatal ones, counted)
    may be read by any thread.
    """

    def __init__(
        self,
        make: Callable[[], mps.MpsDaemon],
        losses: LossFile,
        gpus: Sequence[int],
        engines: Callable[[Sequence[int]], list[mps.ProcessIdentity]],
        log: logging.Logger,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._make = make
        self._losses = losses
        self._gpus = gpus
        self._engines = engines
        self._log = log
        self._clock = clock
        self._sleep = sleep
        self._servers: tuple[mps.ProcessIdentity, ...] = ()
        self.healing = False
        self.given_up = ""
        self.faults = 0
        self._logged_bytes = 0
        self.daemon = make()
        self.daemon.start()

    def run(self, stop: threading.Event) -> None:
        """Looks until `stop` is set."""
        while not stop.wait(LOOK_EVERY_S):
            self.look()

    def look(self) -> None:
        """One look, and the healing of what it finds; trouble that does not heal ends in `given_up`."""
        trouble = None if self.given_up else self._trouble()
        if trouble is None:
            return
        self.healing = True
        gpus = [gpu for gpu in self._gpus if not trouble.gpus or gpu in trouble.gpus]
        self._log.error("%s; restarting the replicas on GPU %s", trouble.why, ", ".join(map(str, gpus)))
        self._losses.lose(gpus, trouble.why)
        try:
            self._heal(gpus)
        finally:
            self.healing = False

    def prove_client(self, pid: int, limit_s: float) -> None:
        """Raises MpsError unless the process is a client."""
        self.daemon.require_client(pid, limit_s)
        self._servers = self.daemon.servers()

    def close(self) -> None:
        self.daemon.stop()

    def _trouble(self) -> Trouble | None:
        if not self.daemon.alive():
            return Trouble("the MPS control daemon has died")
        fault = self.daemon.recent_fault() if self._logs_grew() else None
        if fault is None:
            return None
        self.faults += 1
        culprit = f" in process {fault.culprit_pids[0]}" if fault.culprit_pids else ""
        what = "the MPS server has died" if fault.server_died else f"a fatal GPU error{culprit}"
        return Trouble(f"{what} (logged at {fault.at})", fault.devices)

    def _logs_grew(self) -> bool:
        """To read them through takes far longer than to ask for their size."""
        logged = sum(log.stat().st_size for log in self.daemon.paths.log.glob("*.log"))
        self._logged_bytes, before = logged, self._logged_bytes
        return logged != before

    def _heal(self, gpus: Sequence[int]) -> None:
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                self._wait_for_engines(gpus)
                self._make_usable()
                return
            except mps.MpsError as error:
                self._log.error("MPS is not usable yet (attempt %d of %d): %s", attempt, _ATTEMPTS, error)
                self.given_up = str(error) if attempt == _ATTEMPTS else ""

    def _wait_for_engines(self, gpus: Sequence[int]) -> None:
        """Replicas end their engines themselves; those that are deaf, because they are starting, are helped."""
        began_s = self._clock()
        while left := self._engines(gpus):
            waited_s = self._clock() - began_s
            if waited_s > _EXIT_LIMIT_S:
                pids = ", ".join(str(process.pid) for process in left)
                raise mps.MpsError(mps.MpsCause.SERVER_FAULT, f"the engine processes {pids} do not end: kill them")
            if waited_s > _EXIT_GRACE_S:
                mps.kill(left)
            self._sleep(0.1)

    def _make_usable(self) -> None:
        if self.daemon.alive():
            try:
                self.daemon.wait_clean(_CLEAN_LIMIT_S)
                self.daemon.forget_fault()
                return
            except mps.MpsError:
                if not self.daemon.owned:
                    raise
                self.daemon.stop()
        self._start_anew()

    def _start_anew(self) -> None:
        """Another daemon in place of a dead one, whose servers may live on without it and hold the GPU's memory."""
        if self.daemon.owned:
            mps.kill(self._servers)
            shutil.rmtree(self.daemon.paths.pipe, ignore_errors=True)
        self.daemon = self._make()
        self.daemon.start()
