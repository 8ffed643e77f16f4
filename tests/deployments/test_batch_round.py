"""A batch's whole round over real sockets: the router, the doors of two replicas and the board; engines stand in."""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import aiohttp
import httpx
import pytest
import uvicorn

from balancer import haproxy_view, hint
from balancer.batches import COMPLETIONS, headroom
from balancer.board import Board
from balancer.knobs import Knobs
from balancer.readings import ReplicaReading, ReplicaState
from balancer.route_service import RouteService
from deployments.batch_door import BatchDoor
from deployments.batch_way import open_client
from deployments.middleware import Door
from deployments.slot import Slot
from tests.deployments.batch_stand_ins import document, events

# A busy machine may keep a replica's heart from beating for seconds.
STALE_AFTER_S = 600.0
KNOBS = Knobs(policy="gpu_aware", seed=1, active_set=2, queue_deadline_s=60.0, stale_after_s=STALE_AFTER_S)
PROMPTS = [f"prompt {k}" for k in range(40)]
WISH: dict[str, Any] = {"model": "m", "prompt": PROMPTS, "n": 2, "max_tokens": 8}
LIMIT_S = 60.0
# The most sequences that one part brings here.
A_PART = 8


class Engine:
    """Answers by repeating, after `pause_s`; notes the most sequences that it had at once."""

    def __init__(self) -> None:
        self.pause_s = 0.02
        self.now = self.most = 0
        self.cancelled = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        body = json.loads(await _read(receive))
        if scope["path"].endswith("/render"):
            await _send(send, [b"[]"], b"application/json")
            return
        sequences = len(body["prompt"]) * body.get("n", 1)
        self.now += sequences
        self.most = max(self.most, self.now)
        work = asyncio.ensure_future(asyncio.sleep(self.pause_s))
        gone = asyncio.ensure_future(receive())
        try:
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
            self.cancelled += not work.done()
            if work.done():
                chunks = events(body) if body.get("stream") else [json.dumps(document(body)).encode()]
                await _send(send, chunks, b"text/event-stream" if body.get("stream") else b"application/json")
        finally:
            work.cancel()
            gone.cancel()
            self.now -= sequences


async def _read(receive: Any) -> bytes:
    body, more = b"", True
    while more:
        message = await receive()
        body, more = body + message.get("body", b""), message.get("more_body", False)
    return body


async def _send(send: Any, chunks: list[bytes], kind: bytes) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", kind)]})
    for chunk in chunks:
        await send({"type": "http.response.body", "body": chunk, "more_body": True})
    await send({"type": "http.response.body", "body": b""})


class House:
    """Two replicas of 16 places each, and their router, for as long as the context lasts."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self.folder = folder
        self.engines = [Engine(), Engine()]
        self._servers: list[tuple[uvicorn.Server, asyncio.Task[None]]] = []
        self._beats: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> House:
        path = self.folder / "board"
        self.board, self.client = Board.open(path), open_client()
        self.slots = [Slot(path, f"app#Replica#{k}", 0, time.monotonic) for k in range(2)]
        self.addresses = {}
        for slot, engine in zip(self.slots, self.engines, strict=True):
            slot.engine_ready(blocks=1000, block_tokens=16, max_running_requests=16)
            slot.set_state(ReplicaState.READY)
            self._beats.append(asyncio.create_task(slot.beat()))
            managed = BatchDoor(
                engine, lambda: headroom(self.slots[0].neighbours(), STALE_AFTER_S, 0.05), self.client, 8
            )
            door = Door(engine, slot, f"r{slot.index}", "gpu_aware", tickets_required=True, managed=managed)
            self.addresses[f"app#Replica#{slot.index}"] = await self._serve(door)
        self.router = RouteService(path, KNOBS, time.monotonic, split_from=8)
        self.router._reachable = {haproxy_view.server_name(name): at for name, at in self.addresses.items()}
        await self.router.start()
        self.address = await self._serve(self.router)
        return self

    async def __aexit__(self, *error: object) -> None:
        for beat in self._beats:
            beat.cancel()
        for server, task in self._servers:
            server.should_exit = server.force_exit = True
            await task
        await self.client.close()
        await self.router.close()
        for slot in self.slots:
            slot.close()
        self.board.leave()
        assert not list(self.folder.iterdir())

    async def _serve(self, application: Any) -> str:
        config = uvicorn.Config(application, host="127.0.0.1", port=0, log_level="error", lifespan="off")
        server, socket = uvicorn.Server(config), config.bind_socket()
        self._servers.append((server, asyncio.create_task(server.serve(sockets=[socket]))))
        while not server.started:
            await asyncio.sleep(0.01)
        return f"127.0.0.1:{socket.getsockname()[1]}"

    async def place(self, wish: Any, **asked: str) -> tuple[str, dict[str, str]]:
        """As HAProxy asks the router: where the request goes, and with which headers."""
        headers = {hint.HEADER: urlencode({"path": COMPLETIONS, **asked})}
        async with httpx.AsyncClient() as http:
            answer = await http.post(
                f"http://{self.address}/internal/route", json=wish, headers=headers, timeout=LIMIT_S
            )
        return self.addresses[answer.json()["replica_id"]], answer.json()["request_headers"]

    async def post(self, wish: Any) -> httpx.Response:
        """As a client posts through HAProxy."""
        at, headers = await self.place(wish)
        async with httpx.AsyncClient() as http:
            return await http.post(f"http://{at}{COMPLETIONS}", json=wish, headers=headers, timeout=LIMIT_S)

    def seen(self) -> tuple[ReplicaReading, ...]:
        return self.board.snapshot(time.monotonic()).replicas

    def idle(self) -> bool:
        return not any(r.in_flight_requests or r.on_the_way_requests for r in self.seen())


@pytest.fixture
def house(tmp_path: Path) -> House:
    return House(tmp_path / "shm")


async def settled(house: House) -> None:
    """Until nothing is in flight any more."""
    async with asyncio.timeout(LIMIT_S):
        while not house.idle() or any(engine.now for engine in house.engines):
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("stream", [False, True])
def test_a_batch_larger_than_all_replicas_together_is_worked_off_within_their_room(house: House, stream: bool) -> None:
    """80 sequences over two batches of 16 places: one answer, both at work, and at the end nothing is counted as in
    flight. An arrival is taken for the newest of its router's parts: for a moment a part more than fits may come."""

    async def exchange() -> httpx.Response:
        async with house:
            answer = await house.post({**WISH, "stream": stream})
            await settled(house)
            assert sum(r.received_total - r.finished_total for r in house.seen()) == 0
            return answer

    answer = asyncio.run(asyncio.wait_for(exchange(), LIMIT_S))
    assert answer.status_code == 200
    texts = [choice["text"] for choice in document(WISH)["choices"]]
    if stream:
        assert answer.content.endswith(b"data: [DONE]\n\n")
        assert answer.content.count(b"data: ") == len(events(WISH))
    else:
        assert [choice["text"] for choice in answer.json()["choices"]] == texts
        assert int(answer.headers["x-splitwiser-parts"]) >= 5
    assert all(0 < engine.most <= 16 + A_PART for engine in house.engines), [engine.most for engine in house.engines]


def test_a_client_that_hangs_up_frees_every_place(house: House) -> None:
    """Parts at work and the one that waits for a place are given up, wherever they are."""
    for engine in house.engines:
        engine.pause_s = 3600.0

    async def exchange() -> None:
        async with house, aiohttp.ClientSession() as session:
            at, headers = await house.place(WISH)
            request = asyncio.create_task(session.post(f"http://{at}{COMPLETIONS}", json=WISH, headers=headers))
            async with asyncio.timeout(LIMIT_S):
                while house.router.waiting == 0 or not all(engine.now for engine in house.engines):
                    await asyncio.sleep(0.01)
            request.cancel()
            await asyncio.gather(request, return_exceptions=True)
            async with asyncio.timeout(LIMIT_S):
                while house.router.waiting:
                    await asyncio.sleep(0.01)
            await settled(house)

    asyncio.run(asyncio.wait_for(exchange(), LIMIT_S))
    assert all(engine.cancelled for engine in house.engines)


def test_two_batches_and_single_requests_are_served_side_by_side(house: House) -> None:
    """A batch has one part in the queue at most, so others are not kept waiting for all of it."""

    async def exchange() -> list[httpx.Response]:
        async with house:
            wishes = [WISH, {**WISH, "prompt": PROMPTS[::-1]}, *({**WISH, "prompt": [f"single {k}"]} for k in range(6))]
            answers = await asyncio.gather(*map(house.post, wishes))
            await settled(house)
            return answers

    answers = asyncio.run(asyncio.wait_for(exchange(), LIMIT_S))
    assert {answer.status_code for answer in answers} == {200}
    assert answers[1].json()["choices"][0]["text"] == "prompt 39 0"
    assert [answer.json()["choices"][1]["text"] for answer in answers[2:]] == [f"single {k} 1" for k in range(6)]
