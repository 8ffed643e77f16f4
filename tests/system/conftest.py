"""Starts the whole system as a user does, in a process of its own, and ends it as a user does."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from balancer.board import Owner, board_path
from balancer.ticket import DIRECT, HEADER
from benchmarks.ports import free_port as free_port  # the tests' own too
from deployments import processes
from deployments.processes import runs_folder

ROOT = Path(__file__).parent.parent.parent
START_LIMIT_S = 600
STOP_LIMIT_S = 60


@dataclass
class System:
    """A running `splitwiser serve`. `again`: what broke while it was sent is sent a second time, see `_ask`."""

    url: str
    process: subprocess.Popen[bytes]
    log: Path
    session: Owner | None = None
    orphans_before: frozenset[str] = frozenset()
    again: bool = True

    @property
    def run_id(self) -> str:
        return next(f.name for f in runs_folder().glob(f"{self.process.pid}-*"))

    def direct_urls(self) -> dict[str, str]:
        """Each replica's own address, by the name that `x-splitwiser-replica` gives it."""
        config = next((runs_folder() / self.run_id).glob("*/haproxy.cfg")).read_text()
        found = re.findall(r"server SERVE_REPLICA_\w+-Replica-(\w+) (127\.0\.0\.1:\d+)", config)
        return {name: f"http://{address}" for name, address in found}

    def post(self, path: str, body: Any, headers: dict[str, str] | None = None, url: str | None = None) -> Answer:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        request = urllib.request.Request((url or self.url) + path, data=data)
        request.add_header("content-type", "application/json")
        for name, value in (headers or {}).items():
            request.add_header(name, value)
        return _ask(request, self.again)

    def post_directly(self, replica: str, path: str, body: Any) -> Answer:
        return self.post(path, body, {HEADER: DIRECT.policy}, self.direct_urls()[replica])

    def get(self, path: str) -> Answer:
        return _ask(urllib.request.Request(self.url + path))

    def complete(self, prompt: str = "Once upon a time", **wish: Any) -> Answer:
        return self.post("/v1/completions", {"model": "demo", "prompt": prompt, "max_tokens": 8, **wish})


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def text(self) -> str:
        return str(self.json["choices"][0]["text"])

    @property
    def replica(self) -> str:
        return self.headers.get("x-splitwiser-replica", "")

    @property
    def policy(self) -> str:
        return self.headers.get("x-splitwiser-policy", "")


def _ask(request: urllib.request.Request, again: bool = True) -> Answer:
    """The answer; with `again` asks a second time when the whole machine stood still between headers and body, so that
    HAProxy's limit for slow senders had passed before the body could be sent."""
    try:
        with urllib.request.urlopen(request, timeout=120) as answer:
            return Answer(answer.status, {k.lower(): v for k, v in answer.headers.items()}, answer.read())
    except urllib.error.HTTPError as error:
        return Answer(error.code, {k.lower(): v for k, v in error.headers.items()}, error.read())
    except urllib.error.URLError as error:
        if again and isinstance(error.reason, BrokenPipeError):
            return _ask(request, again=False)
        raise


def write_config(folder: Path, port: int, change: Callable[[dict[str, Any]], None] = lambda document: None) -> Path:
    """The shipped configuration on another port."""
    document = yaml.safe_load((ROOT / "serve_config.yaml").read_text())
    document["http_options"]["port"] = port
    document["applications"][0]["args"].setdefault("batches", {})["folder"] = str(folder / "batches")
    change(document)
    document["applications"][0]["args"].setdefault("monitoring", {})["exporter_port"] = free_port()
    path = folder / "serve_config.yaml"
    path.write_text(yaml.safe_dump(document))
    return path


def start(config: Path, port: int, log: Path, *flags: str) -> System:
    """Start, and wait until it says that it is ready."""
    own_ports = ("RAY_SERVE_HAPROXY_METRICS_PORT", "RAY_SERVE_HAPROXY_STATS_PORT", "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT")
    environment = {**os.environ, **{name: str(free_port()) for name in own_ports}}
    command = [sys.executable, "-m", "deployments.cli", "serve", str(config), *flags]
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment, cwd=ROOT)
    system = System(f"http://127.0.0.1:{port}", process, log, orphans_before=orphans())
    deadline_s = time.monotonic() + START_LIMIT_S
    while "splitwiser: ready" not in log.read_text():
        assert process.poll() is None, f"it ended while starting: ...{log.read_text()[-4000:]}"
        assert time.monotonic() < deadline_s, f"it never became ready: ...{log.read_text()[-4000:]}"
        time.sleep(0.5)
    folder = runs_folder() / system.run_id
    pid, ticks = (folder / "session").read_text().split()
    system.session = Owner(int(pid), int(ticks))
    _let_clients_go_first(int(pid))
    return system


def _let_clients_go_first(session: int) -> None:
    """Where it groups processes by session (autogroup), Linux 6.18 kept a client waiting for seconds beside the busy
    engines of another session: streams were over before a test had seen their first token."""
    with contextlib.suppress(OSError):
        Path(f"/proc/{session}/autogroup").write_text("19")


def belongings(system: System, run_id: str) -> list[psutil.Process]:
    """Every process of the run but its supervisor."""
    return [p for p in processes.of_run(run_id, system.session) if p.pid != system.process.pid]


def orphans() -> frozenset[str]:
    """What Python's multiprocessing left in shared memory and no living process has mapped."""
    names = {path.name for pattern in ("psm_*", "sem.mp-*") for path in Path("/dev/shm").glob(pattern)}
    for maps in Path("/proc").glob("[0-9]*/maps"):
        with contextlib.suppress(OSError):
            text = maps.read_text()
            names = {name for name in names if f"/dev/shm/{name}" not in text}
    return frozenset(names)


def stop(system: System) -> None:
    """Ctrl-C, and nothing is left: no process, no port, no shared memory, no folder."""
    run_id = system.run_id
    system.process.send_signal(signal.SIGINT)
    assert system.process.wait(STOP_LIMIT_S) == 0, system.log.read_text()[-4000:]
    assert not belongings(system, run_id)
    assert not board_path(run_id).exists()
    assert not (runs_folder() / run_id).exists()
    assert not orphans() - system.orphans_before, "shared memory is left that nobody has mapped"
    host, port = system.url.removeprefix("http://").split(":")
    with socket.socket() as probe:
        assert probe.connect_ex((host, int(port))) != 0, "somebody still listens on the public port"


@contextmanager
def running(
    folder: Path, *flags: str, change: Callable[[dict[str, Any]], None] = lambda document: None
) -> Iterator[System]:
    port = free_port()
    system = start(write_config(folder, port, change), port, folder / "log", *flags)
    try:
        yield system
    except BaseException:
        system.process.send_signal(signal.SIGINT)
        system.process.wait(STOP_LIMIT_S)
        raise
    stop(system)


@pytest.fixture(scope="session")
def system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    """The configuration as shipped: two real vLLM engines behind HAProxy. One for all tests that leave it intact."""
    with running(tmp_path_factory.mktemp("system")) as running_system:
        yield running_system
