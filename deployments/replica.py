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
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from balancer.board import Owner
from balancer.readings import ReplicaState
from deployments import cores, engine, entrance, notices, privacy, processes, start_order
from deployments.batches import Batches
from deployments.config import ServeArgs, parse_args
from deployments.device_manager import DeviceManager, Permission
from deployments.engine_memory import weigh
from deployments.gate import Gate
from deployments.gpu_house import EngineSettings
from deployments.gpu_setup import model_path
from deployments.middleware import Door
from deployments.processes import ENGINE_VARIABLE
from deployments.slot import Slot, stat_logger

_ENGINE_STOP_S = 6.0
# How soon a dead engine, a lost GPU or a wish to restart is seen.
_LOOK_EVERY_S = 0.1
# The manager may be gone when everything stops.
_MANAGER_ANSWERS_S = 3.0


@serve.ingress()
class Replica:
    """Ray Serve's replica: the application's arguments, the board's path, whether HAProxy is in front, the manager."""

    def __init__(
        self, raw_args: dict[str, Any], board_path: str, haproxy: bool, manager: DeploymentHandle[DeviceManager]
    ) -> None:
        privacy.keep_grpc_on_loopback()
        self._args: ServeArgs = parse_args(raw_args)
        self._board_path = Path(board_path)
        self._haproxy = haproxy
        self._manager = manager
        self._context = serve.get_replica_context()
        self._id = self._context.replica_id.to_full_id_str()
        self._slot = Slot(self._board_path, self._id, 0, time.monotonic)
        self._losses = notices.LossFile(self._board_path)
        self._lost = ""
        self._pids: list[int] = []
        self._shared_memory: frozenset[Path] = frozenset()
        self._tasks: list[asyncio.Task[None]] = []

    async def __serve_build_asgi_app__(self) -> Gate:
        """Start the engine, then put vLLM's application behind the door. Serve calls it once, before any request."""
        self._tasks.append(asyncio.create_task(self._slot.beat()))
        os.environ[ENGINE_VARIABLE] = str(os.getpid())
        self._permission = await self._permitted()
        settings = self._permission.settings
        os.environ.update(settings.environment)
        # Before its turn, because importing vLLM takes most of the start on a CPU and disturbs nobody.
        namespace = engine.server_arguments(self._args, model_path(self._args), settings.engine)
        async with self._turn(settings):
            await self._start_engine(namespace, settings)
        self._tasks.append(asyncio.create_task(weigh(self._slot, engine.process_ids(self._engine))))
        app = await engine.build_openai_app(self._engine, namespace)
        engine.cache_environment()
        self._batches = Batches(app, self._args, self._slot)
        policy, tag = self._args.balancer.policy, self._context.replica_tag
        self._door = Door(
            app, self._slot, tag, policy, self._haproxy, self._batches.door, self._args.limits.of_answers()
        )
        self._slot.forget_warm_up()
        self._slot.set_state(ReplicaState.READY)
        self._tasks.append(asyncio.create_task(self._watch()))
        return entrance.gate(self._door, self._args, self._haproxy, time.monotonic)

    async def _permitted(self) -> Permission:
        """Ask the device manager until this replica may start. One that never may waits, so that Serve leaves it."""
        while True:
            permission: Permission = await self._manager.may_start.remote(self._id, os.getpid())
            if permission.place is not None:
                self._slot.fields.gpu = permission.gpu
                return permission
            if permission.refusal:
                self._say(permission.refusal)
                self._slot.set_state(ReplicaState.FAILED)
                await asyncio.Event().wait()
            await asyncio.sleep(permission.ask_again_s)

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
        self._pids = engine.process_ids(self._engine)
        self._engines = [Owner.of(pid) for pid in self._pids]
        self._shared_memory = processes.shared_memory_of(processes.engines_of(os.getpid()))
        await self._manager.started.remote(self._id, self._permission.gpu, self._pids)
        if why := self._lost_together():
            raise RuntimeError(why)
        self._say(f"ready in {time.monotonic() - began_s:.1f} s{self._pin()}{_proof(settings)}")

    def _pin(self) -> str:
        """Give the replica its cores once it is up: a start has more use for all of them."""
        if not self._permission.cores:
            return ""
        cores.pin([os.getpid(), *self._pids], self._permission.cores)
        return f" on cores {cores.words(self._permission.cores)}"

    async def _watch(self) -> None:
        """See that the engine is dead or lost, ten times a second: Serve's own checks take seconds."""
        while not self._lost:
            await asyncio.sleep(_LOOK_EVERY_S)
            if why := self._lost_together():
                await self._lose(why, planned=False)
            elif self._engine.errored:
                await self._lose("the replica's engine has died", planned=False)
            elif notices.restart_asked(self._board_path, self._slot.index):
                await self._retire()

    def _lost_together(self) -> str:
        losses = self._losses.read()
        return losses.why if losses.epoch(self._permission.gpu) > self._permission.epoch else ""

    async def _lose(self, why: str, planned: bool) -> None:
        """Take no more requests, end those under way with an error, and have Serve replace this replica."""
        self._door.close(why)
        self._slot.set_state(ReplicaState.FAILED)
        self._lost = why
        self._say(f"{why}; it will be replaced")
        if self._permission.settings.mps or not planned:
            for process in self._engines:  # vLLM sees the death and fails what the engine was doing
                processes.kill(process)
            self._remove_shared_memory()
        await self._manager.ended.remote(self._id, planned)

    async def _retire(self) -> None:
        """A planned stop that harms no neighbour: drain, end the client's GPU work, then kill."""
        self._slot.set_state(ReplicaState.DRAINING)
        deadline_s = time.monotonic() + self._args.drain_s
        while self._slot.fields.in_flight_requests and time.monotonic() < deadline_s:
            await asyncio.sleep(_LOOK_EVERY_S)
        self._door.close("the replica is being restarted")
        if trouble := await self._manager.terminate.remote(self._pids):
            self._say(trouble)
        await self._lose("the replica was asked to restart", planned=True)

    async def check_health(self) -> None:
        """Serve replaces the replica when this has raised three times."""
        if self._lost:
            raise RuntimeError(self._lost)
        await self._engine.check_health()

    async def __del__(self) -> None:
        self._slot.set_state(ReplicaState.DRAINING)
        for task in self._tasks:
            task.cancel()
        if hasattr(self, "_batches"):
            await self._batches.close()
        if hasattr(self, "_engine"):
            if self._slot.fields.in_flight_requests and not self._lost:
                await self._end_gpu_work()
            self._engine.shutdown(timeout=_ENGINE_STOP_S)
        self._remove_shared_memory()
        self._slot.close()

    def _remove_shared_memory(self) -> None:
        processes.remove(self._shared_memory)

    async def _end_gpu_work(self) -> None:
        """Serve's drain is over and requests are still under way: the engine may have to be killed at its work."""
        with contextlib.suppress(TimeoutError, RayError, RayServeException):  # the manager may have stopped first
            await asyncio.wait_for(self._manager.terminate.remote(self._pids), _MANAGER_ANSWERS_S)

    def _say(self, what: str) -> None:
        print(f"replica {self._context.rank.rank + 1}/{self._args.total_replicas}: {what}", flush=True)


def _proof(settings: EngineSettings) -> str:
    return ", proven to be an MPS client" if settings.mps else ""
