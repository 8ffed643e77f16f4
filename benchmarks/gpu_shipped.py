"""serve_gpu.yaml, byte for byte as it is shipped, started by one command on a GPU machine and asked.

    python3 -m benchmarks.gpu_shipped --out shipped.jsonl --logs FOLDER

The model is not downloaded: its name is made to stand for a checkpoint of OPT-125m's shape with random weights, in a
Hugging Face cache laid out under FOLDER. Everything else is the user's way. One JSON line tells what `doctor`
and `plan` said and how the start went (seconds, each replica's KV cache, engines that are MPS clients), what came back
for one completion, one stream and a burst of 40, and what was left after Ctrl-C.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from benchmarks.fault_system import ROOT, MissedError, Setup, System, gpu_used_mib, serving
from benchmarks.gpu_http import provenance
from benchmarks.load import Load, run, summary
from benchmarks.shapes import OPT_125M
from deployments.demo_model import DemoSpec, ensure_demo_model
from deployments.processes import runs_folder

READY_WITHIN_S = 300.0
BURST = 40


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.gpu_shipped", description=__doc__)
    parser.add_argument("--config", type=Path, default=ROOT / "serve_gpu.yaml")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--logs", type=Path, required=True)
    options = parser.parse_args(arguments)
    options.logs.mkdir(parents=True, exist_ok=True)
    document = yaml.safe_load(options.config.read_text())
    args, port = document["applications"][0]["args"], document["http_options"]["port"]
    # Before anything imports the library that reads them; this program's children inherit them.
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(options.logs / "hf")}
    stand_for(args["model"], options.logs / "hf")
    row = {"file": options.config.name, "sha256": hashlib.sha256(options.config.read_bytes()).hexdigest()}
    row |= {"doctor": said("doctor", options.config), "plan": said("plan", options.config)}
    row |= {"memory_before_mib": gpu_used_mib()}
    began_s = time.monotonic()
    setup = Setup(args, args.get("device") == "gpu", BURST, 256, 128)
    try:
        with serving(options.config, setup, options.logs / "shipped.log", port, READY_WITHIN_S) as system:
            row |= {"start_s": round(time.monotonic() - began_s, 1), **started_as(system)}
            row |= asked(system.url, args["model"])
            child = system.child
        row |= {"exit_status": child.returncode}
    except (MissedError, OSError, KeyError, ValueError) as error:
        row |= {"failure": str(error)}
    row |= {"runs_left": len(list(runs_folder().glob("*"))), "memory_after_mib": gpu_used_mib()}
    row |= {"command": " ".join(sys.argv), **provenance()}
    with options.out.open("a") as file:
        file.write(json.dumps(row) + "\n")
    print(json.dumps(row), flush=True)
    return int("failure" in row)


def stand_for(model: str, cache: Path, spec: DemoSpec = OPT_125M) -> None:
    """Lay out a Hugging Face cache in which `model` is a checkpoint of this shape with random weights."""
    if "/" not in model:
        return
    entry = cache / "hub" / f"models--{model.replace('/', '--')}"
    checkpoint = ensure_demo_model(cache, spec)
    commit = hashlib.sha1(checkpoint.name.encode()).hexdigest()
    (entry / "refs").mkdir(parents=True, exist_ok=True)
    (entry / "refs" / "main").write_text(commit)
    (entry / "snapshots").mkdir(exist_ok=True)
    snapshot = entry / "snapshots" / commit
    if not snapshot.exists():
        snapshot.symlink_to(checkpoint.resolve(), target_is_directory=True)


def said(command: str, config: Path) -> dict[str, Any]:
    """What a subcommand says of the file, and its exit status."""
    words = [sys.executable, "-m", "deployments.cli", command, str(config)]
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, timeout=120)
    return {"status": done.returncode, "lines": (done.stdout + done.stderr).splitlines()}


def started_as(system: System) -> dict[str, Any]:
    """What the board and the MPS daemon say of the replicas."""
    engines = set(system.engines())
    clients = set(system.clients()) if system.setup.gpu else set()
    replicas = system.replicas()
    return {
        "replicas": len(replicas),
        "kv_blocks": [replica.kv_blocks_total for replica in replicas],
        "kv_block_tokens": [replica.kv_block_tokens for replica in replicas],
        "max_running_requests": [replica.max_running_requests for replica in replicas],
        "gpu_memory_bytes": [replica.gpu_memory_bytes for replica in replicas],
        "engines": len(engines),
        "engines_that_are_mps_clients": len(engines & clients),
        "memory_serving_mib": gpu_used_mib(),
    }


def asked(url: str, model: str) -> dict[str, Any]:
    """One completion, one stream, and a burst over all replicas."""
    body = {"model": model, "prompt": "The capital of France is", "max_tokens": 16}
    answer = json.loads(_post(f"{url}/v1/completions", body))
    stream = _post(f"{url}/v1/completions", {**body, "stream": True}).decode()
    burst = run(Load(url, model, BURST, 2 * BURST, 256, 128, stream=False, seed=7))
    return {
        "completion": {"tokens": answer["usage"]["completion_tokens"], "model": answer["model"]},
        "stream": {"events": stream.count("data: "), "done": stream.rstrip().endswith("[DONE]")},
        "burst": summary(burst),
    }


def _post(url: str, body: dict[str, Any]) -> bytes:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as answer:
        return bytes(answer.read())


if __name__ == "__main__":
    sys.exit(main())
