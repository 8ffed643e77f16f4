"""The system under test as the fault benchmark starts it and sees it from outside, on a GPU or without one."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import aiohttp
import psutil
import pynvml
import yaml

from balancer.board import Board, Owner, board_path
from balancer.readings import ReplicaReading, ReplicaState
from benchmarks import shapes
from benchmarks.gpu_http import ENGINE
from benchmarks.ports import free_port
from deployments import gpu_setup, launch, middleware, mps, processes

MIB = 1 << 20
T = TypeVar("T")
_KV_BYTES = 8_000_000_000
ROOT = Path(__file__).parent.parent


class MissedError(RuntimeError):
    """Something did not happen in time."""


@dataclass(frozen=True, slots=True)
class Setup:
    """What is started: the application's arguments, and the load that fits them."""

    args: dict[str, Any]
    gpu: bool
    clients: int
    prompt_tokens: int
    output_tokens: int
    heal_s: float = 120.0

    @property
    def replicas(self) -> int:
        """On all GPUs."""
        return int(self.args["replicas"]) * self.gpus

    @property
    def gpus(self) -> int:
        return int(self.args.get("gpus", 1))

    @property
    def model(self) -> str:
        return str(self.args["served_model_name"])

    @property
    def max_model_len(self) -> int:
        return int(self.args["engine"]["max_model_len"])


def gpu_setup_of(replicas: int, graphs: bool, folder: Path, gpus: int = 1, weights: str = "auto") -> Setup:
    """OPT-125m's shape. Without CUDA graphs a start is shorter, and faults are the same."""
    engine = {**ENGINE, "kv_cache_memory_bytes": _KV_BYTES}
    if not graphs:
        engine = {**engine, "enforce_eager": True}
        del engine["compilation_config"]
    args = _args("serve_gpu.yaml") | {"model": str(shapes.make_folder("opt-125m", folder)), "served_model_name": "opt"}
    args |= {"replicas": replicas, "gpus": gpus, "mps": "on", "weights": weights, "engine": engine}
    return Setup(args, True, 48, 256, 128)


def cpu_setup_of(replicas: int) -> Setup:
    args = _args("serve_config.yaml")
    return Setup(args | {"replicas": replicas, "served_model_name": "demo"}, False, 3, 16, 16, 300.0)


def _args(file: str) -> dict[str, Any]:
    args = yaml.safe_load((ROOT / file).read_text())["applications"][0]["args"]
    # One fault after the other is no crash loop here.
    restarts = {"deaths": 100}
    return {**args, "restarts": restarts, "monitoring": {**args.get("monitoring", {}), "exporter_port": None}}


class System:
    """A running `splitwiser serve`, seen from outside: its board, its log, its processes, its MPS daemon."""

    def __init__(self, setup: Setup, child: subprocess.Popen[bytes], log: Path, port: int) -> None:
        self.setup = setup
        self.child = child
        self.log = log
        self.url = f"http://127.0.0.1:{port}"

    @property
    def run_id(self) -> str:
        return next(folder.name for folder in processes.runs_folder().glob(f"{self.child.pid}-*"))

    @property
    def board(self) -> Path:
        return board_path(self.run_id)

    @property
    def pipe(self) -> Path:
        return mps.private_paths(os.getuid(), name=self.run_id).pipe

    def replicas(self) -> list[ReplicaReading]:
        board = Board.open(self.board)
        try:
            return [r for r in board.snapshot(time.monotonic()).replicas if r.state is ReplicaState.READY]
        finally:
            board.close()

    def ids(self) -> set[str]:
        return {replica.replica_id for replica in self.replicas()}

    def engines(self) -> list[int]:
        """The engine processes, by the title that vLLM gives them."""
        return [p.pid for p in self.processes() if "EngineCore" in _command_of(p)]

    def processes(self) -> list[psutil.Process]:
        pid, ticks = (processes.runs_folder() / self.run_id / "session").read_text().split()
        return processes.of_run(self.run_id, Owner(int(pid), int(ticks)))

    def clients(self) -> list[int]:
        """MPS clients, by PID."""
        program = mps.ControlProgram()
        return [pid for server in program.servers(self.pipe) for pid in program.clients(self.pipe, server)]

    def log_says(self, pattern: str) -> int:
        return len(re.findall(pattern, self.log.read_text(errors="replace"), re.IGNORECASE))

    async def all_answer(self) -> bool:
        """Whether every ready replica, and as many as were asked for, answer through the public address."""
        slots = [replica.slot for replica in self.replicas()]
        if len(slots) < self.setup.replicas:
            return False
        timeout = aiohttp.ClientTimeout(total=5)
        async with aiohttp.ClientSession(timeout=timeout) as session:
            for slot in slots:
                async with session.post(self.url + middleware.PROBE_PATH, json={"splitwiser_probe": slot}) as answer:
                    if answer.status != 200:
                        return False
        return True


def _command_of(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:  # it ended while being looked at
        return ""


@contextmanager
def started(setup: Setup, folder: Path, limit_s: float) -> Iterator[System]:
    """The system, ready; stopped in order afterwards."""
    folder.mkdir(parents=True, exist_ok=True)
    port, stamp = free_port(), time.strftime("%H%M%S")
    document = {
        "http_options": {"host": "127.0.0.1", "port": port},
        "logging_config": {"log_level": "WARNING", "enable_access_log": False},
        "applications": [
            {"name": "default", "route_prefix": "/", "import_path": "deployments.app:build", "args": setup.args}
        ],
    }
    config = folder / f"serve-{stamp}.yaml"
    config.write_text(yaml.safe_dump(document))
    with serving(config, setup, config.with_suffix(".log"), port, limit_s) as system:
        yield system


@contextmanager
def serving(config: Path, setup: Setup, log: Path, port: int, limit_s: float) -> Iterator[System]:
    """`splitwiser serve config`, whose arguments are in `setup` and whose port is `port`; stopped in order."""
    command = [sys.executable, "-m", "deployments.cli", "serve", str(config)]
    with log.open("w") as output:
        child = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, cwd=ROOT)
    try:
        until(lambda: _is_ready(child, log), limit_s, "ready")
        yield System(setup, child, log, port)
    finally:
        child.send_signal(signal.SIGINT)
        try:
            child.wait(60)
        except subprocess.TimeoutExpired:
            child.kill()
            launch.clean_up_dead_runs()


def _is_ready(child: subprocess.Popen[bytes], log: Path) -> bool:
    if child.poll() is not None:
        raise MissedError(f"the system ended: ...{log.read_text()[-1500:]}")
    return "splitwiser: ready" in log.read_text()


def until(holds: Callable[[], bool], limit_s: float, what: str) -> float:
    """Seconds until it holds. Raises MissedError."""
    began_s = time.monotonic()
    while not holds():
        if time.monotonic() - began_s > limit_s:
            raise MissedError(f"not {what} within {limit_s:.0f} s")
        time.sleep(0.1)
    return round(time.monotonic() - began_s, 1)


def gpu_used_mib() -> int | None:
    """Memory in use on all visible GPUs; None without any."""
    used = _of_each_gpu(lambda handle: int(pynvml.nvmlDeviceGetMemoryInfo(handle).used) // MIB)
    return sum(used) if used else None


def processes_by_gpu() -> list[list[int]]:
    """The processes that hold a context on each GPU, MPS clients by their own PIDs."""

    def pids(handle: Any) -> list[int]:
        lists = pynvml.nvmlDeviceGetComputeRunningProcesses, pynvml.nvmlDeviceGetMPSComputeRunningProcesses
        return sorted({process.pid for ask in lists for process in ask(handle)})

    return _of_each_gpu(pids)


def _of_each_gpu(ask: Callable[[Any], T]) -> list[T]:
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return []
    try:
        return [ask(pynvml.nvmlDeviceGetHandleByIndex(gpu)) for gpu in gpu_setup.visible_gpus()]
    finally:
        pynvml.nvmlShutdown()
