"""The door in front of vLLM's application: who may pass, what is counted, and that every way out is counted once."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from balancer import ledger
from balancer.board import ROUTER_ROWS, Board
from balancer.readings import ReplicaReading
from balancer.ticket import DIRECT, HEADER, Ticket
from deployments.middleware import Door
from deployments.routes import PROBE_PATH
from deployments.slot import Slot

ASSIGNED = Ticket("gpu_aware", "shortest_wait", row=2, tokens=40)
ESTIMATED = Ticket("gpu_aware", "shortest_wait", row=2, tokens=40, output_tokens=25)
App = Callable[[Any, Any, Any], Awaitable[None]]


class Place:
    """A slot on a board of its own, and doors before it."""

    def __init__(self, path: Path) -> None:
        self.path, self.now_s = path, 7.0
        self.slot = Slot(path, "app#Replica#x1", 0, lambda: self.now_s)
        self.board = Board.open(path)
        self.busiest = 0

    def door(self, app: App, tickets_required: bool = True) -> Door:
        return Door(app, self.slot, "x1", "least_queue", tickets_required)

    def seen(self) -> ReplicaReading:
        (reading,) = self.board.snapshot(self.now_s).replicas
        return reading

    def counts(self) -> tuple[int, int, int, int]:
        r = self.seen()
        return r.received_total, r.finished_total, r.in_flight_requests, r.in_flight_tokens

    async def app(self, scope: Any, receive: Any, send: Any) -> None:
        """Stands for vLLM: notes what the board says while it works, and echoes the body."""
        self.busiest = max(self.busiest, self.seen().in_flight_requests)
        if scope["type"] == "http":
            body = (await receive())["body"]
            await send({"type": "http.response.start", "status": 200, "headers": [(b"x-own", b"1")]})
            await send({"type": "http.response.body", "body": body, "more_body": True})
            await send({"type": "http.response.body", "body": b""})


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    """Afterwards nothing is in flight, and the board's file is gone with the slot."""
    folder = tmp_path / "shm"
    folder.mkdir()
    place = Place(folder / "board")
    yield place
    assert place.counts()[2:] == (0, 0)
    place.slot.close()
    place.board.leave()
    assert not list(folder.iterdir())


def ask(door: Door, method: str = "POST", path: str = "/v1/completions", **headers: str) -> httpx.Response:
    named = {HEADER if name == "ticket" else name: value for name, value in headers.items()}

    async def exchange() -> httpx.Response:
        transport = httpx.ASGITransport(app=door)
        async with httpx.AsyncClient(transport=transport, base_url="http://replica") as client:
            return await client.request(method, path, content=b"hello", headers=named)

    return asyncio.run(exchange())


def test_a_request_with_a_ticket_is_served_counted_and_signed(place: Place) -> None:
    """vLLM's own answer comes back, with who served it and which policy sent it; the router's row is credited."""
    answer = ask(place.door(place.app), ticket=ASSIGNED.encode())
    assert (answer.status_code, answer.content, answer.headers["x-own"]) == (200, b"hello", "1")
    assert answer.headers["x-splitwiser-replica"] == "x1"
    assert answer.headers["x-splitwiser-policy"] == "gpu_aware"
    assert (place.busiest, place.counts()) == (1, (1, 1, 0, 0))
    assert place.seen().received_by_router == tuple(int(row == 2) for row in range(ROUTER_ROWS))


def test_while_it_is_answered_its_tokens_are_in_flight(place: Place) -> None:
    """The tokens that the router expects count as long as the request does."""
    during: list[tuple[int, int, int, int]] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        during.append(place.counts())
        await place.app(scope, receive, send)

    ask(place.door(app), ticket=ASSIGNED.encode())
    assert during == [(1, 0, 1, 40)]


def answered(place: Place, usage: object, ticket: Ticket = ESTIMATED) -> tuple[int, int, int]:
    """What the slot says of predictions, after an answer of which vLLM reported `usage`."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        scope["state"]["request_metadata"] = SimpleNamespace(final_usage_info=usage)
        await place.app(scope, receive, send)

    assert ask(place.door(app), ticket=ticket.encode()).status_code == 200
    r = place.seen()
    return r.predicted_tokens_total, r.answered_tokens_total, r.estimate_error_tokens_total


def test_a_whole_answer_is_compared_with_its_prediction(place: Place) -> None:
    """vLLM reports the tokens of all sequences together, and the router predicted them together."""
    assert answered(place, SimpleNamespace(completion_tokens=17)) == (25, 17, 8)


@pytest.mark.parametrize(
    ("usage", "ticket"),
    [
        (None, ESTIMATED),
        (SimpleNamespace(completion_tokens=None), ESTIMATED),
        (SimpleNamespace(completion_tokens=17), ASSIGNED),
    ],
)
def test_what_was_cut_off_or_never_predicted_is_not_compared(place: Place, usage: object, ticket: Ticket) -> None:
    """An answer that did not come to its end says nothing of how long it would have been."""
    assert answered(place, usage, ticket) == (0, 0, 0)


@pytest.mark.parametrize(
    ("status", "delay_s", "retry_after", "kind"),
    [
        (429, 2.2, "3", "rate_limit_exceeded"),
        (429, 0.0, "1", "rate_limit_exceeded"),
        (503, 1.0, "1", "service_unavailable"),
        (413, 5.0, "5", "invalid_request_error"),
    ],
)
def test_a_refusal_is_spoken_as_openai_does(
    place: Place, status: int, delay_s: float, retry_after: str, kind: str
) -> None:
    """What the router turned away gets its status, Retry-After in whole seconds, and an OpenAI error body."""
    ticket = Ticket("gpu_aware", "queue_full", status=status, retry_after_s=delay_s)
    answer = ask(place.door(place.app), ticket=ticket.encode())
    assert (answer.status_code, answer.headers["retry-after"]) == (status, retry_after)
    error = answer.json()["error"]
    assert (error["code"], error["type"], error["param"]) == ("queue_full", kind, None)
    assert error["message"]
    assert answer.headers["x-splitwiser-policy"] == "gpu_aware"
    assert (place.busiest, place.counts()) == (0, (0, 0, 0, 0))


@pytest.mark.parametrize("ticket", ["", "garbage", "a b 99 1 200 0.0 0", "a b 0 -5 200 0.0 0"])
def test_without_a_routers_ticket_nobody_passes_behind_haproxy(place: Place, ticket: str) -> None:
    """A POST that slipped past the router, or with a ticket that no router writes, is asked to come back."""
    headers = {"ticket": ticket} if ticket else {}
    answer = ask(place.door(place.app), **headers)
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
    assert answer.json()["error"]["code"] == "starting"
    assert (place.busiest, place.counts()) == (0, (0, 0, 0, 0))


@pytest.mark.parametrize("ticket", ["", "garbage", "a b 99 1 200 0.0 0"])
def test_without_haproxy_no_ticket_is_needed(place: Place, ticket: str) -> None:
    """Behind Serve's own proxy the policy is named from the configuration, and a forged ticket does no harm."""
    headers = {"ticket": ticket} if ticket else {}
    answer = ask(place.door(place.app, tickets_required=False), **headers)
    assert (answer.status_code, answer.headers["x-splitwiser-policy"]) == (200, "least_queue")
    assert place.counts() == (1, 1, 0, 0)
    assert sum(place.seen().received_by_router) == 0


def test_a_replica_can_be_asked_directly(place: Place) -> None:
    """The header's word for 'straight to this replica' passes, and is named as such."""
    answer = ask(place.door(place.app), ticket=DIRECT.policy)
    assert (answer.status_code, answer.headers["x-splitwiser-policy"]) == (200, "direct")


@pytest.mark.parametrize("method", ["GET", "HEAD", "OPTIONS"])
def test_what_is_no_post_passes_uncounted(place: Place, method: str) -> None:
    """Lists of models and health checks need no ticket, are signed, and are no work for the engine."""
    answer = ask(place.door(place.app), method=method, path="/v1/models")
    assert (answer.status_code, answer.headers["x-splitwiser-replica"]) == (200, "x1")
    assert answer.headers["x-splitwiser-policy"] == "none"
    assert place.counts() == (0, 0, 0, 0)


def test_a_probe_is_answered_without_the_engine(place: Place) -> None:
    """The readiness probe learns whom it reached; anything else with the probe's mark is refused."""
    probe = Ticket("probe", "probe", probe=True).encode()
    answer = ask(place.door(place.app), path=PROBE_PATH, ticket=probe)
    assert (answer.status_code, answer.json()) == (200, {"replica": "x1"})
    assert ask(place.door(place.app), path="/v1/completions", ticket=probe).status_code == 400
    assert place.busiest == 0


def test_other_protocols_pass_untouched(place: Place) -> None:
    """Lifespan and websocket messages go to vLLM's application as they are."""
    scopes: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        scopes.append((scope, receive, send))

    receive, send = object(), object()
    asyncio.run(place.door(app)({"type": "websocket"}, receive, send))  # type: ignore[arg-type]
    assert scopes == [({"type": "websocket"}, receive, send)]


def test_an_exception_in_the_application_is_counted_out(place: Place) -> None:
    """When vLLM's application raises, the client is told as OpenAI would, and the request is no longer in flight."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        raise KeyError("broken")

    answer = ask(place.door(app), ticket=ASSIGNED.encode())
    assert (answer.status_code, answer.json()["error"]["code"]) == (500, "engine_error")
    assert place.counts() == (1, 1, 0, 0)


@pytest.mark.parametrize("status", [200, 429])
@pytest.mark.parametrize("stop_at", range(6))
@pytest.mark.parametrize("how", ["cancelled", "broken pipe"])
def test_a_client_that_leaves_at_any_moment_is_counted_out(place: Place, status: int, stop_at: int, how: str) -> None:
    """Cancelled, or with its connection broken, at each point where the door waits: received once, finished once, or
    turned away and neither; no place stays taken."""
    ticket = Ticket("gpu_aware", "any", row=1, tokens=9, status=status)
    headers = [(HEADER.encode(), ticket.encode().encode())]
    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": headers}
    awaits = 0

    async def pause() -> None:
        nonlocal awaits
        awaits += 1
        if awaits > stop_at:
            if how == "broken pipe":
                raise BrokenPipeError
            await asyncio.Event().wait()

    async def receive() -> dict[str, Any]:
        await pause()
        return {"type": "http.request", "body": b"x"}

    async def send(message: Any) -> None:
        await pause()

    async def leave() -> None:
        task = asyncio.create_task(place.door(place.app)(scope, receive, send))
        for _ in range(20):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    asyncio.run(leave())
    assert place.counts() == (*[int(ticket.served)] * 2, 0, 0)
    totals = ledger.read(place.path)
    assert (totals.open, sum(totals.ends)) == (0, 1)
    assert place.seen().received_by_router[1] == 1


def test_many_at_once_are_counted_exactly(place: Place) -> None:
    """Fifty requests that overlap are fifty in flight, and none afterwards."""

    async def crowd() -> None:
        gate, inside = asyncio.Event(), 0

        async def app(scope: Any, receive: Any, send: Any) -> None:
            nonlocal inside
            inside += 1
            await gate.wait()
            await place.app(scope, receive, send)

        transport = httpx.ASGITransport(app=place.door(app))
        async with httpx.AsyncClient(transport=transport, base_url="http://replica") as client:
            headers = {HEADER: ASSIGNED.encode()}
            tasks = [asyncio.create_task(client.post("/v1/completions", headers=headers)) for _ in range(50)]
            async with asyncio.timeout(20):
                while inside < 50:
                    await asyncio.sleep(0)
            assert place.counts() == (50, 0, 50, 2000)
            gate.set()
            answers = await asyncio.gather(*tasks)
        assert {answer.status_code for answer in answers} == {200}

    asyncio.run(crowd())
    assert place.counts() == (50, 50, 0, 0)


def test_bodies_are_json_of_the_stated_length(place: Place) -> None:
    """The door's own answers say how long they are and can be parsed."""
    answer = ask(place.door(place.app))
    assert int(answer.headers["content-length"]) == len(answer.content)
    assert json.loads(answer.content)["error"]["message"]


def test_a_closed_door_says_why_and_still_counts(place: Place) -> None:
    """When the engine behind it is lost, every POST gets an OpenAI error that says so; probes and others still pass."""
    door = place.door(place.app)
    door.close("a fatal GPU error in process 7")
    answer = ask(door, ticket=ASSIGNED.encode())
    assert answer.status_code == 503
    assert answer.json()["error"]["code"] == "replica_lost"
    assert answer.json()["error"]["message"].startswith("a fatal GPU error in process 7")
    assert int(answer.headers["retry-after"]) >= 1
    assert ask(door, method="GET", path="/health").status_code == 200
    assert place.counts() == (1, 1, 0, 0)


def test_what_is_only_managed_here_is_not_counted_as_work(place: Place) -> None:
    """A batch that will be split goes to its manager, signed like the rest; its parts are counted where they run."""
    managed: list[str] = []

    async def manager(scope: Any, receive: Any, send: Any) -> None:
        managed.append(scope["path"])
        await place.app(scope, receive, send)

    door = Door(place.app, place.slot, "x1", "least_queue", tickets_required=True, managed=manager)
    answer = ask(door, ticket=Ticket("gpu_aware", "managed", sequences=0).encode())
    assert (answer.status_code, answer.headers["x-splitwiser-policy"]) == (200, "gpu_aware")
    assert managed == ["/v1/completions"]
    assert (place.busiest, place.counts()) == (0, (0, 0, 0, 0))
    refused = ask(door, ticket=Ticket("gpu_aware", "full", status=429, sequences=0).encode())
    assert (refused.status_code, len(managed)) == (429, 1)
    door.close("the engine is lost")
    assert ask(door, ticket=Ticket("gpu_aware", "managed", sequences=0).encode()).status_code == 503
    assert len(managed) == 1


def test_without_haproxy_nobody_can_have_a_request_managed(place: Place) -> None:
    """Serve's own proxy strips no header: a forged ticket must neither reach the manager nor go uncounted."""

    async def manager(scope: Any, receive: Any, send: Any) -> None:
        raise AssertionError

    door = Door(place.app, place.slot, "x1", "least_queue", tickets_required=False, managed=manager)
    assert ask(door, ticket=Ticket("gpu_aware", "managed", sequences=0).encode()).status_code == 200
    assert place.counts() == (1, 1, 0, 0)
