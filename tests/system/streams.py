"""Streams read in threads of their own, so that a test can break something while they run."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import threading
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit


@dataclass
class Stream:
    """A streamed completion under way; `ended` once the answer is over, however it came to that."""

    url: str
    wish: dict[str, Any]
    headers: dict[str, str] = field(default_factory=dict)
    status: int = 0
    replica: str = ""
    text: bytes = b""
    cut: str = ""
    begun: threading.Event = field(default_factory=threading.Event)
    ended: threading.Event = field(default_factory=threading.Event)

    def start(self) -> Stream:
        threading.Thread(target=self._read, daemon=True).start()
        return self

    def hang_up(self) -> None:
        """End the connection as a client does that has gone; to close it would wait for the thread that reads."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    @property
    def done(self) -> bool:
        """Whether it ended as a whole answer does."""
        return self.status == 200 and self.text.rstrip().endswith(b"data: [DONE]")

    @property
    def error(self) -> dict[str, Any]:
        """The error event that it ended with, if it did."""
        last = self.text.rstrip().rpartition(b"\n\n")[2].removeprefix(b"data: ")
        return dict(json.loads(last).get("error", {})) if last.startswith(b"{") else {}

    @property
    def tokens(self) -> int:
        return self.text.count(b'"choices"')

    def _read(self) -> None:
        address = urlsplit(self.url)
        connection = http.client.HTTPConnection(address.hostname or "", address.port, timeout=300)
        try:
            body = json.dumps({"model": "demo", "prompt": "Once", "stream": True, **self.wish})
            headers = {"content-type": "application/json", **self.headers}
            connection.request("POST", "/v1/completions", body, headers)
            self._socket = connection.sock
            answer = connection.getresponse()
            self.status = answer.status
            self.replica = answer.headers.get("x-splitwiser-replica", "")
            while piece := answer.read1(65536):
                self.text += piece
                self.begun.set()
        except (http.client.HTTPException, OSError, ValueError, AttributeError) as error:
            self.cut = repr(error)
        finally:
            self.begun.set()
            self.ended.set()
            connection.close()


def start(url: str, count: int = 1, headers: dict[str, str] | None = None, **wish: Any) -> list[Stream]:
    """So many streams, each begun when this returns."""
    found = [Stream(url, wish, headers or {}).start() for _ in range(count)]
    for stream in found:
        assert stream.begun.wait(120), "a stream never began"
    return found
