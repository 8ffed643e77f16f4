"""A replica's whole part in OpenAI's batches over real sockets, with OpenAI's own client; only the engine stands in."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from deployments import batch_runner
from deployments.batches import Batches
from deployments.config import parse_args
from deployments.processes import URL_VARIABLE
from deployments.slot import Slot
from tests.deployments.batch_stand_ins import REFUSAL

LIMIT_S = 60.0
ENDED = {"completed", "failed", "expired", "cancelled"}


class Engine:
    """Answers a prompt with itself; "bad" is refused, and "slow" waits until `release`."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str]] = []
        self.release = threading.Event()

    async def complete(self, request: Request) -> Response:
        prompt = (await request.json())["prompt"]
        self.asked.append((prompt, request.headers["x-splitwiser-priority"]))
        while prompt.startswith("slow") and not self.release.is_set():
            await asyncio.sleep(0.01)
        if prompt == "bad":
            return JSONResponse(REFUSAL, status_code=400)
        usage = {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3}
        return JSONResponse({"choices": [{"index": 0, "text": prompt}], "usage": usage})


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_POLL_S", "_TAKE_OVER_S", "_RETRY_S"):
        monkeypatch.setattr(batch_runner, name, 0.05)


@contextlib.contextmanager
def served(engine: Engine, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[openai.OpenAI]:
    """A replica's application on a port of its own, with the batches of `folder`, until the block ends."""
    application = Starlette(routes=[Route("/v1/completions", engine.complete, methods=["POST"])])
    server = uvicorn.Server(uvicorn.Config(application, host="127.0.0.1", port=0, log_level="error", lifespan="off"))
    slot = Slot(folder / "board", "app#Replica#x", 0, time.monotonic)
    args = parse_args({"batches": {"folder": str(folder / "store"), "concurrency": 4}})
    listening, stop = threading.Event(), threading.Event()

    async def serve() -> None:
        socket = server.config.bind_socket()
        monkeypatch.setenv(URL_VARIABLE, f"http://127.0.0.1:{socket.getsockname()[1]}")
        batches = Batches(application, args, slot)
        serving = asyncio.create_task(server.serve(sockets=[socket]))
        listening.set()
        await asyncio.to_thread(stop.wait)
        await batches.close()
        engine.release.set()
        server.should_exit = True
        await serving

    thread = threading.Thread(target=asyncio.run, args=(serve(),))
    thread.start()
    assert listening.wait(LIMIT_S)
    try:
        with openai.OpenAI(base_url=f"{os.environ[URL_VARIABLE]}/v1", api_key="none", max_retries=2) as client:
            yield client
    finally:
        stop.set()
        thread.join(LIMIT_S)
        slot.close()
        assert not thread.is_alive()


def line(name: str) -> bytes:
    body = {"model": "m", "prompt": name}
    return json.dumps({"custom_id": name, "method": "POST", "url": "/v1/completions", "body": body}).encode() + b"\n"


def submit(client: openai.OpenAI, *names: str) -> str:
    file = client.files.create(file=("in.jsonl", b"".join(map(line, names))), purpose="batch")
    batch = client.batches.create(input_file_id=file.id, endpoint="/v1/completions", completion_window="24h")
    return batch.id


def until(client: openai.OpenAI, batch_id: str, holds: Callable[[Any], bool]) -> Any:
    deadline_s = time.monotonic() + LIMIT_S
    while not holds(batch := client.batches.retrieve(batch_id)):
        assert time.monotonic() < deadline_s, batch
        time.sleep(0.02)
    return batch


def results(client: openai.OpenAI, file_id: str) -> dict[str, Any]:
    found = [json.loads(text) for text in client.files.content(file_id).text.splitlines()]
    return {result["custom_id"]: result["response"] for result in found}


def test_a_batch_goes_from_its_file_to_its_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the public address, at the lowest priority; refused lines stand in the error file."""
    engine = Engine()
    with served(engine, tmp_path, monkeypatch) as client:
        batch_id = submit(client, "one", "bad", "two")
        batch = until(client, batch_id, lambda b: b.status in ENDED)
        outputs, errors = results(client, batch.output_file_id), results(client, batch.error_file_id)
        assert [found.id for found in client.batches.list()] == [batch_id]
    assert (batch.status, batch.usage.output_tokens) == ("completed", 4)
    assert {name: response["body"]["choices"][0]["text"] for name, response in outputs.items()} == {
        "one": "one",
        "two": "two",
    }
    assert (list(errors), errors["bad"]["status_code"], errors["bad"]["body"]) == (["bad"], 400, REFUSAL)
    assert {priority for _, priority in engine.asked} == {"-100"}


def test_a_batch_is_cancelled_while_its_lines_are_under_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was finished is kept, what was not is given up."""
    engine = Engine()
    with served(engine, tmp_path, monkeypatch) as client:
        batch_id = submit(client, "one", *(f"slow {k}" for k in range(8)))
        until(client, batch_id, lambda b: b.request_counts.completed == 1 and len(engine.asked) == 5)
        client.batches.cancel(batch_id)
        batch = until(client, batch_id, lambda b: b.status in ENDED)
        assert list(results(client, batch.output_file_id)) == ["one"]
    assert (batch.status, batch.request_counts.total, batch.error_file_id) == ("cancelled", 9, None)


def test_a_batch_goes_on_after_a_restart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped in the middle and started again on the same folder: only lines without a result are asked for again."""
    names = ["one", "two", *(f"slow {k}" for k in range(6))]
    before, after = Engine(), Engine()
    with served(before, tmp_path, monkeypatch) as client:
        batch_id = submit(client, *names)
        until(client, batch_id, lambda b: b.request_counts.completed == 2 and len(before.asked) == 6)
    after.release.set()
    with served(after, tmp_path, monkeypatch) as client:
        batch = until(client, batch_id, lambda b: b.status in ENDED)
        assert sorted(results(client, batch.output_file_id)) == sorted(names)
    assert (batch.status, batch.request_counts.completed) == ("completed", 8)
    assert sorted(prompt for prompt, _ in after.asked) == sorted(names[2:])
