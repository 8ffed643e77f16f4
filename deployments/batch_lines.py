"""The lines of OpenAI's batch files: what a request in the input must be, and how results are written."""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

ENDPOINTS = ("/v1/completions", "/v1/chat/completions", "/v1/embeddings", "/v1/responses")
# OpenAI's own limits.
MOST_LINES = 50_000
MOST_FILE_BYTES = 200 * 10**6
# Enough to mend a file by; a file of another kind has an error in every line.
MOST_ERRORS = 100


@dataclass(frozen=True, slots=True)
class Line:
    """One request of an input file: where it stands there (bytes), counted from 1, and its caller's name for it."""

    number: int
    custom_id: str
    start: int
    length: int


@dataclass(frozen=True, slots=True)
class LineError:
    """Why a file cannot be run; `line` None when it is not about a single one."""

    code: str
    message: str
    line: int | None = None
    param: str | None = None

    def as_dict(self) -> dict[str, Any]:
        return {"code": self.code, "message": self.message, "line": self.line, "param": self.param}


class LineFaultError(ValueError):
    """A line is no request."""

    def __init__(self, code: str, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.param = param


def read_lines(file: BinaryIO, endpoint: str) -> tuple[list[Line], list[LineError], str | None]:
    """The requests of an input file, what is wrong with it (at most MOST_ERRORS), and the model of its first line."""
    lines: list[Line] = []
    errors: list[LineError] = []
    names: set[str] = set()
    model: str | None = None
    for number, start, text in _numbered(file):
        try:
            request = parse_line(text, endpoint)
            if request["custom_id"] in names:
                raise LineFaultError("duplicate_custom_id", "the custom_id stands in an earlier line", "custom_id")
        except LineFaultError as fault:
            errors.append(LineError(fault.code, str(fault), number, fault.param))
        else:
            names.add(request["custom_id"])
            lines.append(Line(number, request["custom_id"], start, len(text)))
            model = model or request["body"]["model"]
        if len(errors) >= MOST_ERRORS:
            break
        if number > MOST_LINES:
            return [], [LineError("too_many_requests", f"a batch may have {MOST_LINES} requests; split the file")], None
    if not lines and not errors:
        errors.append(LineError("empty_file", "the file holds no request; write one JSON object a line"))
    return lines, errors, model


def _numbered(file: BinaryIO) -> Iterator[tuple[int, int, bytes]]:
    """The lines that are not blank, with number and position."""
    start = 0
    for number, text in enumerate(file, start=1):
        if text.strip():
            yield number, start, text
        start += len(text)


def parse_line(text: bytes, endpoint: str) -> dict[str, Any]:
    """The request in a line. Raises LineFaultError."""
    try:
        request = json.loads(text)
    except (ValueError, RecursionError):
        raise LineFaultError("invalid_json_line", "the line is not a JSON object") from None
    if not isinstance(request, dict):
        raise LineFaultError("invalid_json_line", "the line is not a JSON object")
    _require(isinstance(request.get("custom_id"), str) and request["custom_id"], "custom_id", "a string of your own")
    _require(request.get("method") == "POST", "method", "POST")
    _require(request.get("url") == endpoint, "url", f"the batch's endpoint, {endpoint}")
    body = request.get("body")
    if not isinstance(body, dict):
        raise LineFaultError("invalid_value", "`body` must be the request as a JSON object", "body")
    _require(isinstance(body.get("model"), str), "body.model", "the name of the model")
    _require(not body.get("stream"), "body.stream", "false: results of a batch are files")
    return request


def _require(holds: object, key: str, must_be: str) -> None:
    if not holds:
        raise LineFaultError("invalid_value", f"`{key}` must be {must_be}", key)


def result_line(custom_id: str, status: int, request_id: str, body: Any) -> str:
    """A line of an output or error file for a request that was answered."""
    response = {"status_code": status, "request_id": request_id, "body": body}
    return _line(custom_id, response, None)


def expired_line(custom_id: str) -> str:
    message = "This request could not be executed before the completion window expired."
    return _line(custom_id, None, {"code": "batch_expired", "message": message})


def _line(custom_id: str, response: Any, error: Any) -> str:
    line = {"id": f"batch_req_{secrets.token_hex(16)}", "custom_id": custom_id, "response": response, "error": error}
    return json.dumps(line, ensure_ascii=False)
