"""What must be settled before an engine may start on a GPU: the memory plan, and whether and how MPS runs."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pynvml  # type: ignore[import-untyped]

from deployments import memory, mps, weights
from deployments.config import ConfigError, ServeArgs
from deployments.demo_model import ensure_demo_model, is_demo

# vLLM checks its share of the card at start; the KV cache is pinned by the plan, so the share only has to be small.
_LITTLE_UTILIZATION = 0.05
_CLIENT_WITHIN_S = 20.0


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """What every replica is given beyond the user's own engine arguments.

    `together`: engines may start at the same time, because the plan pins what each will take.
    """

    engine: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    mps: bool = False
    together: bool = False


def model_path(args: ServeArgs) -> str:
    """The folder or hub name that vLLM loads; makes the demo model where it is asked for."""
    return str(ensure_demo_model()) if is_demo(args.model) else args.model


def this_card(index: int = 0) -> memory.Card:
    """GPU `index` as NVML shows it now."""
    pynvml.nvmlInit()
    try:
        handle = pynvml.nvmlDeviceGetHandleByIndex(index)
        info = pynvml.nvmlDeviceGetMemoryInfo(handle)
        return memory.Card(pynvml.nvmlDeviceGetName(handle), int(info.total), int(info.used))
    finally:
        pynvml.nvmlShutdown()


def weights_read_s(args: ServeArgs) -> float:
    """Seconds that the GPU's memory needs to read the model's weights once, at the bandwidth that NVML tells."""
    return plan(args, this_card()).shape.weights_bytes / _dram_bytes_per_s()


def _dram_bytes_per_s(index: int = 0) -> float:
    """Peak: two transfers each clock over the whole width of the bus."""
    pynvml.nvmlInit()
    try:
        handle = pynvml.nvmlDeviceGetHandleByIndex(index)
        clock_hz = pynvml.nvmlDeviceGetMaxClockInfo(handle, pynvml.NVML_CLOCK_MEM) * 1e6
        return float(2.0 * clock_hz * pynvml.nvmlDeviceGetMemoryBusWidth(handle) / 8)
    finally:
        pynvml.nvmlShutdown()


def plan(args: ServeArgs, card: memory.Card, weights_shared: bool | None = None) -> memory.MemoryPlan:
    """The memory plan of these arguments on `card`. Raises MemoryPlanError in one sentence when it cannot hold.

    Whether the weights are counted once follows from the arguments and the model, unless `weights_shared` says so.
    """
    path = model_path(args)
    config = _model_config(path)
    engine = {key: value for key, value in args.engine.items() if value is not None}
    shape = memory.model_shape(
        config,
        _checkpoint_bytes(path),
        dtype=str(engine.get("dtype", "auto")),
        kv_cache_dtype=str(engine.get("kv_cache_dtype", "auto")),
    )
    demand = memory.Demand(
        replicas=args.replicas,
        max_model_len_tokens=_max_model_len(engine.get("max_model_len", -1), config),
        max_num_seqs=int(engine.get("max_num_seqs", 256)),
        max_num_batched_tokens=int(engine.get("max_num_batched_tokens", 8192)),
        kv_block_tokens=int(engine.get("block_size", 16)),
        kv_cache_bytes=engine.get("kv_cache_memory_bytes"),
        reserve_bytes=int(args.monitoring.memory_reserve_gib * memory.GIB),
        weights_shared=_shares(args, config, shape.weights_bytes) if weights_shared is None else weights_shared,
        mps=uses_mps(args),
    )
    return memory.plan_memory(card, shape, demand)


def _shares(args: ServeArgs, config: dict[str, Any], weights_bytes: int) -> bool:
    """`auto` shares only where that saves memory: the weight host needs some for itself."""
    if not weights.wanted(args.weights, args.replicas, "gpu") or weights.why_private(config, args.engine):
        return False
    return args.weights == "shared" or memory.sharing_saves_bytes(weights_bytes, args.replicas) > 0


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


def check(args: ServeArgs, name: str) -> str:
    """Refuse what cannot work before anything starts, and return the plan as a table. Raises ConfigError."""
    try:
        table = memory.render(plan(args, this_card()))
        if uses_mps(args):
            mps.preflight(mps.ControlProgram(), mps_paths(name), replicas=args.replicas, uid=os.getuid())
    except (memory.MemoryPlanError, mps.MpsError) as error:
        raise ConfigError(str(error)) from error
    why = why_private(args, "gpu")
    return f"{table}\nthe weights are not shared: {why}" if why else table


class GpuHouse:
    """The GPU's side of the device manager: the plan, and the MPS daemon's life from start to stop."""

    def __init__(self, args: ServeArgs, name: str) -> None:
        self._args, self._card = args, this_card()
        self._plan = plan(args, self._card)
        self._daemon: mps.MpsDaemon | None = None
        if uses_mps(args):
            self._daemon = mps.MpsDaemon(mps.ControlProgram(), mps_paths(name))
            self._daemon.start()

    @property
    def daemon(self) -> mps.MpsDaemon | None:
        """None where replicas run outside MPS."""
        return self._daemon

    @property
    def weights_shared(self) -> bool:
        """Whether the plan counts the weights once."""
        return self._plan.demand.weights_shared

    def plan_private_weights(self) -> None:
        """From now on the plan counts the weights in every replica. Raises MemoryPlanError when that does not fit."""
        self._plan = plan(self._args, self._card, weights_shared=False)

    def settings(self) -> EngineSettings:
        demand = self._plan.demand
        engine = {
            "max_model_len": demand.max_model_len_tokens,
            "max_num_seqs": demand.max_num_seqs,
            "max_num_batched_tokens": demand.max_num_batched_tokens,
            "kv_cache_memory_bytes": self._plan.kv_cache_bytes,
            "gpu_memory_utilization": _LITTLE_UTILIZATION,
        }
        if self._daemon is None:
            return EngineSettings(engine, dict(mps.ENVIRONMENT_OUTSIDE_MPS), together=True)
        return EngineSettings(engine, mps.client_environment(self._daemon.paths), mps=True, together=True)

    def prove_client(self, pid: int) -> None:
        """Raises MpsError unless the process is a client of the daemon: it may silently run outside MPS."""
        if self._daemon is not None:
            self._daemon.require_client(pid, _CLIENT_WITHIN_S)

    def check(self) -> None:
        """Raises MpsError when the daemon that was started or adopted no longer runs."""
        if self._daemon is not None and not self._daemon.alive():
            raise mps.MpsError(mps.MpsCause.NO_DAEMON, "the MPS control daemon has died; restart the GPU's replicas")

    def close(self) -> None:
        if self._daemon is not None:
            self._daemon.stop()


def _model_config(path: str) -> dict[str, Any]:
    local = Path(path) / "config.json"
    if local.exists():
        return dict(json.loads(local.read_text()))
    from transformers import AutoConfig

    return dict(AutoConfig.from_pretrained(path).to_dict())


def _checkpoint_bytes(path: str) -> int | None:
    folder = Path(path)
    sizes = [file.stat().st_size for kind in ("*.safetensors", "*.bin") for file in folder.glob(kind)]
    return sum(sizes) or None
