"""One replica: a vLLM engine of its own behind vLLM's own OpenAI application, and its slot on the board."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from ray import serve
from ray.serve.handle import DeploymentHandle

from balancer.readings import ReplicaState
from deployments import engine, start_order
from deployments.config import ServeArgs, parse_args
from deployments.device_manager import DeviceManager
from deployments.engine_memory import weigh
from deployments.gpu_setup import EngineSettings, model_path
from deployments.middleware import Door
from deployments.processes import ENGINE_VARIABLE
from deployments.slot import Slot, stat_logger

_ENGINE_STOP_S = 6.0
_ENGINE_LOOK_EVERY_S = 0.1


@serve.ingress()
class Replica:
    """Ray Serve's replica: the application's arguments, the board's path, whether HAProxy is in front, the manager."""

    def __init__(
        self, raw_args: dict[str, Any], board_path: str, haproxy: bool, manager: DeploymentHandle[DeviceManager]
    ) -> None:
        self._args: ServeArgs = parse_args(raw_args)
        self._board_path = Path(board_path)
        self._haproxy = haproxy
        self._manager = manager
        self._context = serve.get_replica_context()
        self._tasks: list[asyncio.Task[None]] = []
        self._slot = Slot(self._board_path, self._context.replica_id.to_full_id_str(), _gpu_index(), time.monotonic)

    async def __serve_build_asgi_app__(self) -> Door:
        """Start the engine, then put vLLM's application behind the door. Serve calls it once, before any request."""
        self._tasks.append(asyncio.create_task(self._slot.beat()))
        os.environ[ENGINE_VARIABLE] = "1"
        settings: EngineSettings = await self._manager.engine_settings.remote()
        os.environ.update(settings.environment)
        # Before its turn, because importing vLLM takes most of the start on a CPU and disturbs nobody.
        namespace = engine.server_arguments(self._args, model_path(self._args), settings.engine)
        async with self._turn(settings):
            await self._start_engine(namespace, settings)
        self._tasks.append(asyncio.create_task(weigh(self._slot, engine.process_ids(self._engine))))
        app = await engine.build_openai_app(self._engine, namespace)
        self._slot.forget_warm_up()
        self._slot.set_state(ReplicaState.READY)
        self._watching = asyncio.create_task(self._watch_engine())
        policy, limits = self._args.balancer.policy, self._args.limits.of_answers()
        return Door(app, self._slot, self._context.replica_tag, policy, tickets_required=self._haproxy, limits=limits)

    @contextlib.asynccontextmanager
    async def _turn(self, settings: EngineSettings) -> AsyncIterator[None]:
        if settings.together:
            yield
            return
        self._say("waiting for its turn to start")
        async with start_order.turn(self._board_path.with_name(self._board_path.name + ".start")):
            yield

    async def _start_engine(self, namespace: argparse.Namespace, settings: EngineSettings) -> None:
        began_s = time.monotonic()
        self._say("loading weights and starting the engine")
        self._engine = engine.start_engine(namespace, [stat_logger(self._slot)])
        await engine.warm_up(self._engine)
        if settings.mps:
            for pid in engine.process_ids(self._engine):
                await self._manager.prove_client.remote(pid)
        proof = ", proven to be an MPS client" if settings.mps else ""
        self._say(f"ready in {time.monotonic() - began_s:.1f} s{proof}")

    async def _watch_engine(self) -> None:
        """Routers shall know of a dead engine at once, not only when Serve asks for its health."""
        while not self._engine.errored:
            await asyncio.sleep(_ENGINE_LOOK_EVERY_S)
        self._slot.set_state(ReplicaState.FAILED)

    async def check_health(self) -> None:
        """Serve replaces the replica when its engine is dead."""
        try:
            await self._engine.check_health()
        except Exception:
            self._slot.set_state(ReplicaState.FAILED)
            raise

    async def __del__(self) -> None:
        self._slot.set_state(ReplicaState.DRAINING)
        for task in self._tasks:
            task.cancel()
        if hasattr(self, "_watching"):
            self._watching.cancel()
        if hasattr(self, "_engine"):
            self._engine.shutdown(timeout=_ENGINE_STOP_S)
        self._slot.close()

    def _say(self, what: str) -> None:
        print(f"replica {self._context.rank.rank + 1}/{self._args.replicas}: {what}", flush=True)


def _gpu_index() -> int:
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0]
    return int(first) if first.isdigit() else 0
