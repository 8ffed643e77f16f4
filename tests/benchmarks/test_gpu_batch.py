"""The benchmark of a split batch: how its rows are compared, and what it asks."""

from __future__ import annotations

import argparse
import http.server
import json
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from benchmarks.gpu_batch import compared, sent

OPTIONS = argparse.Namespace(prompts=160, tokens=[1024, 1024], replicas=4, demo=False)


def row(way: str, tokens_per_s: float, last_end_over_mean: float = 1.0) -> dict[str, Any]:
    return {"way": way, "tokens_per_s": tokens_per_s, "last_end_over_mean": last_end_over_mean}


def test_the_split_batch_is_compared_by_medians_with_one_engine_and_the_best_by_hand() -> None:
    """One outlier changes nothing, and the best number of hands is what counts."""
    rows = [row("one", 100), row("one", 110), row("one", 900)]
    rows += [row("by hand over 2", 150), row("by hand over 4", 200)]
    rows += [row("split", 190, 1.01), row("split", 198, 1.04), row("split", 10, 1.5)]
    result = compared(rows, OPTIONS)
    assert (result["split_over_one"], result["split_over_best_by_hand"]) == (round(190 / 110, 3), 0.95)
    assert result["last_end_over_mean"] == 1.04


@pytest.fixture
def server() -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Answers every completion with a token for each prompt, and keeps what was asked."""
    asked: list[dict[str, Any]] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            wish = json.loads(self.rfile.read(int(self.headers["content-length"])))
            asked.append({**wish, "ticket": self.headers["x-serve-router-splitwiser"]})
            body = json.dumps({"usage": {"completion_tokens": len(wish["prompt"])}}).encode()
            self.send_response(200)
            self.send_header("content-length", str(len(body)))
            self.send_header("x-splitwiser-parts", "7")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            """Quiet."""

    service = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=service.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{service.server_port}", asked
    service.shutdown()
    thread.join()
    service.server_close()


@pytest.mark.parametrize(("way", "shares", "parts"), [("one", 1, 1), ("by hand over 3", 3, 3), ("split", 1, 7)])
def test_each_way_asks_every_prompt_once(server: Any, way: str, shares: int, parts: int) -> None:
    """In equal shares straight to the replicas, or all at once through the public address."""
    url, asked = server
    prompts = [[k] for k in range(10)]
    assert sent(way, url, [url] * 3, prompts, 5) == (10, parts)
    assert sorted(prompt for wish in asked for prompt in wish["prompt"]) == prompts
    assert len(asked) == shares
    assert {wish["ticket"] for wish in asked} == {None if way == "split" else "direct"}
