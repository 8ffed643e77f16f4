"""Both data planes side by side with echo replicas, and what each part of the way costs.

`python -m benchmarks.data_plane --out rows.jsonl`: HAProxy with the route service against Serve's own Python proxy with
the same policy: requests/s, latency alone, streamed chunks/s, each the median of `--repeats` runs in one go. Then the
route service asked directly over HTTP, a policy alone with 16 replicas, a slot's write, a scrape with 64 replicas, and
what the route service decides on one core (`benchmarks.route_rate`). One JSON line a figure.
"""

from __future__ import annotations

import argparse
import http.client
import itertools
import json
import os
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from balancer.policies import POLICIES, Knobs, decide, make_policy
from balancer.readings import RequestCost
from benchmarks import route_rate
from benchmarks.load import Load, run, summary
from benchmarks.serving import serving
from deployments.processes import runs_folder
from monitoring.exporter import Exporter

REPLICAS = 2
KV_BLOCKS = 10_000
FIGURES = ("planes", "policies", "slot_write", "scrape", "route_rate")
ECHO = {"replicas": REPLICAS, "device": "cpu", "balancer": {"policy": "least_queue"}}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.data_plane", description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--figures", nargs="+", choices=FIGURES, default=FIGURES)
    options = parser.parse_args(arguments)
    with options.out.open("a") as file:
        for row in itertools.chain.from_iterable(_rows(figure, options.repeats) for figure in options.figures):
            line = json.dumps({**row, "cores": os.cpu_count(), "at": time.strftime("%Y-%m-%dT%H:%M:%S")})
            print(line, flush=True)
            file.write(line + "\n")
    return 0


def _rows(figure: str, repeats: int) -> Iterable[dict[str, Any]]:
    match figure:
        case "planes":
            return _both_planes(repeats)
        case "policies":
            return _policies()
        case "slot_write":
            return [_slot_write()]
        case "scrape":
            return [_scrape()]
        case _:
            return [route_rate.row()]


def _both_planes(repeats: int) -> Iterator[dict[str, Any]]:
    planes: dict[str, dict[str, float]] = {}
    for name, flags in (("haproxy", []), ("plain", ["--plain"])):
        application = {"import_path": "benchmarks.echo_app:build", "args": ECHO}
        with serving(application, flags) as url:
            planes[name] = figures = _plane(url, repeats)
            yield {"figure": "data_plane", "plane": name, "replicas": REPLICAS, "repeats": repeats, **figures}
            if name == "haproxy":
                yield _route_service()
    ratios = {key: round(planes["haproxy"][key] / planes["plain"][key], 3) for key in planes["plain"]}
    yield {"figure": "haproxy_over_plain", **ratios}


def _plane(url: str, repeats: int) -> dict[str, float]:
    def median(key: Callable[[dict[str, Any]], float], load: Load) -> float:
        return statistics.median(key(summary(run(load))) for _ in range(repeats))

    run(Load(url, "demo", 8, 200, 16, 1, stream=False))
    return {
        "requests_per_s": median(lambda s: s["requests_per_s"], Load(url, "demo", 32, 2000, 16, 1, stream=False)),
        "alone_p50_s": median(lambda s: s["e2e_s"]["p50"], Load(url, "demo", 1, 200, 16, 1, stream=False)),
        "chunks_per_s": median(lambda s: s["output_tokens_per_s"], Load(url, "demo", 16, 200, 16, 256, stream=True)),
    }


def _route_service() -> dict[str, Any]:
    """Ask the route service itself, as HAProxy does, over one connection a request."""
    port = _router_port()
    body = json.dumps({"model": "demo", "prompt": "x" * 400, "max_tokens": 64}).encode()
    times_s = []
    for _ in range(1000):
        began_s = time.perf_counter()
        connection = http.client.HTTPConnection("127.0.0.1", port)
        connection.request("POST", "/internal/route", body)
        answer = connection.getresponse()
        answer.read()
        connection.close()
        times_s.append(time.perf_counter() - began_s)
        assert answer.status == 200
    return {"figure": "route_service_over_http", **_percentiles(times_s)}


def _router_port() -> int:
    lua = next(runs_folder().glob("*/*/*.lua"))
    router = re.search(r"ROUTERS = .*?port\s*=\s*(\d+)", lua.read_text(), re.DOTALL)
    assert router, f"no router in {lua}"
    return int(router[1])


def _policies(replicas: int = 16, repeats: int = 5000) -> Iterator[dict[str, Any]]:
    with route_rate.ready_replicas(replicas, KV_BLOCKS) as (board, writers):
        for name in POLICIES:
            knobs = Knobs(policy=name, seed=1)
            policy = make_policy(knobs)
            times_s = []
            for k in range(repeats):
                writers[k % replicas].publish(time.monotonic())
                snapshot = board.snapshot(time.monotonic())
                began_s = time.perf_counter()
                decide(policy, knobs, RequestCost(200, 100), snapshot)
                times_s.append(time.perf_counter() - began_s)
            yield {"figure": "policy", "policy": name, "replicas": replicas, **_percentiles(times_s)}


def _slot_write(repeats: int = 20000) -> dict[str, Any]:
    with route_rate.ready_replicas(1, KV_BLOCKS) as (_, writers):
        times_s = []
        for _ in range(repeats):
            began_s = time.perf_counter()
            writers[0].publish(began_s)
            times_s.append(time.perf_counter() - began_s)
        return {"figure": "slot_write", **_percentiles(times_s)}


def _scrape(replicas: int = 64, repeats: int = 200) -> dict[str, Any]:
    """CPU time of one scrape while every replica writes between two."""
    with route_rate.ready_replicas(replicas, KV_BLOCKS) as (board, writers):
        exporter = Exporter(board.path, replicas)
        times_s = []
        for _ in range(repeats):
            for writer in writers:
                writer.publish(time.monotonic())
            began_s = time.thread_time()
            exporter.scrape()
            times_s.append(time.thread_time() - began_s)
        exporter.close()
        return {"figure": "scrape", "replicas": replicas, **_percentiles(times_s)}


def _percentiles(times_s: Sequence[float]) -> dict[str, float]:
    cuts = statistics.quantiles(times_s, n=100)
    return {"p50_us": round(cuts[49] * 1e6, 2), "p99_us": round(cuts[98] * 1e6, 2), "samples": len(times_s)}


if __name__ == "__main__":
    sys.exit(main())
