"""Processes: which belong to a run of this system, how they end, and that an engine never outlives its replica."""

from __future__ import annotations

import contextlib
import importlib.metadata
import multiprocessing
import os
import re
import select
import signal
import threading
import time
from collections.abc import Iterable
from pathlib import Path

import psutil

from balancer.board import Owner, process_start_ticks

# Inherited by everything a run starts (Ray, HAProxy, engines, the MPS daemon), so that whatever lost its parent can
# still be told to be ours.
RUN_VARIABLE = "SPLITWISER_RUN"
# Where a run serves, for what sends requests to the system from within it.
URL_VARIABLE = "SPLITWISER_URL"
# The replica that an engine's processes belong to, by its PID.
ENGINE_VARIABLE = "SPLITWISER_ENGINE"
# Set where an engine shall know the loader of shared weights: it imports parts of vLLM, which take a second.
WEIGHTS_VARIABLE = "SPLITWISER_WEIGHTS"
# The inodes of what is mapped from there: of a semaphore the name in `maps` is the one it had while it was made.
_MAPPED = re.compile(r"^\S+ \S+ \S+ \S+ (\d+) +/dev/shm/", re.MULTILINE)
_SHARED_MEMORY = ("psm_*", "sem.mp-*")
_ENGINE_GRACE_S = 3.0
_TRACKER_S = 3.0
# As pyproject.toml names it.
_PLUGIN = "splitwiser_die_with_parent"
# What to do where `known_to_vllm` says no.
MAKE_KNOWN = "install it into this Python with `pip install -e .`, or clear VLLM_PLUGINS"


def new_run_id() -> str:
    """Names this process and, with it, everything that it starts."""
    me = Owner.me()
    return f"{me.pid}-{me.start_ticks}"


def runs_folder() -> Path:
    """Short on purpose: HAProxy allows a socket's path 97 characters, of which Serve puts a node id of 56 into it."""
    return Path(f"/tmp/sw-{os.geteuid()}")


def run_alive(run_id: str) -> bool:
    """Whether the supervisor that made `run_id` still lives."""
    pid, _, ticks = run_id.partition("-")
    return pid.isdigit() and ticks.isdigit() and Owner(int(pid), int(ticks)).alive()


def of_run(run_id: str, session: Owner | None) -> list[psutil.Process]:
    """Every process of this user that belongs to a run: it carries the run's mark, or is in the run's session.

    Neither alone finds all: processes that set their title wipe the mark, and daemons leave the session. `session` is
    the session's leader as it was at the start; a recycled number is recognised by another start time.
    """
    session_id = session.pid if session and process_start_ticks(session.pid) in (None, session.start_ticks) else None
    return [p for p in psutil.process_iter() if p.pid != os.getpid() and _belongs(p, run_id, session_id)]


def end(processes: Iterable[psutil.Process], grace_s: float) -> list[psutil.Process]:
    """Ask the processes to end, insist after `grace_s`, and return those that live even so."""
    alive = [p for p in processes if _signal(p, signal.SIGTERM)]
    _, alive = psutil.wait_procs(alive, timeout=grace_s)
    alive = [p for p in alive if _signal(p, signal.SIGKILL)]
    _, alive = psutil.wait_procs(alive, timeout=2.0)
    return list(alive)


def end_run(run_id: str, session: Owner | None, grace_s: float) -> list[psutil.Process]:
    """End what belongs to a run, again while its dying processes start others; returns what lives even so.

    Shared memory that they have mapped goes with them.
    """
    for _ in range(3):
        left = of_run(run_id, session)
        if not left:
            return []
        shared = shared_memory_of(process.pid for process in left)
        # Trackers end by themselves after their last owner, and remove the shared memory that it left.
        trackers = [process for process in left if _is_resource_tracker(process)]
        end([process for process in left if process not in trackers], grace_s)
        _, stubborn = psutil.wait_procs(trackers, timeout=_TRACKER_S)
        end(stubborn, 0.0)
        remove(shared)
    return of_run(run_id, session)


def engines_of(pid: int) -> list[int]:
    """The engine processes that the replica process `pid` has started, and those they have; none when it has ended.

    Python's resource tracker, which it starts too, is none of them, and lives as long as the replica.
    """
    with contextlib.suppress(psutil.NoSuchProcess):
        children = psutil.Process(pid).children(recursive=True)
        return [child.pid for child in children if not _is_resource_tracker(child)]
    return []


def shared_memory_of(pids: Iterable[int]) -> frozenset[Path]:
    """The files of Python's shared memory and semaphores that these processes have mapped.

    Killed, they leave them: Ray ends a worker's children, the resource tracker that would remove them among these.
    """
    mapped: set[str] = set()
    for pid in pids:
        with contextlib.suppress(OSError):
            mapped.update(_MAPPED.findall(Path(f"/proc/{pid}/maps").read_text()))
    files = [path for pattern in _SHARED_MEMORY for path in Path("/dev/shm").glob(pattern)]
    return frozenset(path for path in files if _inode(path) in mapped)


def _inode(path: Path) -> str:
    with contextlib.suppress(FileNotFoundError):
        return str(path.stat().st_ino)
    return ""


def remove(shared_memory: Iterable[Path]) -> None:
    """Whoever has it mapped keeps it until it ends."""
    for path in shared_memory:
        path.unlink(missing_ok=True)


def _is_resource_tracker(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):
        return any("resource_tracker" in word for word in process.cmdline())
    return False


def kill(owner: Owner) -> None:
    """End this very process at once; a later one with its number is left alone."""
    with contextlib.suppress(ProcessLookupError):
        if owner.alive():
            os.kill(owner.pid, signal.SIGKILL)


def name_of(process: psutil.Process) -> str:
    """A process as a person would name it."""
    try:
        return f"{process.name()} (pid {process.pid})"
    except psutil.Error:
        return f"pid {process.pid}"


def die_with_parent() -> None:
    """vLLM calls this in each of its processes (entry point `vllm.general_plugins`): engine processes and workers of
    our replicas end when their parent does. Without it they live on and hold their memory after `ray stop`. It is also
    where they get to know the loader of shared weights."""
    parent = multiprocessing.parent_process()
    if os.environ.get(WEIGHTS_VARIABLE):
        from deployments.weight_loader import register

        register()
    if os.environ.get(ENGINE_VARIABLE) and parent is not None:
        # Not getppid(): a parent that ended while vLLM was being imported, for most of a minute, is no longer that.
        threading.Thread(target=_watch_parent, args=(parent.pid,), daemon=True, name="die-with-parent").start()


def known_to_vllm() -> bool:
    """Whether vLLM will call `die_with_parent`: only where this project is installed, not merely found on the path, and
    VLLM_PLUGINS, where it is set, names it."""
    allowed = os.environ.get("VLLM_PLUGINS")
    installed = any(entry.name == _PLUGIN for entry in importlib.metadata.entry_points(group="vllm.general_plugins"))
    return installed and (allowed is None or _PLUGIN in allowed.split(","))


def _watch_parent(parent: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        watch = select.poll()
        watch.register(os.pidfd_open(parent), select.POLLIN)
        watch.poll()
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(_ENGINE_GRACE_S)
    os.kill(os.getpid(), signal.SIGKILL)


def _belongs(process: psutil.Process, run_id: str, session_id: int | None) -> bool:
    try:
        if process.status() == psutil.STATUS_ZOMBIE or process.uids().real != os.getuid():
            return False
        return os.getsid(process.pid) == session_id or process.environ().get(RUN_VARIABLE) == run_id
    except (psutil.Error, OSError):
        return False  # it ended while being looked at


def _signal(process: psutil.Process, number: int) -> bool:
    try:
        process.send_signal(number)
    except psutil.NoSuchProcess:
        return False
    return True
