"""The route service when something is wrong: its ledger, its view of health, its end."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from typing import Any

import pytest

from balancer import hung_up, ledger, stopping
from balancer.counters import EJECTIONS, REJECTIONS, CountersReader, RouterTotals
from balancer.health import ERRORS_IN_A_ROW
from balancer.hint import Hint
from balancer.knobs import Knobs
from balancer.readings import ReplicaState
from balancer.route_service import Answer, RouteService
from balancer.ticket import HEADER, Ticket
from tests.balancer.test_route_service import BODY, House, as_haproxy_reads, at_once, house, named

__all__ = ["house"]  # the fixture
AWARE = Knobs(policy="gpu_aware", seed=1)


def counted(house: House, what: Callable[[RouterTotals], int], number: int) -> bool:
    """Whether the router's counters come to say so: it publishes them fifty times a second."""

    async def wait() -> bool:
        async with asyncio.timeout(20.0):
            while what(CountersReader(house.path).read()) != number:
                await asyncio.sleep(0.01)
        return True

    return house.run(wait())


def ticket_of(answer: Answer) -> Ticket:
    return Ticket.decode(as_haproxy_reads(answer[1])[1][HEADER])


def queued(house: House, router: RouteService, hint: Hint = Hint()) -> asyncio.Future[Answer]:  # noqa: B008
    async def ask() -> asyncio.Future[Answer]:
        answer = router.route(BODY, hint)
        assert isinstance(answer, asyncio.Future)
        return answer

    return house.run(ask())


async def within(future: asyncio.Future[Answer], seconds: float = 20.0) -> Answer:
    return await asyncio.wait_for(asyncio.shield(future), seconds)


def test_the_ledger_follows_a_request_through_the_router(house: House) -> None:
    """Handed over to a replica, refused through one, or refused for want of one: entered once each."""
    router = house.router(AWARE)
    assert at_once(router)[0] == 503
    assert ledger.read(house.path) == ledger.Totals(entered=1, rejected=1)
    house.replica("a")
    named(router)
    found = ledger.read(house.path)
    assert (found.entered, found.on_the_way, found.rejected) == (2, 1, 1)


def test_a_ticket_names_its_replica_and_the_time_in_the_queue(house: House) -> None:
    """So that another replica knows that it was not meant, and the client's own time counts the queue."""
    slot = house.full_replica("a")
    router = house.router(AWARE)
    house.run(router.start())
    future = queued(house, router)
    slot.fields.in_flight_requests = slot.fields.in_flight_tokens = 0
    house.now_s += 1.5
    slot.publish(house.now_s)
    ticket = ticket_of(house.run(within(future)))
    assert (ticket.status, ticket.slot, ticket.waited_s) == (200, slot.index, 1.5)
    assert ticket.routed


def test_five_errors_in_a_row_keep_a_replica_out(house: House) -> None:
    """The other gets everything, and the ejection is counted by its reason."""
    bad = house.replica("bad")
    house.replica("good")
    router = house.router()
    bad.fields.server_errors_in_a_row = ERRORS_IN_A_ROW
    bad.publish(house.now_s)
    assert {named(router)[0] for _ in range(8)} == {"good"}
    ejections = dict(zip(EJECTIONS, CountersReader(house.path).read().ejections, strict=True))
    assert ejections == {**dict.fromkeys(EJECTIONS, 0), "errors": 1}


def test_a_refusal_is_spoken_even_by_a_replica_that_is_out(house: House) -> None:
    """Its engine errs, but its door can still say no."""
    slot = house.replica("only", state=ReplicaState.FAILED)
    assert ticket_of(at_once(house.router(AWARE))).reason == "no_replica_ready"
    assert slot.index == 0


def test_once_asked_to_stop_nothing_new_is_admitted_and_what_waits_is_served(house: House) -> None:
    """New requests get 503 `stopping`; one that was queued before is still assigned."""
    slot = house.full_replica("a")
    router = house.router(AWARE)
    house.run(router.start())
    future = queued(house, router)
    stopping.ask(house.path, house.now_s + 100.0)

    async def refused() -> Ticket:
        while True:
            answer = router.route(BODY)
            if isinstance(answer, tuple):
                return ticket_of(answer)
            answer.cancel()
            await asyncio.sleep(0.01)

    ticket = house.run(asyncio.wait_for(refused(), 20.0))
    assert (ticket.status, ticket.reason) == (503, "stopping")
    assert CountersReader(house.path).read().rejections[REJECTIONS.index("stopping")] >= 1
    slot.fields.in_flight_requests = slot.fields.in_flight_tokens = 0
    slot.publish(house.now_s)
    assert ticket_of(house.run(within(future))).status == 200
    stopping.stopping_path(house.path).unlink()


def test_a_clients_own_time_ends_its_wait(house: House) -> None:
    """A 504 by its own code, counted as such; others go on waiting."""
    house.full_replica("a")
    router = house.router(AWARE)
    house.run(router.start())
    patient = queued(house, router)
    hasty = queued(house, router, Hint(timeout_s=0.02))
    ticket = ticket_of(house.run(within(hasty)))
    assert (ticket.status, ticket.reason) == (504, "client_timeout")
    assert counted(house, lambda totals: totals.rejections[REJECTIONS.index("client_timeout")], 1)
    assert router.waiting == 1
    patient.cancel()
    house.run(asyncio.sleep(0))


def test_a_queued_client_that_hangs_up_gives_its_place_back(house: House) -> None:
    """HAProxy does not tell while its script waits; the kernel does, and the request ends as cancelled."""
    house.full_replica("a")
    router = house.router(AWARE)
    house.run(router.start())
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        client = socket.create_connection(listener.getsockname())
        haproxys_side, address = listener.accept()
        gone = queued(house, router, Hint(client=hung_up.name(*address)))
        stays = queued(house, router, Hint(client="127.0.0.1:1"))
        client.close()
        assert house.run(within(gone))[0] == 503
        haproxys_side.close()
    assert (router.waiting, stays.done()) == (1, False)
    found = ledger.read(house.path)
    assert (found.cancelled, found.open) == (1, 1)
    assert counted(house, lambda totals: totals.cancelled, 1)
    stays.cancel()
    house.run(asyncio.sleep(0))


@pytest.mark.parametrize("how", ["hang-up", "cancelled by Serve"])
def test_a_hang_up_that_haproxy_tells_of_is_counted_once(house: House, how: str) -> None:
    """As a disconnect message, or as the cancellation that Serve makes of it, whichever comes first."""
    house.full_replica("a")
    router = house.router(AWARE)
    house.run(router.start())
    scope = {"type": "http", "method": "POST", "path": "/internal/route", "headers": []}
    messages: asyncio.Queue[Any] = asyncio.Queue()
    messages.put_nowait({"type": "http.request", "body": BODY})

    async def send(message: Any) -> None:
        pass

    async def leave() -> None:
        task = asyncio.create_task(router(scope, messages.get, send))
        while not router.waiting:
            await asyncio.sleep(0.001)
        if how == "hang-up":
            messages.put_nowait({"type": "http.disconnect"})
        else:
            task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    house.run(leave())
    assert router.waiting == 0
    found = ledger.read(house.path)
    assert (found.entered, found.cancelled, found.open) == (1, 1, 0)
    assert counted(house, lambda totals: totals.cancelled, 1)


def test_a_router_that_stops_refuses_what_waits(house: House) -> None:
    """Nothing is left open in its page."""
    house.full_replica("a")
    router, other = house.router(AWARE), house.router(AWARE)
    future = queued(house, router)
    house.run(router.close())
    house.routers.remove(router)
    assert house.run(within(future))[0] == 503
    found = ledger.read(house.path)
    assert (found.entered, found.rejected, found.open) == (1, 1, 0)
    assert other.waiting == 0
