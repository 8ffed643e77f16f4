"""The adaptor for Serve's own Python proxy, used without HAProxy: the same policies, but no request body to look at."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

from balancer.board import Board
from balancer.health import Health
from balancer.on_the_way import OnTheWay
from balancer.policies import Knobs, decide, make_policy
from balancer.readings import NO_SLOT, RequestCost, Snapshot, Verdict

# Without a body there is nothing to estimate from: every request weighs the same.
_UNSEEN = RequestCost(prompt_tokens=128, output_tokens=128)


class BoardRouter(RequestRouter):  # type: ignore[misc]  # Ray's annotations are not followed
    """Ray Serve's RequestRouter interface over the board. One per proxy process."""

    def initialize_state(self, board_path: str, knobs: dict[str, Any]) -> None:
        """Called by Serve with `request_router_kwargs` of the deployment."""
        self._path = Path(board_path)
        self._knobs = Knobs(**knobs)
        self._policy = make_policy(self._knobs)
        self._health = Health(self._knobs)
        self._board: Board | None = None

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """One replica if the policy names one; none makes Serve wait and ask again."""
        by_id = {replica.replica_id.to_full_id_str(): replica for replica in candidate_replicas}
        snapshot = self._snapshot(by_id)
        decision = decide(self._policy, self._knobs, _UNSEEN, snapshot)
        if decision.verdict is not Verdict.ASSIGN or decision.slot == NO_SLOT:
            return []
        chosen = next(r for r in snapshot.replicas if r.slot == decision.slot)
        # Replicas count POSTs only, so nothing else may be noted as being on its way to them.
        if pending_request is None or pending_request.metadata._http_method == "POST":
            self._on_the_way.assigned(chosen, 0, snapshot.now_s)
        return [[by_id[chosen.replica_id]]]

    def _snapshot(self, known: dict[str, RunningReplica]) -> Snapshot:
        if self._board is None or self._board.replaced():
            if self._board is not None:
                self._board.close()
            self._board = Board.open(self._path)
            # Serve's proxy adds no ticket, so replicas cannot tell routers apart: all arrivals count.
            self._on_the_way = OnTheWay(self._board.claim_row(), received=lambda replica: replica.received_total)
        snapshot = self._board.snapshot(time.monotonic())
        if self._on_the_way.reconcile(snapshot):
            snapshot = self._board.snapshot(snapshot.now_s)
        replicas = tuple(r for r in snapshot.replicas if r.replica_id in known)
        return self._health.look(Snapshot(snapshot.now_s, replicas, snapshot.gpus, snapshot.torn_slots))
