"""A batch split by splitwiser-serve against the same batch on one engine, and against equal shares dealt by hand.

`python -m benchmarks.gpu_batch --out rows.jsonl --logs FOLDER` starts four replicas of the shape OPT-125m on the GPU
and times a batch of 160 prompts of 1,024 tokens with answers of 1,024 (`--demo`: a small one on CPUs), each way in
turn, `--repeats` times. Prompts are token ids; sampling is at temperature 1, because greedy decoding of random weights
repeats one token, which measures the detokenizer. The last row compares the medians.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import http.client
import json
import random
import statistics
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO
from urllib.parse import urlsplit

from balancer.board import Board, board_path
from balancer.ticket import DIRECT, HEADER
from benchmarks import latency, rivals, shapes
from benchmarks.rivals import SERVED_NAME, Server, Setup

# KV bytes over all replicas, and what the engines need beside the seed's own settings.
KV_BYTES = 32_000_000_000
ENGINE: dict[str, Any] = {
    "load_format": "dummy",
    "max_model_len": 2048,
    "max_num_seqs": 384,
    "max_num_batched_tokens": 8192,
    "dtype": "bfloat16",
    "enable_prefix_caching": False,
    "compilation_config": {"mode": 0, "cudagraph_mode": "FULL"},
}
DEMO_ENGINE: dict[str, Any] = {"max_model_len": 1024, "max_num_seqs": 64, "dtype": "bfloat16", "enforce_eager": True}
DEMO_KV_BYTES = 1 << 29
LOOK_EVERY_S = 0.005
STRAIGHT = {HEADER: DIRECT.policy}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.gpu_batch", description=__doc__)
    parser.add_argument("--demo", action="store_true", help="a small model on CPUs, two replicas")
    parser.add_argument("--replicas", type=int)
    parser.add_argument("--prompts", type=int)
    parser.add_argument("--tokens", type=int, nargs=2, metavar=("IN", "OUT"))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--active-set", type=int, help="pin the active set; left out, the policy decides")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--logs", type=Path, required=True)
    options = parser.parse_args(arguments)
    options.replicas = options.replicas or (2 if options.demo else 4)
    options.prompts = options.prompts or (32 if options.demo else 160)
    options.tokens = options.tokens or ([32, 64] if options.demo else [1024, 1024])
    options.logs.mkdir(parents=True, exist_ok=True)
    rows = []
    with options.out.open("a", buffering=1) as file, started(options) as server:
        for row in measured(server, options):
            rows.append(row)
            _write(file, row)
        _write(file, compared(rows, options))
    return 0


def _write(file: TextIO, row: dict[str, Any]) -> None:
    print(json.dumps(row), flush=True)
    file.write(json.dumps(row) + "\n")


@contextlib.contextmanager
def started(options: argparse.Namespace) -> Iterator[Server]:
    model = "demo" if options.demo else str(shapes.make_folder("opt-125m", options.logs))
    engine, kv_bytes = (DEMO_ENGINE, DEMO_KV_BYTES) if options.demo else (ENGINE, KV_BYTES)
    setup = Setup(model, engine, kv_bytes, options.logs, time.monotonic() + 500)
    balancer = {"policy": "gpu_aware", **({"active_set": options.active_set} if options.active_set else {})}
    with rivals.splitwiser(setup, options.replicas, "off" if options.demo else "on", balancer) as server:
        yield server


def measured(server: Server, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One row for each way and repeat; the first turn of each way warms up and is not reported."""
    assert server.folder is not None
    direct = [f"http://{address}" for address in latency.direct_urls(server.folder)]
    rng = random.Random(7)
    for repeat in range(-1, options.repeats):
        for way in ["one", *(f"by hand over {k}" for k in range(2, len(direct) + 1)), "split"]:
            prompts = [[rng.randrange(10, 200) for _ in range(options.tokens[0])] for _ in range(options.prompts)]
            with busy_until(server.folder.name) as ends:
                began_s = time.monotonic()
                tokens, parts = sent(way, server.url, direct, prompts, options.tokens[1])
                seconds = time.monotonic() - began_s
            if repeat >= 0:
                spent = [end - began_s for end in ends.values()]
                yield {"way": way, "repeat": repeat, "seconds": round(seconds, 3), "output_tokens": tokens,
                       "parts": parts, "tokens_per_s": round(tokens / seconds, 1), "replicas_used": len(spent),
                       "last_end_over_mean": round(max(spent) / statistics.mean(spent), 4)}  # fmt: skip


def sent(way: str, url: str, direct: list[str], prompts: list[list[int]], output: int) -> tuple[int, int]:
    """Output tokens of the whole batch, and in how many parts it was answered."""
    if way == "split":
        document, headers = ask(url, prompts, output, {})
        return document["usage"]["completion_tokens"], int(headers.get("x-splitwiser-parts", "1"))
    shares = int(way.rpartition(" ")[2]) if way != "one" else 1
    with concurrent.futures.ThreadPoolExecutor(shares) as pool:
        asked = [pool.submit(ask, direct[k], prompts[k::shares], output, STRAIGHT) for k in range(shares)]
        return sum(future.result()[0]["usage"]["completion_tokens"] for future in asked), shares


def ask(url: str, prompts: list[list[int]], output: int, headers: dict[str, str]) -> tuple[Any, dict[str, str]]:
    """Raises RuntimeError unless the answer is 200."""
    wish = {"model": SERVED_NAME, "prompt": prompts, "max_tokens": output, "ignore_eos": True, "temperature": 1.0}
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=600)
    with contextlib.closing(connection):
        connection.request("POST", "/v1/completions", json.dumps(wish), {"content-type": "application/json", **headers})
        answer = connection.getresponse()
        body = answer.read()
        if answer.status != 200:
            raise RuntimeError(f"{url} answered {answer.status}: {body[:500]!r}")
        return json.loads(body), {name.lower(): value for name, value in answer.getheaders()}


@contextlib.contextmanager
def busy_until(run_id: str) -> Iterator[dict[int, float]]:
    """When each replica that worked while the block ran was last seen running something, by its slot."""
    ends: dict[int, float] = {}
    stop = threading.Event()

    def look() -> None:
        board = Board.open(board_path(run_id))
        while not stop.wait(LOOK_EVERY_S):
            now_s = time.monotonic()
            ends.update((r.slot, now_s) for r in board.snapshot(now_s).replicas if r.running_requests)
        board.close()

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield ends
    finally:
        stop.set()
        thread.join()


def compared(rows: Sequence[dict[str, Any]], options: argparse.Namespace) -> dict[str, Any]:
    """Medians of each way, and what the split batch is to the one engine and to the best dealt by hand."""
    ways = {row["way"] for row in rows}
    rate = {way: statistics.median(r["tokens_per_s"] for r in rows if r["way"] == way) for way in ways}
    by_hand = max(rate[way] for way in ways if way.startswith("by hand"))
    ends = [row["last_end_over_mean"] for row in rows if row["way"] == "split"]
    return {"prompts": options.prompts, "tokens": options.tokens, "replicas": options.replicas, "demo": options.demo,
            "median_tokens_per_s": rate, "split_over_one": round(rate["split"] / rate["one"], 3),
            "split_over_best_by_hand": round(rate["split"] / by_hand, 3),
            "last_end_over_mean": statistics.median(ends)}  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
