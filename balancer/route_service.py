"""The adaptor for HAProxy: `POST /internal/route` with a request's body in, the replica to send it to out.

A plain ASGI application without a framework: it stands before every request, and each layer here is paid by all.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any

from balancer import haproxy_view
from balancer.board import Board, RowWriter
from balancer.on_the_way import OnTheWay
from balancer.policies import Knobs, Policy, decide, make_policy
from balancer.readings import Decision, ReplicaReading, RequestCost, Snapshot, Verdict
from balancer.ticket import HEADER, Ticket

logger = logging.getLogger(__name__)

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

# HAProxy's view changes when replicas come and go, which is announced on the board first.
_VIEW_EVERY_S = 0.5
_BOARD_CHECK_EVERY_S = 1.0
PROBE_FIELD = b'"splitwiser_probe"'


class RouteService:
    """One router: a policy, a row of the board, and HAProxy's view of the replicas.

    Use it as an ASGI application after `start`; `close` gives the row back.
    """

    def __init__(
        self,
        board_path: Path,
        knobs: Knobs,
        clock: Callable[[], float],
        haproxy_socket: Path | None = None,
        policy: Policy | None = None,
    ) -> None:
        self._board_path = board_path
        self._knobs = knobs
        self._clock = clock
        self._haproxy_socket = haproxy_socket
        self._policy = policy or make_policy(knobs)
        self._reachable: frozenset[str] | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._attach()

    async def start(self) -> None:
        """Begin to follow HAProxy's view and the board's file."""
        self._tasks.append(asyncio.create_task(self._follow_board()))
        if self._haproxy_socket is not None:
            self._tasks.append(asyncio.create_task(self._follow_haproxy(self._haproxy_socket)))

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._row.release()
        self._board.leave()

    def reconfigure(self, knobs: Knobs) -> None:
        """Take another policy or other knobs, effective with the next decision."""
        self._policy = make_policy(knobs)
        self._knobs = knobs

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await _lifespan(receive, send)
        elif scope["type"] == "http" and scope["path"] == "/internal/route" and scope["method"] == "POST":
            await _reply(send, *self.route(await _body(receive)))
        elif scope["type"] == "http":
            await _reply(send, 404, b'{"detail":"only POST /internal/route is served here"}')

    def route(self, body: bytes) -> tuple[int, bytes]:
        """Decide about one request. 200 with a replica id and a ticket, or 503 when there is no replica to name at all."""
        snapshot = self._snapshot()
        if PROBE_FIELD in body:
            return _probe(body, snapshot)
        cost = estimate(body)
        return self._answer(decide(self._policy, self._knobs, cost, snapshot), cost, snapshot)

    def _answer(self, decision: Decision, cost: RequestCost, snapshot: Snapshot) -> tuple[int, bytes]:
        if decision.verdict is Verdict.ASSIGN:
            replica = next(r for r in snapshot.replicas if r.slot == decision.slot)
            self._on_the_way.assigned(replica, cost.tokens, snapshot.now_s)
            return _name(replica, Ticket(self._policy.name, decision.reason, self._row.index, cost.tokens))
        # HAProxy turns any refusal of ours into a bare 503, so a replica has to speak it, whatever its state.
        if not snapshot.replicas:
            return 503, json.dumps({"detail": decision.reason}).encode()
        ticket = Ticket(
            self._policy.name, decision.reason, status=decision.status, retry_after_s=decision.retry_after_s
        )
        return _name(snapshot.replicas[0], ticket)

    def _snapshot(self) -> Snapshot:
        """The board as it is now, without the replicas that HAProxy cannot reach."""
        snapshot = self._board.snapshot(self._clock())
        self._on_the_way.reconcile(snapshot)
        if self._reachable is None:
            return snapshot
        known = tuple(r for r in snapshot.replicas if haproxy_view.server_name(r.replica_id) in self._reachable)
        return Snapshot(snapshot.now_s, known, snapshot.gpus, snapshot.torn_slots)

    def _attach(self) -> None:
        self._board = Board.open(self._board_path)
        self._row: RowWriter = self._board.claim_row()
        self._on_the_way = OnTheWay(self._row)

    async def _follow_board(self) -> None:
        while True:
            await asyncio.sleep(_BOARD_CHECK_EVERY_S)
            if self._board.replaced():
                logger.warning("the board %s was replaced; opening it again", self._board_path)
                self._board.close()
                self._attach()

    async def _follow_haproxy(self, socket: Path) -> None:
        while True:
            try:
                self._reachable = await haproxy_view.ask(socket)
            except (OSError, TimeoutError) as error:
                logger.warning("HAProxy does not answer on %s (%s); keeping its last view", socket, error)
            await asyncio.sleep(_VIEW_EVERY_S)


def estimate(body: bytes) -> RequestCost:
    """A first guess at the cost of a request from its size alone: four bytes of JSON a prompt token, 128 tokens out."""
    return RequestCost(prompt_tokens=len(body) // 4, output_tokens=128)


def _probe(body: bytes, snapshot: Snapshot) -> tuple[int, bytes]:
    """Name the replica in the slot that a readiness probe asks for."""
    with contextlib.suppress(ValueError, AttributeError):
        slot = json.loads(body).get("splitwiser_probe")
        for replica in snapshot.ready(stale_after_s=float("inf")):
            if replica.slot == slot:
                return _name(replica, Ticket("probe", "probe", probe=True))
    return 503, b'{"detail":"no ready replica in that slot"}'


def _name(replica: ReplicaReading, ticket: Ticket) -> tuple[int, bytes]:
    return 200, json.dumps(
        {"replica_id": replica.replica_id, "request_headers": {HEADER: ticket.encode()}}
    ).encode()


async def _body(receive: Receive) -> bytes:
    chunks = []
    while True:
        message = await receive()
        chunks.append(message.get("body", b""))
        if not message.get("more_body"):
            return b"".join(chunks)


async def _reply(send: Send, status: int, body: bytes) -> None:
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def _lifespan(receive: Receive, send: Send) -> None:
    while (await receive())["type"] != "lifespan.shutdown":
        await send({"type": "lifespan.startup.complete"})
    await send({"type": "lifespan.shutdown.complete"})
