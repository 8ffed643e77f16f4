"""The GPUs' side of the device manager: the plan and environment of each replica, and MPS while they live."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deployments import gpu_setup, memory, mps, numeric_check, start_order
from deployments.config import ServeArgs
from deployments.mps_keeper import MpsKeeper
from deployments.notices import LossFile

# vLLM checks its share of the card at start; the KV cache is pinned by the plan, so the share only has to be small.
_LITTLE_UTILIZATION = 0.05
_CLIENT_WITHIN_S = 20.0
# Engines may start together where all of them could be this much larger than planned, which itself lies above whatever
# was measured, and the card would still hold them.
_ENGINE_GROWTH = 0.1

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


class GpuHouse:
    """The GPUs' side of the device manager: the plan, and the MPS daemon's life from start to stop.

    `refusal` says why no replica can start, in one sentence; empty while they can.
    """

    def __init__(self, args: ServeArgs, name: str, board: Path, engines: EnginesOf, log: logging.Logger) -> None:
        self._args = args
        self._log = log
        self.gpus = gpu_setup.chosen_gpus(args.gpus)
        self._before = gpu_setup.cards_before(board, self.gpus)
        gpu_setup.note_cards(board, self._before)
        self._plan = gpu_setup.tightest(args, self._before.values())
        self.losses = LossFile(board)
        self._keeper: MpsKeeper | None = None
        self._measured: set[int] = set()
        self.refusal = ""
        if gpu_setup.uses_mps(args):
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
        self._plan = gpu_setup.tightest(self._args, self._before.values(), weights_shared=False)

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
            if not self.refusal and self._keeper.given_up:
                self.refusal = self._keeper.given_up
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
            # In this order: another replica may ask meanwhile, in another thread, and starts once this one is measured.
            self._correct(gpu)
            self._measured.add(gpu)

    def terminate(self, pids: list[int]) -> str:
        """End the GPU work of these clients, after which they may be killed without harm; what went wrong, if any."""
        try:
            for pid in pids if self._keeper is not None else ():
                self._keeper.daemon.terminate_client(pid)  # type: ignore[union-attr]
        except mps.MpsError as error:
            return str(error)
        return ""

    def close(self) -> None:
        if self._keeper is not None:
            self._keeper.close()

    def _together(self) -> bool:
        """Whether replicas may start at the same time; else the first on each GPU starts alone and is measured."""
        return start_order.together(self._args.start, self._plan.tolerates(_ENGINE_GROWTH))

    def _correct(self, gpu: int) -> None:
        now, made = gpu_setup.this_card(gpu), self._plan
        measured = now.used_bytes - self._before[gpu].used_bytes - made.common_bytes
        try:
            corrected = memory.correct(made, measured, now.free_bytes)
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
            device="0" if self.gpus == (0,) else gpu_setup.uuid_of(gpu),
        )

    def _check_numbers(self, thread_percentage: int | None) -> None:
        """SM caps have made BF16 products wrong on some driver: such a cap is used only where products are right."""
        if thread_percentage is not None:
            device = {"CUDA_VISIBLE_DEVICES": str(self.gpus[0]), "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
            self.refusal = numeric_check.refusal({**self._client_environment(self.gpus[0]), **device})


def _daemon(name: str) -> mps.MpsDaemon:
    return mps.MpsDaemon(mps.ControlProgram(), gpu_setup.mps_paths(name))
