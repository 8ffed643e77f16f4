"""The MPS daemon's life cycle, against a stand-in for the control program that fails in the ways the real one does."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from deployments.mps import (
    DEFAULT_LOG,
    ENVIRONMENT_OUTSIDE_MPS,
    MAX_CLIENTS,
    PIPE_VARIABLE,
    ControlProgram,
    GpuFacts,
    MpsCause,
    MpsDaemon,
    MpsError,
    MpsMode,
    MpsPaths,
    ProcessIdentity,
    client_environment,
    fault_from_log,
    find_paths,
    identify,
    preflight,
    private_paths,
    running_daemon,
    wanted,
)

UID = os.getuid()
STAND_IN = Path(__file__).with_name("mps_stand_in.py")
SECONDS = 20.0  # far beyond anything a stand-in needs; reached only where a test fails


class Clock:
    """Time that passes only while somebody sleeps."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds


class World:
    """The stand-in, its state file, and what a test starts beside it."""

    def __init__(self, folder: Path) -> None:
        self.state_file = folder / "state.json"
        self.binary = folder / "bin" / "nvidia-cuda-mps-control"
        self.paths = private_paths(UID, folder)
        self.program = ControlProgram(str(self.binary))
        self.processes: list[subprocess.Popen[bytes]] = []
        self.clock = Clock()
        self.binary.parent.mkdir()
        words = [sys.executable, "-S", "-E", str(STAND_IN), str(self.state_file), str(self.binary)]
        self.binary.write_text(f'#!/bin/sh\nexec {shlex.join(words)} "$@"\n')
        self.binary.chmod(0o700)
        self.set()

    def set(self, **state: Any) -> None:
        half = self.state_file.with_suffix(".half")
        half.write_text(json.dumps(state))
        half.rename(self.state_file)

    def serve(self, *clients: int, status: str = "ACTIVE", code: str = "0", **state: Any) -> None:
        self.set(servers={"427": {"status": status, "clients": clients, "code": code}}, **state)

    def commands(self) -> list[str]:
        log = self.state_file.with_suffix(".commands")
        return log.read_text().splitlines() if log.exists() else []

    def daemon(self, paths: MpsPaths | None = None, **options: Any) -> MpsDaemon:
        """A daemon on real time, for what must really happen."""
        return MpsDaemon(self.program, paths or self.paths, **options)

    def timed(self, daemon: MpsDaemon) -> MpsDaemon:
        """From here on, the daemon's waits take no time."""
        daemon.clock, daemon.sleep = self.clock, self.clock.sleep
        return daemon

    def process(self, **environment: str) -> int:
        """A process that a replica's engine could be."""
        command = [sys.executable, "-S", "-E", "-c", "import time; time.sleep(60)"]
        self.processes.append(subprocess.Popen(command, env=environment))
        return self.processes[-1].pid

    def someone_elses_daemon(self, pipe: Path) -> MpsDaemon:
        """A daemon that runs already and that this project did not start."""
        daemon = self.daemon(MpsPaths(pipe, pipe.parent / "log", private=True))
        daemon.start(SECONDS)
        return daemon

    def end(self) -> None:
        self.state_file.unlink(missing_ok=True)
        for process in self.processes:
            process.kill()
            process.wait()


def running_under(folder: Path) -> list[str]:
    """The command lines of running processes that name `folder`."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue
        if str(folder) in line and identify(int(entry.name)) is not None:
            found.append(line)
    return found


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    """Asserts after every test that nothing it started is still running."""
    made = World(tmp_path)
    yield made
    made.end()
    deadline = time.monotonic() + SECONDS
    while running_under(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert running_under(tmp_path) == []


def refused(attempt: Callable[[], object], cause: MpsCause) -> str:
    """The sentence of the MpsError that `attempt` raises, which must have this cause."""
    with pytest.raises(MpsError) as error:
        attempt()
    assert error.value.cause is cause, str(error.value)
    assert "\n" not in str(error.value)
    return str(error.value)


# --- whether ---


@pytest.mark.parametrize(
    ("mode", "replicas", "can", "answer"),
    [
        (MpsMode.AUTO, 4, True, True),
        (MpsMode.AUTO, 1, True, False),
        (MpsMode.AUTO, 4, False, False),
        (MpsMode.ON, 1, True, True),
        (MpsMode.OFF, 4, True, False),
    ],
)
def test_mps_is_wanted_where_several_replicas_share_a_gpu(
    mode: MpsMode, replicas: int, can: bool, answer: bool
) -> None:
    """`auto` takes MPS for several replicas where the driver has it; `on` and `off` are obeyed."""
    assert wanted(mode, replicas, can) is answer


def test_on_without_a_driver_is_refused() -> None:
    """MPS asked for and not to be had is an error, never a silent fallback."""
    assert "set it to 'auto' or 'off'" in refused(lambda: wanted(MpsMode.ON, 4, False), MpsCause.UNSUPPORTED)


# --- start, adopt, stop ---


def test_start_answers_and_stop_undoes_everything(world: World, tmp_path: Path) -> None:
    """Private folders with mode 0700, an answering daemon; after stop neither process nor folder is left."""
    daemon = world.daemon()
    daemon.start(SECONDS)
    assert daemon.alive()
    assert daemon.owned
    assert daemon.server_pids() == ()
    assert {path.stat().st_mode & 0o777 for path in (world.paths.pipe, world.paths.log)} == {0o700}
    process = daemon.identity
    assert process is not None
    daemon.stop()
    assert identify(process.pid) is None
    assert not daemon.alive()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "bin",
        "state.commands",
        "state.environment",
        "state.json",
    ]


def test_the_daemon_inherits_no_cuda_settings(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA_VISIBLE_DEVICES would renumber its clients' devices, caps would hold for every client."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    monkeypatch.setenv("CUDA_MPS_ACTIVE_THREAD_PERCENTAGE", "10")
    daemon = world.daemon()
    daemon.start(SECONDS)
    environment = json.loads(world.state_file.with_suffix(".environment").read_text())
    ours = {PIPE_VARIABLE, "CUDA_MPS_LOG_DIRECTORY", "CUDA_DEVICE_ORDER"}
    assert {name for name in environment if name.startswith("CUDA_")} == ours
    assert environment[PIPE_VARIABLE] == str(world.paths.pipe)
    daemon.stop()


def test_stop_twice_and_stop_before_start_do_nothing(world: World) -> None:
    """Stop is always safe."""
    daemon = world.daemon()
    daemon.stop()
    daemon.start(SECONDS)
    daemon.stop()
    daemon.stop()
    assert [command for command in world.commands() if command.startswith("quit")] == ["quit -t 2"]


@pytest.mark.parametrize(
    ("kind", "named"),
    [
        ("refuses", "An instance of this daemon is already running"),
        ("hangs", "still starting after 0.5 s"),
    ],
)
def test_a_failed_start_says_why_and_leaves_nothing(world: World, kind: str, named: str) -> None:
    """A control program that refuses or hangs ends in one sentence, with the folders removed."""
    world.set(start=kind)
    daemon = world.daemon()
    assert named in refused(lambda: daemon.start(0.5), MpsCause.START_FAILED)
    assert not world.paths.pipe.parent.exists()
    assert not daemon.alive()


@pytest.mark.parametrize("kind", ["dies", "mute"])
def test_a_daemon_that_never_answers_is_undone(world: World, kind: str) -> None:
    """A daemon that dies at once or stays silent is an error after the limit; it is killed, its folders removed."""
    world.set(start=kind)
    daemon = world.daemon()
    refused(lambda: daemon.start(1.0), MpsCause.NO_ANSWER)
    assert running_daemon(world.paths.pipe) is None
    assert not world.paths.pipe.parent.exists()


def test_stop_ends_a_daemon_that_ignores_quit(world: World) -> None:
    """Where `quit` does nothing, the daemon is ended by its own identity."""
    daemon = world.daemon()
    daemon.start(SECONDS)
    process = daemon.identity
    world.set(quits=False)
    daemon.stop(limit_s=1.0)
    assert process is not None
    assert identify(process.pid) is None
    assert not world.paths.pipe.exists()


def test_stop_ends_a_daemon_that_answers_nothing(world: World) -> None:
    """A hung control pipe does not keep stop from undoing everything."""
    daemon = world.daemon()
    daemon.start(SECONDS)
    process = daemon.identity
    world.set(fails=["get_server_list", "quit"])
    daemon.stop(limit_s=2.0)
    assert process is not None
    assert identify(process.pid) is None


def test_stop_ends_a_server_that_outlives_its_daemon(world: World) -> None:
    """A server process that would go on holding GPU memory is ended with its daemon."""
    daemon = world.daemon()
    daemon.start(SECONDS)
    server = world.process()
    world.set(servers={str(server): {}})
    daemon.stop(limit_s=1.0)
    assert identify(server) is None


def test_an_adopted_daemon_is_left_running(world: World, tmp_path: Path) -> None:
    """What this project did not start, it does not stop; its log folder is read from the daemon's environment."""
    theirs = world.someone_elses_daemon(tmp_path / "theirs" / "mps" / "pipe")
    paths = find_paths({PIPE_VARIABLE: str(theirs.paths.pipe)}, world.paths, uid=UID, default_pipe=tmp_path / "none")
    assert (paths.pipe, paths.log, paths.private) == (theirs.paths.pipe, theirs.paths.log, False)
    ours = world.daemon(paths)
    ours.start(SECONDS)
    assert not ours.owned
    assert ours.identity == theirs.identity
    ours.stop()
    assert theirs.alive()
    theirs.stop()


def test_a_leftover_of_a_crash_is_taken_over_and_ended(world: World) -> None:
    """A daemon that a crashed run left in the private folders, without clients, is ours again."""
    world.daemon().start(SECONDS)
    again = world.daemon()
    again.start(SECONDS)
    assert again.owned
    again.stop()
    assert not world.paths.pipe.exists()


class LateProgram(ControlProgram):
    """A control program that finds, when it starts its daemon, that another process was a moment quicker."""

    def start(self, paths: MpsPaths, limit_s: float) -> None:
        ControlProgram(self.program).start(paths, limit_s)
        super().start(paths, limit_s)


def test_two_that_start_at_once_share_the_first_daemon(world: World) -> None:
    """Whoever comes second uses the first one's daemon, and neither kills it nor removes its folders."""
    second = MpsDaemon(LateProgram(str(world.binary)), world.paths)
    second.start(SECONDS)
    assert second.alive()
    assert not second.owned
    second.stop()
    assert running_daemon(world.paths.pipe) is not None
    last = world.daemon()
    last.start(SECONDS)
    last.stop()
    assert not world.paths.pipe.exists()


def test_a_failed_start_leaves_the_daemon_of_a_quicker_one(world: World) -> None:
    """Where the daemon of whoever was quicker does not answer, the start fails and that daemon is not touched."""
    world.set(start="mute")
    second = MpsDaemon(LateProgram(str(world.binary)), world.paths)
    refused(lambda: second.start(1.0), MpsCause.NO_ANSWER)
    assert running_daemon(world.paths.pipe) is not None
    world.set()
    last = world.daemon()
    last.start(SECONDS)
    last.stop()


def test_a_daemon_of_another_application_of_ours_is_only_adopted(world: World) -> None:
    """A daemon in the private folders that has clients is in use: it is shared and left running."""
    first, second = world.daemon(), world.daemon()
    first.start(SECONDS)
    world.serve(425)
    second.start(SECONDS)
    assert not second.owned
    second.stop()
    assert first.alive()
    first.stop()


def test_stale_pipes_of_a_killed_daemon_do_not_hinder(world: World) -> None:
    """After a SIGKILL the sockets and the PID file stay behind; the next start works, and death was noticed."""
    daemon = world.daemon()
    daemon.start(SECONDS)
    killed = daemon.identity
    assert killed is not None
    os.kill(killed.pid, signal.SIGKILL)
    assert wait_for(lambda: not daemon.alive())
    assert world.paths.pid_file.exists()
    asked = len(world.commands())
    assert not daemon.alive()
    assert len(world.commands()) == asked
    daemon.start(SECONDS)
    assert daemon.alive()
    assert daemon.identity != killed
    daemon.stop()


def wait_for(holds: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + SECONDS
    while not holds() and time.monotonic() < deadline:
        time.sleep(0.01)
    return holds()


def test_a_recycled_pid_is_not_the_daemon(world: World) -> None:
    """A PID file that names another process, or nothing at all, is no running daemon."""
    world.paths.pipe.mkdir(parents=True)
    for content in (str(os.getpid()), "999999999", "", "no number"):
        world.paths.pid_file.write_text(content)
        assert running_daemon(world.paths.pipe) is None
    mine = identify(os.getpid())
    assert mine is not None
    assert mine != ProcessIdentity(mine.pid, mine.started_ticks + 1, mine.uid)


def test_a_zombie_counts_as_gone() -> None:
    """In a container without an init, an ended daemon stays as a zombie: it must not look alive."""
    process = subprocess.Popen(["true"])
    assert wait_for(lambda: identify(process.pid) is None)
    assert Path(f"/proc/{process.pid}").exists()
    process.wait()


def test_adopting_nothing_is_refused(world: World) -> None:
    """Without a daemon there is nothing to adopt."""
    assert "start one" in refused(world.daemon().adopt, MpsCause.NO_DAEMON)


# --- which folders ---


def test_private_folders_are_used_where_no_daemon_of_ours_runs(world: World, tmp_path: Path) -> None:
    """A stale variable or a foreign default daemon leads to folders of one's own; a named foreign one is reported."""
    nowhere = tmp_path / "nowhere"
    assert find_paths({PIPE_VARIABLE: str(nowhere)}, world.paths, uid=UID, default_pipe=nowhere) == world.paths
    theirs = world.someone_elses_daemon(tmp_path / "theirs" / "mps" / "pipe")
    pipe = theirs.paths.pipe
    assert find_paths({}, world.paths, uid=UID, default_pipe=pipe).pipe == pipe
    assert find_paths({}, world.paths, uid=UID + 1, default_pipe=pipe) == world.paths
    assert find_paths({PIPE_VARIABLE: str(pipe)}, world.paths, uid=UID + 1, default_pipe=nowhere).pipe == pipe
    theirs.stop()


# --- preflight ---


def check(world: World, paths: MpsPaths | None = None, uid: int = UID, **options: Any) -> None:
    preflight(world.program, paths or world.paths, **({"replicas": 4, "uid": uid} | options))


def test_preflight_passes_where_mps_can_start_and_where_it_runs(world: World) -> None:
    """No daemon yet, or a healthy one with clients: nothing to complain of, and nothing is changed on disk."""
    check(world)
    assert not world.paths.pipe.exists()
    daemon = world.daemon()
    daemon.start(SECONDS)
    world.serve(425, 436)
    check(world, gpu=GpuFacts("Exclusive_Process", (427, 425, 436)))
    daemon.stop()


def test_preflight_names_a_missing_program(world: World) -> None:
    """No control program: the mend is to install it."""
    world.program = ControlProgram("no-such-program-here")
    assert "install" in refused(lambda: check(world), MpsCause.NO_BINARY)


def test_preflight_names_a_folder_of_another_user(world: World) -> None:
    """A folder under /tmp that somebody else made is not used."""
    world.paths.pipe.mkdir(parents=True)
    sentence = refused(lambda: check(world, uid=UID + 1), MpsCause.FOREIGN_FOLDER)
    assert f"belongs to user {UID}" in sentence
    foreign = MpsPaths(world.paths.pipe, DEFAULT_LOG)
    refused(lambda: check(world, foreign, uid=UID + 1), MpsCause.FOREIGN_FOLDER)


def test_preflight_names_a_link_in_place_of_the_folder(world: World, tmp_path: Path) -> None:
    """A link that somebody laid under /tmp is not followed, neither by preflight nor by start."""
    world.paths.pipe.parent.parent.symlink_to(tmp_path / "bin")
    refused(lambda: check(world), MpsCause.PATH)
    refused(world.daemon().start, MpsCause.PATH)
    assert sorted(path.name for path in (tmp_path / "bin").iterdir()) == ["nvidia-cuda-mps-control"]


def test_preflight_names_a_daemon_of_another_user(world: World) -> None:
    """A daemon that belongs to somebody else would not serve us."""
    daemon = world.daemon()
    daemon.start(SECONDS)
    public = MpsPaths(world.paths.pipe, world.paths.log)
    assert "have it stopped" in refused(lambda: check(world, public, uid=UID + 1), MpsCause.FOREIGN_DAEMON)
    daemon.stop()


def test_preflight_names_a_pipe_without_a_daemon(world: World) -> None:
    """A folder that is named from outside and holds only stale sockets is an error; without sockets too."""
    public = MpsPaths(world.paths.pipe, world.paths.log)
    world.paths.pipe.mkdir(parents=True)
    assert "none was started there" in refused(lambda: check(world, public), MpsCause.NO_ANSWER)
    world.paths.socket.touch()
    assert "its process has ended" in refused(lambda: check(world, public), MpsCause.NO_ANSWER)


@pytest.mark.parametrize("silent", ["get_server_list", "get_client_list", "get_server_status"])
def test_preflight_gives_up_on_a_silent_daemon(world: World, silent: str) -> None:
    """A hung daemon is named within the limit, whichever question it does not answer."""
    daemon = world.daemon()
    daemon.start(SECONDS)
    world.serve(425, hangs=[silent])
    assert "it was silent for" in refused(lambda: check(world, limit_s=0.7), MpsCause.NO_ANSWER)
    world.set()
    daemon.stop()


def test_preflight_names_a_server_in_fault(world: World) -> None:
    """A server in FAULT takes no clients; the sentence names the processes that hold it."""
    daemon = world.daemon()
    daemon.start(SECONDS)
    world.serve(436, 482, status="FAULT")
    assert "(436, 482)" in refused(lambda: check(world), MpsCause.SERVER_FAULT)
    world.set()
    daemon.stop()


def test_preflight_counts_clients(world: World) -> None:
    """The server's limit holds for those that are there and those to come; exactly the limit is allowed."""
    daemon = world.daemon()
    daemon.start(SECONDS)
    world.serve(*range(1000, 1000 + MAX_CLIENTS - 3))
    check(world, replicas=3)
    assert "start fewer replicas" in refused(lambda: check(world, replicas=4), MpsCause.TOO_MANY_CLIENTS)
    world.set()
    daemon.stop()


def test_preflight_names_a_compute_mode_that_forbids(world: World) -> None:
    """In exclusive mode a process outside MPS blocks the server; in Default mode it does not."""
    check(world, gpu=GpuFacts("Default", (999,)))
    check(world, gpu=GpuFacts("Exclusive_Process", ()))
    assert "(999)" in refused(lambda: check(world, gpu=GpuFacts("Exclusive_Process", (999,))), MpsCause.EXCLUSIVE_MODE)
    refused(lambda: check(world, gpu=GpuFacts("Prohibited")), MpsCause.EXCLUSIVE_MODE)


def test_preflight_names_a_path_too_long_for_a_socket(world: World, tmp_path: Path) -> None:
    """A socket's path has 107 bytes; beyond that the real daemon only says that it cannot find itself."""
    long = private_paths(UID, tmp_path / ("x" * 100))
    assert "use a shorter folder" in refused(lambda: check(world, long), MpsCause.PATH)


# --- clients ---


@pytest.fixture
def daemon(world: World) -> Iterator[MpsDaemon]:
    """A started daemon whose waits take no time."""
    started = world.daemon()
    started.start(SECONDS)
    yield world.timed(started)
    world.set()
    started.clock, started.sleep = time.monotonic, time.sleep
    started.stop()


def test_lists_are_kept_for_a_while(world: World, daemon: MpsDaemon) -> None:
    """Asking often does not hammer the control pipe: within half a second the last answer serves."""
    world.serve(425, 436)
    before = len(world.commands())
    assert daemon.client_pids() == daemon.client_pids() == (425, 436)
    assert daemon.server_pids() == (427,)
    assert len(world.commands()) == before + 2
    world.serve(436)
    assert daemon.client_pids() == (425, 436)
    world.clock.sleep(0.5)
    assert daemon.client_pids() == (436,)


def test_a_sentence_is_no_list_of_pids(world: World, daemon: MpsDaemon) -> None:
    """`Server 1 not found` comes with exit status 0: its number is not a client."""
    assert world.program.clients(world.paths.pipe, 1) == ()


def test_a_client_is_proven_by_its_pid(world: World, daemon: MpsDaemon) -> None:
    """require_client returns once the PID is listed, after asking a few times, not constantly."""
    pid = world.process()
    asked = len(world.commands())
    world.set(servers={"427": {}}, servers_after={"427": {"clients": [pid]}}, after=asked + 5)
    daemon.require_client(pid, limit_s=30.0)
    assert pid in daemon.client_pids()
    assert len(world.commands()) <= asked + 10


def test_a_process_with_another_pipe_is_named(world: World, daemon: MpsDaemon) -> None:
    """A process that was started with the wrong folder, or with none, will never be a client: the sentence says so."""
    wrong, none = world.process(**{PIPE_VARIABLE: "/tmp/other"}), world.process()
    sentence = refused(lambda: daemon.require_client(wrong, 5.0), MpsCause.NOT_A_CLIENT)
    assert f"{PIPE_VARIABLE}=/tmp/other instead of {world.paths.pipe}" in sentence
    assert f"{PIPE_VARIABLE}= instead" in refused(lambda: daemon.require_client(none, 5.0), MpsCause.NOT_A_CLIENT)


def test_a_process_without_a_context_is_named(world: World, daemon: MpsDaemon) -> None:
    """A process with the right folder that has not created its GPU context is told apart, after the whole limit."""
    pid = world.process(**client_environment(world.paths))
    began_s = world.clock.now_s
    assert "no GPU context yet" in refused(lambda: daemon.require_client(pid, 30.0), MpsCause.NOT_A_CLIENT)
    assert world.clock.now_s == pytest.approx(began_s + 30.0)


def test_a_process_of_another_user_is_named(world: World, daemon: MpsDaemon) -> None:
    """The daemon serves one user; a process of another is named with both."""
    pid = world.process(**client_environment(world.paths))
    daemon.uid = UID + 1
    sentence = refused(lambda: daemon.require_client(pid, 5.0), MpsCause.NOT_A_CLIENT)
    assert f"runs as user {UID} and the daemon serves user {UID + 1}" in sentence


def test_a_process_that_ends_is_not_waited_for(world: World, daemon: MpsDaemon) -> None:
    """An engine that dies while loading is reported at once."""
    pid = world.process()
    os.kill(pid, signal.SIGKILL)
    assert wait_for(lambda: identify(pid) is None)
    began_s = world.clock.now_s
    assert "ended (see its log)" in refused(lambda: daemon.require_client(pid, 60.0), MpsCause.NOT_A_CLIENT)
    assert world.clock.now_s == began_s


def test_a_daemon_that_dies_meanwhile_is_named(world: World, daemon: MpsDaemon) -> None:
    """Waiting for a client ends when the daemon does."""
    pid = world.process()
    assert daemon.identity is not None
    os.kill(daemon.identity.pid, signal.SIGKILL)
    assert wait_for(lambda: not daemon.alive())
    sentence = refused(lambda: daemon.require_client(pid, 60.0), MpsCause.NOT_A_CLIENT)
    assert "the MPS control daemon ended (restart it)" in sentence


def test_a_missed_answer_is_forgiven_until_the_limit(world: World, daemon: MpsDaemon) -> None:
    """A control pipe that fails once does not fail the client; one that fails to the end is the cause that is named."""
    pid = world.process()
    world.serve(pid, fails=["get_client_list"])
    refused(lambda: daemon.require_client(pid, 2.0), MpsCause.NO_ANSWER)
    mended: list[float] = []

    def sleep_and_mend(seconds: float) -> None:
        world.clock.sleep(seconds)
        world.serve(pid)
        mended.append(seconds)

    daemon.sleep = sleep_and_mend
    world.clock.sleep(1.0)
    daemon.require_client(pid, 5.0)
    assert mended


def test_terminating_a_client_asks_its_own_server(world: World, daemon: MpsDaemon) -> None:
    """The command names the client's server, and 0 is the proof; a process that is no client needs nothing."""
    world.set(servers={"427": {"clients": [425]}, "584": {"clients": [582]}})
    assert daemon.terminate_client(582)
    assert world.commands()[-1] == "terminate_client 584 582"
    assert not daemon.terminate_client(999)
    assert world.commands()[-1] == "get_client_list 584"


def test_a_client_that_is_not_terminated_must_not_be_killed(world: World, daemon: MpsDaemon) -> None:
    """Any answer but 0 is an error that says what to do instead of killing."""
    world.serve(425, code="999")
    sentence = refused(lambda: daemon.terminate_client(425), MpsCause.NOT_TERMINATED)
    assert "'999'" in sentence
    assert "restart all replicas" in sentence


def test_a_server_that_does_not_finish_terminating_is_named(world: World, daemon: MpsDaemon) -> None:
    """A terminate_client that hangs ends at its limit."""
    world.serve(425, hangs=["terminate_client"])
    assert "terminate_client 427 425" in refused(lambda: daemon.terminate_client(425, 0.3), MpsCause.NO_ANSWER)


def test_after_the_kill_its_memory_is_waited_for(world: World, daemon: MpsDaemon) -> None:
    """wait_gone returns when the server has dropped the client, and names one that stays."""
    world.serve(425)
    assert "still an MPS client" in refused(lambda: daemon.wait_gone(425, 3.0), MpsCause.NOT_TERMINATED)
    world.set(servers={"427": {"clients": [425]}}, servers_after={"427": {}}, after=len(world.commands()) + 4)
    world.clock.sleep(1.0)
    daemon.wait_gone(425, 60.0)
    assert daemon.client_pids() == ()


def test_a_replicas_environment(world: World) -> None:
    """Pipe folder always; memory cap in whole MiB for its device; thread percentage within 1 to 100."""
    pipe = {PIPE_VARIABLE: str(world.paths.pipe)}
    assert client_environment(world.paths) == pipe
    limited = client_environment(world.paths, memory_limit_bytes=(1 << 30) + 5, thread_percentage=25)
    assert limited["CUDA_MPS_PINNED_DEVICE_MEM_LIMIT"] == "0=1024M"
    assert limited["CUDA_MPS_ACTIVE_THREAD_PERCENTAGE"] == "25"
    for percentage in (0, 101):
        with pytest.raises(ValueError, match="between 1 and 100"):
            client_environment(world.paths, thread_percentage=percentage)
    with pytest.raises(ValueError, match="at least 1048576"):
        client_environment(world.paths, memory_limit_bytes=5)
    assert ENVIRONMENT_OUTSIDE_MPS == {PIPE_VARIABLE: "/dev/null"}


# --- faults ---

DRIVER_580 = """\
[2026-11-22 13:42:17.410 Server   427] Received new client request for {PID: 4, Context ID: 699050544}
[2026-11-22 13:42:17.425 Server   427] Status of client {PID: 482, Context ID: 1} is ACTIVE
[2026-11-22 13:42:23.634 Server   427] Client {PID: 482, Context: 1} encountered a fatal GPU error.
[2026-11-22 13:42:23.634 Server   427] Server is handling a fatal GPU error.
[2026-11-22 13:42:23.634 Server   427] Client {PID: 436, Context ID: 1} on device 0 to be torn down
[2026-11-22 13:42:23.634 Server   427] All clients belonging to error trigging process 436 will be torn down
[2026-11-22 13:42:23.634 Server   427] The following devices will be reset:
[2026-11-22 13:42:23.634 Server   427] 0
[2026-11-22 13:42:23.634 Server   427] The following client process have a sticky error set:
[2026-11-22 13:42:23.634 Server   427] 436
[2026-11-22 13:42:23.634 Server   427] 482
[2026-11-22 13:42:26.449 Server   427] Failed to accept client {PID: 502, Context ID: 0} with status 807
""".splitlines()
DRIVER_580_CLEARED = [
    "[2026-11-22 13:42:29.425 Server   427] Destroy server context on device 0 (NVIDIA H200)",
    "[2026-11-22 13:42:29.492 Server   427] Client process 482 disconnected",
]
OLDER_DRIVER = """\
[2022-04-28 15:56:07.518 Other 11570] Volta MPS: status of client {11643, 2} is ACTIVE
[2022-04-28 15:56:08.906 Other 11570] Volta MPS: Server is handling a fatal GPU error.
[2022-04-28 15:56:08.906 Other 11570] Volta MPS: status of client {11641, 1} is INACTIVE
[2022-04-28 15:56:08.906 Other 11570] Volta MPS: status of client {11643, 1} is INACTIVE
[2022-04-28 15:56:08.906 Other 11570] Volta MPS: The following devices
[2022-04-28 15:56:08.906 Other 11570] 0
[2022-04-28 15:56:08.907 Other 11570] 1
[2022-04-28 15:56:08.907 Other 11570] Volta MPS: The following clients have a sticky error set:
[2022-04-28 15:56:08.907 Other 11570] 11641
[2022-04-28 15:56:08.907 Other 11570] 11643
[2022-04-28 15:56:09.245 Other 11570] Volta MPS: Destroy server context on device 0
[2022-04-28 15:56:10.310 Other 11570] Volta MPS: Creating server context on device 0
""".splitlines()
SERVER_DIED = """\
[2024-12-10 06:38:01.170 Control    64] Starting new server 95 for user 1001
[2024-12-10 06:38:01.210 Control    64] Server encountered a fatal exception. Shutting down
[2024-12-10 06:38:01.222 Control    64] Server 95 exited with status 1
""".splitlines()
ORDINARY = """\
[2026-11-22 13:42:15.298 Server   427] Client termination failed with invalid device context.
[2026-11-22 13:42:15.300 Server   427] MPS server requesting client {PID: 425, Context ID: 1} to exit
[2026-11-22 13:42:16.315 Server   427] Server failed to recevie command with status 806, assuming client {PID: 425} exit
[2026-11-22 13:42:09.285 Control   406] User did not send valid credentials
[2026-11-22 13:42:35.722 Control   406] FAULT
[2026-11-22 13:42:37.783 Control   406] Server 427 exited with status 0
[2022-04-28 15:56:08.906 Other 11570] Volta MPS: status of client {11641, 1} is INACTIVE
not a log line at all: encountered a fatal GPU error
""".splitlines()


def test_a_fault_of_driver_580_names_culprit_and_victims() -> None:
    """The culprit's PID, all who lost their contexts, the device; not the client that was refused meanwhile."""
    fault = fault_from_log(DRIVER_580)
    assert fault is not None
    assert (fault.at, fault.server_pid) == ("2026-11-22 13:42:23.634", 427)
    assert (fault.culprit_pids, fault.client_pids, fault.devices) == ((482,), (436, 482), (0,))
    assert not fault.cleared
    assert not fault.server_died


def test_a_fault_is_cleared_once_its_contexts_are_destroyed() -> None:
    """When the last victim has exited, the server destroys its context and is usable again."""
    fault = fault_from_log(DRIVER_580 + DRIVER_580_CLEARED)
    assert fault is not None
    assert fault.cleared


def test_a_fault_of_an_older_driver_is_read_too() -> None:
    """The guide's own example: no culprit is named, two devices and two processes are affected."""
    fault = fault_from_log(OLDER_DRIVER)
    assert fault is not None
    assert (fault.culprit_pids, fault.client_pids, fault.devices) == ((), (11641, 11643), (0, 1))
    assert fault.cleared


def test_a_server_that_died_is_a_fault() -> None:
    """The control log's exit with a status other than 0 names the server that died."""
    fault = fault_from_log(SERVER_DIED)
    assert fault is not None
    assert fault.server_died
    assert fault.server_pid == 95


def test_the_latest_of_several_faults_counts() -> None:
    """After a recovery, a second fault is a new one with its own victims."""
    second = [line.replace("13:42:", "13:55:").replace("482", "777").replace("436", "778") for line in DRIVER_580]
    fault = fault_from_log(DRIVER_580 + DRIVER_580_CLEARED + second)
    assert fault is not None
    assert fault.at.startswith("2026-11-22 13:55")
    assert fault.client_pids == (777, 778)
    assert not fault.cleared


def test_ordinary_lines_are_no_fault() -> None:
    """Terminations, exits with status 0, answers to commands and stray text are not faults."""
    assert fault_from_log(ORDINARY) is None
    assert fault_from_log([]) is None


def test_a_cut_log_is_no_error() -> None:
    """Every prefix of a log, as it is while being written, can be read."""
    text = "\n".join(DRIVER_580 + DRIVER_580_CLEARED)
    faults = [fault_from_log(text[:length].splitlines()) for length in range(0, len(text), 7)]
    assert faults[0] is None
    assert faults[-1] is not None


def test_the_daemon_sees_new_faults_only(world: World, daemon: MpsDaemon) -> None:
    """A fault is seen from the log without asking the daemon; one from before this start is not reported again."""
    log = world.paths.log / "server.log"
    asked = len(world.commands())
    assert daemon.recent_fault() is None
    log.write_text("\n".join(DRIVER_580))
    fault = daemon.recent_fault()
    assert fault is not None
    assert fault.culprit_pids == (482,)
    assert len(world.commands()) == asked
    later = world.daemon()
    later.adopt()
    assert later.recent_fault() is None
    (world.paths.log / "control.log").write_text("\n".join(SERVER_DIED).replace("2024-", "2027-"))
    died = later.recent_fault()
    assert died is not None
    assert died.server_died


def test_after_a_fault_the_server_is_waited_for(world: World, daemon: MpsDaemon) -> None:
    """wait_clean returns when the server is ACTIVE again, or gone; it names those that still hold it."""
    world.serve(436, 482, status="FAULT")
    assert "(436, 482)" in refused(lambda: daemon.wait_clean(10.0), MpsCause.SERVER_FAULT)
    held = {"427": {"status": "FAULT", "clients": [482]}}
    world.set(servers=held, servers_after={"427": {}}, after=len(world.commands()) + 5)
    daemon.wait_clean(60.0)
    assert world.program.status(world.paths.pipe, 427) == "ACTIVE"
    world.set()
    daemon.wait_clean(1.0)
    assert world.commands()[-1] == "get_server_list"
