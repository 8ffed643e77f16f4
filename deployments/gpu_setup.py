"""What must be settled before an engine may start on a GPU: which cards, the memory plan, whether and how MPS runs."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pynvml  # type: ignore[import-untyped]

from balancer.board import board_path
from deployments import memory, mps, weights
from deployments.config import ConfigError, ServeArgs
from deployments.demo_model import ensure_demo_model, is_demo
from monitoring.sampler import visible_indices

_COMPUTE_MODES = {
    pynvml.NVML_COMPUTEMODE_DEFAULT: "Default",
    pynvml.NVML_COMPUTEMODE_EXCLUSIVE_THREAD: "Exclusive_Thread",
    pynvml.NVML_COMPUTEMODE_PROHIBITED: "Prohibited",
    pynvml.NVML_COMPUTEMODE_EXCLUSIVE_PROCESS: "Exclusive_Process",
}


def model_path(args: ServeArgs) -> str:
    """The folder or hub name that vLLM loads; makes the demo model where it is asked for."""
    return str(ensure_demo_model()) if is_demo(args.model) else args.model


@contextmanager
def nvml() -> Iterator[None]:
    """NVML's library is open inside; it counts how often it was opened, so that nobody closes it for another."""
    pynvml.nvmlInit()
    try:
        yield
    finally:
        pynvml.nvmlShutdown()


def this_card(index: int = 0) -> memory.Card:
    """GPU `index` as NVML shows it now."""
    with nvml():
        handle = pynvml.nvmlDeviceGetHandleByIndex(index)
        info = pynvml.nvmlDeviceGetMemoryInfo(handle)
        return memory.Card(pynvml.nvmlDeviceGetName(handle), int(info.total), int(info.used))


def weights_read_s(args: ServeArgs) -> float:
    """Seconds that the GPU's memory needs to read the model's weights once, at the bandwidth that NVML tells."""
    return shape_of(args).weights_bytes / _dram_bytes_per_s(chosen_gpus(args.gpus)[0])


def _dram_bytes_per_s(index: int) -> float:
    """Peak: two transfers each clock over the whole width of the bus."""
    with nvml():
        handle = pynvml.nvmlDeviceGetHandleByIndex(index)
        clock_hz = pynvml.nvmlDeviceGetMaxClockInfo(handle, pynvml.NVML_CLOCK_MEM) * 1e6
        return float(2.0 * clock_hz * pynvml.nvmlDeviceGetMemoryBusWidth(handle) / 8)


def plan(
    args: ServeArgs, card: memory.Card, mps_used: bool | None = None, weights_shared: bool | None = None
) -> memory.MemoryPlan:
    """The memory plan of these arguments on `card`. Raises MemoryPlanError in one sentence when it cannot hold.

    `mps_used` None: as this machine would. `weights_shared` None: as the arguments and the model allow.
    """
    config, engine, shape = _model_config(model_path(args)), _engine_arguments(args), shape_of(args)
    may_share = weights.wanted(args.weights, args.replicas, "gpu") and not weights.why_private(config, args.engine)
    demand = memory.Demand(
        replicas=args.replicas,
        max_model_len_tokens=_max_model_len(engine.get("max_model_len", -1), config),
        max_num_seqs=int(engine.get("max_num_seqs", 256)),
        max_num_batched_tokens=int(engine.get("max_num_batched_tokens", 8192)),
        kv_block_tokens=int(engine.get("block_size", 16)),
        kv_cache_bytes=engine.get("kv_cache_memory_bytes"),
        reserve_bytes=int(args.monitoring.memory_reserve_gib * memory.GIB),
        weights_shared=may_share if weights_shared is None else weights_shared,
        mps=uses_mps(args) if mps_used is None else mps_used,
    )
    return memory.plan_memory(card, shape, demand)


def shape_of(args: ServeArgs) -> memory.ModelShape:
    """The model's shape, its weights as large as their files. Raises MemoryPlanError for a model it cannot size."""
    path, engine = model_path(args), _engine_arguments(args)
    return memory.model_shape(
        _model_config(path),
        _checkpoint_bytes(path),
        dtype=str(engine.get("dtype", "auto")),
        kv_cache_dtype=str(engine.get("kv_cache_dtype", "auto")),
    )


def _engine_arguments(args: ServeArgs) -> dict[str, Any]:
    return {key: value for key, value in args.engine.items() if value is not None}


def why_private(args: ServeArgs, on: str) -> str | None:
    """Why weights that were wished to be shared are not, as far as is known before loading; None otherwise."""
    if not weights.wanted(args.weights, args.replicas, on):
        return None
    return weights.why_private(_model_config(model_path(args)), args.engine)


def _max_model_len(wanted: int, config: dict[str, Any]) -> int:
    """vLLM's own choice (-1) is the model's longest."""
    if wanted != -1:
        return wanted
    if "max_position_embeddings" not in config:
        raise memory.MemoryPlanError("the model's config.json names no longest sequence; set `engine.max_model_len`")
    return int(config["max_position_embeddings"])


def uses_mps(args: ServeArgs) -> bool:
    """Whether replicas shall be MPS clients on this machine. Raises MpsError when that is asked for and cannot be."""
    try:
        mps.ControlProgram().resolve()
    except mps.MpsError:
        return mps.wanted(mps.MpsMode(args.mps), args.replicas, driver_can=False)
    return mps.wanted(mps.MpsMode(args.mps), args.replicas, driver_can=True)


def mps_paths(name: str) -> mps.MpsPaths:
    """Where the MPS daemon of the run `name` is, or will be."""
    return mps.find_paths(os.environ, mps.private_paths(os.getuid(), name=name), uid=os.getuid())


def mps_folder(name: str) -> Path:
    """The private MPS folders of the run `name` lie in here."""
    return mps.private_paths(os.getuid(), name=name).pipe.parent


def chosen_gpus(count: int) -> tuple[int, ...]:
    """NVML's numbers of the GPUs to use: the first `count` that CUDA_VISIBLE_DEVICES leaves. Raises ConfigError."""
    try:
        visible = visible_gpus()
    except ValueError as error:
        raise ConfigError(str(error)) from None
    if len(visible) < count:
        raise ConfigError(f"`gpus` is {count}, but {len(visible)} can be used here; lower it, or make others visible")
    return visible[:count]


def visible_gpus() -> tuple[int, ...]:
    """NVML's numbers of the GPUs that CUDA_VISIBLE_DEVICES leaves. Raises ValueError for one that does not exist."""
    with nvml():
        return visible_indices(os.environ, int(pynvml.nvmlDeviceGetCount()), uuid_of)


def uuid_of(index: int) -> str:
    with nvml():
        return str(pynvml.nvmlDeviceGetUUID(pynvml.nvmlDeviceGetHandleByIndex(index)))


def tightest(args: ServeArgs, cards: Iterable[memory.Card], weights_shared: bool | None = None) -> memory.MemoryPlan:
    """One plan for all cards: replicas are alike everywhere, so the fullest card decides. Raises MemoryPlanError."""
    return min((plan(args, card, None, weights_shared) for card in cards), key=lambda made: made.kv_cache_bytes)


def check_mode(args: ServeArgs, paths: mps.MpsPaths, facts: mps.GpuFacts) -> None:
    """Whether a GPU's compute mode, and MPS where it is used, let all replicas in. Raises MpsError."""
    if uses_mps(args):
        mps.preflight(mps.ControlProgram(), paths, replicas=args.total_replicas, uid=os.getuid(), gpu=facts)
    elif facts.compute_mode == "Prohibited" or (facts.compute_mode == "Exclusive_Process" and args.replicas > 1):
        raise mps.MpsError(
            mps.MpsCause.EXCLUSIVE_MODE,
            f"the GPU's compute mode is {facts.compute_mode}, which does not let {args.replicas} replica(s) in without"
            " MPS: have it set to Default, or set mps to 'on'",
        )


def gpu_facts(index: int) -> mps.GpuFacts:
    """The compute mode of GPU `index`, and the processes that use it."""
    with nvml():
        handle = pynvml.nvmlDeviceGetHandleByIndex(index)
        mode = _COMPUTE_MODES[pynvml.nvmlDeviceGetComputeMode(handle)]
        return mps.GpuFacts(mode, tuple(p.pid for p in pynvml.nvmlDeviceGetComputeRunningProcesses(handle)))


def check(args: ServeArgs, name: str) -> str:
    """Refuse what cannot work before anything starts, and return the plan as a table. Raises ConfigError."""
    try:
        gpus = chosen_gpus(args.gpus)
        table = memory.render(tightest(args, cards_before(board_path(name), gpus).values()))
        for gpu in gpus:
            check_mode(args, mps_paths(name), gpu_facts(gpu))
    except (memory.MemoryPlanError, mps.MpsError) as error:
        raise ConfigError(str(error)) from error
    more = [] if args.gpus == 1 else [f"the same on each of the GPUs {', '.join(map(str, gpus))}"]
    if why := why_private(args, "gpu"):
        more.append(f"the weights are not shared: {why}")
    return "\n".join([table, *more])


def cards_before(board: Path, gpus: Iterable[int]) -> dict[int, memory.Card]:
    """The cards as they were before any replica of this run, also for who asks while replicas hold their memory."""
    cards = {gpu: this_card(gpu) for gpu in gpus}
    if not board.exists() or not _cards_file(board).exists():  # without a board, what was noted is an older run's
        return cards
    noted = json.loads(_cards_file(board).read_text())
    return {gpu: replace(card, used_bytes=noted.get(str(gpu), card.used_bytes)) for gpu, card in cards.items()}


def note_cards(board: Path, cards: Mapping[int, memory.Card]) -> None:
    _cards_file(board).write_text(json.dumps({gpu: card.used_bytes for gpu, card in cards.items()}))


def _cards_file(board: Path) -> Path:
    return board.with_name(board.name + ".cards")


def _model_config(path: str) -> dict[str, Any]:
    local = Path(path) / "config.json"
    if local.exists():
        return dict(json.loads(local.read_text()))
    from transformers import AutoConfig

    try:
        return dict(AutoConfig.from_pretrained(path).to_dict())
    except (OSError, ValueError) as error:
        why = str(error).strip().splitlines()[0].rstrip(".")
        raise ConfigError(f"the model {path} cannot be read ({why}); name a folder or a model that exists") from None


def _checkpoint_bytes(path: str) -> int | None:
    folder = Path(path)
    sizes = [file.stat().st_size for kind in ("*.safetensors", "*.bin") for file in folder.glob(kind)]
    return sum(sizes) or None
