"""Stand-in engines (`benchmarks.stand_in`) as replicas of Ray Serve, behind the product's door, board and router."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

from ray import serve

from balancer.readings import ReplicaState
from benchmarks.stand_in import StandIn
from deployments.app import assemble
from deployments.config import parse_args
from deployments.middleware import Door
from deployments.slot import Slot


def build(args: dict[str, Any]) -> serve.Application:
    return assemble(args, parse_args(args), "cpu", StandInReplica)


@serve.ingress()
class StandInReplica:
    """A replica whose engine is a stand-in."""

    def __init__(self, raw_args: dict[str, Any], board_path: str, haproxy: bool, manager: Any) -> None:
        self._args = parse_args(raw_args)
        self._haproxy = haproxy
        context = serve.get_replica_context()
        self._tag = context.replica_tag
        self._slot = Slot(Path(board_path), context.replica_id.to_full_id_str(), 0, time.monotonic)
        self._engine = StandIn(self._slot)

    async def __serve_build_asgi_app__(self) -> Door:
        self._tasks = [asyncio.create_task(self._slot.beat()), asyncio.create_task(self._engine.run())]
        self._slot.set_state(ReplicaState.READY)
        policy, limits = self._args.balancer.policy, self._args.limits.of_answers()
        return Door(self._engine.app(), self._slot, self._tag, policy, tickets_required=self._haproxy, limits=limits)

    async def __del__(self) -> None:
        for task in self._tasks:
            task.cancel()
        self._slot.close()
