"""The runner of batches: every line once, through full and broken servers, cancels, expiry, crashes and take-overs."""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from deployments import batch_lines, batch_runner
from deployments.batch_lines import MOST_ERRORS, MOST_LINES
from deployments.batch_runner import BatchRunner, PublicAddress, Reply
from deployments.batch_store import WINDOW_S, BatchStore

LIMIT_S = 30.0
ENDED = {"completed", "failed", "expired", "cancelled"}
USAGE = {"prompt_tokens": 2, "completion_tokens": 3, "total_tokens": 5}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_POLL_S", "_TAKE_OVER_S", "_RETRY_S"):
        monkeypatch.setattr(batch_runner, name, 0.01)


class Server:
    """Stands for the public address. `replies` are given to a prompt in order, then it is echoed; an exception is
    raised; "hang" never answers."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.replies: dict[str, list[Any]] = {}
        self.at_once = self.most_at_once = 0
        self.gate: asyncio.Event | None = None

    async def send(self, url: str, body: Any) -> Reply:
        self.asked.append(body["prompt"])
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            await (self.gate.wait() if self.gate else asyncio.sleep(0))
            reply = self.replies.get(body["prompt"], [])
            given = reply.pop(0) if reply else Reply(200, "r", {"echo": body["prompt"], "usage": USAGE})
            if isinstance(given, Exception):
                raise given
            if given == "hang":
                await asyncio.Event().wait()
            assert isinstance(given, Reply)
            return given
        finally:
            self.at_once -= 1


class House:
    """A store, a server before it, and a clock."""

    def __init__(self, folder: Path) -> None:
        self.now_s = 1000.0
        self.store = BatchStore(folder, lambda: self.now_s, 1 << 30)
        self.server = Server()

    def batch(self, *names: str, content: bytes | None = None) -> str:
        file = self.store.add_file(io.BytesIO(content or b"".join(map(line, names))), "in.jsonl", "batch")
        return str(self.store.create_batch(file["id"], "/v1/completions", None)["id"])

    def runner(self, concurrency: int = 4, store: BatchStore | None = None) -> BatchRunner:
        return BatchRunner(store or self.store, self.server.send, concurrency, lambda: self.now_s)

    def run(self, batch_id: str, holds: Callable[[Any], bool] = lambda b: b["status"] in ENDED, **more: Any) -> Any:
        """Let a runner work until this holds of the batch, then stop it as a stopping replica does."""

        async def work() -> Any:
            task = asyncio.create_task(self.runner(**more).run())
            try:
                async with asyncio.timeout(LIMIT_S):
                    return await self.until(batch_id, holds)
            finally:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
                assert asyncio.all_tasks() == {asyncio.current_task()}

        return asyncio.run(work())

    async def until(self, batch_id: str, holds: Callable[[Any], bool]) -> Any:
        while not holds(batch := self.store.batch(batch_id)):
            await asyncio.sleep(0.005)
        return batch

    def results(self, file_id: str | None) -> list[Any]:
        return [json.loads(text) for text in self.store.content(file_id).open()] if file_id else []


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    """Afterwards nothing half-written is left."""
    house = House(tmp_path / "store")
    yield house
    assert not list((tmp_path / "store" / "files").glob(".*"))


def line(name: str, **more: Any) -> bytes:
    wish = {
        "custom_id": name,
        "method": "POST",
        "url": "/v1/completions",
        "body": {"model": "m", "prompt": name},
        **more,
    }
    return json.dumps(wish).encode() + b"\n"


def test_each_line_is_sent_once_and_its_answer_written_in_order(house: House) -> None:
    """Outputs in the order of the input, in OpenAI's form, with counts, usage and all times."""
    names = [f"n{k}" for k in range(20)]
    batch = house.run(house.batch(*names))
    assert batch["status"] == "completed"
    assert sorted(house.server.asked) == sorted(names)
    outputs = house.results(batch["output_file_id"])
    assert [output["custom_id"] for output in outputs] == names
    assert outputs[3]["response"] == {"status_code": 200, "request_id": "r", "body": {"echo": "n3", "usage": USAGE}}
    assert (outputs[3]["error"], outputs[3]["id"][:10]) == (None, "batch_req_")
    assert (batch["request_counts"], batch["error_file_id"]) == ({"total": 20, "completed": 20, "failed": 0}, None)
    assert (batch["usage"]["input_tokens"], batch["usage"]["output_tokens"], batch["model"]) == (40, 60, "m")
    assert batch["in_progress_at"] == batch["finalizing_at"] == batch["completed_at"] == 1000
    assert house.store.file(batch["output_file_id"])["purpose"] == "batch_output"


def test_no_more_lines_than_allowed_are_under_way(house: House) -> None:
    """Over all batches together, and as many as that."""
    gate = house.server.gate = asyncio.Event()
    house.batch(*(f"a{k}" for k in range(10)))

    def open_when_full(batch: Any) -> bool:
        if house.server.at_once == 3:
            gate.set()
        return batch["status"] in ENDED

    house.run(house.batch(*(f"b{k}" for k in range(10))), open_when_full, concurrency=3)
    assert house.server.most_at_once == 3


def test_what_the_server_refuses_goes_to_the_error_file(house: House) -> None:
    """A 4xx is the line's answer, asked once; the rest of the batch goes on."""
    house.server.replies["bad"] = [Reply(400, "q", {"error": {"message": "no"}})]
    batch = house.run(house.batch("good", "bad"))
    (error,) = house.results(batch["error_file_id"])
    assert (batch["status"], batch["request_counts"]) == ("completed", {"total": 2, "completed": 1, "failed": 1})
    assert (error["custom_id"], error["response"]["status_code"]) == ("bad", 400)
    assert house.server.asked.count("bad") == 1


@pytest.mark.parametrize(
    "trouble",
    [
        [Reply(429, "", {}, 0.01)] * 5,
        [Reply(503, "", {}, None)] * 5,
        [ConnectionRefusedError()] * 5,
        [aiohttp.ServerDisconnectedError()] * 5,
        [Reply(500, "", {})] * 2,
    ],
    ids=["full", "starting", "absent", "gone", "broken twice"],
)
def test_passing_troubles_are_waited_out(house: House, trouble: list[Any]) -> None:
    """A full, starting or absent system is asked again until it answers; a broken one up to three times."""
    house.server.replies["x"] = list(trouble)
    batch = house.run(house.batch("x"))
    assert (batch["request_counts"]["completed"], len(house.server.asked)) == (1, len(trouble) + 1)


def test_a_line_that_breaks_the_server_every_time_fails_alone(house: House) -> None:
    """After three errors of the server the last one is the line's answer."""
    house.server.replies["poison"] = [Reply(500, "", {"error": {}})] * 9
    batch = house.run(house.batch("poison", "x"))
    assert (house.server.asked.count("poison"), batch["request_counts"]["failed"]) == (3, 1)
    assert batch["request_counts"]["completed"] == 1


@pytest.mark.parametrize(
    ("content", "code", "at"),
    [
        (b"\n\n", "empty_file", None),
        (b"{\n", "invalid_json_line", 1),
        (b"[]\n", "invalid_json_line", 1),
        (line("a") + b"\xff\n", "invalid_json_line", 2),
        (line("a") + line("a"), "duplicate_custom_id", 2),
        (line(""), "invalid_value", 1),
        (line("a", method="GET"), "invalid_value", 1),
        (line("a", url="/v1/embeddings"), "invalid_value", 1),
        (line("a", body=[]), "invalid_value", 1),
        (line("a", body={"prompt": "x"}), "invalid_value", 1),
        (line("a", body={"model": "m", "stream": True}), "invalid_value", 1),
        (line("a") * (MOST_ERRORS + 9), "duplicate_custom_id", 2),
    ],
)
def test_a_file_with_a_wrong_line_fails_before_anything_is_sent(
    house: House, content: bytes, code: str, at: int | None
) -> None:
    """The batch names the line and what is wrong with it."""
    batch = house.run(house.batch(content=content))
    error = batch["errors"]["data"][0]
    assert (batch["status"], error["code"], error["line"]) == ("failed", code, at)
    assert len(batch["errors"]["data"]) <= MOST_ERRORS
    assert (error["message"].count("\n"), house.server.asked, batch["failed_at"]) == (0, [], 1000)


def test_more_lines_than_openai_allows_are_refused(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as are allowed run, one more does not."""
    assert MOST_LINES == 50_000
    monkeypatch.setattr(batch_lines, "MOST_LINES", 30)
    assert house.run(house.batch(*map(str, range(30))))["status"] == "completed"
    house.server.asked.clear()
    batch = house.run(house.batch(*map(str, range(31))))
    assert house.server.asked == []
    assert (batch["status"], batch["errors"]["data"][0]["code"]) == ("failed", "too_many_requests")


def test_a_cancel_stops_what_is_under_way_and_keeps_what_is_done(house: House) -> None:
    """Requests in flight are given up; finished lines are in the output, nothing else."""
    house.server.replies = {f"slow{k}": ["hang"] for k in range(6)}
    batch_id = house.batch("quick", *house.server.replies)
    house.run(batch_id, lambda b: b["request_counts"]["completed"] == 1 and house.server.at_once == 2, concurrency=2)
    assert house.store.cancel(batch_id)["status"] == "cancelling"
    batch = house.run(batch_id)
    assert (batch["status"], house.server.at_once) == ("cancelled", 0)
    assert [output["custom_id"] for output in house.results(batch["output_file_id"])] == ["quick"]
    assert (batch["request_counts"]["total"], batch["error_file_id"]) == (7, None)


def test_a_cancel_while_it_runs_is_noticed(house: House) -> None:
    """By the runner that is at it, without a restart."""
    house.server.replies = {"slow": ["hang"]}
    batch_id = house.batch("slow")

    def cancelled_when_under_way(batch: Any) -> bool:
        if batch["status"] == "in_progress" and house.server.at_once:
            house.store.cancel(batch_id)
        return batch["status"] in ENDED

    assert house.run(batch_id, cancelled_when_under_way)["status"] == "cancelled"


def test_a_batch_that_outlives_its_window_expires(house: House) -> None:
    """What was finished is kept; the rest stands in the error file as expired."""
    house.server.replies = {"slow": ["hang"]}
    batch_id = house.batch("quick", "slow", "never")

    def a_day_passes(batch: Any) -> bool:
        house.now_s += WINDOW_S * (batch["request_counts"]["completed"] >= 1 and house.now_s == 1000.0)
        return batch["status"] in ENDED

    batch = house.run(batch_id, a_day_passes, concurrency=2)
    # "never" came to the freed place.
    assert (batch["status"], batch["expired_at"]) == ("expired", 1000 + WINDOW_S)
    outputs, errors = house.results(batch["output_file_id"]), house.results(batch["error_file_id"])
    assert {output["custom_id"] for output in outputs} | {error["custom_id"] for error in errors} == {
        "quick", "slow", "never",
    }  # fmt: skip
    assert {error["error"]["code"] for error in errors} == {"batch_expired"}
    assert [error["response"] for error in errors] == [None] * len(errors)
    assert "slow" in {error["custom_id"] for error in errors}


@pytest.mark.parametrize("stop_at", [0, 1, 7, 19])
def test_after_a_restart_finished_lines_are_not_done_again(house: House, stop_at: int) -> None:
    """The runner stops in the middle, the store is opened anew by another: only what has no result is sent."""
    names = [f"n{k}" for k in range(20)]
    for name in names[stop_at:]:
        house.server.replies[name] = ["hang"]
    batch_id = house.batch(*names)
    house.run(
        batch_id, lambda b: b["request_counts"]["completed"] == stop_at and house.server.at_once > 0, concurrency=1
    )
    asked = list(house.server.asked)
    house.server.replies, house.server.asked = {}, []
    batch = house.run(batch_id, store=BatchStore(house.store.folder, lambda: house.now_s, 1 << 30))
    assert (batch["status"], batch["request_counts"]["completed"]) == ("completed", 20)
    assert sorted(house.server.asked) == sorted(names[stop_at:])
    assert asked == names[: stop_at + 1]
    assert [output["custom_id"] for output in house.results(batch["output_file_id"])] == names


@pytest.mark.parametrize("crash_at", ["_write_results", "_register", "_move"])
def test_a_crash_while_results_are_written_loses_and_doubles_nothing(
    house: House, monkeypatch: pytest.MonkeyPatch, crash_at: str
) -> None:
    """Wherever it stops, the next attempt finds the same results, and ends the batch once."""
    batch_id = house.batch("a", "b")
    house.store.validate(batch_id)
    for pending in house.store.pending(batch_id):
        house.store.record(batch_id, pending, True, json.dumps({"custom_id": pending.custom_id}), (1, 1))
    calls = 0
    original = getattr(BatchStore, crash_at)

    def crash(*args: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2 or crash_at == "_register":
            raise OSError("no space left")
        return original(*args, **named)

    with monkeypatch.context() as broken:
        broken.setattr(BatchStore, crash_at, crash)
        with pytest.raises(OSError, match="no space"):
            house.store.finish(batch_id)
    assert house.store.status(batch_id) == "finalizing"
    batch = house.run(batch_id)
    assert [output["custom_id"] for output in house.results(batch["output_file_id"])] == ["a", "b"]
    assert len(house.store.files("batch_output", None, 10, True)) == 1
    assert house.server.asked == []


def test_a_second_result_for_a_line_changes_nothing(house: House) -> None:
    """Two runners at once cannot be, but a result, once written, stays."""
    batch_id = house.batch("a")
    house.store.validate(batch_id)
    (pending,) = house.store.pending(batch_id)
    for text in ("first", "second"):
        house.store.record(batch_id, pending, True, json.dumps(text), (1, 1))
    house.store.finish(batch_id)
    assert house.results(house.store.batch(batch_id)["output_file_id"]) == ["first"]


def test_only_one_of_several_runs_the_batches_and_another_takes_over(house: House) -> None:
    """The first to lock the store works; when it is gone, the second goes on."""

    async def work() -> tuple[int, Any]:
        house.server.gate = asyncio.Event()
        batch_id = house.batch(*(f"n{k}" for k in range(8)))
        stores = [BatchStore(house.store.folder, lambda: house.now_s, 1 << 30) for _ in range(2)]
        tasks = [asyncio.create_task(house.runner(2, store).run()) for store in stores]
        while house.server.at_once < 2:
            await asyncio.sleep(0.005)
        await asyncio.sleep(0.1)
        under_way = house.server.at_once
        tasks[0].cancel()
        await asyncio.gather(tasks[0], return_exceptions=True)
        house.server.gate.set()
        batch = await house.until(batch_id, lambda b: b["status"] in ENDED)
        tasks[1].cancel()
        await asyncio.gather(tasks[1], return_exceptions=True)
        return under_way, batch

    under_way, batch = asyncio.run(asyncio.wait_for(work(), LIMIT_S))
    assert (under_way, batch["status"], batch["request_counts"]["completed"]) == (2, "completed", 8)


def test_a_broken_store_does_not_end_the_runner(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk at one moment is logged, and the batch goes on at the next."""
    batch_id = house.batch("a")
    original, failures = BatchStore.record, iter([OSError("no space left")])

    def record(*args: Any) -> None:
        if error := next(failures, None):
            raise error
        original(*args)

    monkeypatch.setattr(BatchStore, "record", record)
    assert house.run(batch_id)["request_counts"]["completed"] == 1


def test_lines_are_sent_at_the_lowest_priority_with_the_servers_key() -> None:
    """Over a real socket: the header that lets interactive requests go first, and what the answer becomes."""
    seen: list[Any] = []

    async def complete(request: web.Request) -> web.Response:
        seen.append((request.headers["x-splitwiser-priority"], request.headers["authorization"], await request.json()))
        return web.Response(status=429, text="full", headers={"retry-after": "7", "x-request-id": "r1"})

    async def exchange() -> Reply:
        application = web.Application()
        application.router.add_post("/v1/completions", complete)
        runner = web.AppRunner(application)
        await runner.setup()
        try:
            await web.TCPSite(runner, "127.0.0.1", 0).start()
            async with aiohttp.ClientSession() as session:
                url = f"http://127.0.0.1:{runner.addresses[0][1]}"
                return await PublicAddress(url, "key", session).send("/v1/completions", {"prompt": "x"})
        finally:
            await runner.cleanup()

    reply = asyncio.run(exchange())
    assert seen == [("-100", "Bearer key", {"prompt": "x"})]
    assert (reply.status, reply.request_id, reply.retry_after_s) == (429, "r1", 7.0)
    assert reply.body["error"]["message"] == "full"
