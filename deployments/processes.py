"""Processes: which belong to a run of this system, how they end, and that an engine never outlives its replica."""

from __future__ import annotations

import multiprocessing
import os
import select
import signal
import threading
import time
from collections.abc import Iterable

import psutil

from balancer.board import Owner

# Inherited by everything a run starts (Ray, HAProxy, engines, the MPS daemon), so that whatever lost its parent can
# still be told to be ours.
RUN_VARIABLE = "SPLITWISER_RUN"
ENGINE_VARIABLE = "SPLITWISER_ENGINE"
_ENGINE_GRACE_S = 3.0


def new_run_id() -> str:
    """Names this process and, with it, everything that it starts."""
    me = Owner.me()
    return f"{me.pid}-{me.start_ticks}"


def run_alive(run_id: str) -> bool:
    """Whether the supervisor that made `run_id` still lives."""
    pid, _, ticks = run_id.partition("-")
    return pid.isdigit() and ticks.isdigit() and Owner(int(pid), int(ticks)).alive()


def runs() -> dict[str, list[psutil.Process]]:
    """Every process of this user that carries a run's mark, by run. The asking process itself is left out."""
    found: dict[str, list[psutil.Process]] = {}
    for process in psutil.process_iter():
        if process.pid != os.getpid() and (run_id := _mark(process)):
            found.setdefault(run_id, []).append(process)
    return found


def end(processes: Iterable[psutil.Process], grace_s: float) -> list[psutil.Process]:
    """Ask the processes to end, insist after `grace_s`, and return those that live even so."""
    alive = [p for p in processes if _signal(p, signal.SIGTERM)]
    _, alive = psutil.wait_procs(alive, timeout=grace_s)
    alive = [p for p in alive if _signal(p, signal.SIGKILL)]
    _, alive = psutil.wait_procs(alive, timeout=2.0)
    return list(alive)


def name_of(process: psutil.Process) -> str:
    """A process as a person would name it."""
    try:
        return f"{process.name()} (pid {process.pid})"
    except psutil.Error:
        return f"pid {process.pid}"


def die_with_parent() -> None:
    """vLLM calls this in each of its processes (entry point `vllm.general_plugins`): engine processes and workers of
    our replicas end when their parent does. Without it they live on and hold their memory after `ray stop`."""
    if os.environ.get(ENGINE_VARIABLE) and multiprocessing.parent_process() is not None:
        threading.Thread(target=_watch_parent, args=(os.getppid(),), daemon=True, name="die-with-parent").start()


def _watch_parent(parent: int) -> None:
    try:
        descriptor = os.pidfd_open(parent)
    except ProcessLookupError:
        pass
    else:
        select.select([descriptor], [], [])
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(_ENGINE_GRACE_S)
    os.kill(os.getpid(), signal.SIGKILL)


def _mark(process: psutil.Process) -> str:
    try:
        if process.status() == psutil.STATUS_ZOMBIE:
            return ""
        return str(process.environ().get(RUN_VARIABLE, ""))
    except (psutil.Error, OSError):
        return ""  # another user's process, or gone: not ours to end


def _signal(process: psutil.Process, number: int) -> bool:
    try:
        process.send_signal(number)
    except psutil.NoSuchProcess:
        return False
    return True
