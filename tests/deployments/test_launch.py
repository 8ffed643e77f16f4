"""The launcher's small parts: ports, environment, and what an earlier run that was killed has left behind."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from balancer.board import Board, Owner
from benchmarks.ports import free_port
from deployments import launch, notices, processes
from deployments.config import ConfigError, parse_args
from deployments.launch import Run, clean_up_dead_runs, environment, require_free_port, require_free_ports, runs_folder
from deployments.processes import RUN_VARIABLE

DEAD = "4194305-1"  # above the largest PID that Linux gives
SLEEP = "print('up', flush=True); import time; time.sleep(600)"
DEAF = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); " + SLEEP


class Place:
    """Folders of its own for runs and boards, and processes that a run could have left."""

    def __init__(self, folder: Path) -> None:
        self.runs, self.shm = folder / "runs", folder / "shm"
        self.runs.mkdir()
        self.shm.mkdir()
        self.children: list[subprocess.Popen[str]] = []

    def board_path(self, run_id: str) -> Path:
        return self.shm / run_id

    def run(self, run_id: str, session: str | None = None) -> Path:
        folder = self.runs / run_id
        folder.mkdir()
        (folder / "haproxy.cfg").touch()
        if session is not None:
            (folder / "session").write_text(session)
        Board.open(self.board_path(run_id)).close()
        Path(f"{self.board_path(run_id)}.start").touch()
        return folder

    def process(self, script: str = SLEEP, mark: str | None = None) -> subprocess.Popen[str]:
        variables = {**os.environ} | ({RUN_VARIABLE: mark} if mark else {})
        command = [sys.executable, "-S", "-c", script]
        child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=variables, start_new_session=True)
        self.children.append(child)
        assert child.stdout is not None
        assert child.stdout.readline() == "up\n"
        return child

    def left(self) -> list[str]:
        return sorted(path.name for folder in (self.runs, self.shm) for path in folder.iterdir())


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    """Afterwards no child is left."""
    place = Place(tmp_path)
    monkeypatch.setattr(launch, "runs_folder", lambda: place.runs)
    monkeypatch.setattr(launch, "board_path", place.board_path)
    yield place
    for child in place.children:
        child.kill()
        child.communicate()
    assert processes.engines_of(os.getpid()) == []  # but for Python's resource tracker


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(DEAD, tmp_path / DEAD, "127.0.0.1", 8000, plain=False)


@pytest.fixture
def taken() -> Iterator[int]:
    """A port on which this process listens."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield int(listener.getsockname()[1])


def alive(child: subprocess.Popen[str]) -> bool:
    return Owner.of(child.pid).alive()


# --- an earlier run's leftovers ---


def test_what_a_killed_run_left_is_ended_and_removed(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    """Processes with the run's mark or in its session, deaf ones too, its folder and its board go, and it is said."""
    leader = place.process()
    owner = Owner.of(leader.pid)
    place.run(DEAD, f"{owner.pid} {owner.start_ticks}")
    marked, stranger = place.process(DEAF, mark=DEAD), place.process()
    clean_up_dead_runs()
    assert [alive(child) for child in (leader, marked, stranger)] == [False, False, True]
    assert place.left() == []
    said = capsys.readouterr().out
    assert "ending 2 processes of an earlier run: " in said
    assert f"(pid {leader.pid})" in said
    assert f"(pid {marked.pid})" in said


def test_a_living_run_is_left_alone(place: Place) -> None:
    """A run whose supervisor lives keeps its processes, folder and board."""
    run_id = processes.new_run_id()
    place.run(run_id)
    child = place.process(mark=run_id)
    clean_up_dead_runs()
    assert alive(child)
    assert place.left() == sorted([run_id, run_id, f"{run_id}.start"])


@pytest.mark.parametrize("session", [None, "", "garbage", "12", "a b"])
def test_a_run_killed_before_it_began_is_removed(place: Place, session: str | None) -> None:
    """No note of a session, or half a note: the mark alone must do."""
    place.run(DEAD, session)
    child = place.process(mark=DEAD)
    clean_up_dead_runs()
    assert not alive(child)
    assert place.left() == []


def test_a_recycled_session_number_harms_nobody(place: Place) -> None:
    """A process that by chance leads a session of the dead run's number, started later, lives on."""
    child = place.process()
    place.run(DEAD, f"{child.pid} {Owner.of(child.pid).start_ticks - 1}")
    clean_up_dead_runs()
    assert alive(child)
    assert place.left() == []


def test_several_dead_runs_are_all_removed(place: Place) -> None:
    """Each earlier run is cleaned up, and other folders there are left alone."""
    for number in range(3):
        place.run(f"4194305-{number}")
    (place.runs / "other").mkdir()
    clean_up_dead_runs()
    assert place.left() == ["other"]


def test_nothing_to_clean_is_silent(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    """A first start says nothing about earlier ones, with or without a folder for runs."""
    clean_up_dead_runs()
    place.runs.rmdir()
    clean_up_dead_runs()
    assert capsys.readouterr().out == ""


def test_what_does_not_end_is_named(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """A leftover that survives even SIGKILL stops the start with its name, and its run is kept for the next try."""
    place.run(DEAD)
    child = place.process(mark=DEAD)
    monkeypatch.setattr(processes, "end", lambda left, grace_s: list(left))
    with pytest.raises(ConfigError, match=rf"\(pid {child.pid}\) of an earlier run does not end; end it by hand"):
        clean_up_dead_runs()
    assert DEAD in place.left()


# --- ports ---


def test_a_free_port_passes() -> None:
    """A port on which no server listens any more is free at once, though its last connections linger."""
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)) as client:
            listener.accept()[0].close()
            client.recv(1)
    require_free_port("127.0.0.1", port, "key")


def test_a_taken_port_names_its_holder_and_the_key(taken: int) -> None:
    """Who holds the port, and which setting to change."""
    with pytest.raises(ConfigError, match=rf"port {taken} is taken by .*\(pid {os.getpid()}\).*set another some\.key"):
        require_free_port("127.0.0.1", taken, "some.key")


def test_an_address_of_another_machine_is_refused() -> None:
    """An address that this machine does not have is not called a taken port."""
    with pytest.raises(ConfigError, match=r"cannot listen on 192\.0\.2\.1:8000 \(.*\); set another some\.key"):
        require_free_port("192.0.2.1", 8000, "some.key")


def test_haproxys_other_ports_are_checked_too(run: Run, taken: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind HAProxy three more ports are needed; without it they may be taken."""
    for name in launch._RAY_PORTS:
        monkeypatch.setenv(name, str(free_port()))
    monkeypatch.setenv("RAY_SERVE_HAPROXY_STATS_PORT", str(taken))
    port = free_port()
    with pytest.raises(ConfigError, match="set another RAY_SERVE_HAPROXY_STATS_PORT in the environment"):
        require_free_ports(Run(DEAD, run.folder, "127.0.0.1", port, plain=False))
    require_free_ports(Run(DEAD, run.folder, "127.0.0.1", port, plain=True))


# --- the run ---


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("127.0.0.1", "http://127.0.0.1:81"),
        ("0.0.0.0", "http://127.0.0.1:81"),
        ("::", "http://127.0.0.1:81"),
        ("10.1.2.3", "http://10.1.2.3:81"),
    ],
)
def test_a_run_is_reached_at_an_address_one_can_ask(host: str, url: str, tmp_path: Path) -> None:
    """Serving on every interface is asked at this machine's own address."""
    assert Run(DEAD, tmp_path, host, 81, plain=False).url == url


def test_each_run_has_a_board_of_its_own(tmp_path: Path) -> None:
    """The board's file is named after the run."""
    boards = [Run(name, tmp_path, "", 1, plain=False).board for name in ("1-1", "1-2")]
    assert boards[0] != boards[1]
    assert all(board.parent == Path("/dev/shm") for board in boards)


def test_haproxys_socket_has_a_path_that_it_can_bind() -> None:
    """Below the run's folder there is room for the node id that Serve puts into the path, within HAProxy's 97."""
    longest = runs_folder() / f"4194304-{10**12}" / ("n" * 56) / "ctl"
    assert len(str(longest)) <= 97


def test_the_environment_keeps_what_the_caller_may_choose(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """The caller's own wishes win, but not over what the run needs to be told from others."""
    monkeypatch.setenv("RAY_DEDUP_LOGS", "1")
    monkeypatch.setenv("RAY_SERVE_ENABLE_HA_PROXY", "0")
    monkeypatch.setenv(RUN_VARIABLE, "another run")
    monkeypatch.setenv("SOMETHING_ELSE", "kept")
    made = environment(run)
    assert (made["RAY_DEDUP_LOGS"], made["SOMETHING_ELSE"]) == ("1", "kept")
    assert (made[RUN_VARIABLE], made["RAY_SERVE_ENABLE_HA_PROXY"]) == (DEAD, "1")
    assert all(isinstance(value, str) for value in made.values())
    assert {made[f"RAY_SERVE_HAPROXY_{name}"] for name in ("SOCKET_PATH", "METRICS_SOCKET_PATH")} == {
        str(run.folder / "ctl"),
        str(run.folder / "log"),
    }


def test_plain_serving_turns_haproxy_off(run: Run) -> None:
    """`--plain` is Serve's own proxy."""
    plain = Run(run.run_id, run.folder, run.host, run.port, plain=True)
    assert environment(plain)["RAY_SERVE_ENABLE_HA_PROXY"] == "0"


def test_its_folder_is_private_and_goes_with_it(tmp_path: Path) -> None:
    """Nobody else can look into the run's folder, which is gone even when the run fails."""
    folder = tmp_path / "runs" / DEAD
    with contextlib.suppress(RuntimeError), launch._private_folder(folder):
        assert {path.stat().st_mode & 0o777 for path in (folder, folder.parent)} == {0o700}
        (folder / "file").touch()
        raise RuntimeError("failed")
    assert not folder.exists()


def test_a_folder_of_another_user_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody else's folder in our place under /tmp is not used."""
    monkeypatch.setattr(os, "geteuid", lambda: tmp_path.stat().st_uid + 1)
    with pytest.raises(ConfigError, match="is not a folder of yours"), launch._private_folder(tmp_path / "runs" / DEAD):
        pass


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_are_collected_and_given_back(number: signal.Signals) -> None:
    """A signal while serving is noted, any number of times; afterwards the former handlers stand."""
    before = signal.getsignal(number)
    with launch._interruptible() as received:
        for _ in range(2):
            os.kill(os.getpid(), number)
        wait_until(lambda: len(received) == 2)
    assert received == [number, number]
    assert signal.getsignal(number) is before


def wait_until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30.0
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_every_process_of_a_run_is_told_to_stay_on_loopback(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's own ports too; who wants a cluster says so in the environment, which wins."""
    monkeypatch.delenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", raising=False)
    assert environment(run)["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] == "0"
    monkeypatch.setenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "1")
    assert environment(run)["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] == "1"


def test_vllms_sockets_lie_in_the_runs_private_folder(run: Run) -> None:
    """There they are closed to others and go with the run; a socket's path may have 107 characters."""
    folder = environment(run)["VLLM_RPC_BASE_PATH"]
    assert folder == str(run.folder)
    assert len(f"{launch.runs_folder()}/4194304-1234567890/{'x' * 36}") < 107


def test_a_run_in_which_nothing_is_left_that_could_serve_ends_with_status_1(
    place: Place, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The device manager's reason is the last word, and `serve run` is asked to end in order."""
    run = Run(DEAD, place.runs / DEAD, "127.0.0.1", 8000, plain=False)
    run.folder.mkdir()
    child = place.process()
    monkeypatch.setattr(launch.subprocess, "Popen", lambda *_, **__: child)
    monkeypatch.setattr(launch, "_prepare", lambda config_path, *_: config_path)
    monkeypatch.setattr(launch, "_show", lambda output: None)
    monkeypatch.setattr(launch.live, "note_start", lambda *_: None)
    notices.stop(run.board, "no replica is left that could be started: its last 3 starts ended")
    args = parse_args({"monitoring": {"exporter_port": None}})
    assert launch._supervise(Path("serve.yaml"), args, run, []) == 1
    assert capsys.readouterr().out.startswith("splitwiser: stopping because no replica is left that could be started")
    assert child.wait(20) == -signal.SIGINT or child.returncode != 0


def test_of_a_lost_replica_its_own_sentence_is_shown_and_not_serves_tracebacks() -> None:
    """Serve repeats a failed health check three times with a traceback each; other errors of it are still shown."""
    prefix = b"\x1b[36m(ServeController pid=7)\x1b[0m "
    hidden = [
        prefix + b'  File "replica.py", line 2292, in check_health',
        prefix + b"WARNING 2026-11-22 17:18:34 controller 7 -- Health check for Replica(id='x') failed: ray::Serve",
        prefix + b"RuntimeError: the replica was asked to restart",
        b"(ServeReplica:default:Replica pid=9) WARNING 2026-11-22 default_Replica x -- Replica health check failed.",
    ]
    shown = [
        prefix + b"ERROR 2026-11-22 controller 7 -- Exception in Replica(id='x'), the replica will be stopped.",
        prefix + b"RuntimeError: Engine core initialization failed. See root cause above.",
        b"(ServeReplica:default:Replica pid=9) replica 1/2: the replica's engine has died; it will be replaced",
    ]
    assert all(launch._CHATTER.search(line) for line in hidden)
    assert not any(launch._CHATTER.search(line) for line in shown)
