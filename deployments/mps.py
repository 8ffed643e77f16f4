"""The MPS control daemon: start or adopt it, prove that a process is its client, stop a client safely, see a fault.

MPS lets the kernels of several processes run on the GPU at the same time. A CUDA process looks for the daemon in
`CUDA_MPS_PIPE_DIRECTORY` once, when it creates its context, and *silently* runs without MPS where it finds none: hence
the proof by PID. All clients of a GPU share one fault domain: after one client's fatal fault the server refuses new
clients until every old one has exited. Sources: NVIDIA's "Multi-Process Service" guide (architecture, error
containment, appendix "Tools and Interface Reference"), and the daemon of driver 580.159 on an H200, whose answers and
log lines are quoted below.

Nothing here touches the compute mode, clocks, MIG or persistence.
"""

from __future__ import annotations

import enum
import os
import re
import shutil
import signal
import stat
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

DEFAULT_PIPE = Path("/tmp/nvidia-mps")
DEFAULT_LOG = Path("/var/log/nvidia-mps")
PIPE_VARIABLE = "CUDA_MPS_PIPE_DIRECTORY"
LOG_VARIABLE = "CUDA_MPS_LOG_DIRECTORY"
PROC = Path("/proc")

# Volta and later accept 48 client contexts per GPU (60 in the newest guides); an engine has one.
MAX_CLIENTS = 48
# sockaddr_un.sun_path: beyond it the daemon exits, saying only that it cannot find itself.
MAX_SOCKET_PATH_BYTES = 107
# `quit -t`: how long the daemon waits for clients before it shuts their server down by force.
QUIT_WAIT_S = 2
ANSWER_LIMIT_S = 2.0
_LOG_TAIL_BYTES = 1 << 18
_MIB = 1 << 20

# A process with this environment never becomes a client, whatever daemon runs at the default place (seen: driver 580).
ENVIRONMENT_OUTSIDE_MPS: Mapping[str, str] = {PIPE_VARIABLE: os.devnull}


class MpsCause(enum.Enum):
    """What is wrong, for code; the MpsError's sentence is for people."""

    NO_BINARY = "no binary"
    PATH = "bad path"
    FOREIGN_FOLDER = "folder of another user"
    FOREIGN_DAEMON = "daemon of another user"
    NO_DAEMON = "no daemon"
    NO_ANSWER = "no answer"
    START_FAILED = "start failed"
    EXCLUSIVE_MODE = "compute mode"
    SERVER_FAULT = "server in fault state"
    TOO_MANY_CLIENTS = "too many clients"
    NOT_A_CLIENT = "not a client"
    NOT_TERMINATED = "client not terminated"
    UNSUPPORTED = "unsupported"


class MpsError(RuntimeError):
    """MPS cannot be used as asked; one sentence with the cause and the mend."""

    def __init__(self, cause: MpsCause, message: str) -> None:
        super().__init__(message)
        self.cause = cause


class MpsMode(enum.StrEnum):
    AUTO = "auto"
    ON = "on"
    OFF = "off"


def wanted(mode: MpsMode, replicas_per_gpu: int, driver_can: bool) -> bool:
    """Whether replicas shall be MPS clients; `auto` takes MPS where several share a GPU and the driver has it."""
    if mode is MpsMode.ON and not driver_can:
        raise MpsError(MpsCause.UNSUPPORTED, "mps is 'on' but this machine cannot run MPS: set it to 'auto' or 'off'")
    return mode is MpsMode.ON or (mode is MpsMode.AUTO and replicas_per_gpu > 1 and driver_can)


# --- processes ---


@dataclass(frozen=True, slots=True)
class ProcessIdentity:
    """A process that cannot be mistaken for a later one with the same PID."""

    pid: int
    started_ticks: int
    uid: int


def identify(pid: int, proc: Path = PROC) -> ProcessIdentity | None:
    """The running process `pid`; None once it has ended, a zombie included (few containers have an init that reaps)."""
    try:
        fields = (proc / str(pid) / "stat").read_text().rpartition(")")[2].split()
        uid = (proc / str(pid)).stat().st_uid
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] in "ZX" else ProcessIdentity(pid, int(fields[19]), uid)


def _running(process: ProcessIdentity, proc: Path) -> bool:
    return identify(process.pid, proc) == process


def _environment_of(pid: int, proc: Path) -> dict[str, str] | None:
    """What `pid` was started with; None where it may not be read. Later changes inside the process do not show."""
    try:
        entries = (proc / str(pid) / "environ").read_bytes().split(b"\0")
    except OSError:
        return None
    return {name: value for name, _, value in (os.fsdecode(entry).partition("=") for entry in entries if entry)}


# --- folders ---


@dataclass(frozen=True, slots=True)
class MpsPaths:
    """Where daemon and clients meet. A `private` pair is made, and removed, by this project; another is only used."""

    pipe: Path
    log: Path
    private: bool = False

    @property
    def socket(self) -> Path:
        return self.pipe / "control"

    @property
    def pid_file(self) -> Path:
        return self.pipe / "nvidia-cuda-mps-control.pid"


def private_paths(uid: int, root: Path = Path("/tmp"), name: str = "mps") -> MpsPaths:
    """This user's own folders, the same at every start, so that what a crash left behind is found again."""
    home = root / f"splitwiser-{uid}" / name
    return MpsPaths(home / "pipe", home / "log", private=True)


def find_paths(
    environment: Mapping[str, str],
    private: MpsPaths,
    *,
    uid: int,
    default_pipe: Path = DEFAULT_PIPE,
    proc: Path = PROC,
) -> MpsPaths:
    """The folders to use: those of a daemon of ours that already runs, else `private`.

    A daemon named by `CUDA_MPS_PIPE_DIRECTORY` is returned whoever owns it, so that preflight can say what is wrong.
    """
    named = environment.get(PIPE_VARIABLE, "")
    for pipe in [Path(named)] * bool(named) + [default_pipe]:
        daemon = running_daemon(pipe, proc)
        if daemon is not None and (daemon.uid == uid or str(pipe) == named):
            theirs = _environment_of(daemon.pid, proc) or {}
            return MpsPaths(pipe, Path(theirs.get(LOG_VARIABLE, DEFAULT_LOG)))
    return private


def running_daemon(pipe: Path, proc: Path = PROC) -> ProcessIdentity | None:
    """The daemon whose PID file lies in `pipe`, if that process runs and is a control daemon."""
    try:
        pid = int((pipe / "nvidia-cuda-mps-control.pid").read_text())
        arguments = (proc / str(pid) / "cmdline").read_bytes().split(b"\0")
    except (OSError, ValueError):
        return None
    is_daemon = any(argument.endswith(b"nvidia-cuda-mps-control") for argument in arguments)
    return identify(pid, proc) if is_daemon else None


def _check_folder(folder: Path, uid: int) -> None:
    """Refuses what another user could have put in our place under /tmp."""
    try:
        found = folder.lstat()
    except FileNotFoundError:
        return
    if stat.S_ISLNK(found.st_mode) or not stat.S_ISDIR(found.st_mode):
        raise MpsError(MpsCause.PATH, f"{folder} is not a folder: remove it, or set {PIPE_VARIABLE}")
    if found.st_uid != uid:
        raise MpsError(
            MpsCause.FOREIGN_FOLDER,
            f"{folder} belongs to user {found.st_uid} and this is user {uid}: have it removed, or run as that user",
        )


def _own_folders(paths: MpsPaths) -> list[Path]:
    """Outermost first."""
    return [paths.pipe.parent.parent, paths.pipe.parent, paths.pipe, paths.log]


def _make_folders(paths: MpsPaths, uid: int) -> None:
    for folder in _own_folders(paths):
        _check_folder(folder, uid)
        folder.mkdir(mode=0o700, exist_ok=True)
        folder.chmod(0o700)


def _remove_folders(paths: MpsPaths) -> None:
    for folder in (paths.pipe, paths.log):
        shutil.rmtree(folder, ignore_errors=True)
    for folder in (paths.pipe.parent, paths.pipe.parent.parent):
        with suppress(OSError):  # another application of this user still has its own there
            folder.rmdir()


# --- the control program ---


@dataclass(frozen=True, slots=True)
class ControlProgram:
    """The one seam to MPS: the program that starts the daemon and carries commands to it, one at a time.

    Commands sent at once by several threads or processes get lost; keep to one ControlProgram per daemon.
    """

    program: str = "nvidia-cuda-mps-control"
    _turn: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    def resolve(self) -> str:
        found = shutil.which(self.program)
        if found is None:
            raise MpsError(
                MpsCause.NO_BINARY,
                f"{self.program} is not installed: install the NVIDIA driver's compute utilities, or set mps to 'off'",
            )
        return found

    def start(self, paths: MpsPaths, limit_s: float) -> None:
        """Starts a daemon in the background. Output goes to a file: a pipe would stay open as long as the daemon."""
        environment = {k: v for k, v in os.environ.items() if not k.startswith("CUDA_")}
        # The order in which NVML numbers the GPUs, so that the log's device numbers are ours.
        environment |= {PIPE_VARIABLE: str(paths.pipe), LOG_VARIABLE: str(paths.log), "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
        with tempfile.TemporaryFile() as output:
            try:
                done = subprocess.run(
                    [self.resolve(), "-d"],
                    env=environment,
                    cwd="/",
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    timeout=limit_s,
                    start_new_session=True,
                )
            except subprocess.TimeoutExpired:
                raise self._not_started(paths, f"it was still starting after {limit_s:.1f} s") from None
            output.seek(0)
            said = _one_line(output.read().decode(errors="replace"))
        if done.returncode != 0:
            raise self._not_started(paths, said or f"it exited with status {done.returncode}")

    def ask(self, pipe: Path, command: str, limit_s: float = ANSWER_LIMIT_S) -> str:
        """One command to the daemon and its answer."""
        try:
            with self._turn:
                done = subprocess.run(
                    [self.resolve()],
                    input=command + "\n",
                    env=os.environ | {PIPE_VARIABLE: str(pipe)},
                    capture_output=True,
                    text=True,
                    errors="replace",
                    timeout=limit_s,
                )
        except subprocess.TimeoutExpired:
            raise _no_answer(pipe, f"it was silent for {limit_s:.1f} s after '{command}'") from None
        if done.returncode != 0:
            raise _no_answer(pipe, _one_line(done.stderr or done.stdout) or f"status {done.returncode}")
        return done.stdout.strip()

    def servers(self, pipe: Path, limit_s: float = ANSWER_LIMIT_S) -> tuple[int, ...]:
        return _pids(self.ask(pipe, "get_server_list", limit_s))

    def clients(self, pipe: Path, server_pid: int, limit_s: float = ANSWER_LIMIT_S) -> tuple[int, ...]:
        return _pids(self.ask(pipe, f"get_client_list {server_pid}", limit_s))

    def status(self, pipe: Path, server_pid: int, limit_s: float = ANSWER_LIMIT_S) -> str:
        """ACTIVE, FAULT, or what else the driver calls it."""
        return self.ask(pipe, f"get_server_status {server_pid}", limit_s)

    def _not_started(self, paths: MpsPaths, why: str) -> MpsError:
        return MpsError(
            MpsCause.START_FAILED,
            f"the MPS control daemon did not start in {paths.pipe} ({why}): mend that, or set mps to 'off'",
        )


def _no_answer(pipe: Path, why: str) -> MpsError:
    return MpsError(
        MpsCause.NO_ANSWER,
        f"no MPS control daemon answers in {pipe} ({why}): end what is left of it and remove that folder,"
        f" or unset {PIPE_VARIABLE}",
    )


def _pids(answer: str) -> tuple[int, ...]:
    """One PID a line; anything else is a sentence, such as 'Server 1 not found', which comes with exit status 0."""
    return tuple(int(line) for line in answer.split("\n") if line.strip().isdigit())


def _one_line(text: str) -> str:
    return " ".join(text.split()).rstrip(".")


# --- before anything is loaded ---


@dataclass(frozen=True, slots=True)
class GpuFacts:
    """What NVML says of the GPU: its compute mode ("Default", "Exclusive_Process", "Prohibited"), and who uses it."""

    compute_mode: str = "Default"
    process_pids: tuple[int, ...] = ()


def preflight(
    program: ControlProgram,
    paths: MpsPaths,
    *,
    replicas: int,
    uid: int,
    gpu: GpuFacts = GpuFacts(),
    limit_s: float = 4.0,
    clock: Callable[[], float] = time.monotonic,
    proc: Path = PROC,
) -> None:
    """Raises MpsError with the first reason why `replicas` clients could not use MPS here; takes `limit_s` at most."""
    deadline = clock() + limit_s
    program.resolve()
    _check_paths(paths, uid)
    daemon = running_daemon(paths.pipe, proc)
    _check_daemon(paths, daemon, uid)
    servers: tuple[int, ...] = ()
    clients: tuple[int, ...] = ()
    if daemon is not None:
        servers, clients = _survey(program, paths.pipe, lambda: max(0.05, deadline - clock()))
    if len(clients) + replicas > MAX_CLIENTS:
        raise MpsError(
            MpsCause.TOO_MANY_CLIENTS,
            f"MPS has {len(clients)} clients and {replicas} more would exceed its {MAX_CLIENTS}: start fewer replicas",
        )
    _check_compute_mode(gpu, {*servers, *clients})


def _check_paths(paths: MpsPaths, uid: int) -> None:
    length = len(os.fsencode(paths.socket))
    if length > MAX_SOCKET_PATH_BYTES:
        raise MpsError(
            MpsCause.PATH,
            f"{paths.socket} is {length} bytes long and a socket's path may have {MAX_SOCKET_PATH_BYTES}:"
            " use a shorter folder",
        )
    for folder in _own_folders(paths) if paths.private else ():
        _check_folder(folder, uid)


def _check_daemon(paths: MpsPaths, daemon: ProcessIdentity | None, uid: int) -> None:
    if daemon is not None and daemon.uid != uid:
        raise MpsError(
            MpsCause.FOREIGN_DAEMON,
            f"the MPS control daemon in {paths.pipe} (process {daemon.pid}) belongs to user {daemon.uid} and this is"
            f" user {uid}: have it stopped, run as that user, or unset {PIPE_VARIABLE}",
        )
    if daemon is None and not paths.private:
        _check_folder(paths.pipe, uid)
        raise _no_answer(paths.pipe, "its process has ended" if paths.socket.exists() else "none was started there")


def _survey(
    program: ControlProgram, pipe: Path, left_s: Callable[[], float]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """All servers and all clients; raises where a server is in fault state."""
    servers = program.servers(pipe, left_s())
    clients: list[int] = []
    for server in servers:
        clients += program.clients(pipe, server, left_s())
        if program.status(pipe, server, left_s()) == "FAULT":
            raise _in_fault(server, clients)
    return servers, tuple(clients)


def _in_fault(server_pid: int, clients: Iterable[int]) -> MpsError:
    holders = ", ".join(map(str, clients)) or "none listed"
    return MpsError(
        MpsCause.SERVER_FAULT,
        f"MPS server {server_pid} is in fault state and takes no new clients until its old ones have exited:"
        f" end their processes ({holders})",
    )


def _check_compute_mode(gpu: GpuFacts, mps_pids: set[int]) -> None:
    outside = [str(pid) for pid in gpu.process_pids if pid not in mps_pids]
    if gpu.compute_mode == "Prohibited":
        raise MpsError(MpsCause.EXCLUSIVE_MODE, "the GPU's compute mode is Prohibited: have it set to Default")
    if gpu.compute_mode == "Exclusive_Process" and outside:
        raise MpsError(
            MpsCause.EXCLUSIVE_MODE,
            f"the GPU is in Exclusive_Process mode and processes outside MPS hold it ({', '.join(outside)}):"
            " end them, or have its compute mode set to Default",
        )


# --- the daemon's life ---


@dataclass
class MpsDaemon:
    """One control daemon, started or adopted, used by one process.

    Ask it rarely: each command is a process and five lines in its log, and control pipes that are polled hard fail.
    The lists are kept for `fresh_for_s`; `alive` and `recent_fault` only read files.
    """

    program: ControlProgram
    paths: MpsPaths
    uid: int = field(default_factory=os.getuid)
    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep
    proc: Path = PROC
    fresh_for_s: float = 0.5
    owned: bool = field(default=False, init=False)
    identity: ProcessIdentity | None = field(default=None, init=False)
    _answers: dict[str, tuple[float, tuple[int, ...]]] = field(default_factory=dict, init=False)
    _old_fault: GpuFault | None = field(default=None, init=False)

    def start(self, limit_s: float = 5.0) -> None:
        """Starts a daemon in private folders and waits until it answers; one that already runs is adopted instead.

        One that a crash of ours left in the private folders, without clients, is taken over and ended at stop.
        """
        if not self.paths.private or running_daemon(self.paths.pipe, self.proc):
            self.adopt()
            self.owned = self.paths.private and not self.client_pids()
            return
        deadline = self.clock() + limit_s
        _make_folders(self.paths, self.uid)
        self.owned = self._start_first(limit_s)
        try:
            self._wait_for_answer(deadline)
        except MpsError:
            self._undo_start()
            raise
        self._old_fault = self._latest_fault()

    def adopt(self) -> None:
        """Uses a daemon of ours that runs; `stop` will leave it running."""
        daemon = running_daemon(self.paths.pipe, self.proc)
        _check_daemon(self.paths, daemon, self.uid)
        if daemon is None:
            raise MpsError(MpsCause.NO_DAEMON, f"no MPS control daemon runs in {self.paths.pipe}: start one")
        self.program.servers(self.paths.pipe)
        self.identity, self.owned = daemon, False
        self._old_fault = self._latest_fault()

    def stop(self, limit_s: float = 5.0) -> None:
        """Ends what `start` started, clients or not, and removes its folders; leaves an adopted daemon alone."""
        daemon, self.identity = self.identity, None
        if not self.owned or daemon is None:
            return
        self.owned = False
        mine = [daemon]

        def ended() -> bool:
            return not any(_running(process, self.proc) for process in mine)

        quitting = self._quit(mine, limit_s) and self._wait_until(ended, limit_s)
        for number in () if quitting else (signal.SIGTERM, signal.SIGKILL):
            _send(mine, number, self.proc)
            self._wait_until(ended, limit_s)
        _remove_folders(self.paths)

    def alive(self) -> bool:
        """Whether the very process that was started or adopted still runs; asks /proc, not the daemon."""
        return self.identity is not None and _running(self.identity, self.proc)

    def server_pids(self) -> tuple[int, ...]:
        return self._cached("servers", lambda: self.program.servers(self.paths.pipe))

    def client_pids(self) -> tuple[int, ...]:
        """All processes with a context under this daemon. A terminated client stays listed until its process ends."""
        return self._cached("clients", self._ask_clients)

    def require_client(self, pid: int, limit_s: float) -> None:
        """Returns once `pid` is a client; raises MpsError, naming why it is none, after `limit_s` or when it ends."""
        seen: list[MpsError] = []
        if self._wait_until(lambda: self._is_client(pid, seen) or not self._may_become_client(pid), limit_s):
            if self._may_become_client(pid):
                return
            raise MpsError(MpsCause.NOT_A_CLIENT, f"{self._what_ended(pid)} before process {pid} became an MPS client")
        raise seen[-1] if seen else self._why_no_client(pid, limit_s)

    def terminate_client(self, pid: int, limit_s: float = 10.0) -> bool:
        """Ends `pid`'s GPU work; only then may its process be killed without harm to its neighbours.

        Killing a client that has work in flight leaves the server in an undefined state. The daemon answers 0 once the
        client's contexts are gone, and the client sees CUDA_ERROR_MPS_CLIENT_TERMINATED (810); it stays listed until
        its process ends. False: `pid` is no client, nothing was to be done. The caller drains before, kills after, and
        may then `wait_gone`.
        """
        servers = self.program.servers(self.paths.pipe)
        server = next((s for s in servers if pid in self.program.clients(self.paths.pipe, s)), None)
        if server is None:
            return False
        answer = self.program.ask(self.paths.pipe, f"terminate_client {server} {pid}", limit_s)
        if answer != "0":
            raise MpsError(
                MpsCause.NOT_TERMINATED,
                f"MPS server {server} did not terminate client {pid} (it answered '{_one_line(answer)}'), and killing"
                " the process now can harm its neighbours: drain and restart all replicas on this GPU",
            )
        return True

    def wait_gone(self, pid: int, limit_s: float = 10.0) -> None:
        """After the kill: waits until the server has dropped `pid`, that is, freed its memory."""
        if not self._wait_until(lambda: pid not in self.client_pids(), limit_s):
            raise MpsError(
                MpsCause.NOT_TERMINATED, f"process {pid} is still an MPS client after {limit_s:.0f} s: end its process"
            )

    def recent_fault(self) -> GpuFault | None:
        """The latest fault in the logs since `start` or `adopt`; costs two file reads."""
        fault = self._latest_fault()
        return None if fault is None or (self._old_fault and fault.at == self._old_fault.at) else fault

    def forget_fault(self) -> None:
        """What the logs tell up to now has been answered; `recent_fault` reports only what comes after."""
        self._old_fault = self._latest_fault()

    def servers(self) -> tuple[ProcessIdentity, ...]:
        """The server processes by identity, so that they can be found after their daemon has died."""
        found = (identify(pid, self.proc) for pid in self.server_pids())
        return tuple(process for process in found if process is not None)

    def wait_clean(self, limit_s: float) -> None:
        """After a fault: waits until servers are gone or ACTIVE again; every old client's process has to end first."""
        self._answers.clear()
        if not self._wait_until(lambda: not self._unclean(), limit_s) and (left := self._unclean()):
            raise _in_fault(left[0], self.client_pids())

    def _unclean(self) -> list[int]:
        return [pid for pid in self.server_pids() if self.program.status(self.paths.pipe, pid) != "ACTIVE"]

    def _cached(self, name: str, ask: Callable[[], tuple[int, ...]]) -> tuple[int, ...]:
        asked_at_s, answer = self._answers.get(name, (float("-inf"), ()))
        if self.clock() - asked_at_s >= self.fresh_for_s:
            answer = ask()
            self._answers[name] = (self.clock(), answer)
        return answer

    def _ask_clients(self) -> tuple[int, ...]:
        servers = self.server_pids()
        return tuple(pid for server in servers for pid in self.program.clients(self.paths.pipe, server))

    def _is_client(self, pid: int, seen: list[MpsError]) -> bool:
        """A daemon that is busy creating a server may miss an answer; that counts only if it is so to the end."""
        seen.clear()
        try:
            return pid in self.client_pids()
        except MpsError as error:
            seen.append(error)
            return False

    def _may_become_client(self, pid: int) -> bool:
        return self.alive() and identify(pid, self.proc) is not None

    def _what_ended(self, pid: int) -> str:
        return f"process {pid} ended (see its log)" if self.alive() else "the MPS control daemon ended (restart it)"

    def _why_no_client(self, pid: int, limit_s: float) -> MpsError:
        process = identify(pid, self.proc)
        if process is not None and process.uid != self.uid:
            why = f"it runs as user {process.uid} and the daemon serves user {self.uid}: start the replica as that user"
        else:
            environment = _environment_of(pid, self.proc)
            pipe = str(self.paths.pipe) if environment is None else environment.get(PIPE_VARIABLE, "")
            if pipe != str(self.paths.pipe):
                why = f"it was started with {PIPE_VARIABLE}={pipe} instead of {self.paths.pipe}: correct that"
            else:
                why = "it has no GPU context yet: see its log for what it waits for, or allow it more time"
        return MpsError(MpsCause.NOT_A_CLIENT, f"process {pid} is no MPS client after {limit_s:.0f} s because {why}")

    def _wait_for_answer(self, deadline_s: float) -> None:
        pause_s = 0.02
        while True:
            try:
                self.program.servers(self.paths.pipe, min(ANSWER_LIMIT_S, max(0.05, deadline_s - self.clock())))
            except MpsError:
                if self.clock() + pause_s >= deadline_s:
                    raise
            else:
                self.identity = running_daemon(self.paths.pipe, self.proc)
                if self.identity is not None:
                    return
                raise _no_answer(self.paths.pipe, "it wrote no PID file")
            self.sleep(pause_s)
            pause_s *= 2

    def _start_first(self, limit_s: float) -> bool:
        """False where another process of ours started its daemon here in this very moment: that one is then shared."""
        try:
            self.program.start(self.paths, limit_s)
        except MpsError:
            if running_daemon(self.paths.pipe, self.proc):
                return False
            _remove_folders(self.paths)
            raise
        return True

    def _undo_start(self) -> None:
        daemon = running_daemon(self.paths.pipe, self.proc)
        if self.owned:
            _send([daemon] if daemon is not None else [], signal.SIGKILL, self.proc)
            _remove_folders(self.paths)
        self.owned = False

    def _quit(self, mine: list[ProcessIdentity], limit_s: float) -> bool:
        """Asks the daemon to end, and adds its servers to `mine`; False where it does not answer."""
        try:
            servers = (identify(pid, self.proc) for pid in self.program.servers(self.paths.pipe))
            mine += [server for server in servers if server is not None]
            self.program.ask(self.paths.pipe, f"quit -t {QUIT_WAIT_S}", QUIT_WAIT_S + limit_s)
        except MpsError:
            return False
        return True

    def _wait_until(self, holds: Callable[[], bool], limit_s: float) -> bool:
        deadline, pause_s = self.clock() + limit_s, 0.05
        while not holds():
            left_s = deadline - self.clock()
            if left_s <= 0:
                return False
            self.sleep(min(pause_s, left_s))
            pause_s = min(2 * pause_s, 2.0)
        return True

    def _latest_fault(self) -> GpuFault | None:
        logs = (self.paths.log / "server.log", self.paths.log / "control.log")
        faults = [fault for log in logs if (fault := fault_from_log(_tail(log))) is not None]
        return max(faults, key=lambda fault: fault.at, default=None)


def kill(processes: Iterable[ProcessIdentity], proc: Path = PROC) -> None:
    """Ends those of `processes` that still run, and no later process with the same PID."""
    _send(processes, signal.SIGKILL, proc)


def _send(processes: Iterable[ProcessIdentity], number: signal.Signals, proc: Path) -> None:
    for process in processes:
        if _running(process, proc):
            with suppress(ProcessLookupError):
                os.kill(process.pid, number)


def _tail(log: Path) -> list[str]:
    try:
        with log.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _LOG_TAIL_BYTES))
            return file.read().decode(errors="replace").splitlines()
    except OSError:
        return []


# --- a replica's environment ---


def client_environment(
    paths: MpsPaths, *, memory_limit_bytes: int | None = None, thread_percentage: int | None = None, device: str = "0"
) -> dict[str, str]:
    """What a replica's process is started with to become a client.

    `memory_limit_bytes` caps what it can allocate on `device` (an ordinal or a UUID), CUDA's own needs included; beyond
    it the client alone gets out-of-memory. `thread_percentage` (1-100) caps its share of the SMs.
    """
    environment = {PIPE_VARIABLE: str(paths.pipe)}
    if memory_limit_bytes is not None:
        if memory_limit_bytes < _MIB:
            raise ValueError(f"the memory limit is {memory_limit_bytes} bytes: it must be at least {_MIB}")
        environment["CUDA_MPS_PINNED_DEVICE_MEM_LIMIT"] = f"{device}={memory_limit_bytes // _MIB}M"
    if thread_percentage is not None:
        if not 1 <= thread_percentage <= 100:
            raise ValueError(f"the thread percentage is {thread_percentage}: it must lie between 1 and 100")
        environment["CUDA_MPS_ACTIVE_THREAD_PERCENTAGE"] = str(thread_percentage)
    return environment


# --- faults ---


@dataclass(frozen=True, slots=True)
class GpuFault:
    """A fatal fault as the logs tell it. `at` is the log's own time stamp.

    `culprit_pids` caused it (empty where the log does not say); `client_pids` have lost their contexts and must exit.
    `cleared`: they have, and the server takes new clients again. `server_died`: the server process itself ended.
    """

    at: str
    server_pid: int
    culprit_pids: tuple[int, ...] = ()
    client_pids: tuple[int, ...] = ()
    devices: tuple[int, ...] = ()
    cleared: bool = False
    server_died: bool = False


_LINE = re.compile(r"\[(?P<at>[\d-]+ [\d:.]+) [A-Za-z ]+?\s+(?P<pid>\d+)\] (?P<text>.*)")
_BEGINS = re.compile(r"(encountered|handling) a fatal GPU error|^Server \d+ exited with status [1-9]")
_ENDS = "Destroy server context on device"
_CULPRIT = re.compile(r"Client \{(?:PID: )?(\d+).*\} encountered a fatal GPU error")
_INACTIVE = re.compile(r"[Ss]tatus of client \{(?:PID: )?(\d+).*\} is INACTIVE")
_EXIT = re.compile(r"^Server (\d+) exited with status [1-9]")


def fault_from_log(lines: Iterable[str]) -> GpuFault | None:
    """The latest fatal fault in lines of server.log or control.log.

    server.log, driver 580 (in brackets, what differs in the guide's example for older drivers; appendix "Server Log",
    there the affected are also listed as `Volta MPS: status of client {11641, 1} is INACTIVE`):

        Client {PID: 482, Context: 1} encountered a fatal GPU error.     [absent]
        Server is handling a fatal GPU error.                            [Volta MPS: Server is ...]
        The following devices will be reset:                             [Volta MPS: The following devices]
        0
        The following client process have a sticky error set:            [... The following clients have ...]
        482
        Destroy server context on device 0 (NVIDIA H200)                 once the last of them has exited

    control.log, when the server itself dies (NVIDIA/k8s-device-plugin#685, #762):

        Server encountered a fatal exception. Shutting down
        Server 95 exited with status 1
    """
    matches = [match for line in lines if (match := _LINE.match(line))]
    texts = [match["text"].strip() for match in matches]
    begins = [i for i, text in enumerate(texts) if _BEGINS.search(text)]
    if not begins:
        return None
    # One fault prints several lines that begin it; what came before the last recovery is an older fault.
    recovered = max((i for i, text in enumerate(texts[: begins[-1]]) if _ENDS in text), default=-1)
    begin = begins[-1] if _EXIT.search(texts[begins[-1]]) else next(i for i in begins if i > recovered)
    return _fault(matches[begin]["at"], int(matches[begin]["pid"]), texts[begin:])


def _fault(at: str, logged_by: int, texts: list[str]) -> GpuFault:
    died = _found(_EXIT, texts)
    return GpuFault(
        at=at,
        server_pid=died[-1] if died else logged_by,
        culprit_pids=_found(_CULPRIT, texts),
        client_pids=tuple(sorted({*_found(_INACTIVE, texts), *_listed("The following client", texts)})),
        devices=_listed("The following devices", texts),
        cleared=any(_ENDS in text for text in texts),
        server_died=bool(died),
    )


def _found(pattern: re.Pattern[str], texts: list[str]) -> tuple[int, ...]:
    return tuple(sorted({int(match[1]) for text in texts if (match := pattern.search(text))}))


def _listed(heading: str, texts: list[str]) -> tuple[int, ...]:
    """The lines of bare numbers below each line with `heading`."""
    numbers: list[int] = []
    below = False
    for text in texts:
        below = heading in text or (below and text.isdigit())
        if below and text.isdigit():
            numbers.append(int(text))
    return tuple(numbers)
