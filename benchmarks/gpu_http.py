"""Servers side by side on one GPU, through HTTP: plain vLLM in four ways, Ray Serve LLM, and splitwiser-serve.

`python -m benchmarks.gpu_http --shape opt-125m --out rows.jsonl --logs FOLDER --seconds 500` starts each system in turn
with the same engine arguments and the same KV bytes in all, sends closed loops, and writes one JSON line for each
system and load as it goes. splitwiser-serve changes its policy between rounds without a restart, as `splitwiser apply`
does. What the time does not allow is written as skipped.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import datetime
import functools
import importlib.metadata
import json
import logging
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from balancer.board import board_path
from balancer.readings import GpuReading
from benchmarks import latency, rivals, shapes
from benchmarks.load import Load, run, summary
from benchmarks.rivals import Server, Setup
from deployments import live
from monitoring.sampler import Sampler, open_reader

SIZES = [1, 2, 4, 8, 16, 24, 32, 40, 48, 64, 80, 96, 128, 160, 192, 256, 320, 384]
ENGINE: dict[str, Any] = {
    "load_format": "dummy",
    "max_model_len": 2048,
    "max_num_seqs": 384,
    "max_num_batched_tokens": 8192,
    "dtype": "bfloat16",
    "enable_prefix_caching": False,
    "compilation_config": {"mode": 0, "cudagraph_mode": "FULL", "cudagraph_capture_sizes": SIZES},
}
CLIENT_PROCESSES = 8
STARTS: dict[str, Callable[[Setup], contextlib.AbstractContextManager[Server]]] = {
    "vllm": rivals.vllm_serve,
    "vllm-api4": functools.partial(rivals.vllm_serve, api_servers=4),
    "haproxy": functools.partial(rivals.haproxy, replicas=4, with_mps=False),
    "haproxy-mps": functools.partial(rivals.haproxy, replicas=4, with_mps=True),
    "ray-llm": functools.partial(rivals.ray_llm, replicas=4),
    "splitwiser": functools.partial(rivals.splitwiser, replicas=4, uses_mps="on", balancer={"policy": "gpu_aware"}),
}
# Under which the same splitwiser-serve answers, one after the other.
BALANCERS: dict[str, dict[str, Any]] = {
    "gpu_aware": {"policy": "gpu_aware"},
    "round_robin": {"policy": "round_robin"},
    "pinned-1": {"policy": "gpu_aware", "active_set": 1},
    "pinned-2": {"policy": "gpu_aware", "active_set": 2},
}


@dataclass(frozen=True, slots=True)
class Shape:
    """What is asked of a model: tokens in and out, concurrent requests, KV bytes over all replicas."""

    prompt_tokens: int
    output_tokens: int
    concurrency: tuple[int, ...]
    streamed: tuple[int, ...]
    kv_bytes: int


SHAPES = {
    "opt-125m": Shape(1024, 1024, (40, 160, 320), (160, 320), 32_000_000_000),
    "qwen2.5-0.5b": Shape(512, 256, (64, 256), (256,), 16_000_000_000),
    "llama-3-8b": Shape(512, 256, (64, 256), (), 48_000_000_000),
}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.gpu_http", description=__doc__)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="opt-125m")
    parser.add_argument("--systems", nargs="+", choices=sorted(STARTS), default=list(STARTS))
    parser.add_argument("--balancers", nargs="+", choices=sorted(BALANCERS), default=list(BALANCERS))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--logs", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=500.0)
    parser.add_argument("--rounds", type=int, default=2, help="requests of each client of a closed loop")
    parser.add_argument("--repeats", type=int, default=1, help="how often each system gets all loads")
    parser.add_argument("--weights", choices=("auto", "shared", "private"), default="auto")
    parser.add_argument("--pinning", choices=("auto", "off"), default="auto", help="splitwiser-serve's cpu_pinning")
    parser.add_argument("--kv-bytes", type=int, help="KV bytes over all replicas, if not the shape's own")
    parser.add_argument("--record", type=Path, help="record the board under gpu_aware into this file")
    options = parser.parse_args(arguments)
    options.logs.mkdir(parents=True, exist_ok=True)
    deadline_s = time.monotonic() + options.seconds
    model = shapes.make_folder(options.shape, options.logs)
    kv_bytes = options.kv_bytes or SHAPES[options.shape].kv_bytes
    setup = Setup(str(model), ENGINE, kv_bytes, options.logs, deadline_s)
    for name in options.systems:
        try:
            measure(name, setup, options)
        except (RuntimeError, TimeoutError, OSError, StopIteration) as error:
            _write(options.out, {"system": name, "shape": options.shape, "failure": str(error), "logs": _ends(options)})
    return 0


def measure(name: str, setup: Setup, options: argparse.Namespace) -> None:
    """Start the system, send every load that the deadline leaves time for, stop it."""
    began_s = time.monotonic()
    start_system = STARTS[name]
    if name == "splitwiser":
        start_system = functools.partial(start_system, weights=options.weights, pinning=options.pinning)
    with start_system(setup) as server:
        start = {
            "system": name,
            "weights": options.weights,
            "pinning": options.pinning,
            "kv_bytes": setup.kv_bytes,
            "shape": options.shape,
            "start_s": round(time.monotonic() - began_s, 1),
        }
        run(_load(server, SHAPES[options.shape], 32, 64, stream=False, tokens=(64, 16)), 2)
        for balancer in options.balancers if server.folder else [None]:
            if balancer and balancer != "gpu_aware":
                try:
                    _apply(server, balancer)
                except subprocess.CalledProcessError as error:
                    _write(options.out, {**start, "balancer": balancer, "failure": str(error)})
                    continue
            with _recording(server, options.record if balancer == "gpu_aware" else None):
                _loads(server, {**start, "balancer": balancer}, setup, options)
            if balancer == "gpu_aware":
                try:
                    _latency(server, start, options)
                except (RuntimeError, OSError, ValueError, IndexError) as error:
                    _write(options.out, {**start, "figure": "added_latency", "failure": repr(error)})


def _loads(server: Server, row: dict[str, Any], setup: Setup, options: argparse.Namespace) -> None:
    shape = SHAPES[options.shape]
    cells = [(c, False) for c in shape.concurrency] + [(c, True) for c in shape.streamed]
    for concurrency, stream in cells * options.repeats:
        if time.monotonic() > setup.deadline_s - 25:
            _write(options.out, {**row, "concurrency": concurrency, "stream": stream, "skipped": "no time left"})
            continue
        load = _load(server, shape, concurrency, options.rounds * concurrency, stream)
        with gpu_readings() as readings:
            answers = run(load, processes=CLIENT_PROCESSES)
        _write(options.out, {**row, **asdict(load), **summary(answers), **gpu_means(readings), **provenance()})


def _load(
    server: Server, shape: Shape, concurrency: int, requests: int, stream: bool, tokens: tuple[int, int] | None = None
) -> Load:
    prompt, output = tokens or (shape.prompt_tokens, shape.output_tokens)
    return Load(server.url, rivals.SERVED_NAME, concurrency, requests, prompt, output, stream, seed=7)


def _latency(server: Server, row: dict[str, Any], options: argparse.Namespace) -> None:
    """What the way through the router adds, with half of the middle load going on."""
    shape = SHAPES[options.shape]
    half = shape.concurrency[1] // 2
    load = _load(server, shape, half, 3 * half, stream=False)
    background = threading.Thread(target=run, args=(load, CLIENT_PROCESSES))
    background.start()
    time.sleep(3.0)
    assert server.folder is not None
    added = latency.added(server.url, latency.direct_urls(server.folder), rivals.SERVED_NAME, background.is_alive)
    background.join()
    _write(options.out, {**row, "figure": "added_latency", "background": half, **added, **provenance()})


def _apply(server: Server, balancer: str) -> None:
    assert server.folder is not None
    document = copy.deepcopy(yaml.safe_load((server.folder / live.STARTED_WITH).read_text()))
    document["applications"][0]["args"]["balancer"] = BALANCERS[balancer]
    path = server.folder / f"{balancer}.yaml"
    path.write_text(yaml.safe_dump(document))
    subprocess.run(
        [sys.executable, "-m", "deployments.cli", "apply", "--run", server.folder.name, str(path)], check=True
    )


@contextlib.contextmanager
def _recording(server: Server, path: Path | None) -> Iterator[None]:
    """Keeps what stood on the board and what the exporter said while the block ran, of ten minutes at most."""
    if path is None or server.folder is None:
        yield
        return
    board, exporter = board_path(server.folder.name), _exporter_url(server.folder)
    words = ["--board", str(board), "--seconds", "600", "--hz", "20", "--metrics", exporter, "--out", str(path)]
    with path.with_suffix(".log").open("w") as output:
        child = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.record", *words], stdout=output, stderr=subprocess.STDOUT
        )
    yield
    child.terminate()
    child.wait()


def _exporter_url(folder: Path) -> str:
    document = yaml.safe_load((folder / live.STARTED_WITH).read_text())
    port = document["applications"][0]["args"]["monitoring"]["exporter_port"]
    return f"http://127.0.0.1:{port}/metrics"


@contextlib.contextmanager
def gpu_readings() -> Iterator[list[GpuReading]]:
    """The readings of the (first visible) GPU while the block runs."""
    readings: list[GpuReading] = []
    reader = open_reader(0, logging.getLogger(__name__))
    stop = threading.Event()
    thread = threading.Thread(target=Sampler(reader, readings.append, time.monotonic).run, args=(stop,))
    thread.start()
    try:
        yield readings
    finally:
        stop.set()
        thread.join()
        reader.close()


def gpu_means(readings: list[GpuReading]) -> dict[str, Any]:
    """Means over the readings; a ratio that the GPU does not tell is None."""

    def mean(name: str) -> float | None:
        values = [value for r in readings if (value := getattr(r, name)) is not None]
        return round(statistics.mean(values), 3) if values else None

    used = max((r.memory_used_bytes for r in readings), default=0)
    names = ("sm_ratio", "sm_occupancy_ratio", "dram_bandwidth_ratio", "power_w")
    return {**{name: mean(name) for name in names}, "memory_used_bytes": used, "readings": len(readings)}


def _ends(options: argparse.Namespace) -> dict[str, str]:
    logs = sorted(options.logs.glob("*.log"), key=lambda path: path.stat().st_mtime)[-2:]
    return {path.name: path.read_text(errors="replace")[-1500:] for path in logs}


def provenance() -> dict[str, Any]:
    versions = {name: importlib.metadata.version(name) for name in ("vllm", "ray", "torch")}
    return {**versions, "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")}


def _write(path: Path, row: dict[str, Any]) -> None:
    print(json.dumps(row), flush=True)
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    sys.exit(main())
