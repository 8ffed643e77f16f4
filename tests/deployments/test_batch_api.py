"""Files and batches with OpenAI's own client: every call, every refusal, and what lies on disk."""

from __future__ import annotations

import asyncio
import json
import stat
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, TypeVar

import httpx2
import openai
import pytest
from starlette.applications import Starlette

from deployments import batch_api
from deployments.batch_api import routes
from deployments.batch_store import WINDOW_S, BatchStore

T = TypeVar("T")
Use = Callable[[openai.AsyncOpenAI], Coroutine[Any, Any, T]]
NOW_S = 1_800_000_000
LINE = json.dumps(
    {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"model": "m", "prompt": "x"}}
).encode()


class Service:
    """The routes over a store of its own, and OpenAI's client before them."""

    def __init__(self, folder: Path) -> None:
        self.now_s = NOW_S
        self.store = BatchStore(folder, lambda: self.now_s, most_bytes=1 << 20)
        self.application = Starlette(routes=routes(self.store))

    def use(self, calls: Use[T]) -> T:
        async def exchange() -> T:
            transport = httpx2.ASGITransport(app=self.application)
            async with httpx2.AsyncClient(transport=transport) as http:
                return await calls(
                    openai.AsyncOpenAI(base_url="http://x/v1", api_key="k", http_client=http, max_retries=0)
                )

        return asyncio.run(exchange())

    def upload(self, content: bytes = LINE) -> Any:
        return self.use(lambda client: client.files.create(file=("in.jsonl", content), purpose="batch"))

    def create(self, file_id: str, **more: Any) -> Any:
        wish: dict[str, Any] = {"endpoint": "/v1/completions", "completion_window": "24h", **more}
        return self.use(lambda client: client.batches.create(input_file_id=file_id, **wish))


@pytest.fixture
def service(tmp_path: Path) -> Service:
    return Service(tmp_path / "store")


def test_a_file_is_kept_and_given_back_as_it_was(service: Service) -> None:
    """Create, retrieve, content, list, delete; afterwards it is gone from the list and from the disk."""
    file = service.upload(b"some\r\nbytes\x00\n")
    assert (file.bytes, file.filename, file.purpose, file.created_at) == (13, "in.jsonl", "batch", NOW_S)
    assert service.use(lambda client: client.files.retrieve(file.id)) == file
    assert service.use(lambda client: client.files.content(file.id)).content == b"some\r\nbytes\x00\n"
    assert service.use(lambda client: client.files.delete(file.id)).deleted
    assert service.use(_all_files) == []
    assert list((service.store.folder / "files").iterdir()) == []


async def _all_files(client: openai.AsyncOpenAI) -> list[Any]:
    return [file async for file in client.files.list(limit=2)]


async def _all_batches(client: openai.AsyncOpenAI) -> list[Any]:
    return [batch async for batch in client.batches.list(limit=2)]


def test_lists_go_on_page_by_page_newest_first(service: Service) -> None:
    """Five of each over pages of two: all of them once."""
    files = [service.upload() for _ in range(5)]
    batches = [service.create(file.id) for file in files]
    assert [file.id for file in service.use(_all_files)] == [file.id for file in files[::-1]]
    assert [batch.id for batch in service.use(_all_batches)] == [batch.id for batch in batches[::-1]]


def test_a_new_batch_waits_to_be_validated_and_expires_in_a_day(service: Service) -> None:
    """As OpenAI shows it, with the caller's metadata."""
    batch = service.create(service.upload().id, metadata={"for": "me"})
    assert (batch.status, batch.endpoint, batch.metadata) == ("validating", "/v1/completions", {"for": "me"})
    assert (batch.created_at, batch.expires_at) == (NOW_S, NOW_S + WINDOW_S)
    assert (batch.request_counts.total, batch.output_file_id) == (0, None)
    assert service.use(lambda client: client.batches.retrieve(batch.id)) == batch


def test_a_batch_is_cancelled_once_it_is_asked(service: Service) -> None:
    """It is cancelling at once, also when asked twice, and its input cannot be deleted under it."""
    file = service.upload()
    batch = service.create(file.id)
    with pytest.raises(openai.ConflictError, match="still reads this file"):
        service.use(lambda client: client.files.delete(file.id))
    for _ in range(2):
        cancelled = service.use(lambda client: client.batches.cancel(batch.id))
        assert (cancelled.status, cancelled.cancelling_at) == ("cancelling", NOW_S)


def test_ids_cannot_be_guessed_and_files_are_private(service: Service) -> None:
    """128 random bits, mode 0600, folders 0700."""
    file = service.upload()
    batch = service.create(file.id)
    assert len(file.id.removeprefix("file-")) == len(batch.id.removeprefix("batch_")) == 32
    for path in [service.store.folder, *service.store.folder.rglob("*")]:
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path


def test_nothing_is_on_disk_before_it_is_used(service: Service) -> None:
    """A system whose batches nobody uses leaves no trace."""
    assert not service.store.exists
    assert not service.store.folder.exists()


@pytest.mark.parametrize(
    ("wish", "said"),
    [
        ({"endpoint": "/v1/moderations"}, "must be one of"),
        ({"completion_window": "1h"}, "24h"),
        ({"metadata": {"k": 5}}, "metadata"),
        ({"metadata": {"k" * 65: "v"}}, "metadata"),
    ],
)
def test_an_impossible_batch_is_refused_in_one_sentence(service: Service, wish: dict[str, Any], said: str) -> None:
    """400 with OpenAI's error body."""
    with pytest.raises(openai.BadRequestError, match=said):
        service.create(service.upload().id, **wish)


@pytest.mark.parametrize(
    "call", ["files.retrieve", "files.content", "files.delete", "batches.retrieve", "batches.cancel"]
)
@pytest.mark.parametrize("name", ["nothing", "..%2F..%2Fbatches.db", "file-' OR 1=1 --"])
def test_what_does_not_exist_is_404(service: Service, call: str, name: str) -> None:
    """Also when the id tries to be a path or a query."""
    service.upload()
    resource, method = call.split(".")
    with pytest.raises((openai.NotFoundError, openai.APIStatusError)) as refused:
        service.use(lambda client: getattr(getattr(client, resource), method)(name))
    assert refused.value.status_code in (404, 405)


def test_a_batch_needs_an_existing_input_file(service: Service) -> None:
    """404 for a file that is not there."""
    with pytest.raises(openai.NotFoundError, match="there is no file"):
        service.create("file-none")


def test_other_purposes_are_refused(service: Service) -> None:
    """Files are for batches only."""
    with pytest.raises(openai.BadRequestError, match="`purpose` must be `batch`"):
        service.use(lambda client: client.files.create(file=("a", b"x"), purpose="fine-tune"))


def test_a_file_beyond_the_limit_is_413_whatever_its_length_says(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refused by its stated length, and where that is missing as soon as it is longer; nothing is kept."""
    monkeypatch.setattr(batch_api, "MOST_FILE_BYTES", 1000)
    monkeypatch.setattr(batch_api, "_FORM_BYTES", 1000)

    async def unstated(client: openai.AsyncOpenAI) -> Any:
        async def chunks() -> Any:
            yield b'--b\r\ncontent-disposition: form-data; name="file"; filename="x"\r\n\r\n'
            for _ in range(5):
                yield b"x" * 1000

        return await client._client.post(
            "http://x/v1/files", content=chunks(), headers={"content-type": "multipart/form-data; boundary=b"}
        )

    with pytest.raises(openai.APIStatusError) as refused:
        service.upload(b"x" * 3000)
    assert refused.value.status_code == service.use(unstated).status_code == 413
    assert service.use(_all_files) == []


def test_a_full_store_takes_no_more_files(service: Service) -> None:
    """507, until something is deleted."""
    file = service.upload(b"x" * (1 << 20))
    with pytest.raises(openai.InternalServerError, match="delete files"):
        service.upload()
    service.use(lambda client: client.files.delete(file.id))
    assert service.upload().bytes == len(LINE)


@pytest.mark.parametrize(
    ("method", "path", "content"),
    [
        ("POST", "/v1/files", b"no form"),
        ("POST", "/v1/batches", b"{"),
        ("POST", "/v1/batches", b"[]"),
        ("GET", "/v1/files?limit=0", b""),
        ("GET", "/v1/batches?limit=x", b""),
        ("GET", "/v1/batches?limit=101", b""),
    ],
)
def test_malformed_calls_are_400(service: Service, method: str, path: str, content: bytes) -> None:
    """With OpenAI's error body."""

    async def call(client: openai.AsyncOpenAI) -> Any:
        return await client._client.request(method, f"http://x{path}", content=content)

    answer = service.use(call)
    assert (answer.status_code, answer.json()["error"]["type"]) == (400, "invalid_request_error")


def test_a_file_is_deleted_when_its_time_is_over(service: Service) -> None:
    """`expires_after` is kept to, but never while a batch still reads the file."""
    lifetime: Any = {"anchor": "created_at", "seconds": 3600}
    create: Use[Any] = lambda client: client.files.create(file=("a", LINE), purpose="batch", expires_after=lifetime)  # noqa: E731
    read, unread = service.use(create), service.use(create)
    assert read.expires_at == NOW_S + 3600
    service.create(read.id)
    service.now_s += 3599
    service.store.purge()
    assert len(service.use(_all_files)) == 2
    service.now_s += 1
    service.store.purge()
    assert [file.id for file in service.use(_all_files)] == [read.id]
    assert unread.id not in [path.name for path in (service.store.folder / "files").iterdir()]
