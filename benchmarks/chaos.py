"""Storms against the data plane of `benchmarks.plane`: `python -m benchmarks.chaos --out FILE`, or `make chaos`.

Each scenario sends an open loop of requests with a fixed seed while something is broken, and returns figures; a lost
request is an AssertionError, not a figure. `tests/chaos` runs the same with few requests.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import platform
import random
import shutil
import signal
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import aiohttp
import psutil

from balancer import ledger
from balancer.counters import CountersReader
from balancer.knobs import Knobs
from balancer.on_the_way import LOST_AFTER_S
from balancer.readings import ReplicaReading, ReplicaState
from benchmarks.plane import Plane
from benchmarks.scrapes import scraped
from benchmarks.simulation import quantile
from deployments.limits import Limits

# What a client can say of a request. `left` hung up on purpose: the server may have been faster.
_AT_MOST_S = 3600.0
COMPLETED, REJECTED, FAILED, LEFT = "completed", "rejected", "failed", "left"
# HAProxy's own refusals: the ledger knows such a request as lost on its way, or not at all.
_BY_HAPROXY_ALONE = ("replica_unreachable", "router_unreachable")
Figures = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Storm:
    """An open loop. A short answer has `short` tokens, a long one ten times as many and is streamed."""

    requests: int
    rate_per_s: float
    seed: int = 1
    long_ratio: float = 0.2
    hang_up_ratio: float = 0.1
    short: int = 8

    @property
    def mean_tokens(self) -> float:
        return self.short * (1 + 9 * self.long_ratio)


@dataclass(frozen=True, slots=True)
class Seen:
    """One request as its client saw it. `first_s` is the time to the first byte of the answer's body."""

    end: str
    status: int
    first_s: float
    total_s: float


@asynccontextmanager
async def plane(**options: Any) -> AsyncIterator[Plane]:
    """A plane in a folder of its own, whose path is short enough for sockets."""
    folder = Path(tempfile.mkdtemp(prefix="sw-chaos-"))
    try:
        async with Plane(folder, **options) as running:
            yield running
    finally:
        shutil.rmtree(folder)


async def send(session: aiohttp.ClientSession, url: str, wish: dict[str, Any], leave_after_s: float = math.inf) -> Seen:
    """Send one request and say how it went; never raises for what the server does."""
    began_s = time.perf_counter()
    status, body, first_s, whole = 0, b"", math.nan, False
    with suppress(aiohttp.ClientError, ConnectionError, TimeoutError):
        async with asyncio.timeout(leave_after_s if leave_after_s < math.inf else None):
            async with session.post(f"{url}/v1/completions", json=wish) as answer:
                status = answer.status
                async for piece in answer.content.iter_any():
                    first_s = first_s if body else time.perf_counter() - began_s
                    body += piece
                whole = True
    total_s = time.perf_counter() - began_s
    if not whole and total_s >= leave_after_s:
        return Seen(LEFT, status, first_s, total_s)
    return Seen(_end(status, body, whole, bool(wish.get("stream"))), status, first_s, total_s)


def _end(status: int, body: bytes, whole: bool, streamed: bool) -> str:
    if not whole or (status >= 500 and status != 503):
        return FAILED
    if status != 200:
        code = json.loads(body)["error"]["code"]  # whoever refuses says why, as OpenAI does
        return FAILED if code in _BY_HAPROXY_ALONE else REJECTED
    return FAILED if streamed and b"data: [DONE]" not in body else COMPLETED


async def blow(plane: Plane, storm: Storm, fault: str = "") -> list[Seen]:
    """Send the storm: Poisson arrivals, whatever comes back."""
    rng = random.Random(storm.seed)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=120)) as session:
        tasks, at_s = [], time.perf_counter()
        for _ in range(storm.requests):
            at_s += rng.expovariate(storm.rate_per_s)
            await asyncio.sleep(max(0.0, at_s - time.perf_counter()))
            long = rng.random() < storm.long_ratio
            leaves = rng.uniform(0.0, 0.3) if rng.random() < storm.hang_up_ratio else math.inf
            wish = {"prompt": "x", "max_tokens": storm.short * (10 if long else 1), "stream": long, "fault": fault}
            tasks.append(asyncio.create_task(send(session, plane.url, wish, leaves)))
        return await asyncio.gather(*tasks)


def living(plane: Plane) -> list[ReplicaReading]:
    """Readings of replicas that still write; what a dead one last wrote stays on the board until its slot is taken."""
    now_s = time.monotonic()
    return [r for r in plane.readings() if r.written_at_s > now_s - 2.0]


async def settle(plane: Plane, within_s: float = 1.0) -> float:
    """How long until nothing is in flight or queued; AssertionError when it takes longer than `within_s`.

    What was assigned and never arrived, because its client left in between, is given up by its router later.
    """
    began_s, queues = time.monotonic(), CountersReader(plane.board)
    while any(r.in_flight_requests or r.awaiting_requests for r in living(plane)) or queues.read().queue_length:
        assert time.monotonic() - began_s < within_s, plane.readings()
        await asyncio.sleep(0.02)
    took_s = time.monotonic() - began_s
    while any(r.assigned_requests for r in living(plane)):
        assert time.monotonic() - began_s < within_s + LOST_AFTER_S + 1.0, plane.readings()
        await asyncio.sleep(0.1)
    assert ledger.settled(plane.ledger()).open == 0, plane.ledger()
    return took_s


def compare(seen: list[Seen], before: ledger.Totals, after: ledger.Totals, torn: int = 0) -> Figures:
    """The client's ledger against the server's. A request whose client left may have ended in any way.

    So may `torn` ones, which a replica had in its hands when it was killed: between the last byte and the count of it.
    HAProxy alone answers when no router or replica can be reached; such a request never enters, and the client counts
    it as rejected or failed.
    """
    client = Counter(one.end for one in seen)
    server = {name: getattr(after, name) - getattr(before, name) for name in (*ledger.ENDS, "entered")}
    assert sum(server[name] for name in ledger.ENDS) == server["entered"], "requests are open or counted twice"
    outside = len(seen) - server["entered"]
    assert outside >= 0, "the server counted requests that nobody sent"
    slack = client[LEFT]
    assert client[COMPLETED] - torn <= server[COMPLETED] <= client[COMPLETED] + slack, (client, server)
    assert server[REJECTED] - slack - torn <= client[REJECTED] <= server[REJECTED] + outside, (client, server)
    return {
        "sent": len(seen), **{f"client_{name}": client[name] for name in (COMPLETED, REJECTED, FAILED, LEFT)},
        **{f"server_{name}": number for name, number in server.items()}, "answered_by_haproxy_alone": outside,
        "lost": len(seen) - sum(client.values()), "redirected": after.redirected - before.redirected,
        **latencies(seen),
    }  # fmt: skip


def latencies(seen: list[Seen]) -> Figures:
    good = sorted(one.total_s for one in seen if one.end == COMPLETED)
    refused = sorted(one.total_s for one in seen if one.end == REJECTED)
    return {
        "p50_completed_s": _percentile(good, 0.5), "p99_completed_s": _percentile(good, 0.99),
        "p50_rejected_s": _percentile(refused, 0.5), "p99_rejected_s": _percentile(refused, 0.99),
    }  # fmt: skip


def _percentile(ordered: list[float], share: float) -> float | None:
    return round(quantile(ordered, share), 4) if ordered else None


# --- scenarios ---


async def storm_with_kills(requests: int, kill_every_s: float) -> Figures:
    """1.5 times capacity, long streams, hang-ups, and a replica killed every second."""
    shape = Storm(requests, 0.0)
    batch, step_s = 8, 0.01
    capacity_per_s = 4 * batch / (shape.mean_tokens * step_s)
    knobs = Knobs(queue_limit=64, queue_deadline_s=5.0, seed=1)
    async with plane(replicas=4, batch=batch, step_s=step_s, knobs=knobs) as running:
        healing = asyncio.create_task(running.heal())
        killing = asyncio.create_task(_kill_in_turn(running, kill_every_s))
        before = running.ledger()
        async with scraped(running.board, slots=8) as metrics:
            seen = await blow(running, replace(shape, rate_per_s=1.5 * capacity_per_s))
        killing.cancel()
        await _all_ready(running, 4)
        healing.cancel()
        settled_s = await settle(running)
        figures = compare(seen, before, ledger.settled(running.ledger()), torn=running.restarts * batch)
        # A kill costs what the replica had in its hands, and what was on the way there.
        assert figures["server_failed"] <= 2 * batch * running.restarts, figures
        return {**figures, "offered_per_s": round(1.5 * capacity_per_s), "kills": running.restarts,
                "settled_s": round(settled_s, 3), **metrics.figures()}  # fmt: skip


async def _kill_in_turn(running: Plane, every_s: float) -> None:
    """A replica every so often, but never the last two: one that was killed takes a while to start."""
    turn = 0
    while True:
        await asyncio.sleep(every_s)
        now_s = time.monotonic()
        serving = {r.replica_id for r in running.readings() if r.written_at_s > now_s - 0.5}
        turn += 1
        if len(serving) > 2 and running.replicas[turn % 4].name in serving:
            await running.kill(turn % 4)


async def _all_ready(running: Plane, replicas: int, within_s: float = 60.0) -> float:
    began_s = time.monotonic()
    while True:
        now_s = time.monotonic()
        fresh = [r for r in running.readings() if r.state is ReplicaState.READY and r.written_at_s > now_s - 1.0]
        if len(fresh) == replicas and all(worker.alive for worker in running.replicas):
            return now_s - began_s
        assert now_s - began_s < within_s, "the replicas never came back"
        await asyncio.sleep(0.05)


async def hang_ups(count: int) -> Figures:
    """Clients that leave, queued and running, beside neighbours that stay."""
    knobs = Knobs(queue_limit=count, seed=1)
    async with plane(replicas=2, batch=16, knobs=knobs) as running:
        before = running.ledger()
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(connector=connector) as session:
            stay = {"prompt": "x", "max_tokens": 600, "stream": True}
            neighbours = [asyncio.create_task(send(session, running.url, stay)) for _ in range(8)]
            await asyncio.sleep(0.3)
            leave = {"prompt": "x", "max_tokens": 100_000, "stream": True}
            rng = random.Random(1)
            waves = []
            for start in range(0, count, 100):
                wave = [
                    send(session, running.url, leave, rng.uniform(0.2, 1.0)) for _ in range(min(100, count - start))
                ]
                waves += await asyncio.gather(*wave)
            left_at_s = time.monotonic()
            while sum(r.in_flight_requests for r in running.readings()) > sum(not n.done() for n in neighbours):
                assert time.monotonic() - left_at_s < 5.0, "hang-ups hold their places"
                await asyncio.sleep(0.01)
            freed_s = time.monotonic() - left_at_s
            stayed = await asyncio.gather(*neighbours)
        assert {one.end for one in stayed} == {COMPLETED}, "a neighbour was touched"
        assert {one.end for one in waves} == {LEFT}, Counter(one.end for one in waves)
        await settle(running)
        after = ledger.settled(running.ledger())
        assert after.completed - before.completed == len(stayed), after
        assert after.rejected == before.rejected, after
        assert all(r.kv_blocks_used == 0 for r in running.readings())
        return {"hang_ups": count, "entered": after.entered - before.entered - len(stayed),
                "cancelled": after.cancelled - before.cancelled, "left_on_the_way": after.failed - before.failed,
                "freed_s": round(freed_s, 3),
                "neighbours_completed": len(stayed)}  # fmt: skip


async def overload(seconds: float, factor: float = 10.0) -> Figures:
    """Many times capacity: refused at once, what is held finishes, goodput and memory stay."""
    batch, step_s, tokens = 1, 0.04, 8
    capacity_per_s = 4 * batch / (tokens * step_s)
    # One short queue: with 30 s in the queue every answer would be old, which is another promise.
    knobs = Knobs(queue_limit=32, queue_deadline_s=5.0, seed=1)
    async with plane(replicas=4, batch=batch, step_s=step_s, knobs=knobs) as running:
        calm = Storm(round(capacity_per_s * min(20.0, seconds)), capacity_per_s, 1, 0.0, 0.0, tokens)
        peak = _goodput(await _timed(blow(running, calm)))
        memory = [_memory_bytes(running)]
        before = running.ledger()
        watching = asyncio.create_task(_sample(lambda: memory.append(_memory_bytes(running)), 1.0))
        high = Storm(round(factor * capacity_per_s * seconds), factor * capacity_per_s, 2, 0.0, 0.0, tokens)
        async with scraped(running.board, slots=8) as metrics:
            seen, took_s = await _timed(blow(running, high))
        watching.cancel()
        await settle(running)
        figures = compare(seen, before, ledger.settled(running.ledger()))
        warm = memory[max(1, len(memory) // 4) :] or memory
        goodput = _goodput((seen, took_s))
        return {
            **figures, "seconds": round(took_s, 1), "factor": factor, "peak_goodput_per_s": round(peak, 1),
            "goodput_per_s": round(goodput, 1), "goodput_ratio": round(goodput / peak, 3),
            "memory_first_mib": round(memory[0] / 2**20), "memory_early_mib": round(warm[0] / 2**20),
            "memory_last_mib": round(statistics.median(warm[-5:]) / 2**20), **metrics.figures(),
        }  # fmt: skip


async def _timed(storm: Awaitable[list[Seen]]) -> tuple[list[Seen], float]:
    began_s = time.perf_counter()
    return await storm, time.perf_counter() - began_s


def _goodput(timed: tuple[list[Seen], float]) -> float:
    seen, took_s = timed
    return sum(one.end == COMPLETED for one in seen) / took_s


async def _sample(take: Callable[[], None], every_s: float) -> None:
    while True:
        await asyncio.sleep(every_s)
        take()


def _memory_bytes(running: Plane) -> int:
    """Resident memory of router, replicas and HAProxy."""
    total = 0
    for worker in (running.router, running.haproxy, *running.replicas):
        with suppress(psutil.Error):
            process = psutil.Process(worker.process.pid)
            total += sum(p.memory_info().rss for p in (process, *process.children(recursive=True)))
    return total


async def stopped_replica() -> Figures:
    """SIGSTOP of a replica's process, and an engine that freezes while its process lives: out, and back."""
    knobs = Knobs(stalled_after_s=2.0, seed=1)
    async with plane(replicas=2, knobs=knobs) as running, aiohttp.ClientSession() as session:
        wish = {"prompt": "x", "max_tokens": 4}
        async with scraped(running.board, slots=4) as metrics:
            await running.kill(0, signal.SIGSTOP)
            began_s = time.monotonic()
            stopped_out_s = await _until_quick(session, running.url, wish, began_s)
            await running.kill(0, signal.SIGCONT)
            await _all_ready(running, 2)
            freeze = {**wish, "fault": "freeze", "for_s": 8.0}
            frozen = asyncio.create_task(send(session, running.url, freeze))
            began_s = time.monotonic()
            frozen_out_s = await _until_quick(session, running.url, wish, began_s)
            assert (await frozen).end == COMPLETED
        return {"stopped_out_s": round(stopped_out_s, 2), "frozen_out_s": round(frozen_out_s, 2), **metrics.figures()}


async def _until_quick(session: aiohttp.ClientSession, url: str, wish: dict[str, Any], began_s: float) -> float:
    """When from `began_s` on ten requests in a row are answered within half a second each."""
    pending = []
    while True:
        assert time.monotonic() - began_s < 12.0, "requests still go to the stopped replica"
        tasks = [asyncio.create_task(send(session, url, wish)) for _ in range(10)]
        done, slow = await asyncio.wait(tasks, timeout=0.5)
        pending += slow
        if not slow and all(task.result().end == COMPLETED for task in done):
            break
    took_s = time.monotonic() - began_s
    for task in pending:
        task.cancel()
    return took_s


async def killed_router(rounds: int) -> Figures:
    """The route service killed while streams run: they end well; new requests are answered again soon."""
    recoveries = []
    async with plane(replicas=2) as running, aiohttp.ClientSession() as session:
        async with scraped(running.board, slots=4) as metrics:
            for _ in range(rounds):
                recoveries.append(await _kill_router_under_streams(running, session))
        await settle(running)
    recovery_s = [round(r, 2) for r in recoveries]
    return {"rounds": rounds, "streams_lost": 0, "recovery_s": recovery_s, **metrics.figures()}


async def _kill_router_under_streams(running: Plane, session: aiohttp.ClientSession) -> float:
    """How long until a new request was answered; AssertionError when a stream was lost."""
    stream = {"prompt": "x", "max_tokens": 400, "stream": True}
    streams = [asyncio.create_task(send(session, running.url, stream)) for _ in range(8)]
    await asyncio.sleep(0.3)
    began_s = time.monotonic()
    await running.kill_router()
    while (await send(session, running.url, {"prompt": "x", "max_tokens": 1})).end != COMPLETED:
        assert time.monotonic() - began_s < 30.0
        await asyncio.sleep(0.05)
    recovered_s = time.monotonic() - began_s
    assert {one.end for one in await asyncio.gather(*streams)} == {COMPLETED}
    return recovered_s


async def every_replica_errs(requests: int) -> Figures:
    """All answer 500: nothing is sent twice, one stays in rotation, and nobody is refused for want of replicas."""
    async with plane(replicas=3, knobs=Knobs(seed=1)) as running:
        before = running.ledger()
        seen = await blow(running, Storm(requests, 100.0, 1, 0.0, 0.0), fault="error")
        await settle(running)
        after = ledger.settled(running.ledger())
        attempts = sum(r.received_total for r in running.readings())
        statuses = Counter(one.status for one in seen)
        assert statuses[500] + statuses[503] == requests, statuses  # 503: a starved machine's heartbeats come late
        assert after.failed - before.failed == statuses[500]
        return {"sent": requests, "upstream_attempts": attempts, "redirected": after.redirected,
                "failed": after.failed - before.failed}  # fmt: skip


async def full_disk() -> Figures:
    """No process of the plane can write another byte to a file: logs are lost, requests are not."""
    async with plane(replicas=2, knobs=Knobs(seed=1)) as running, aiohttp.ClientSession() as session:
        for worker in (running.router, *running.replicas):
            psutil.Process(worker.process.pid).rlimit(psutil.RLIMIT_FSIZE, (1, 1))
        loud = [await send(session, running.url, {"prompt": "x", "fault": "cut"}) for _ in range(20)]
        calm = [await send(session, running.url, {"prompt": "x", "max_tokens": 2}) for _ in range(20)]
        assert {one.end for one in loud} == {FAILED}
        await settle(running)
        return {"sent": len(calm), "completed": sum(one.end == COMPLETED for one in calm),
                "replicas_alive": sum(worker.alive for worker in running.replicas)}  # fmt: skip


async def limits_fire(limits: Limits) -> Figures:
    """A replica that takes a request and is silent, and one that stalls in the middle."""
    async with plane(replicas=2, limits=limits, knobs=Knobs(stalled_after_s=60.0)) as running:
        found = {}
        async with aiohttp.ClientSession() as session:
            for name, wish in {
                "hang": {"stream": True, "fault": "hang"},
                "hang_whole": {"stream": False, "fault": "hang"},
                "stall": {"stream": True, "fault": "stall", "at": 5, "max_tokens": 20},
            }.items():
                began_s = time.perf_counter()
                async with session.post(f"{running.url}/v1/completions", json={"prompt": "x", **wish}) as answer:
                    text = await answer.text()
                code = json.loads(text.strip().rpartition("\n")[2].removeprefix("data: "))["error"]["code"]
                assert "[DONE]" not in text
                found[name] = {"code": code, "status": answer.status, "s": round(time.perf_counter() - began_s, 2)}
        return found


# Each takes the share of its full size that shall be run.
SCENARIOS: dict[str, Callable[[float], Awaitable[Figures]]] = {
    "limits": lambda scale: limits_fire(Limits(2.0, 1.0, 10.0)),
    "stopped_replica": lambda scale: stopped_replica(),
    "killed_router": lambda scale: killed_router(math.ceil(10 * scale)),
    "every_replica_errs": lambda scale: every_replica_errs(math.ceil(2000 * scale)),
    "full_disk": lambda scale: full_disk(),
    "hang_ups": lambda scale: hang_ups(math.ceil(1000 * scale)),
    "overload": lambda scale: overload(300.0 * scale),
    "storm": lambda scale: storm_with_kills(math.ceil(100_000 * scale), 1.0),
}


async def _bounded(scenario: Awaitable[Figures]) -> Figures:
    async with asyncio.timeout(_AT_MOST_S):
        return await scenario


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("scenarios", nargs="*", choices=[[], *SCENARIOS], metavar="SCENARIO", help=", ".join(SCENARIOS))
    parser.add_argument("--scale", type=float, default=1.0, help="share of the full size, for a try (1)")
    parser.add_argument("--out", type=Path, help="append one line of JSON for each scenario")
    chosen = parser.parse_args()
    for name in chosen.scenarios or SCENARIOS:
        began_s = time.monotonic()
        figures = asyncio.run(_bounded(SCENARIOS[name](chosen.scale)))
        line = {"scenario": name, "scale": chosen.scale, "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                "machine": f"{platform.machine()}, {psutil.cpu_count()} CPUs",
                "load_1m": round(psutil.getloadavg()[0], 1),
                "took_s": round(time.monotonic() - began_s, 1), **figures}  # fmt: skip
        print(json.dumps(line), flush=True)
        if chosen.out:
            with chosen.out.open("a") as file:
                file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
