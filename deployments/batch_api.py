"""OpenAI's `/v1/files` and `/v1/batches`, as routes of vLLM's own application, so that its API key guards them too.

Any replica answers: everything is in the shared store. Written against the official client (openai-python 3).
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable
from typing import Any

from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route

from deployments.batch_lines import ENDPOINTS, MOST_FILE_BYTES
from deployments.batch_store import BatchStore, StoreError
from deployments.middleware import Message, Receive

# The form around the file: boundaries, headers and the other fields.
_FORM_BYTES = 64 << 10
_PAIRS, _KEY_CHARS, _VALUE_CHARS = 16, 64, 512
_LIFETIME_S = (3600, 30 * 24 * 3600)
_TOO_LARGE = f"a file may have {MOST_FILE_BYTES} bytes; split it into several batches"

Handler = Callable[[Request], Awaitable[Response]]


def routes(store: BatchStore) -> list[Route]:
    """To be added to an application's own."""
    api = BatchApi(store)
    table: list[tuple[str, str, Handler]] = [
        ("POST", "/v1/files", api.create_file),
        ("GET", "/v1/files", api.list_files),
        ("GET", "/v1/files/{id}", api.file),
        ("DELETE", "/v1/files/{id}", api.delete_file),
        ("GET", "/v1/files/{id}/content", api.content),
        ("POST", "/v1/batches", api.create_batch),
        ("GET", "/v1/batches", api.list_batches),
        ("GET", "/v1/batches/{id}", api.batch),
        ("POST", "/v1/batches/{id}/cancel", api.cancel),
    ]
    return [Route(path, _spoken(handler), methods=[method]) for method, path, handler in table]


class BatchApi:
    """One coroutine for each call. Raises StoreError, which `routes` turns into OpenAI's error body."""

    def __init__(self, store: BatchStore) -> None:
        self._store = store

    async def create_file(self, request: Request) -> Response:
        if int(request.headers.get("content-length", "0")) > MOST_FILE_BYTES + _FORM_BYTES:
            raise StoreError(413, _TOO_LARGE, "file")
        limited = Request(request.scope, _limited(request.receive, MOST_FILE_BYTES + _FORM_BYTES))
        async with limited.form(max_files=1, max_fields=8) as form:
            file, purpose = form.get("file"), form.get("purpose")
            if not isinstance(file, UploadFile):
                raise StoreError(400, "`file` must be a file of a multipart form", "file")
            if purpose != "batch":
                raise StoreError(400, "`purpose` must be `batch`: files are for batches only here", "purpose")
            lifetime_s = _lifetime_s(form.get("expires_after[seconds]"))
            if (file.size or 0) > MOST_FILE_BYTES:
                raise StoreError(413, _TOO_LARGE, "file")
            name = (file.filename or "input.jsonl")[:255]
            return JSONResponse(await asyncio.to_thread(self._store.add_file, file.file, name, purpose, lifetime_s))

    async def list_files(self, request: Request) -> Response:
        limit, purpose = _limit(request, 10_000, 10_000), request.query_params.get("purpose")
        newest_first = request.query_params.get("order", "desc") != "asc"
        after = request.query_params.get("after")
        return _page(await asyncio.to_thread(self._store.files, purpose, after, limit, newest_first), limit)

    async def file(self, request: Request) -> Response:
        return JSONResponse(await asyncio.to_thread(self._store.file, request.path_params["id"]))

    async def delete_file(self, request: Request) -> Response:
        file_id = request.path_params["id"]
        await asyncio.to_thread(self._store.delete_file, file_id)
        return JSONResponse({"id": file_id, "object": "file", "deleted": True})

    async def content(self, request: Request) -> Response:
        path = await asyncio.to_thread(self._store.content, request.path_params["id"])
        return FileResponse(path, media_type="application/octet-stream")

    async def create_batch(self, request: Request) -> Response:
        wish = await _json_object(request)
        endpoint, input_file_id = wish.get("endpoint"), wish.get("input_file_id")
        if endpoint not in ENDPOINTS:
            raise StoreError(400, f"`endpoint` must be one of {', '.join(ENDPOINTS)}", "endpoint")
        if wish.get("completion_window") != "24h":
            raise StoreError(400, "`completion_window` must be 24h", "completion_window")
        if not isinstance(input_file_id, str):
            raise StoreError(400, "`input_file_id` must name a file", "input_file_id")
        metadata = _metadata(wish.get("metadata"))
        return JSONResponse(await asyncio.to_thread(self._store.create_batch, input_file_id, endpoint, metadata))

    async def list_batches(self, request: Request) -> Response:
        limit = _limit(request, 20, 100)
        return _page(await asyncio.to_thread(self._store.batches, request.query_params.get("after"), limit), limit)

    async def batch(self, request: Request) -> Response:
        return JSONResponse(await asyncio.to_thread(self._store.batch, request.path_params["id"]))

    async def cancel(self, request: Request) -> Response:
        return JSONResponse(await asyncio.to_thread(self._store.cancel, request.path_params["id"]))


def _spoken(handler: Handler) -> Handler:
    """`handler` with its errors as OpenAI writes them."""

    async def spoken(request: Request) -> Response:
        try:
            return await handler(request)
        except StoreError as error:
            return _refusal(error.status, str(error), error.param)
        except (MultiPartException, HTTPException) as error:
            # Starlette raises the second where it knows its application, and the first where it does not.
            return _refusal(400, str(getattr(error, "detail", "") or getattr(error, "message", "")), "file")

    return spoken


def _refusal(status: int, message: str, param: str | None) -> Response:
    kind = "server_error" if status >= 500 else "invalid_request_error"
    error = {"message": message, "type": kind, "param": param, "code": None}
    return JSONResponse({"error": error}, status_code=status)


def _limited(receive: Receive, most_bytes: int) -> Receive:
    """The same body, refused as soon as it is longer."""
    left = most_bytes

    async def limited() -> Message:
        nonlocal left
        message = await receive()
        left -= len(message.get("body", b""))
        if left < 0:
            raise StoreError(413, _TOO_LARGE, "file")
        return message

    return limited


async def _json_object(request: Request) -> dict[str, Any]:
    try:
        value = await request.json()
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise StoreError(400, "the body must be a JSON object")
    return value


def _limit(request: Request, default: int, most: int) -> int:
    text = request.query_params.get("limit", str(default))
    if not re.fullmatch(r"\d{1,6}", text) or not 1 <= int(text) <= most:
        raise StoreError(400, f"`limit` must be a number from 1 to {most}", "limit")
    return int(text)


def _lifetime_s(text: Any) -> int | None:
    if text is None:
        return None
    least, most = _LIFETIME_S
    if not isinstance(text, str) or not re.fullmatch(r"\d{1,8}", text) or not least <= int(text) <= most:
        raise StoreError(400, f"`expires_after` must be {least} to {most} seconds", "expires_after")
    return int(text)


def _metadata(value: Any) -> dict[str, str] | None:
    if value is None:
        return None
    if not isinstance(value, dict) or len(value) > _PAIRS or not all(map(_fits, value.keys(), value.values())):
        limits = f"{_PAIRS} pairs of strings (keys of {_KEY_CHARS}, values of {_VALUE_CHARS} characters)"
        raise StoreError(400, f"`metadata` may hold {limits}", "metadata")
    return value


def _fits(key: str, value: Any) -> bool:
    return len(key) <= _KEY_CHARS and isinstance(value, str) and len(value) <= _VALUE_CHARS


def _page(items: list[dict[str, Any]], limit: int) -> Response:
    """A page of a list; the store was asked for one more than fits."""
    shown = items[:limit]
    ends = {"first_id": shown[0]["id"], "last_id": shown[-1]["id"]} if shown else {"first_id": None, "last_id": None}
    return JSONResponse({"object": "list", "data": shown, "has_more": len(items) > limit, **ends})
