"""The route service: who it names, what it says when it names nobody, and that HAProxy's Lua can read it."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any, TypeVar

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from balancer import haproxy_view, route_service
from balancer.access import Access, Limits, parse_keys
from balancer.board import ROUTER_ROWS, Board, SlotWriter
from balancer.hint import Hint
from balancer.policies import Knobs
from balancer.readings import ReplicaReading, ReplicaState, assign
from balancer.route_service import RouteService
from balancer.ticket import HEADER, ROUTER_HEADER, Ticket

T = TypeVar("T")
NOW_S = 100.0
BODY = b'{"model": "demo", "prompt": "Once upon a time"}'
KNOBS = Knobs(policy="least_queue", seed=1)

# The patterns of Ray 2.60's ingress_request_router.lua.tmpl; Lua's `-` is a lazy repetition.
LUA_REPLICA = re.compile(r'"replica_id"\s*:\s*"([^"]+)"')
LUA_HEADERS = re.compile(r'"request_headers"\s*:\s*{(.*?)}', re.DOTALL)
LUA_HEADER = re.compile(r'"\s*([^"]*?)\s*"\s*:\s*"([^"]*)"')


class House:
    """A board, the replicas on it and the routers before it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.board = Board.open(path)
        self.slots: list[SlotWriter] = []
        self.routers: list[RouteService] = []
        self.now_s = NOW_S
        self.loop = asyncio.Runner()

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return self.loop.run(coroutine)

    def replica(self, name: str, state: ReplicaState = ReplicaState.READY, written_at_s: float = NOW_S) -> SlotWriter:
        slot = self.board.claim_slot(name)
        slot.fields.state = state
        slot.publish(written_at_s)
        self.slots.append(slot)
        return slot

    def full_replica(self, name: str) -> SlotWriter:
        """One with 100 blocks of KV cache, all promised."""
        slot = self.replica(name)
        slot.fields.kv_blocks_total, slot.fields.kv_block_tokens, slot.fields.max_running_requests = 100, 16, 64
        slot.fields.in_flight_requests, slot.fields.in_flight_tokens = 4, 1600
        slot.publish(NOW_S)
        return slot

    def router(self, knobs: Knobs = KNOBS, haproxy_socket: Path | None = None, split_from: int = 0) -> RouteService:
        self.routers.append(RouteService(self.path, knobs, lambda: self.now_s, haproxy_socket, None, split_from))
        return self.routers[-1]

    def seen(self) -> dict[str, ReplicaReading]:
        return {r.replica_id: r for r in self.board.snapshot(NOW_S).replicas}

    def end(self) -> None:
        for router in self.routers:
            self.run(router.close())
        self.loop.close()
        for slot in self.slots:
            slot.release()
        self.board.leave()


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    """Afterwards everybody has left, and the board's file is gone with the last."""
    folder = tmp_path / "shm"
    folder.mkdir()
    house = House(folder / "board")
    yield house
    house.end()
    assert not list(folder.iterdir())


def as_haproxy_reads(body: bytes) -> tuple[str | None, dict[str, str]]:
    text = body.decode()
    replica, headers = LUA_REPLICA.search(text), LUA_HEADERS.search(text)
    return replica and replica[1], dict(LUA_HEADER.findall(headers[1])) if headers else {}


def at_once(router: RouteService, body: bytes = BODY) -> tuple[int, bytes]:
    answer = router.route(body)
    assert isinstance(answer, tuple)
    return answer


def named(router: RouteService, body: bytes = BODY) -> tuple[str, Ticket]:
    status, answer = at_once(router, body)
    replica, headers = as_haproxy_reads(answer)
    assert status == 200
    assert replica is not None
    return replica, Ticket.decode(headers[HEADER])


def test_a_request_is_assigned_and_counted(house: House) -> None:
    """The answer names a replica and carries the ticket; the board shows the request on its way at once."""
    house.replica("app#Replica#a")
    router = house.router()
    replica, ticket = named(router)
    assert replica == "app#Replica#a"
    assert (ticket.policy, ticket.status, ticket.row, ticket.probe) == ("least_queue", 200, 0, False)
    assert ticket.tokens > 0
    reading = house.seen()["app#Replica#a"]
    assert (reading.on_the_way_requests, reading.on_the_way_tokens) == (1, ticket.tokens)


def test_requests_spread_by_what_is_on_its_way(house: House) -> None:
    """Two idle replicas get every other request, though neither has received one yet."""
    house.replica("a")
    house.replica("b")
    router = house.router()
    assert sorted(named(router)[0] for _ in range(6)) == ["a"] * 3 + ["b"] * 3


def test_what_arrived_is_not_counted_twice_in_a_decision(house: House) -> None:
    """A decision made after its predecessors arrived and ended sees idle replicas, not old assignments."""
    first, second = house.replica("a"), house.replica("b")
    second.fields.in_flight_requests = 2
    second.publish(NOW_S)
    router = house.router()
    for _ in range(2):
        named(router)
    first.received_by_router[0] = 2
    first.publish(NOW_S)
    assert named(router)[0] == "a"
    assert house.seen()["a"].on_the_way_requests == 1


def test_routers_see_each_others_assignments(house: House) -> None:
    """Several routers, each with a row of its own, spread requests as one would."""
    house.replica("a")
    house.replica("b")
    routers = [house.router() for _ in range(3)]
    taken = [named(router) for router in routers * 2]
    assert sorted(name for name, _ in taken) == ["a"] * 3 + ["b"] * 3
    assert [ticket.row for _, ticket in taken] == [0, 1, 2] * 2
    assert [house.seen()[name].on_the_way_requests for name in "ab"] == [3, 3]


def test_a_router_that_closes_gives_its_row_back(house: House) -> None:
    """After closing, a router's assignments count no more and its row is the next router's."""
    house.replica("a")
    router = house.router()
    named(router)
    house.routers.remove(router)
    house.run(router.close())
    assert house.seen()["a"].on_the_way_requests == 0
    assert named(house.router())[1].row == 0


@pytest.mark.parametrize(
    ("state", "written_at_s"),
    [
        (ReplicaState.STARTING, NOW_S),
        (ReplicaState.DRAINING, NOW_S),
        (ReplicaState.FAILED, NOW_S),
        (ReplicaState.READY, NOW_S - KNOBS.stale_after_s - 0.1),
    ],
)
def test_a_refusal_travels_as_a_ticket(house: House, state: ReplicaState, written_at_s: float) -> None:
    """No replica may take the request: one is named all the same, to answer 503 with Retry-After in its place."""
    house.replica("a", state, written_at_s)
    _, ticket = named(house.router())
    assert (ticket.status, ticket.reason, ticket.retry_after_s) == (503, "no_replica_ready", 1.0)
    assert house.seen()["a"].on_the_way_requests == 0


def test_a_full_house_is_told_by_a_living_replica(house: House) -> None:
    """The policy's own refusal keeps its status and delay, and goes to a replica that is there to speak it."""
    house.replica("dead", written_at_s=NOW_S - 60)
    house.replica("starting", ReplicaState.STARTING)
    house.full_replica("full")
    replica, ticket = named(house.router(Knobs(policy="gpu_aware", queue_limit=0)))
    assert replica == "full"
    assert (ticket.policy, ticket.reason, ticket.status, ticket.row) == ("gpu_aware", "queue_full", 429, -1)
    assert ticket.retry_after_s >= 1.0


def test_without_replicas_there_is_nobody_to_name(house: House) -> None:
    """An empty board: 503, in words."""
    status, answer = at_once(house.router())
    assert (status, json.loads(answer)) == (503, {"detail": "no_replica_ready"})


def test_a_torn_slot_is_passed_over(house: House) -> None:
    """A replica whose record cannot be read right now is not named; the others are."""
    torn = house.replica("torn")
    house.replica("whole")
    torn._record._store(torn._record._sequence + 1, b"")
    router = house.router()
    assert {named(router)[0] for _ in range(4)} == {"whole"}


def test_only_what_haproxy_reaches_is_named(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replicas that HAProxy does not know yet, or no longer, receive nothing, and its silence keeps its last view."""
    house.replica("app#Replica#a")
    house.replica("app#Replica#b")
    views: list[dict[str, str] | OSError] = [{"app-Replica-b": "127.0.0.1:1"}, ConnectionError("gone")]
    asked = asyncio.Event()

    async def ask(socket: Path) -> dict[str, str]:
        view = views.pop(0)
        if not views:
            asked.set()
            views.append(view)
        if isinstance(view, OSError):
            raise view
        return view

    monkeypatch.setattr(haproxy_view, "ask", ask)
    monkeypatch.setattr(route_service, "_VIEW_EVERY_S", 0.001)
    router = house.router(haproxy_socket=Path("/nowhere"))
    assert {named(router)[0] for _ in range(2)} == {"app#Replica#a", "app#Replica#b"}

    async def follow() -> None:
        await router.start()
        await asyncio.wait_for(asked.wait(), 10)
        await asyncio.sleep(0)

    house.run(follow())
    assert {named(router)[0] for _ in range(4)} == {"app#Replica#b"}


def test_nobody_reachable_is_503(house: House) -> None:
    """Replicas on the board of which HAProxy reaches none cannot even speak a refusal."""
    house.replica("a")
    router = house.router()
    router._reachable = {}
    assert at_once(router)[0] == 503


def test_a_probe_reaches_the_slot_it_asks_for(house: House) -> None:
    """A readiness probe is sent to the replica of its slot, whatever the policy says, and is not counted as work."""
    house.replica("a")
    b = house.replica("b")
    b.fields.in_flight_requests = 50
    b.publish(NOW_S)
    router = house.router()
    replica, ticket = named(router, json.dumps({"splitwiser_probe": b.index}).encode())
    assert (replica, ticket.probe, ticket.row) == ("b", True, -1)
    assert house.seen()["b"].on_the_way_requests == 0


def test_a_probe_of_an_unready_slot_fails(house: House) -> None:
    """The probe of a slot that is empty or still starting gets 503 and is sent to nobody else."""
    house.replica("a")
    starting = house.replica("b", ReplicaState.STARTING)
    router = house.router()
    for slot in (starting.index, 17, -1):
        assert at_once(router, json.dumps({"splitwiser_probe": slot}).encode())[0] == 503


def test_a_prompt_about_probes_is_a_request(house: House) -> None:
    """A body that only mentions the probe's field deeper down is served like any other."""
    house.replica("a")
    body = json.dumps({"model": "demo", "prompt": "x", "metadata": {"splitwiser_probe": 0}}).encode()
    assert not named(house.router(), body)[1].probe


NASTY = [
    b"", b"null", b"[]", b'"splitwiser_probe"', b'{"splitwiser_probe": null}', b'{"splitwiser_probe": "x"}',
    b'{"splitwiser_probe": {}}', b'{"splitwiser_probe": 1e999}', b'{"splitwiser_probe":' + b"[" * 200_000,
    b'["splitwiser_probe"', b"\xff\xfe" + b'"splitwiser_probe"', bytes(range(256)), b"{" * 100_000, b'{"prompt": NaN}',
    b'{"max_tokens": -1, "n": 1e400}', b'{"prompt": [[[]]], "messages": 5, "max_tokens": "many"}', b'{"a":' * 50_000,
]  # fmt: skip


@pytest.mark.parametrize("body", NASTY, ids=range(len(NASTY)))
def test_a_nasty_body_still_gets_a_replica(house: House, body: bytes) -> None:
    """What no parser likes is routed all the same: to say what is wrong with a request is vLLM's business."""
    house.replica("a")
    assert named(house.router(), body)[0] == "a"


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.one_of(st.binary(), st.binary().map(lambda b: b'{"splitwiser_probe"' + b), st.text().map(str.encode)))
def test_no_body_raises(house: House, body: bytes) -> None:
    """Any bytes at all end in an answer that HAProxy can act on."""
    if not house.slots:
        house.replica("a")
    router = house.routers[0] if house.routers else house.router()
    status, answer = at_once(router, body)
    assert (status, as_haproxy_reads(answer)[0]) in ((200, "a"), (503, None))


@pytest.mark.parametrize("reason", ["plain", 'a "quoted" one', "with } and { braces", "several words, and more\n"])
def test_haproxys_patterns_read_every_answer(house: House, monkeypatch: pytest.MonkeyPatch, reason: str) -> None:
    """The Lua patterns find the replica and exactly one header, however a policy words its reason."""
    slot = house.replica("SERVE_REPLICA::my app#Replica#x1")
    router = house.router()
    monkeypatch.setattr(router._dispatcher, "submit", lambda *_: assign(slot.index, reason))
    status, answer = at_once(router)
    replica, headers = as_haproxy_reads(answer)
    assert (status, replica, list(headers)) == (200, "SERVE_REPLICA::my app#Replica#x1", [HEADER])
    assert Ticket.decode(headers[HEADER]).policy == "least_queue"


def test_knobs_can_change_while_it_runs(house: House) -> None:
    """Another policy holds from the next decision on."""
    house.replica("a")
    router = house.router()
    assert named(router)[1].policy == "least_queue"
    router.reconfigure(Knobs(policy="round_robin"))
    assert named(router)[1].policy == "round_robin"


def test_a_board_made_anew_is_followed(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    """A router whose board was replaced opens the new one and names who is there."""
    monkeypatch.setattr(route_service, "_BOARD_CHECK_EVERY_S", 0.001)
    house.replica("old")
    router = house.router()
    assert named(router)[0] == "old"
    house.path.unlink()
    house.board = Board.open(house.path)
    house.slots.clear()
    house.replica("new")

    async def follow() -> None:
        await router.start()
        async with asyncio.timeout(10):
            while router._board.replaced():
                await asyncio.sleep(0.001)

    house.run(follow())
    assert named(router)[0] == "new"
    assert house.board.router_rows() == 1


def test_rows_run_out_by_name(house: House) -> None:
    """More routers than rows: the next is refused when it starts, and those there go on."""
    routers = [house.router() for _ in range(ROUTER_ROWS)]
    with pytest.raises(RuntimeError, match="router rows"):
        house.router()
    house.replica("a")
    assert named(routers[-1])[0] == "a"


# --- requests that wait ---

AWARE = Knobs(policy="gpu_aware", seed=1, queue_deadline_s=30.0)


def make_room(slot: SlotWriter) -> None:
    slot.fields.in_flight_requests = slot.fields.in_flight_tokens = 0
    slot.publish(NOW_S)


def test_a_request_waits_until_a_replica_has_room(house: House) -> None:
    """Nobody has room: the answer comes when somebody has, and names that replica."""
    slot = house.full_replica("a")
    router = house.router(AWARE)

    async def wait() -> tuple[int, bytes]:
        await router.start()
        future = router.route(BODY)
        assert isinstance(future, asyncio.Future)
        await asyncio.sleep(0.02)
        assert not future.done()
        assert router.waiting == 1
        make_room(slot)
        return await asyncio.wait_for(future, 10)

    status, answer = house.run(wait())
    assert (status, as_haproxy_reads(answer)[0]) == (200, "a")
    assert (router.waiting, house.seen()["a"].on_the_way_requests) == (0, 1)


def test_a_request_that_waited_too_long_is_turned_away(house: House) -> None:
    """At the deadline a waiting request gets a ticket that says 429."""
    house.full_replica("a")
    router = house.router(AWARE)

    async def wait() -> tuple[int, bytes]:
        await router.start()
        future = router.route(BODY)
        assert isinstance(future, asyncio.Future)
        house.now_s += AWARE.queue_deadline_s
        house.slots[0].publish(house.now_s)
        return await asyncio.wait_for(future, 10)

    _, answer = house.run(wait())
    ticket = Ticket.decode(as_haproxy_reads(answer)[1][HEADER])
    assert (ticket.status, ticket.reason) == (429, "queue_deadline")
    assert router.waiting == 0


def test_a_client_that_hangs_up_leaves_the_queue(house: House) -> None:
    """HAProxy closes the connection of a waiting request: its place is free and nothing is counted."""
    house.full_replica("a")
    router = house.router(AWARE)
    sent: list[Any] = []
    messages: list[dict[str, Any]] = [{"type": "http.request", "body": BODY}, {"type": "http.disconnect"}]

    async def receive() -> dict[str, Any]:
        if len(messages) == 1:
            assert router.waiting == 1
        return messages.pop(0)

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/internal/route", "headers": []}

    async def exchange() -> None:
        await router.start()
        await asyncio.wait_for(router(scope, receive, send), 10)
        await asyncio.sleep(0)

    house.run(exchange())
    assert (router.waiting, router._waiting, sent[0]["status"]) == (0, {}, 503)
    assert house.seen()["a"].on_the_way_requests == 0


# --- as an ASGI application ---


def over_http(house: House, router: RouteService, ask: Callable[[httpx.AsyncClient], Any]) -> httpx.Response:
    async def exchange() -> httpx.Response:
        transport = httpx.ASGITransport(app=router)
        async with httpx.AsyncClient(transport=transport, base_url="http://router") as client:
            answer: httpx.Response = await ask(client)
            return answer

    return house.run(exchange())


def test_it_answers_over_http(house: House) -> None:
    """`POST /internal/route` is answered with JSON of the stated length."""
    house.replica("a")
    answer = over_http(house, house.router(), lambda client: client.post("/internal/route", content=BODY))
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "application/json"
    assert int(answer.headers["content-length"]) == len(answer.content)
    assert answer.json()["replica_id"] == "a"


@pytest.mark.parametrize(("method", "path"), [("GET", "/internal/route"), ("POST", "/"), ("POST", "/v1/completions")])
def test_anything_else_is_not_found(house: House, method: str, path: str) -> None:
    """Other paths and methods are 404, and no request is counted."""
    house.replica("a")
    answer = over_http(house, house.router(), lambda client: client.request(method, path))
    assert answer.status_code == 404
    assert house.seen()["a"].on_the_way_requests == 0


def test_a_body_in_pieces_is_read_whole(house: House) -> None:
    """A body that comes in several messages costs what its whole length costs."""
    house.replica("a")
    router = house.router()

    async def pieces() -> Any:
        for _ in range(4):
            yield b"x" * 4000

    over_http(house, router, lambda client: client.post("/internal/route", content=pieces()))
    in_pieces = house.seen()["a"].on_the_way_tokens
    over_http(house, router, lambda client: client.post("/internal/route", content=b"x" * 16000))
    assert house.seen()["a"].on_the_way_tokens == 2 * in_pieces


def test_it_starts_and_stops_as_asgi_servers_ask(house: House) -> None:
    """The lifespan messages are answered in kind."""
    sent: list[str] = []
    messages = ["lifespan.startup", "lifespan.shutdown"]

    async def receive() -> dict[str, Any]:
        return {"type": messages.pop(0)}

    async def send(message: Any) -> None:
        sent.append(message["type"])

    house.run(house.router()({"type": "lifespan"}, receive, send))
    assert sent == ["lifespan.startup.complete", "lifespan.shutdown.complete"]


ALICE, BOB = "alice-" + "a" * 32, "bob-" + "b" * 32


def guarded(house: House, text: str) -> RouteService:
    keys = parse_keys(text, Limits())
    access = Access(lambda: keys, lambda: house.now_s)
    house.routers.append(RouteService(house.path, KNOBS, lambda: house.now_s, access=access))
    return house.routers[-1]


def shown(secret: str, concurrent: int = 1) -> Hint:
    return Hint.decode(f"authorization=Bearer%20{secret}&concurrent={concurrent}")


def ticket_for(router: RouteService, hint: Hint, body: bytes = BODY) -> Ticket:
    answer = router.route(body, hint)
    assert isinstance(answer, tuple)
    return Ticket.decode(as_haproxy_reads(answer[1])[1][HEADER])


def test_a_client_without_a_valid_key_gets_a_401_ticket_and_takes_no_place(house: House) -> None:
    """Nothing is on its way for it, nothing waits, and it is counted under its reason."""
    house.replica("a")
    router = guarded(house, f"alice {ALICE}")
    for hint in (shown("wrong"), Hint.decode("authorization=&api_key=")):
        ticket = ticket_for(router, hint)
        assert (ticket.status, ticket.reason) == (401, "invalid_api_key")
    assert house.seen()["a"].on_the_way_requests == 0
    assert ticket_for(router, shown(ALICE)).status == 200
    assert ticket_for(router, Hint.decode(f"api_key={ALICE}")).status == 200
    assert house.seen()["a"].on_the_way_requests == 2


def test_each_key_has_its_own_rates_and_requests_at_once(house: House) -> None:
    """Refused with 429 and when to come back, before the queue; others go on."""
    slot = house.replica("a")
    router = guarded(house, f"alice {ALICE} requests_per_minute=2; bob {BOB} concurrent=3 tokens_per_minute=500")
    assert [ticket_for(router, shown(ALICE)).status for _ in range(3)] == [200, 200, 429]
    assert ticket_for(router, shown(ALICE)).retry_after_s == pytest.approx(30.0)
    assert ticket_for(router, shown(BOB, concurrent=4)).reason == "too_many_at_once"
    costly = b'{"model": "demo", "prompt": "x", "max_tokens": 400}'
    assert [ticket_for(router, shown(BOB, 3), costly).reason for _ in range(2)] == ["least_queue", "token_rate"]
    house.now_s += 30.0
    slot.publish(house.now_s)
    assert ticket_for(router, shown(ALICE)).status == 200


def test_parts_of_the_system_need_no_key_at_the_router(house: House) -> None:
    """Only HAProxy composes hints, for clients; whoever asks without one is on this machine's loopback."""
    house.replica("a")
    router = guarded(house, f"alice {ALICE}")
    assert named(router)[1].status == 200


BATCH = json.dumps({"model": "demo", "prompt": ["Once upon a time"] * 8, "n": 2, "max_tokens": 10}).encode()


def test_a_batch_is_managed_by_the_idlest_replica_and_takes_no_place(house: House) -> None:
    """Its ticket promises nothing and nothing is on its way; it tells where the parts ask for a place."""
    house.replica("busy").fields.in_flight_requests = 3
    house.slots[0].publish(NOW_S)
    house.replica("idle")
    router = house.router(AWARE, split_from=8)
    scope = {"type": "http", "method": "POST", "path": "/internal/route", "headers": [], "server": ("127.0.0.1", 321)}
    answer = house.run(posted(router, scope, BATCH))
    replica, headers = as_haproxy_reads(answer)
    ticket = Ticket.decode(headers[HEADER])
    assert (replica, headers[ROUTER_HEADER]) == ("idle", "127.0.0.1:321")
    assert (ticket.sequences, ticket.tokens, ticket.row, ticket.status) == (0, 0, -1, 200)
    assert house.seen()["idle"].on_the_way_requests == 0


async def posted(router: RouteService, scope: dict[str, Any], body: bytes) -> bytes:
    sent: list[Any] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": body}

    async def send(message: Any) -> None:
        sent.append(message)

    await router(scope, receive, send)
    return bytes(sent[-1]["body"])


@pytest.mark.parametrize(
    ("hint", "split_from"),
    [(Hint(), 9), (Hint(), 0), (Hint(path="/v1/embeddings"), 8), (Hint(part=True), 8)],
    ids=["below the threshold", "switched off", "another interface", "a part"],
)
def test_what_is_not_split_is_weighed_as_a_whole(house: House, hint: Hint, split_from: int) -> None:
    """Every sequence of it takes a place of its own on the board, at once and until it arrives."""
    house.replica("a")
    status, answer = house.router(split_from=split_from).route(BATCH, hint)  # type: ignore[misc]
    ticket = Ticket.decode(as_haproxy_reads(answer)[1][HEADER])
    assert (status, ticket.sequences, ticket.output_tokens) == (200, 16, 160)
    reading = house.seen()["a"]
    assert (reading.on_the_way_requests, reading.on_the_way_tokens) == (16, ticket.tokens)


def test_who_asks_learns_where_the_replica_listens(house: House) -> None:
    """Whoever brings a part there by itself, and a HAProxy that was replaced and knows no later replica."""
    house.replica("app#Replica#a")
    router = house.router(split_from=8)
    router._reachable = {"app-Replica-a": "127.0.0.1:30001"}
    addresses = [json.loads(router.route(BODY, hint)[1]).get("address") for hint in (Hint(part=True), Hint())]  # type: ignore[index]
    assert addresses == ["127.0.0.1:30001", "127.0.0.1:30001"]


def test_parts_with_one_beginning_are_spread_all_the_same(house: House) -> None:
    """Ordinary requests are drawn to where their prefix is cached; parts of a batch are not."""
    for name in ("a", "b"):
        slot = house.replica(name)
        slot.fields.kv_blocks_total, slot.fields.kv_block_tokens, slot.fields.max_running_requests = 1000, 16, 64
        slot.publish(NOW_S)
    router = house.router(Knobs(policy="gpu_aware", seed=3, active_set=2), split_from=8)
    part = json.dumps({"prompt": ["You are helpful. " * 40] * 4, "max_tokens": 10}).encode()
    named = [json.loads(router.route(part, Hint(part=True))[1])["replica_id"] for _ in range(6)]  # type: ignore[index]
    assert (named.count("a"), named.count("b")) == (3, 3)


def test_files_and_batches_are_nobodys_work(house: House) -> None:
    """An upload is managed by a replica, whatever bytes it has, also when no KV cache is free anywhere."""
    house.full_replica("a")
    status, answer = house.router(AWARE).route(b"--form", Hint(path="/v1/files"))  # type: ignore[misc]
    assert (status, Ticket.decode(as_haproxy_reads(answer)[1][HEADER]).sequences) == (200, 0)


def test_without_a_ready_replica_a_batch_is_turned_away_like_any_request(house: House) -> None:
    """503 in the ticket, spoken by whatever replica there is."""
    house.replica("a", state=ReplicaState.STARTING)
    status, answer = house.router(AWARE, split_from=8).route(BATCH)  # type: ignore[misc]
    assert (status, Ticket.decode(as_haproxy_reads(answer)[1][HEADER]).status) == (200, 503)
