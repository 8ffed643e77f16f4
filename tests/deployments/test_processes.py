"""Processes of a run: found by mark or session, ended whatever they ignore, and engines that die with their parent."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from balancer.board import Owner
from deployments import processes
from deployments.processes import (
    ENGINE_VARIABLE,
    RUN_VARIABLE,
    die_with_parent,
    end,
    end_run,
    name_of,
    new_run_id,
    of_run,
    run_alive,
)

SECONDS = 30.0
RUN = "4194305-1"  # above the largest PID that Linux gives
SLEEP = "print('up', flush=True); import time; time.sleep(600)"
DEAF = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); " + SLEEP
FAMILY = f"""
import os, subprocess, sys
subprocess.Popen([sys.executable, "-c", {SLEEP!r}], start_new_session=sys.argv[1] == "marked")
{SLEEP}
"""

Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def start() -> Iterator[Start]:
    """Runs a script once it says that it is up; afterwards no descendant of this process is alive."""
    children: list[subprocess.Popen[str]] = []

    def run(script: str, *arguments: str, mark: str | None = None, session: bool = True) -> subprocess.Popen[str]:
        environment = {k: v for k, v in os.environ.items() if k != RUN_VARIABLE}
        environment |= {RUN_VARIABLE: mark} if mark else {}
        command = [sys.executable, "-S", "-c", script, *arguments]
        child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment, start_new_session=session)
        children.append(child)
        assert child.stdout is not None
        assert child.stdout.readline() == "up\n"
        return child

    yield run
    left = [psutil.Process(pid) for pid in processes.engines_of(os.getpid())]
    for process in left:
        process.kill()
    for child in children:
        child.communicate()
    assert [p for p in left if p.pid not in {c.pid for c in children}] == []


def pids(found: list[psutil.Process]) -> set[int]:
    return {process.pid for process in found}


def gone(pid: int) -> bool:
    return not Owner.of(pid).alive()


def wait_until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SECONDS
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_run_lives_as_long_as_its_supervisor(start: Start) -> None:
    """A run's name tells whether its supervisor still lives, and is not fooled by a recycled PID."""
    me = new_run_id()
    assert run_alive(me)
    assert not run_alive(f"{os.getpid()}-1")
    child = start(SLEEP)
    name = "-".join(map(str, (child.pid, Owner.of(child.pid).start_ticks)))
    assert run_alive(name)
    child.kill()
    child.wait()
    assert not run_alive(name)


@pytest.mark.parametrize("name", ["", "-", "x", "12", "12-", "-12", "a-b", "1-x"])
def test_what_names_no_run_is_no_living_run(name: str) -> None:
    """Folders of other names are nobody's."""
    assert not run_alive(name)


def test_marked_processes_belong_whatever_their_session(start: Start) -> None:
    """A process in a session of its own that carries the run's mark belongs; one with another mark does not."""
    marked, other, bare = start(SLEEP, mark=RUN), start(SLEEP, mark=RUN + "0"), start(SLEEP)
    assert pids(of_run(RUN, None)) == {marked.pid}
    assert {other.pid, bare.pid}.isdisjoint(pids(of_run(RUN, None)))


def test_processes_of_the_session_belong_without_a_mark(start: Start) -> None:
    """A process that wiped its environment is still found by its session, even when the session's leader is gone."""
    leader = start(FAMILY, "unmarked")
    owner = Owner.of(leader.pid)
    (child,) = psutil.Process(leader.pid).children()
    assert pids(of_run(RUN, owner)) == {leader.pid, child.pid}
    leader.kill()
    leader.wait()
    assert pids(of_run(RUN, owner)) == {child.pid}
    child.kill()
    wait_until(lambda: gone(child.pid))


def test_a_recycled_session_number_is_nobodys(start: Start) -> None:
    """A session whose leader started at another time is another session."""
    leader = start(SLEEP)
    owner = Owner.of(leader.pid)
    assert of_run(RUN, Owner(owner.pid, owner.start_ticks - 1)) == []


def test_the_caller_never_belongs() -> None:
    """A supervisor does not end itself, though it is in its own session."""
    assert os.getpid() not in pids(of_run(RUN, Owner.of(os.getsid(0))))


def test_who_listens_is_asked_who_does_not_is_killed(start: Start) -> None:
    """SIGTERM ends one process, SIGKILL the other that ignores it, and nobody is left."""
    polite, deaf = start(SLEEP), start(DEAF)
    assert end([psutil.Process(polite.pid), psutil.Process(deaf.pid)], grace_s=0.3) == []
    assert gone(polite.pid)
    assert gone(deaf.pid)


def test_ending_the_dead_is_no_error(start: Start) -> None:
    """A process that ended on its own is ended."""
    child = start(SLEEP)
    process = psutil.Process(child.pid)
    child.kill()
    child.wait()
    assert end([process], grace_s=0.1) == []


def test_a_whole_run_ends(start: Start) -> None:
    """Marked and unmarked, deaf and in other sessions: all of a run end, and a stranger lives on."""
    leader = start(FAMILY, "unmarked")
    deaf = start(DEAF, mark=RUN)
    family = start(FAMILY, "marked", mark=RUN)
    stranger = start(SLEEP)
    owner = Owner.of(leader.pid)
    found = pids(of_run(RUN, owner))
    assert len(found) == 5
    assert end_run(RUN, owner, grace_s=0.3) == []
    assert all(map(gone, found))
    assert {leader.pid, deaf.pid, family.pid} <= found
    assert not gone(stranger.pid)


def test_shared_memory_goes_with_the_run(start: Start) -> None:
    """What a killed process had mapped stays otherwise: its resource tracker ends with it, and nobody else knows."""
    child = start(
        "from multiprocessing import resource_tracker; from multiprocessing.shared_memory import SharedMemory;"
        " m = SharedMemory(create=True, size=4096); resource_tracker.unregister(m._name, 'shared_memory');" + DEAF,
        mark=RUN,
    )
    (path,) = processes.shared_memory_of([child.pid])
    assert path.exists()
    assert end_run(RUN, None, grace_s=0.1) == []
    assert not path.exists()


def test_a_run_that_is_over_ends_at_once() -> None:
    """Nothing to end: nothing left."""
    assert end_run(RUN, None, grace_s=0.0) == []


def test_what_does_not_end_is_returned(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """What lives in spite of everything is named, so that a person can be told."""
    child = start(SLEEP, mark=RUN)
    monkeypatch.setattr(processes, "end", lambda left, grace_s: list(left))
    assert pids(end_run(RUN, None, grace_s=0.0)) == {child.pid}


def test_a_process_is_named_for_people(start: Start) -> None:
    """By name and PID while it lives, by PID afterwards."""
    child = start(SLEEP)
    process = psutil.Process(child.pid)
    assert name_of(process).endswith(f"(pid {child.pid})")
    child.kill()
    child.wait()
    assert name_of(psutil.Process()) == f"{psutil.Process().name()} (pid {os.getpid()})"
    assert str(child.pid) in name_of(process)


# --- engines die with their replica ---

# What vLLM does: a replica starts its engine through multiprocessing, which calls the plugin after its imports.
REPLICA = """
import multiprocessing, os, signal, sys, time
from pathlib import Path
from deployments.processes import die_with_parent

def engine(folder, deaf):
    if deaf:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    (folder / "engine").write_text(str(os.getpid()))
    while (folder / "wait").exists():
        time.sleep(0.01)
    die_with_parent()
    (folder / "watches").touch()
    time.sleep(600)

if __name__ == "__main__":
    folder, deaf, method = Path(sys.argv[1]), sys.argv[2] == "deaf", sys.argv[3]
    multiprocessing.get_context(method).Process(target=engine, args=(folder, deaf)).start()
    time.sleep(600)
"""


class Replica:
    """A replica with an engine of its own; what the engine says lies in `folder`."""

    def __init__(self, folder: Path, how: str, method: str, imports: bool, marked: bool) -> None:
        self.folder = folder
        script = folder / "replica.py"
        script.write_text(REPLICA)
        if imports:
            (folder / "wait").touch()
        environment = {**os.environ, "PYTHONPATH": str(Path(processes.__file__).parents[1])}
        environment |= {ENGINE_VARIABLE: "1"} if marked else {}
        self.process = subprocess.Popen([sys.executable, str(script), str(folder), how, method], env=environment)
        wait_until(lambda: bool(self.said("engine")))
        self.engine = Owner.of(int(self.said("engine")))
        if not imports:
            wait_until((folder / "watches").exists)

    def said(self, what: str) -> str:
        path = self.folder / what
        return path.read_text() if path.exists() else ""

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture
def replica(tmp_path: Path) -> Iterator[Callable[..., Replica]]:
    replicas: list[Replica] = []

    def make(how: str = "polite", method: str = "spawn", imports: bool = False, marked: bool = True) -> Replica:
        replicas.append(Replica(tmp_path, how, method, imports, marked))
        return replicas[-1]

    yield make
    for one in replicas:
        one.kill()
        if one.engine.alive():
            os.kill(one.engine.pid, signal.SIGKILL)
        wait_until(lambda one=one: not one.engine.alive())  # type: ignore[misc]


@pytest.mark.parametrize("method", ["spawn", "fork"])
def test_an_engine_ends_when_its_replica_is_killed(replica: Callable[..., Replica], method: str) -> None:
    """SIGKILL of the replica ends its engine, however it was started."""
    one = replica(method=method)
    assert one.engine.alive()
    one.kill()
    wait_until(lambda: not one.engine.alive())


def test_an_engine_that_ignores_sigterm_ends_too(replica: Callable[..., Replica]) -> None:
    """An engine stuck in a kernel, deaf to SIGTERM, is killed after its grace."""
    one = replica("deaf")
    one.kill()
    wait_until(lambda: not one.engine.alive())


def test_an_engine_whose_replica_died_during_its_imports_ends(replica: Callable[..., Replica]) -> None:
    """The replica is gone before the engine begins to watch: the engine ends as soon as it does."""
    one = replica(imports=True)
    one.kill()
    assert one.engine.alive()
    (one.folder / "wait").unlink()
    wait_until(lambda: not one.engine.alive())


def test_other_users_of_vllm_are_left_alone(replica: Callable[..., Replica]) -> None:
    """vLLM calls the plugin in every process that it starts; without our mark it does nothing."""
    one = replica(marked=False)
    one.kill()
    assert one.engine.alive()


def test_the_replica_itself_does_not_watch(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that multiprocessing did not start has no parent to die with."""
    monkeypatch.setenv(ENGINE_VARIABLE, "1")
    assert multiprocessing.parent_process() is None
    die_with_parent()
    assert "die-with-parent" not in {thread.name for thread in threading.enumerate()}


def test_the_engines_of_a_replica_are_all_it_started_but_the_resource_tracker() -> None:
    """Python's tracker of shared memory is a child as well, and must outlive the engines."""
    script = (
        "import multiprocessing.resource_tracker as t, subprocess, sys, time; t.ensure_running();"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']);"
        "print(child.pid, flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as replica:
        assert replica.stdout is not None
        engine = int(replica.stdout.readline())
        try:
            assert len(psutil.Process(replica.pid).children()) == 2
            assert processes.engines_of(replica.pid) == [engine]
        finally:
            os.kill(engine, signal.SIGKILL)
            replica.kill()
    assert processes.engines_of(replica.pid) == []


def test_the_shared_memory_that_a_process_has_mapped_is_known_while_it_lives() -> None:
    """Afterwards nobody could tell whose it was; of a process that has ended there is none."""
    holds = "from multiprocessing.shared_memory import SharedMemory; m = SharedMemory(create=True, size=4096);"
    locks = "from multiprocessing import get_context; lock = get_context('spawn').Lock(); name = lock._semlock.name;"
    command = [sys.executable, "-c", f"{holds} {locks} print(m.name, 'sem.' + name.strip('/'), flush=True); input()"]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    paths = {Path("/dev/shm") / name for name in child.stdout.readline().split()}
    assert len(paths) == 2
    assert processes.shared_memory_of([child.pid]) == paths
    child.communicate("")
    assert processes.shared_memory_of([child.pid]) == frozenset()
    processes.remove(paths)


def test_only_the_very_process_is_killed() -> None:
    """A number that was given to another process since is left alone."""
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as process:
        meant = Owner.of(process.pid)
        processes.kill(Owner(process.pid, meant.start_ticks + 1))
        assert meant.alive()
        processes.kill(meant)
        assert process.wait(20) == -signal.SIGKILL
        processes.kill(meant)
