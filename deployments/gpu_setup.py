"""What must be settled before an engine may start on a GPU: the memory plan, and whether and how MPS runs."""

from __future__ import annotations

import json
import logging
import os
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pynvml  # type: ignore[import-untyped]

from deployments import memory, mps, numeric_check, weights
from deployments.config import ConfigError, ServeArgs
from deployments.demo_model import ensure_demo_model, is_demo
from deployments.mps_keeper import MpsKeeper
from deployments.notices import LossFile
from monitoring.sampler import visible_indices

# vLLM checks its share of the card at start; the KV cache is pinned by the plan, so the share only has to be small.
_LITTLE_UTILIZATION = 0.05
_CLIENT_WITHIN_S = 20.0
# Engines may start together where all of them could be this much larger than planned and still leave the card room.
_ENGINE_GROWTH = 0.25

EnginesOf = Callable[[Sequence[int]], list[mps.ProcessIdentity]]
"""The engine processes on these GPUs."""


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


def plan(
    args: ServeArgs, card: memory.Card, mps_used: bool | None = None, weights_shared: bool | None = None
) -> memory.MemoryPlan:
    """The memory plan of these arguments on `card`. Raises MemoryPlanError in one sentence when it cannot hold.

    `mps_used` None: as this machine would. `weights_shared` None: as follows from the arguments and the model.
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
        mps=uses_mps(args) if mps_used is None else mps_used,
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
    pynvml.nvmlInit()
    try:
        return visible_indices(os.environ, int(pynvml.nvmlDeviceGetCount()), _uuid)
    finally:
        pynvml.nvmlShutdown()


def _uuid(index: int) -> str:
    return str(pynvml.nvmlDeviceGetUUID(pynvml.nvmlDeviceGetHandleByIndex(index)))


def tightest(args: ServeArgs, cards: Iterable[memory.Card], weights_shared: bool | None = None) -> memory.MemoryPlan:
    """One plan for all cards: replicas are alike everywhere, so the fullest card decides. Raises MemoryPlanError."""
    return min((plan(args, card, None, weights_shared) for card in cards), key=lambda made: made.kv_cache_bytes)


def check(args: ServeArgs, name: str) -> str:
    """Refuse what cannot work before anything starts, and return the plan as a table. Raises ConfigError."""
    try:
        gpus = chosen_gpus(args.gpus)
        table = memory.render(tightest(args, map(this_card, gpus)))
        if uses_mps(args):
            mps.preflight(mps.ControlProgram(), mps_paths(name), replicas=args.total_replicas, uid=os.getuid())
    except (memory.MemoryPlanError, mps.MpsError) as error:
        raise ConfigError(str(error)) from error
    more = [] if args.gpus == 1 else [f"the same on each of the GPUs {', '.join(map(str, gpus))}"]
    if why := why_private(args, "gpu"):
        more.append(f"the weights are not shared: {why}")
    return "\n".join([table, *more])


class GpuHouse:
    """The GPUs' side of the device manager: the plan, and the MPS daemon's life from start to stop.

    `refusal` says why no replica can start, in one sentence; empty while they can.
    """

    def __init__(self, args: ServeArgs, name: str, board: Path, engines: EnginesOf, log: logging.Logger) -> None:
        self._args = args
        self._log = log
        self.gpus = chosen_gpus(args.gpus)
        self._before = _cards_before(board, self.gpus)
        self._plan = tightest(args, self._before.values())
        self.losses = LossFile(board)
        self._keeper: MpsKeeper | None = None
        self._measured: set[int] = set()
        self.refusal = ""
        if uses_mps(args):
            self._keeper = MpsKeeper(lambda: _daemon(name), self.losses, self.gpus, engines, log)
            self._check_numbers(args.mps_limits.thread_percentage)

    @property
    def keeper(self) -> MpsKeeper | None:
        """None where replicas run outside MPS."""
        return self._keeper

    @property
    def weights_shared(self) -> bool:
        """Whether the plan counts the weights once."""
        return self._plan.demand.weights_shared

    def plan_private_weights(self) -> None:
        """From now on the plan counts the weights in every replica. Raises MemoryPlanError when that does not fit."""
        self._plan = tightest(self._args, self._before.values(), weights_shared=False)

    def settings(self, gpu: int) -> EngineSettings:
        """What a replica on `gpu` adds to its engine's arguments and environment."""
        demand = self._plan.demand
        engine = {
            "max_model_len": demand.max_model_len_tokens,
            "max_num_seqs": demand.max_num_seqs,
            "max_num_batched_tokens": demand.max_num_batched_tokens,
            "kv_cache_memory_bytes": self._plan.kv_cache_bytes,
            "gpu_memory_utilization": _LITTLE_UTILIZATION,
        }
        device = {"CUDA_VISIBLE_DEVICES": str(gpu), "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
        if self._keeper is None:
            return EngineSettings(engine, {**mps.ENVIRONMENT_OUTSIDE_MPS, **device}, together=True)
        return EngineSettings(engine, {**self._client_environment(gpu), **device}, mps=True, together=True)

    def watch(self, stop: threading.Event) -> None:
        """Looks after MPS until `stop` is set; a thread of its own."""
        if self._keeper is None:
            stop.wait()
        else:
            self._keeper.run(stop)

    def must_wait(self, gpu: int, others_starting: int) -> bool:
        """Whether a replica on `gpu` may not start yet: MPS is being healed, or the first one is being measured."""
        if self._keeper is not None:
            self.refusal = self.refusal or self._keeper.given_up
            if self._keeper.healing:
                return True
        return others_starting > 0 and not self._together() and gpu not in self._measured

    def started(self, gpu: int, pids: list[int]) -> None:
        """A replica on `gpu` is up: prove that it is an MPS client, and hold the first one against the plan.

        Raises MpsError unless every engine process is a client of the daemon: it may silently run outside MPS.
        """
        for pid in pids if self._keeper is not None else ():
            self._keeper.prove_client(pid, _CLIENT_WITHIN_S)  # type: ignore[union-attr]
        if not self._together() and gpu not in self._measured:
            self._measured.add(gpu)
            self._correct(gpu)

    def terminate(self, pids: list[int]) -> str:
        """End the GPU work of these clients, after which they may be killed without harm; what went wrong, if any."""
        try:
            for pid in pids if self._keeper is not None else ():
                self._keeper.daemon.terminate_client(pid)  # type: ignore[union-attr]
        except mps.MpsError as error:
            return str(error)
        return ""

    def close(self) -> None:
        self.losses.remove()
        if self._keeper is not None:
            self._keeper.close()

    def _together(self) -> bool:
        """Whether replicas may start at the same time; else the first on each GPU starts alone and is measured."""
        return self._args.start == "together" or (self._args.start == "auto" and self._plan.tolerates(_ENGINE_GROWTH))

    def _correct(self, gpu: int) -> None:
        now = this_card(gpu)
        try:
            corrected = memory.correct(self._plan, now.used_bytes - self._before[gpu].used_bytes, now.free_bytes)
        except memory.MemoryPlanError as error:
            self.refusal = f"the first replica on GPU {gpu} was measured, and {error}"
            return
        word = "larger than planned" if corrected.measured else "within the plan"
        self._log.warning("the first replica on GPU %d is %s; the others may start", gpu, word)

    def _client_environment(self, gpu: int, thread_percentage: int | None = None) -> dict[str, str]:
        assert self._keeper is not None
        limits = self._args.mps_limits
        return mps.client_environment(
            self._keeper.daemon.paths,
            memory_limit_bytes=self._plan.client_limit_bytes if limits.memory == "plan" else None,
            thread_percentage=thread_percentage or limits.thread_percentage,
            device="0" if self.gpus == (0,) else _uuid(gpu),
        )

    def _check_numbers(self, thread_percentage: int | None) -> None:
        """SM caps have made BF16 products wrong on some driver: such a cap is used only where products are right."""
        if thread_percentage is not None:
            device = {"CUDA_VISIBLE_DEVICES": str(self.gpus[0]), "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
            self.refusal = numeric_check.refusal({**self._client_environment(self.gpus[0]), **device})


def _daemon(name: str) -> mps.MpsDaemon:
    return mps.MpsDaemon(mps.ControlProgram(), mps_paths(name))


def _cards_before(board: Path, gpus: Iterable[int]) -> dict[int, memory.Card]:
    """The cards as they were before any replica of this run, whichever device manager of the run asks."""
    path = board.with_name(board.name + ".cards")
    cards = {gpu: this_card(gpu) for gpu in gpus}
    if not path.exists():
        path.write_text(json.dumps({gpu: card.used_bytes for gpu, card in cards.items()}))
    used = {int(gpu): used for gpu, used in json.loads(path.read_text()).items()}
    return {gpu: replace(card, used_bytes=used[gpu]) for gpu, card in cards.items()}


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
