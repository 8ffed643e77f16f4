"""An OpenAI completions server on loopback that streams, fails or breaks off as a request's first token id tells it."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

FINE, BUSY, CUT, ERROR_EVENT, NO_USAGE = 0, 1, 2, 3, 4


class StandIn(ThreadingHTTPServer):
    """`asked` holds the bodies it got; `most` how many it had at once."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: list[dict[str, Any]] = []
        self.under_way, self.most = 0, 0
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: StandIn

    def do_GET(self) -> None:
        self._whole(200, {"data": [{"id": "stand-in"}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        with self.server.lock:
            self.server.asked.append(body)
            self.server.under_way += 1
            self.server.most = max(self.server.most, self.server.under_way)
        self._answer(body, behaviour=body["prompt"][0])
        with self.server.lock:
            self.server.under_way -= 1

    def _answer(self, body: dict[str, Any], behaviour: int) -> None:
        tokens = body["max_tokens"]
        if behaviour == BUSY:
            self._whole(503, {"error": {"message": "full"}})
        elif not body["stream"]:
            self._whole(200, {"choices": [{"text": "x"}], "usage": {"completion_tokens": tokens}})
        else:
            self._stream(tokens, behaviour)

    def _stream(self, tokens: int, behaviour: int) -> None:
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.send_header("x-splitwiser-replica", "r0")
        self.send_header("connection", "close")
        self.end_headers()
        self.close_connection = True
        for _ in range(tokens if behaviour != CUT else 1):
            self._event({"choices": [{"text": "x"}]})
        if behaviour == CUT:
            return
        if behaviour == ERROR_EVENT:
            self._event({"error": {"message": "the engine died"}})
        elif behaviour != NO_USAGE:
            self._event({"choices": [], "usage": {"completion_tokens": tokens}})
        self.wfile.write(b"data: [DONE]\n\n")

    def _event(self, content: dict[str, Any]) -> None:
        self.wfile.write(b"data: " + json.dumps(content).encode() + b"\n\n")

    def _whole(self, status: int, content: dict[str, Any]) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet."""


@contextmanager
def stand_in() -> Iterator[StandIn]:
    server = StandIn()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
