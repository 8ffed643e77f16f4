"""The adaptor for HAProxy: `POST /internal/route` with a request's body in, the replica to send it to out.

A plain ASGI application without a framework: it stands before every request, and each layer here is paid by all.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import logging
import random
import time
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from balancer import batches, explain, haproxy_view, hung_up, ledger, stopping
from balancer.access import ANYONE, Access, Key, presented, refusal_of_strangers
from balancer.admission import Dispatcher
from balancer.board import Board, BoardError, RowWriter
from balancer.cost import BYTES_PER_TOKEN, CostEstimator
from balancer.counters import RouterCounters
from balancer.health import Health
from balancer.hint import HEADER as HINT_HEADER
from balancer.hint import NO_HINT, SESSION, Hint
from balancer.knobs import Knobs
from balancer.ledger import End
from balancer.on_the_way import OnTheWay
from balancer.readings import Decision, ReplicaReading, ReplicaState, RequestCost, Snapshot, Verdict, reject
from balancer.selection import least
from balancer.ticket import HEADER, ROUTER_HEADER, Ticket

logger = logging.getLogger(__name__)

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

# HAProxy's view changes when replicas come and go, which is announced on the board first.
_VIEW_EVERY_S = 0.5
_BOARD_CHECK_EVERY_S = 1.0
# A hang-up must free its place within a second.
_CLIENTS_EVERY_S = 0.25
# How often waiting requests are looked at: an engine step takes at least as long, and nothing frees room in between.
_RELEASE_EVERY_S = 0.003
# The same while nothing waits: the active set is measured then too.
_IDLE_EVERY_S = 0.02
PROBE_FIELD = b'"splitwiser_probe"'
_HINT_HEADER = HINT_HEADER.encode()
_NO_COST = RequestCost(1, 1)
_SESSION_HEADER = SESSION.encode()

Answer = tuple[int, bytes]


@dataclass(frozen=True, slots=True)
class Waiter:
    """A request in the queue, and the future that its connection waits on."""

    cost: RequestCost
    hint: Hint
    since_s: float
    future: asyncio.Future[Answer]


class RouteService:
    """One router: a dispatcher with its queue, a row of the board, and HAProxy's view of the replicas.

    Use it as an ASGI application after `start`; `close` gives the row back.
    """

    def __init__(
        self,
        board_path: Path,
        knobs: Knobs,
        clock: Callable[[], float],
        haproxy_socket: Path | None = None,
        access: Access | None = None,
        split_from: int = 0,
    ) -> None:
        self._board_path = board_path
        self._clock = clock
        self._haproxy_socket = haproxy_socket
        self._access = access or Access(lambda: None, clock)
        self._split_from = split_from
        self._address = ""
        self._rng = random.Random(knobs.seed)
        self._dispatcher = Dispatcher(knobs, self._rng)
        self._estimator = CostEstimator(knobs)
        self._ids = map(str, itertools.count())
        self._waiting: dict[str, Waiter] = {}
        self._lost_counted = 0
        self._reachable: Mapping[str, str] | None = None
        self._speakers: tuple[ReplicaReading, ...] = ()
        self._health = Health(knobs)
        self._stopping = False
        self._tasks: list[asyncio.Task[None]] = []
        self._attach()
        self._page = ledger.Page.of_router(board_path)

    async def start(self) -> None:
        """Begin to release what waits, and to follow HAProxy's view and the board's file."""
        self._tasks.append(asyncio.create_task(self._release()))
        self._tasks.append(asyncio.create_task(self._follow_board()))
        self._tasks.append(asyncio.create_task(self._follow_clients()))
        if self._haproxy_socket is not None:
            self._tasks.append(asyncio.create_task(self._follow_haproxy(self._haproxy_socket)))

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for waiter in list(self._waiting.values()):
            if not waiter.future.done():
                self._page.end(End.REJECTED)
                waiter.future.set_result((503, b'{"detail":"the router is stopping"}'))
        self._counters.leave()
        self._row.release()
        self._board.leave()
        self._page.leave()

    def check(self) -> None:
        """Raises what ended a background task: without it what waits would wait for ever."""
        for task in self._tasks:
            if task.done():
                task.result()

    def reconfigure(self, knobs: Knobs) -> None:
        """Take another policy or other knobs, effective with the next decision; what waits goes on waiting."""
        self._dispatcher.reconfigure(knobs)
        self._health.knobs = knobs

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await _lifespan(receive, send)
        elif scope["type"] == "http" and scope["path"] == "/internal/route" and scope["method"] == "POST":
            self._address = _own_address(scope)
            answer = self.route(await _body(receive), _hint(scope))
            await _reply(send, *(answer if isinstance(answer, tuple) else await self._until_decided(answer, receive)))
        elif scope["type"] == "http" and scope["path"] == "/internal/decisions" and scope["method"] == "GET":
            records = [explain.as_dict(record) for record in list(self._dispatcher.recent)]
            await _reply(send, 200, json.dumps(records).encode())
        elif scope["type"] == "http":
            await _reply(send, 404, b'{"detail":"POST /internal/route and GET /internal/decisions are served here"}')

    def route(self, body: bytes, hint: Hint = NO_HINT) -> Answer | asyncio.Future[Answer]:
        """Decide about one request: 200 with a replica id and a ticket, or 503 when there is no replica to name.

        A request that must wait gets a future of that; cancelling it gives up the place in the queue.
        """
        snapshot = self._snapshot()
        if PROBE_FIELD in body and (slot := _probed_slot(body)) is not None:
            return _probe(slot, snapshot)
        key = self._holder(hint)
        if key is None:
            self._page.enter()
            return self._refuse(refusal_of_strangers(), _NO_COST, snapshot, hint)
        if self._stopping and not hint.part:
            self._page.enter()
            return self._refuse(_STOPPING, _NO_COST, snapshot, hint)
        if not hint.part and (managed := self._managed(key, body, hint, snapshot)):
            return managed
        self._page.enter()
        cost, request_id = self._estimator.estimate(body, hint.session, hint.priority), next(self._ids)
        if hint.part:
            cost = replace(cost, prefix=0)  # the parts of a batch are to be spread, whatever they begin with
        if (refusal := self._access.admit(key, cost.tokens, hint.concurrent)) is not None:
            return self._refuse(refusal, cost, snapshot, hint)
        began_s = time.perf_counter()
        decision = self._dispatcher.submit(request_id, cost, snapshot)
        self._count(decision, time.perf_counter() - began_s)
        self._publish_counts(snapshot.now_s)
        if decision.verdict is not Verdict.WAIT:
            return self._answer(decision, cost, snapshot, hint)
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Answer] = loop.create_future()
        self._waiting[request_id] = Waiter(cost, hint, snapshot.now_s, future)
        future.add_done_callback(lambda _: self._forget(request_id))
        if hint.timeout_s is not None:
            loop.call_later(hint.timeout_s, self._give_up, request_id)
        return future

    def _holder(self, hint: Hint) -> Key | None:
        """Whose key a client showed. What HAProxy did not ask about comes from a part of the system on this machine."""
        if not hint.from_client:
            return ANYONE
        return self._access.holder(presented(hint.authorization, hint.api_key))

    def _refuse(self, decision: Decision, cost: RequestCost, snapshot: Snapshot, hint: Hint) -> Answer:
        self._count(decision, 0.0)
        self._publish_counts(snapshot.now_s)
        return self._answer(decision, cost, snapshot, hint)

    def _managed(self, key: Key, body: bytes, hint: Hint, snapshot: Snapshot) -> Answer | None:
        """The replica to manage a batch that will be split, or a file: the one that answers least. It costs nothing:
        each part of a batch comes back here, and is weighed then. Its key is charged for the whole of it, by its size.
        """
        sequences = batches.sequences_announced(body, hint.path, self._split_from)
        if not (sequences or hint.path.startswith(batches.MANAGED)):
            return None
        ready = snapshot.ready(self._dispatcher.knobs.stale_after_s)
        if not ready:
            return None
        tokens = int(len(body) / BYTES_PER_TOKEN) if sequences else 0
        if (refusal := self._access.admit(key, tokens, hint.concurrent)) is not None:
            self._page.enter()
            return self._refuse(refusal, _NO_COST, snapshot, hint)
        if sequences:
            self._dispatcher.expect(sequences, snapshot)
        ticket = Ticket(self._dispatcher.knobs.policy, "managed", sequences=0)
        manager = least(ready, lambda replica: replica.assigned_requests, self._rng)
        return self._named(manager, ticket, {ROUTER_HEADER: self._address} if self._address else {})

    @property
    def waiting(self) -> int:
        return self._dispatcher.waiting

    async def _until_decided(self, future: asyncio.Future[Answer], receive: Receive) -> Answer:
        """The answer, unless HAProxy hangs up first: its client has gone."""
        hung_up = asyncio.create_task(_disconnected(receive))
        either: set[asyncio.Future[Any]] = {future, hung_up}
        try:
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            return future.result() if future.done() else _GONE
        finally:
            hung_up.cancel()
            if future.cancel():  # not if it was decided; Serve may cancel us before we see the hang-up ourselves
                self._client_left()

    def _forget(self, request_id: str) -> None:
        waiter = self._waiting.pop(request_id)
        self._counters.observe_wait(self._clock() - waiter.since_s)
        self._dispatcher.cancel(request_id)

    def _give_up(self, request_id: str) -> None:
        """The client's own time is over while its request waits."""
        waiter = self._waiting.get(request_id)
        if waiter is not None and not waiter.future.done():
            self._count(_TOO_LATE_FOR_CLIENT, 0.0)
            waiter.future.set_result(self._answer(_TOO_LATE_FOR_CLIENT, waiter.cost, self._snapshot(), waiter.hint))

    async def _release(self) -> None:
        while True:
            await asyncio.sleep(_RELEASE_EVERY_S if self._waiting else _IDLE_EVERY_S)
            self._stopping = stopping.asked(self._board_path) is not None
            snapshot = self._snapshot()
            began_s = time.perf_counter()
            decided = self._dispatcher.release(snapshot)
            each_s = (time.perf_counter() - began_s) / max(1, len(decided))
            if decided:
                self._forget_gone()
            for request_id, decision in decided:
                waiter = self._waiting[request_id]
                if not waiter.future.done():  # else its client went in this very turn of the loop
                    self._count(decision, each_s)
                    waited_s = snapshot.now_s - waiter.since_s
                    answer = self._answer(decision, waiter.cost, snapshot, waiter.hint, waited_s)
                    waiter.future.set_result(answer)
            self._publish_counts(snapshot.now_s)

    def _count(self, decision: Decision, seconds: float) -> None:
        if decision.verdict is Verdict.ASSIGN:
            self._counters.count_decision(decision.slot, self._dispatcher.knobs.policy, decision.reason, seconds)
        elif decision.verdict is Verdict.REJECT:
            self._counters.count_rejection(decision.reason)

    def _publish_counts(self, now_s: float) -> None:
        self._counters.count_lost(self._on_the_way.lost_total - self._lost_counted)
        self._lost_counted = self._on_the_way.lost_total
        for reason in self._health.ejected():
            self._counters.count_ejection(reason)
        self._counters.set_queue(self._dispatcher.waiting)
        self._counters.set_active(self._dispatcher.active)
        self._counters.publish(now_s)

    def _answer(
        self, decision: Decision, cost: RequestCost, snapshot: Snapshot, hint: Hint, waited_s: float = 0.0
    ) -> Answer:
        policy = self._dispatcher.knobs.policy
        extra = {}
        if hint.explain:
            record = explain.Record(snapshot.now_s, "this", cost, decision, snapshot)
            extra = {explain.HEADER: f"policy={policy} {explain.as_line(record)}"}
        if decision.verdict is Verdict.ASSIGN:
            replica = next(r for r in snapshot.replicas if r.slot == decision.slot)
            self._on_the_way.assigned(replica, cost.tokens, snapshot.now_s, cost.sequences)
            ticket = _ticket(policy, decision, self._row.index, cost, waited_s)
            self._page.hand_over()
            return self._named(replica, ticket, extra)
        # HAProxy turns any refusal of ours into a bare 503, so a replica has to speak it, whatever its state.
        if not self._speakers:
            self._page.end(End.REJECTED)
            return 503, json.dumps({"detail": decision.reason}).encode()
        speaker = max(self._speakers, key=_most_likely_to_answer)
        ticket = Ticket(
            policy, decision.reason, status=decision.status, retry_after_s=decision.retry_after_s, slot=speaker.slot
        )
        self._page.hand_over()
        return self._named(speaker, ticket, extra)

    def _named(self, replica: ReplicaReading, ticket: Ticket, extra: Mapping[str, str]) -> Answer:
        """With the address, where it is known: a HAProxy that was replaced while it asked knows no later replica."""
        address = (self._reachable or {}).get(haproxy_view.server_name(replica.replica_id), "")
        return _name(replica, ticket, extra, address)

    def _snapshot(self) -> Snapshot:
        """The board as it is now, without the replicas that HAProxy cannot reach or that are out of rotation."""
        snapshot = self._board.snapshot(self._clock())
        if self._on_the_way.reconcile(snapshot):
            snapshot = self._board.snapshot(snapshot.now_s)
        self._estimator.learn(snapshot)
        if self._reachable is not None:
            known = tuple(r for r in snapshot.replicas if haproxy_view.server_name(r.replica_id) in self._reachable)
            snapshot = Snapshot(snapshot.now_s, known, snapshot.gpus, snapshot.torn_slots)
        self._speakers = snapshot.replicas
        return self._health.look(snapshot)

    def _attach(self) -> None:
        board = Board.open(self._board_path)
        self._row: RowWriter = board.claim_row()
        self._board = board
        self._on_the_way = OnTheWay(self._row)
        self._lost_counted = 0
        self._counters = RouterCounters.open(self._board_path, self._row.index)

    async def _follow_board(self) -> None:
        while True:
            await asyncio.sleep(_BOARD_CHECK_EVERY_S)
            if self._board.replaced():
                logger.warning("the board %s was replaced; opening it again", self._board_path)
                self._move()

    def _move(self) -> None:
        old, old_counters = self._board, self._counters
        try:
            self._attach()
        except BoardError as error:
            logger.warning("%s; trying again", error)
        else:
            old_counters.leave()
            old.close()

    async def _follow_clients(self) -> None:
        """Forget what waits for a client that has gone: HAProxy does not tell."""
        while True:
            await asyncio.sleep(_CLIENTS_EVERY_S)
            self._forget_gone()

    def _forget_gone(self) -> None:
        named = {w.hint.client: w for w in self._waiting.values() if w.hint.client}
        for client in hung_up.clients() & named.keys() if named else ():
            if not named[client].future.done():
                self._client_left()
                named[client].future.set_result(_GONE)

    def _client_left(self) -> None:
        self._counters.count_cancelled()
        self._page.end(End.CANCELLED)

    async def _follow_haproxy(self, socket: Path) -> None:
        while True:
            try:
                self._see(await haproxy_view.ask(socket))
            except (OSError, TimeoutError) as error:
                logger.warning("HAProxy does not answer on %s (%s); keeping its last view", socket, error)
            await asyncio.sleep(_VIEW_EVERY_S)

    def _see(self, reachable: Mapping[str, str]) -> None:
        gone = (self._reachable or {}).keys() - reachable.keys()
        ready = self._board.snapshot(self._clock()).ready(self._dispatcher.knobs.stale_after_s)
        for _ in gone & {haproxy_view.server_name(replica.replica_id) for replica in ready}:
            self._counters.count_ejection("unreachable")
        self._reachable = reachable


_GONE: Answer = (503, b'{"detail":"the client has gone"}')
_STOPPING = reject(503, "stopping", 1.0)
_TOO_LATE_FOR_CLIENT = reject(504, "client_timeout", 1.0)


def _most_likely_to_answer(replica: ReplicaReading) -> tuple[bool, float]:
    return replica.state is ReplicaState.READY, replica.written_at_s


def _probed_slot(body: bytes) -> int | None:
    """The slot that a readiness probe asks for; None when the body only mentions the field somewhere."""
    with contextlib.suppress(ValueError, AttributeError, TypeError, OverflowError, RecursionError):
        return int(json.loads(body).get("splitwiser_probe"))
    return None


def _probe(slot: int, snapshot: Snapshot) -> Answer:
    for replica in snapshot.ready(stale_after_s=float("inf")):
        if replica.slot == slot:
            return _name(replica, Ticket("probe", "probe", probe=True))
    return 503, b'{"detail":"no ready replica in that slot"}'


def _ticket(policy: str, decision: Decision, row: int, cost: RequestCost, waited_s: float) -> Ticket:
    output = cost.output_tokens * cost.sequences
    return Ticket(
        policy, decision.reason, row, cost.tokens, output_tokens=output, sequences=cost.sequences, slot=decision.slot,
        waited_s=waited_s,
    )  # fmt: skip


def _name(
    replica: ReplicaReading, ticket: Ticket, extra: Mapping[str, str] = MappingProxyType({}), address: str = ""
) -> Answer:
    headers = {HEADER: ticket.encode(), **extra}
    named = {"replica_id": replica.replica_id, "request_headers": headers, **({"address": address} if address else {})}
    return 200, json.dumps(named).encode()


def _own_address(scope: Scope) -> str:
    """Where this router was asked: the address of its own end of the connection, which no client can choose."""
    host, port = scope.get("server") or ("", None)
    return f"{host}:{port}" if port else ""


def _hint(scope: Scope) -> Hint:
    """Behind a bare `serve run` HAProxy composes no hint, and only the session comes through."""
    headers = dict(scope["headers"])
    if _HINT_HEADER in headers:
        return Hint.decode(headers[_HINT_HEADER].decode("latin-1"))
    session = headers.get(_SESSION_HEADER, b"")
    return Hint(session.decode("latin-1")) if session else NO_HINT


async def _body(receive: Receive) -> bytes:
    chunks = []
    while True:
        message = await receive()
        chunks.append(message.get("body", b""))
        if not message.get("more_body"):
            return b"".join(chunks)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _reply(send: Send, status: int, body: bytes) -> None:
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def _lifespan(receive: Receive, send: Send) -> None:
    while (await receive())["type"] != "lifespan.shutdown":
        await send({"type": "lifespan.startup.complete"})
    await send({"type": "lifespan.shutdown.complete"})
