"""How many requests a second the route service decides on one core: `python -m benchmarks.route_rate`.

A process serves it over HTTP before a board of 64 ready replicas; this one asks as HAProxy does, a connection for each
request, several at once. The rate is the requests over the CPU time that the service's process took for them, so that
it does not matter what else keeps the machine busy.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import http.client
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import uvloop

from balancer.board import Board, SlotWriter
from balancer.knobs import Knobs
from balancer.readings import ReplicaState
from balancer.route_service import RouteService
from benchmarks.ports import free_port

REPLICAS = 64
AT_ONCE = 4
REQUESTS = 3000
BODY = json.dumps({"model": "demo", "prompt": "x" * 400, "max_tokens": 64}).encode()


def row() -> dict[str, Any]:
    return {"figure": "route_rate", "replicas": REPLICAS, "requests": REQUESTS, "decisions_per_core_s": round(rate())}


def rate() -> float:
    """Decisions for each second of one core's time."""
    # Nothing that is assigned here ever arrives, so that there must be room for all of it.
    with ready_replicas(REPLICAS, kv_blocks=1 << 24) as (board, _):
        port = free_port()
        command = [sys.executable, "-m", "benchmarks.route_rate", "--serve", str(board.path), str(port)]
        service = subprocess.Popen(command)
        try:
            return _asked(port, psutil.Process(service.pid))
        finally:
            service.terminate()
            service.wait()


@contextlib.contextmanager
def ready_replicas(count: int, kv_blocks: int) -> Iterator[tuple[Board, list[SlotWriter]]]:
    """A board with so many ready replicas, and their pens."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        board = Board.open(Path(folder) / "board")
        writers = [board.claim_slot(f"replica-{k}") for k in range(count)]
        for writer in writers:
            writer.fields.state = ReplicaState.READY
            writer.fields.kv_blocks_total, writer.fields.kv_block_tokens = kv_blocks, 16
            writer.publish(time.monotonic())
        yield board, writers
        board.close()


def _asked(port: int, service: psutil.Process) -> float:
    until_s = time.monotonic() + 60.0
    while True:
        try:
            _ask(port)
            break
        except OSError:
            if time.monotonic() > until_s:
                raise
            time.sleep(0.1)
    with concurrent.futures.ThreadPoolExecutor(AT_ONCE) as pool:
        before = _cpu_s(service)
        list(pool.map(_ask, [port] * REQUESTS))
        return REQUESTS / (_cpu_s(service) - before)


def _ask(port: int) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request("POST", "/internal/route", BODY)
    answer = connection.getresponse()
    answer.read()
    connection.close()
    if answer.status != 200:
        raise RuntimeError(f"the route service answered {answer.status}")


def _cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


async def _serve(board: Path, port: int) -> None:
    import uvicorn

    service = RouteService(board, Knobs(stale_after_s=1e9), time.monotonic, None)
    await service.start()
    try:
        await uvicorn.Server(uvicorn.Config(service, "127.0.0.1", port, log_level="critical", lifespan="off")).serve()
    finally:
        await service.close()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.route_rate", description=__doc__)
    parser.add_argument("--serve", nargs=2, metavar=("BOARD", "PORT"), help="for its own process")
    options = parser.parse_args(arguments)
    if options.serve:
        uvloop.run(_serve(Path(options.serve[0]), int(options.serve[1])))
    else:
        print(json.dumps(row()))


if __name__ == "__main__":
    main()
