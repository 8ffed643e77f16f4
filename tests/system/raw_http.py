"""Requests as bytes, for what a client library would refuse to send."""

from __future__ import annotations

import json
import re
import socket
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Reply:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def error(self) -> dict[str, Any]:
        """The OpenAI error object; fails where the body is anything else."""
        error: dict[str, Any] = json.loads(self.body)["error"]
        assert error["message"]
        return error


def head(method: str, path: str, *lines: str, length: int | str | None = None) -> bytes:
    """A request up to its body; `lines` are headers, written as they are."""
    headers = [f"{method} {path} HTTP/1.1", "host: x", "content-type: application/json", *lines]
    if length is not None:
        headers.append(f"content-length: {length}")
    return "\r\n".join([*headers, "", ""]).encode("latin-1")


def post(url: str, path: str, body: bytes, *lines: str) -> Reply:
    return send(url, head("POST", path, *lines, length=len(body)) + body)


def send(url: str, *parts: bytes, wait_s: float = 60.0) -> Reply:
    """Send the bytes as they are, and take what comes back; a server that stops listening midway is no error."""
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=wait_s) as connection:
        try:
            for part in parts:
                connection.sendall(part)
        except (BrokenPipeError, ConnectionResetError):
            pass
        return _read(connection)


def _read(connection: socket.socket) -> Reply:
    answer = b""
    while not _whole(answer):
        try:
            chunk = connection.recv(1 << 16)
        except ConnectionResetError:
            break
        if not chunk:
            break
        answer += chunk
    start, _, body = answer.partition(b"\r\n\r\n")
    first, *lines = start.decode("latin-1").split("\r\n")
    assert first.startswith("HTTP/1.1 "), f"no answer but {answer[:200]!r}"
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    return Reply(int(first.split()[1]), headers, body)


def _whole(answer: bytes) -> bool:
    start, separator, body = answer.partition(b"\r\n\r\n")
    length = re.search(rb"content-length: (\d+)", start.lower())
    return bool(separator and length and len(body) >= int(length[1]))
