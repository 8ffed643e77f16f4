"""Errors as OpenAI's clients understand them: the one place that knows their form."""

from __future__ import annotations

import math
from typing import Any

Headers = list[tuple[bytes, bytes]]
Error = tuple[int, dict[str, Any], Headers]

# What the refusals of `balancer.access` mean.
WORDS = {
    "invalid_api_key": "the API key is missing or not valid",
    "request_rate": "this key has used up its requests per minute",
    "token_rate": "this key has used up its tokens per minute",
    "too_many_at_once": "this key has too many requests at once",
}
_KINDS = {429: "rate_limit_exceeded", 404: "not_found_error", 500: "server_error", 502: "server_error", 504: "timeout"}


def body(status: int, message: str, code: str | None = None) -> dict[str, Any]:
    """The JSON object that an OpenAI client turns into its exception."""
    kind = _KINDS.get(status, "invalid_request_error" if status < 500 else "service_unavailable")
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}


def error(status: int, code: str | None, message: str, retry_after_s: float | None = None) -> Error:
    """Status, body and headers; `Retry-After` in whole seconds, at least 1, where there is something to wait for."""
    headers: Headers = []
    if status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    if retry_after_s is not None:
        headers.append((b"retry-after", str(max(1, math.ceil(retry_after_s))).encode()))
    return status, body(status, message, code), headers
