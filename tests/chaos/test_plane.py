"""The fast form of `benchmarks.chaos`: the same scenarios with few requests, and each fault of a stand-in by itself."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

import aiohttp
import pytest

from balancer import ledger
from balancer.knobs import Knobs
from benchmarks import chaos
from benchmarks.plane import Plane
from deployments.limits import Limits

pytestmark = pytest.mark.timeout(280)


def run(what: Awaitable[Any]) -> Any:
    async def bounded() -> Any:
        async with asyncio.timeout(250):
            return await what

    return asyncio.run(bounded())


async def post(session: aiohttp.ClientSession, plane: Plane, **wish: Any) -> tuple[int, str]:
    """Status and body; status 0 and what came when the connection was cut."""
    text = b""
    try:
        async with session.post(f"{plane.url}/v1/completions", json={"prompt": "x", **wish}) as answer:
            async for piece in answer.content.iter_any():
                text += piece
            return answer.status, text.decode()
    except aiohttp.ClientError:
        return 0, text.decode()


async def died(plane: Plane) -> int:
    """How many replicas are dead, once their deaths had the time to be noticed."""
    await asyncio.sleep(1.0)
    return sum(not worker.alive for worker in plane.replicas)


def error_of(text: str) -> dict[str, Any]:
    return dict(json.loads(text.strip().rpartition("\n")[2].removeprefix("data: "))["error"])


def metrics_stood(figures: dict[str, Any]) -> None:
    """`/metrics` was read all the while, and showed the same number of series each time."""
    assert figures["scrapes"] > 0
    assert len(set(figures["scraped_series"])) == 1


def test_a_storm_with_killed_replicas_loses_no_request() -> None:
    """1.5 times capacity, hang-ups, long streams, kills: both ledgers agree, and nothing is left in flight."""
    figures = run(chaos.storm_with_kills(600, 1.0))
    assert figures["lost"] == 0
    assert figures["kills"] > 0
    assert figures["client_completed"] > 0
    metrics_stood(figures)


def test_clients_that_hang_up_queued_and_running_free_their_places() -> None:
    """Within a second, beside neighbours whose streams end whole."""
    figures = run(chaos.hang_ups(100))
    assert figures["neighbours_completed"] == 8
    assert figures["freed_s"] < 1.0
    assert figures["cancelled"] + figures["left_on_the_way"] == figures["entered"]


def test_under_overload_who_is_refused_is_told_and_who_is_held_finishes() -> None:
    """Ten times capacity: every request is answered, completed or refused, and nothing fails."""
    figures = run(chaos.overload(4.0))
    assert figures["lost"] == figures["server_failed"] == 0
    assert figures["client_rejected"] > figures["client_completed"] > 0
    metrics_stood(figures)


def test_a_stopped_process_and_a_frozen_engine_leave_the_rotation_and_return() -> None:
    """SIGSTOP of a replica, and an engine that makes no step: within 10 s nothing is sent there any more."""
    figures = run(chaos.stopped_replica())
    assert figures["stopped_out_s"] < 10.0
    assert figures["frozen_out_s"] < 10.0
    metrics_stood(figures)


def test_a_killed_router_loses_no_stream() -> None:
    """What runs at the replicas goes on without it; once it is back, so does the rest."""
    figures = run(chaos.killed_router(1))
    assert figures["streams_lost"] == 0
    metrics_stood(figures)


def test_a_full_disk_costs_logs_and_no_request() -> None:
    """Errors are logged with every broken answer; when that cannot be written, the next requests are still served."""
    figures = run(chaos.full_disk())
    assert figures["replicas_alive"] == 2
    assert figures["completed"] == figures["sent"]


def test_when_every_replica_errs_nothing_is_sent_twice() -> None:
    """An answer of 500 is an answer: retries add nothing, and one replica stays in rotation to give it."""
    figures = run(chaos.every_replica_errs(60))
    assert figures["upstream_attempts"] == figures["sent"]
    assert figures["redirected"] == 0


def test_each_limit_fires_alone() -> None:
    """A replica that takes a request and is silent, and one that stalls at the fifth token, by their own codes."""
    figures = run(chaos.limits_fire(Limits(first_token_s=1.5, between_tokens_s=0.5, total_s=60.0)))
    assert {name: found["code"] for name, found in figures.items()} == {
        "hang": "first_token_timeout",
        "hang_whole": "first_token_timeout",
        "stall": "between_tokens_timeout",
    }
    assert figures["hang_whole"]["status"] == 504


def test_each_way_to_break_looks_broken() -> None:
    """No fault of a replica ever reaches the client as a whole answer, and each ends in the ledger once."""

    async def scenario() -> None:
        async with chaos.plane(replicas=2, knobs=Knobs(seed=1)) as plane, aiohttp.ClientSession() as session:
            before = plane.ledger()
            status, text = await post(session, plane, fault="error")
            assert status == 500
            for at in (0, 1, 5):
                status, text = await post(session, plane, stream=True, fault="cut", at=at)
                assert (status, error_of(text)["code"]) == (200, "engine_error")
                assert text.count('"choices"') == at
                assert "[DONE]" not in text
                status, text = await post(session, plane, stream=True, fault="event", at=at)
                assert (status, error_of(text)["code"]) == (200, 500)
                assert "[DONE]" not in text
            status, text = await post(session, plane, fault="refuse")
            assert status == 400
            status, text = await post(session, plane, fault="lie")
            assert status in (0, 500, 502), (status, text)
            await chaos.settle(plane, within_s=5.0)
            after = ledger.settled(plane.ledger())
            assert after.entered - before.entered == 9
            assert after.rejected - before.rejected == 1
            assert after.failed - before.failed >= 7

    run(scenario())


def test_a_poison_prompt_kills_one_replica_and_not_the_next() -> None:
    """Whoever takes it dies; it is not sent to another, before its first byte or after, and others are served."""

    async def scenario() -> None:
        async with chaos.plane(replicas=3, knobs=Knobs(seed=1)) as plane, aiohttp.ClientSession() as session:
            before = plane.ledger()
            status, text = await post(session, plane, fault="die")
            assert status in (0, 502), (status, text)
            assert await died(plane) == 1
            status, text = await post(session, plane, stream=True, fault="die", at=3)
            assert status == 0
            assert "[DONE]" not in text
            assert await died(plane) == 2
            await asyncio.sleep(3.0)  # two of three are dead: the one retry may meet the other until both are stale
            answers = [await post(session, plane, max_tokens=2) for _ in range(10)]
            assert {status for status, _ in answers} == {200}
            await chaos.settle(plane, within_s=8.0)
            after = ledger.settled(plane.ledger())
            assert (after.completed - before.completed, after.failed - before.failed) == (10, 2)

    run(scenario())


def test_what_could_not_be_delivered_goes_to_another_replica_once() -> None:
    """A request assigned to a replica that just died is served elsewhere, and counted as redirected."""

    async def scenario() -> None:
        async with chaos.plane(replicas=2, knobs=Knobs(seed=1, stale_after_s=60.0)) as plane:
            await plane.kill(0)
            async with aiohttp.ClientSession() as session:
                answers = [await post(session, plane, max_tokens=2) for _ in range(3)]
            assert {status for status, _ in answers} == {200}
            assert ledger.settled(plane.ledger()).completed == 3

    run(scenario())


@pytest.mark.parametrize(
    ("header", "kept"),
    [("my-own.id:7", True), ("x" * 128, True), ("x" * 129, False), ("a b", False), ("a,b", False), ("é", False)],
)
def test_a_request_id_travels_or_is_replaced(one: Callable[..., Any], header: str, kept: bool) -> None:
    """The engine answers under the id that the client reads in the header."""
    given, engines = one(header)
    assert given == engines
    assert (given == header) is kept
    assert 0 < len(given) <= 128


@pytest.fixture(scope="module")
def one() -> Callable[..., Any]:
    """Send ids to one plane and remember what came back."""
    sent = ["my-own.id:7", "x" * 128, "x" * 129, "a b", "a,b", "é"]

    async def scenario() -> dict[str, tuple[str, str]]:
        found = {}
        async with chaos.plane(replicas=1) as plane, aiohttp.ClientSession() as session:
            for text in sent:
                headers = {"x-request-id": text}
                body = {"prompt": "x", "max_tokens": 1}
                async with session.post(f"{plane.url}/v1/completions", json=body, headers=headers) as answer:
                    found[text] = (answer.headers["x-request-id"], (await answer.json())["id"])
        return found

    found = run(scenario())
    return lambda text: found[text]
