"""What the router adds is told against the replica that did the work."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from benchmarks import latency


class Node:
    """Two replicas on ports of their own, and a public port whose requests all go to the second."""

    def __init__(self) -> None:
        self.answered: list[str] = []
        self._servers = [self._server(name, replica) for name, replica in (("a", "a"), ("b", "b"), ("public", "b"))]
        self.urls = [f"127.0.0.1:{server.server_address[1]}" for server in self._servers]

    def _server(self, name: str, replica: str) -> ThreadingHTTPServer:
        answered = self.answered

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                self.rfile.read(int(self.headers["content-length"]))
                answered.append(name)
                self.send_response(200)
                self.send_header("x-splitwiser-replica", replica)
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, format: str, *args: object) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever).start()
        return server

    def close(self) -> None:
        for server in self._servers:
            server.shutdown()
            server.server_close()


@pytest.fixture
def node() -> Iterator[Node]:
    node = Node()
    yield node
    node.close()


def test_a_request_is_compared_with_one_to_the_replica_that_answered_it(node: Node) -> None:
    """An idle replica answers sooner; measured against it, the router would seem to add an engine's step."""
    *direct, public = node.urls
    row = latency.added(f"http://{public}", direct, "m", lambda: True, most=5)
    assert node.answered == ["a", "b"] + 5 * ["public", "b"]
    assert row["requests_each"] == 5
    assert row["added_p50_s"] == pytest.approx(row["through_s"]["p50"] - row["straight_s"]["p50"], abs=1e-5)
