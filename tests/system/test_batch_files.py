"""OpenAI's files and batches over the real system, with OpenAI's own client, through a cancel and a restart."""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import openai
import pytest
from conftest import System, free_port, start, stop, write_config

pytestmark = [pytest.mark.system, pytest.mark.timeout(900)]

BATCH_LIMIT_S = 180.0
ENDED = {"completed", "failed", "expired", "cancelled"}


def line(name: str, **wish: Any) -> bytes:
    body = {"model": "demo", "prompt": f"{name} and", "max_tokens": 4, "temperature": 0.0, "ignore_eos": True, **wish}
    return json.dumps({"custom_id": name, "method": "POST", "url": "/v1/completions", "body": body}).encode() + b"\n"


def client_of(system: System) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{system.url}/v1", api_key="none", max_retries=0)


def submit(client: openai.OpenAI, *lines: bytes) -> Any:
    file = client.files.create(file=("input.jsonl", b"".join(lines)), purpose="batch")
    return client.batches.create(input_file_id=file.id, endpoint="/v1/completions", completion_window="24h")


def until(client: openai.OpenAI, batch_id: str, holds: Callable[[Any], bool]) -> Any:
    deadline_s = time.monotonic() + BATCH_LIMIT_S
    while not holds(batch := client.batches.retrieve(batch_id)):
        assert time.monotonic() < deadline_s, batch
        time.sleep(0.1)
    return batch


def results(client: openai.OpenAI, file_id: str) -> dict[str, Any]:
    found = [json.loads(text) for text in client.files.content(file_id).text.splitlines()]
    return {result["custom_id"]: result for result in found}


def test_the_official_clients_calls_bring_a_batch_from_its_file_to_its_results(system: System) -> None:
    """Upload, create, wait, read outputs and errors, list, delete; texts are those of ordinary requests."""
    client = client_of(system)
    batch = submit(client, line("sea"), line("harbour"), line("broken", max_tokens=-1))
    batch = until(client, batch.id, lambda b: b.status in ENDED)
    assert (batch.status, batch.request_counts.completed, batch.request_counts.failed) == ("completed", 2, 1)
    outputs, errors = results(client, batch.output_file_id), results(client, batch.error_file_id)
    said = outputs["sea"]["response"]["body"]["choices"][0]["text"]
    assert said == system.complete("sea and", max_tokens=4, temperature=0.0, ignore_eos=True).text
    assert (sorted(outputs), errors["broken"]["response"]["status_code"]) == (["harbour", "sea"], 400)
    assert batch.usage.output_tokens == 8
    assert batch.id in [found.id for found in client.batches.list(limit=100)]
    for file_id in (batch.input_file_id, batch.output_file_id, batch.error_file_id):
        assert client.files.retrieve(file_id).id == file_id
        assert client.files.delete(file_id).deleted
    with pytest.raises(openai.NotFoundError):
        client.files.retrieve(batch.input_file_id)


def test_a_cancelled_batch_keeps_what_was_finished_and_frees_the_engines(system: System) -> None:
    """After the cancel the batch ends as cancelled, with at most what was done in its output."""
    client = client_of(system)
    batch = submit(client, line("first"), *(line(f"long {k}", max_tokens=900) for k in range(40)))
    until(client, batch.id, lambda b: b.request_counts.completed > 0)
    assert client.batches.cancel(batch.id).status in ("cancelling", "cancelled")
    batch = until(client, batch.id, lambda b: b.status in ENDED)
    assert batch.status == "cancelled"
    assert 0 < batch.request_counts.completed < batch.request_counts.total == 41
    assert len(results(client, batch.output_file_id)) == batch.request_counts.completed
    with pytest.raises(openai.ConflictError, match="cancelled"):
        client.batches.cancel(batch.id)


@pytest.mark.long
def test_a_batch_goes_on_after_a_restart_without_doing_finished_lines_again(tmp_path: Path) -> None:
    """The system is stopped in the middle and started again on the same folder: every line has one result, and those
    from before are kept to the letter."""
    port = free_port()

    def small(document: dict[str, Any]) -> None:
        arguments = document["applications"][0]["args"]
        arguments["replicas"] = 1
        arguments["batches"]["concurrency"] = 4

    config = write_config(tmp_path, port, small)
    system = start(config, port, tmp_path / "log")
    try:
        batch = submit(client_of(system), *(line(f"line {k}", max_tokens=200) for k in range(60)))
        until(client_of(system), batch.id, lambda b: b.request_counts.completed >= 4)
    finally:
        stop(system)
    before = recorded(tmp_path / "batches" / "batches.db")
    assert 4 <= len(before) < 60
    system = start(config, port, tmp_path / "log 2")
    try:
        batch = until(client_of(system), batch.id, lambda b: b.status in ENDED)
        after = results(client_of(system), batch.output_file_id)
    finally:
        stop(system)
    assert (batch.status, batch.request_counts.completed, len(after)) == ("completed", 60, 60)
    assert {name: after[name] for name in before} == before


def recorded(database: Path) -> dict[str, Any]:
    """The results on disk so far."""
    with closing(sqlite3.connect(database)) as connection:
        rows = connection.execute("SELECT custom_id, result FROM lines WHERE ok").fetchall()
    return {name: json.loads(text) for name, text in rows}
