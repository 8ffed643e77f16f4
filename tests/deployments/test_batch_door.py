"""The batch door: split and merged as one engine answers, through every failure that a part can meet."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Coroutine, Iterator
from typing import Any, TypeVar

import aiohttp
import pytest

from balancer.batches import COMPLETIONS, Room
from balancer.ticket import ROUTER_HEADER, Ticket
from deployments import batch_door
from deployments.batch_door import BatchDoor
from tests.deployments.batch_stand_ins import BAD, REFUSAL, House, OwnEngine, Replica, document, events

T = TypeVar("T")
PROMPTS = [f"prompt {k}" for k in range(24)]
WISH: dict[str, Any] = {"model": "m", "prompt": PROMPTS}
STREAM = {**WISH, "stream": True}
FULL = Ticket("stand_in", "queue_full", status=429, retry_after_s=0.01)
# What may befall a part before any of it has reached the client, whole and streamed.
EARLY = ["500", "busy", "refuse", "bad event"]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """What waits for others to notice a failure waits for less."""
    monkeypatch.setattr(batch_door, "_NOTICED_AFTER_S", 0.01)


class Answer:
    """What a client was sent."""

    def __init__(self, messages: list[Any]) -> None:
        self.status = messages[0]["status"] if messages else 0
        self.headers = {k.decode(): v.decode() for k, v in messages[0]["headers"]} if messages else {}
        self.body = b"".join(message.get("body", b"") for message in messages)
        self.ended = bool(messages) and not messages[-1].get("more_body")

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def events(self) -> list[bytes]:
        return [text + b"\n\n" for text in self.body.split(b"\n\n")[:-1]]


class Client:
    """One request to the door, and when it hangs up."""

    def __init__(self, wish: dict[str, Any], router: str, **headers: str) -> None:
        named = {ROUTER_HEADER: router, "x-request-id": "mine", **{k.replace("_", "-"): v for k, v in headers.items()}}
        raw = [(name.encode(), value.encode()) for name, value in named.items()]
        self.scope = {"type": "http", "method": "POST", "path": COMPLETIONS, "headers": raw, "server": ("127.0.0.1", 1)}
        self.body = json.dumps(wish).encode()
        self.hangs_up = asyncio.Event()
        self.messages: list[Any] = []
        self._asked = False

    async def receive(self) -> dict[str, Any]:
        if self._asked:
            await self.hangs_up.wait()
            return {"type": "http.disconnect"}
        self._asked = True
        return {"type": "http.request", "body": self.body, "more_body": False}

    async def send(self, message: Any) -> None:
        self.messages.append(message)

    @property
    def answer(self) -> Answer:
        return Answer(self.messages)


async def through_door(client: Client, engine: OwnEngine | None = None) -> Answer:
    async with aiohttp.ClientSession() as session:
        door = BatchDoor(engine or OwnEngine(), lambda: Room(64, 1 << 20, 2.0), session, threshold=8)
        await door(client.scope, client.receive, client.send)
    return client.answer


@pytest.fixture
def loop() -> Iterator[asyncio.Runner]:
    """Afterwards no task is left."""
    with asyncio.Runner() as runner:
        yield runner
        assert not asyncio.all_tasks(runner.get_loop())


def run(loop: asyncio.Runner, exchange: Coroutine[Any, Any, T]) -> T:
    return loop.run(asyncio.wait_for(exchange, 30))


async def ask(wish: dict[str, Any], *replicas: Replica, refusals: list[Ticket | None] | None = None) -> Answer:
    async with House(*replicas) as house:
        house.router.refusals = refusals or []
        return await through_door(Client(wish, house.address))


def whole(wish: dict[str, Any]) -> Any:
    return {**document(wish), "id": "cmpl-mine", "created": 0}


def merged(answer: Answer) -> Any:
    return {**answer.json, "created": 0}


def choices(data: list[bytes]) -> dict[int, str]:
    """The text of each choice of a stream."""
    texts: dict[int, str] = {}
    for event in data[:-1]:
        for choice in json.loads(event.removeprefix(b"data: "))["choices"]:
            texts[choice["index"]] = texts.get(choice["index"], "") + choice["text"]
    return texts


@pytest.mark.parametrize("n", [1, 3])
def test_a_batch_is_answered_by_several_replicas_as_by_one(loop: asyncio.Runner, n: int) -> None:
    """Every prompt once, in order; each part is the client's own request with fewer prompts."""
    replicas = Replica(), Replica()
    answer = run(loop, ask({**WISH, "n": n}, *replicas))
    assert (answer.status, merged(answer)) == (200, whole({**WISH, "n": n}))
    asked = [body for replica in replicas for body in replica.bodies]
    assert sorted(prompt for body in asked for prompt in body["prompt"]) == sorted(PROMPTS)
    assert all({**body, "prompt": PROMPTS} == {**WISH, "n": n} for body in asked)
    assert all(replica.bodies for replica in replicas)
    assert answer.headers["x-splitwiser-parts"] == str(len(asked))


def test_a_streamed_batch_is_one_stream(loop: asyncio.Runner) -> None:
    """The chunks of one engine's stream, one usage with the sum, one [DONE]."""
    answer = run(loop, ask({**STREAM, "n": 2}, Replica(), Replica()))
    expected = events({**STREAM, "n": 2})
    assert choices(answer.events) == choices(expected)
    assert len(answer.events) == len(expected)
    assert json.loads(answer.events[-2].removeprefix(b"data: "))["usage"] == document({**STREAM, "n": 2})["usage"]
    assert (answer.events[-1], answer.ended) == (b"data: [DONE]\n\n", True)
    assert answer.headers["content-type"].startswith("text/event-stream")


@pytest.mark.parametrize("wish", [WISH, STREAM], ids=["whole", "stream"])
@pytest.mark.parametrize("fault", [*EARLY, "error event", "cut early"])
def test_a_part_that_fails_before_its_first_byte_is_tried_once_more_elsewhere(
    loop: asyncio.Runner, wish: dict[str, Any], fault: str
) -> None:
    """The client sees nothing of it."""
    broken, sound = Replica(fault), Replica()
    answer = run(loop, ask(wish, broken, sound))
    if wish is STREAM:
        assert choices(answer.events) == choices(events(wish))
        assert answer.events[-1] == b"data: [DONE]\n\n"
    else:
        assert merged(answer) == whole(wish)
    if fault not in ("error event", "cut early") or wish is STREAM:
        lost = broken.bodies[0]["prompt"]
        assert any(set(lost) & set(body["prompt"]) for body in sound.bodies)
        assert not any(set(lost) & set(body["prompt"]) for body in broken.bodies[1:])


@pytest.mark.parametrize("wish", [WISH, STREAM], ids=["whole", "stream"])
@pytest.mark.parametrize("fault", EARLY)
def test_a_part_that_fails_twice_fails_the_batch_with_one_clear_error(
    loop: asyncio.Runner, wish: dict[str, Any], fault: str
) -> None:
    """One sentence that names the prompts and the replica; a stream that has begun ends with it, without [DONE]."""
    answer = run(loop, ask(wish, Replica(*[fault] * 50), Replica(*[fault] * 50)))
    assert answer.status == 500
    assert (answer.json["error"]["code"], answer.ended) == (500, True)
    assert "failed on replica r" in answer.json["error"]["message"]


@pytest.mark.parametrize("fault", ["cut", "hang later"])
def test_a_stream_that_breaks_after_its_first_byte_ends_as_broken(loop: asyncio.Runner, fault: str) -> None:
    """An error event and no [DONE]; what was sent is not sent again, and no other part goes on."""

    async def exchange() -> tuple[Answer, House]:
        async with House(Replica(fault), Replica()) as house:
            client = Client(STREAM, house.address)
            task = asyncio.create_task(through_door(client))
            if fault == "hang later":
                while not client.messages or not house.replicas[0].working:
                    await asyncio.sleep(0.01)
                await house._runners[0].cleanup()
            await task
            return client.answer, house

    answer, house = run(loop, exchange())
    *_, last = answer.events
    assert "prompts 0 to" in json.loads(last.removeprefix(b"data: "))["error"]["message"]
    assert b"[DONE]" not in answer.body
    assert (answer.ended, [replica.working for replica in house.replicas]) == (True, [0, 0])


@pytest.mark.parametrize("wish", [WISH, STREAM], ids=["whole", "stream"])
@pytest.mark.parametrize("place", [0, 23])
def test_what_an_engine_refuses_is_refused_in_its_words(loop: asyncio.Runner, wish: dict[str, Any], place: int) -> None:
    """A bad prompt, first or last: the whole is asked from one engine, and its 4xx is the answer."""
    prompts = [*PROMPTS]
    prompts[place] = BAD
    engine = OwnEngine()

    async def exchange() -> Answer:
        async with House(Replica(), Replica()) as house:
            return await through_door(Client({**wish, "prompt": prompts}, house.address), engine)

    answer = run(loop, exchange())
    assert (answer.status, answer.json) == (400, REFUSAL)
    assert engine.asked[-1] == COMPLETIONS


def test_a_refusal_in_a_stream_is_asked_from_one_engine_too(loop: asyncio.Runner) -> None:
    """vLLM finds some faults only once it has begun to stream: it then refuses by an event with a 4xx in it."""
    engine = OwnEngine()

    async def exchange() -> Answer:
        async with House(Replica(*["refusal event"] * 50), Replica(*["refusal event"] * 50)) as house:
            return await through_door(Client(STREAM, house.address), engine)

    assert run(loop, exchange()).json == document(STREAM)
    assert engine.asked[-1] == COMPLETIONS


@pytest.mark.parametrize("wish", [WISH, STREAM], ids=["whole", "stream"])
def test_a_client_that_hangs_up_ends_every_part(loop: asyncio.Runner, wish: dict[str, Any]) -> None:
    """All requests to replicas are cancelled, and nothing is sent any more."""

    async def exchange() -> tuple[int, list[int], Answer]:
        async with House(Replica(*["hang"] * 50), Replica(*["hang"] * 50)) as house:
            client = Client(wish, house.address)
            task = asyncio.create_task(through_door(client))
            while sum(len(body["prompt"]) for r in house.replicas for body in r.bodies) < len(PROMPTS):
                await asyncio.sleep(0.01)
            busy = sum(replica.working for replica in house.replicas)
            client.hangs_up.set()
            await task
            while any(replica.working for replica in house.replicas):
                await asyncio.sleep(0.01)
            return busy, [replica.working for replica in house.replicas], client.answer

    busy, after, answer = run(loop, exchange())
    assert busy > 2
    assert (after, answer.body) == ([0, 0], b"")


def test_a_batch_that_the_router_turns_away_gets_its_refusal(loop: asyncio.Runner) -> None:
    """Before anything was begun: 429 with Retry-After, as for any other request."""
    answer = run(loop, ask(WISH, Replica(), refusals=[FULL]))
    assert (answer.status, answer.json["error"]["code"]) == (429, "queue_full")
    assert answer.headers["retry-after"] == "1"


def test_parts_that_find_no_room_for_a_while_are_handed_out_later(loop: asyncio.Runner) -> None:
    """A refusal in the middle costs time, not the batch."""
    answer = run(loop, ask(WISH, Replica(), Replica(), refusals=[None, FULL, None, FULL, FULL]))
    assert merged(answer) == whole(WISH)


def test_a_router_that_refuses_for_ever_ends_a_batch_that_was_begun(loop: asyncio.Runner) -> None:
    """One clear error, and nothing is left running."""
    answer = run(loop, ask(WISH, Replica(), refusals=[None, *[FULL] * 100]))
    assert answer.status == 500
    assert "queue_full" in answer.json["error"]["message"]


def test_without_a_router_the_batch_is_refused_as_not_now(loop: asyncio.Runner) -> None:
    """Nobody at the router's address: 503 with Retry-After."""
    answer = run(loop, through_door(Client(WISH, "127.0.0.1:9")))
    assert (answer.status, answer.headers["retry-after"]) == (503, "1")


@pytest.mark.parametrize("router", ["", "10.1.2.3:80", "example.org:80", "nonsense"])
def test_only_a_router_on_this_machine_is_asked(loop: asyncio.Runner, router: str) -> None:
    """Without one, and for an address that somebody forged, this replica's own engine answers."""
    engine = OwnEngine()
    answer = run(loop, through_door(Client(WISH, router), engine))
    assert (answer.json, engine.asked) == (document(WISH), [COMPLETIONS])


def test_what_is_no_batch_is_for_the_own_engine(loop: asyncio.Runner) -> None:
    """The router judges a long body by its first megabyte, and may be wrong."""
    engine = OwnEngine()
    answer = run(loop, through_door(Client({"prompt": PROMPTS[:3]}, "127.0.0.1:9"), engine))
    assert (answer.json["usage"]["prompt_tokens"], engine.asked) == (6, [COMPLETIONS])


def test_parts_take_the_clients_key_and_priority_along_but_not_its_session(loop: asyncio.Runner) -> None:
    """The session would bring every part to the same replica. Each part has a request id of its own."""

    async def exchange() -> House:
        async with House(Replica(), Replica()) as house:
            named = {"authorization": "Bearer k", "x_splitwiser_priority": "-5", "x_session_id": "s"}
            await through_door(Client(WISH, house.address, **named))
            return house

    house = run(loop, exchange())
    assert all(asked["part"] == ["1"] and asked["priority"] == ["-5"] for asked in house.router.hints)
    assert not any("session" in asked for asked in house.router.hints)
    headers = [headers for replica in house.replicas for headers in replica.headers]
    assert {h["authorization"] for h in headers} == {"Bearer k"}
    assert not any("x-session-id" in h for h in headers)
    assert len({h["x-request-id"] for h in headers}) == len(headers)
