"""Systems side by side on one GPU, through HTTP: one `vllm serve`, and splitwiser-serve with 1 and 4 replicas.

`python -m benchmarks.gpu_http --out rows.jsonl --seconds 500` makes a model of OPT-125m's shape with random weights,
starts each system in turn with the same engine arguments and the same KV bytes in all, sends closed loops of 1024
tokens in and 1024 out, and writes one JSON line for each system and load, with what was started.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import signal
import statistics
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pynvml
import yaml

from balancer.readings import GpuReading
from benchmarks.load import Load, run, summary
from deployments.demo_model import DemoSpec, ensure_demo_model
from monitoring.sampler import NvmlReader, Sampler

OPT_125M = DemoSpec(hidden_size=768, layers=12, heads=12, ffn_size=3072, padded_vocab_size=50272)
KV_BYTES = 32_000_000_000
PORT = 8000
SIZES = [1, 2, 4, 8, 16, 24, 32, 40, 48, 64, 80, 96, 128, 160, 192, 256, 320, 384]
ENGINE: dict[str, Any] = {
    "max_model_len": 2048,
    "max_num_seqs": 384,
    "max_num_batched_tokens": 8192,
    "dtype": "bfloat16",
    "enable_prefix_caching": False,
    "compilation_config": {"mode": 0, "cudagraph_mode": "FULL", "cudagraph_capture_sizes": SIZES},
}


@dataclass(frozen=True, slots=True)
class System:
    """One rival: how many engines, how they are started, with or without MPS."""

    name: str
    replicas: int
    mps: str = "off"
    policy: str = ""
    engine: dict[str, Any] = field(default_factory=dict)


SYSTEMS = (
    System("splitwiser", 4, "on", "gpu_aware"),
    System("vllm serve", 1),
    System("splitwiser", 4, "on", "round_robin"),
    System("splitwiser", 1, "off", "gpu_aware"),
    System("splitwiser", 4, "off", "gpu_aware"),
)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.gpu_http", description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--logs", type=Path, default=Path("/tmp/gpu_http"))
    parser.add_argument("--seconds", type=float, default=500.0)
    parser.add_argument("--concurrency", type=int, nargs="+", default=[40, 160, 320])
    parser.add_argument("--tokens", type=int, default=1024, help="in and out")
    parser.add_argument("--systems", type=int, nargs="+", default=list(range(len(SYSTEMS))))
    options = parser.parse_args(arguments)
    options.logs.mkdir(parents=True, exist_ok=True)
    deadline_s = time.monotonic() + options.seconds
    model = str(ensure_demo_model(spec=OPT_125M))
    for system in [SYSTEMS[k] for k in options.systems]:
        try:
            measure(system, model, options, deadline_s)
        except (RuntimeError, TimeoutError, OSError) as error:
            _write(options.out, {"system": asdict(system), "failure": str(error)})
    return 0


def measure(system: System, model: str, options: argparse.Namespace, deadline_s: float) -> None:
    """Start the system, send every load that the deadline leaves time for, stop it."""
    log = options.logs / f"{system.name.replace(' ', '_')}-{system.replicas}-{system.mps}-{system.policy}.log"
    began_s = time.monotonic()
    with _running(system, model, log, options.logs) as ready:
        ready(deadline_s)
        start_s = round(time.monotonic() - began_s, 1)
        run(Load(f"http://127.0.0.1:{PORT}", "opt", 32, 64, 64, 16, stream=False), 2)
        for concurrency in options.concurrency:
            for stream in (False, True) if concurrency == 160 else (False,):
                if time.monotonic() > deadline_s - 30:
                    return
                row = _load(concurrency, options.tokens, stream)
                _write(options.out, {"system": asdict(system), "start_s": start_s, **row, **_provenance()})


def _load(concurrency: int, tokens: int, stream: bool) -> dict[str, Any]:
    load = Load(f"http://127.0.0.1:{PORT}", "opt", concurrency, 2 * concurrency, tokens, tokens, stream, seed=7)
    with _gpu_readings() as readings:
        answers = run(load, processes=8)
    return {**asdict(load), "processes": 8, **summary(answers), **_gpu_means(readings)}


@contextmanager
def _gpu_readings() -> Iterator[list[GpuReading]]:
    readings: list[GpuReading] = []
    reader = NvmlReader(pynvml, None, 0)
    stop = threading.Event()
    thread = threading.Thread(target=Sampler(reader, readings.append, time.monotonic).run, args=(stop,))
    thread.start()
    try:
        yield readings
    finally:
        stop.set()
        thread.join()
        reader.close()


def _gpu_means(readings: list[GpuReading]) -> dict[str, Any]:
    def mean(name: str) -> float | None:
        values = [value for r in readings if (value := getattr(r, name)) is not None]
        return round(statistics.mean(values), 3) if values else None

    used = max((r.memory_used_bytes for r in readings), default=0)
    names = ("sm_ratio", "sm_occupancy_ratio", "dram_bandwidth_ratio", "power_w")
    return {**{name: mean(name) for name in names}, "memory_used_bytes": used, "readings": len(readings)}


@contextmanager
def _running(system: System, model: str, log: Path, folder: Path) -> Iterator[Any]:
    command = _vllm_command(system, model) if system.name == "vllm serve" else _our_command(system, model, folder)
    with log.open("w") as output:
        child = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)

        def ready(deadline_s: float) -> None:
            while not _is_ready(system, log):
                if child.poll() is not None or time.monotonic() > deadline_s - 60:
                    raise RuntimeError(f"not ready: ...{log.read_text()[-1500:]}")
                time.sleep(0.5)

        try:
            yield ready
        finally:
            child.send_signal(signal.SIGINT)
            try:
                child.wait(25)
            except subprocess.TimeoutExpired:
                os.killpg(child.pid, signal.SIGKILL)
            time.sleep(2)


def _vllm_command(system: System, model: str) -> list[str]:
    from deployments.engine import command_line

    engine = {**ENGINE, "kv_cache_memory_bytes": KV_BYTES, "gpu_memory_utilization": 0.05}
    words = ["serve", model, "--served-model-name", "opt", "--port", str(PORT), "--host", "127.0.0.1"]
    start = "from vllm.entrypoints.cli.main import main; main()"
    return [sys.executable, "-c", start, *words, "--disable-uvicorn-access-log", *command_line(engine)]


def _our_command(system: System, model: str, folder: Path) -> list[str]:
    document = yaml.safe_load((Path(__file__).parent.parent / "serve_gpu.yaml").read_text())
    args = document["applications"][0]["args"]
    args |= {"model": model, "served_model_name": "opt", "replicas": system.replicas, "mps": system.mps}
    args["engine"] = {**ENGINE, "kv_cache_memory_bytes": KV_BYTES // system.replicas}
    args["balancer"] = {"policy": system.policy}
    path = folder / f"serve-{system.replicas}-{system.mps}-{system.policy}.yaml"
    path.write_text(yaml.safe_dump(document))
    return [sys.executable, "-m", "deployments.cli", "serve", str(path)]


def _is_ready(system: System, log: Path) -> bool:
    if system.name != "vllm serve":
        return "splitwiser: ready" in log.read_text()
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{PORT}/health", timeout=2) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def _provenance() -> dict[str, Any]:
    versions = {name: importlib.metadata.version(name) for name in ("vllm", "ray", "torch")}
    return {**versions, "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")}


def _write(path: Path, row: dict[str, Any]) -> None:
    print(json.dumps(row), flush=True)
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    sys.exit(main())
