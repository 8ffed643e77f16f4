"""Stands in for an engine's worker (`worker`) and for a weight host (`host`) of the shared-weights proof."""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
from pathlib import Path

from balancer.board import Owner
from deployments import weights
from deployments.weights import Follower, WeightStatus

WEIGHTS_BYTES = 1 << 20


def worker() -> None:
    """Answers orders as an engine would; a shared one follows its host, and ends with it."""
    spec = json.loads(sys.stdin.readline())
    extra = spec["engine"].get("model_loader_extra_config")
    if extra:
        follow(Path(extra["socket"]))
    say({"core_pids": [os.getpid()]})
    for line in sys.stdin:
        order = json.loads(line)
        if order["order"] == "load":
            time.sleep(0.01)
            say({"tokens": order["sequences"] * order["output_tokens"], "seconds": 0.01})
        else:
            say({"tokens": [[1, 2], [3, 4]], "logprobs": [[-1.0, -2.0], [-3.0, -4.0]]})


def say(message: object) -> None:
    print(json.dumps(message), flush=True)


def follow(path: Path) -> None:
    host = weights.connect(path, 20.0)
    me = Follower(os.getpid(), os.getpid(), 0, 0.25)
    weights.send(host, {"ask": "follow", **{name: getattr(me, name) for name in me.__slots__}})
    text = "Mapped 0.00 GiB of shared weights in 0.25 s (0.50 s to build the model, 1.00 s of waiting for the host)."
    print(text, file=sys.stderr, flush=True)

    def end_with() -> None:
        try:
            weights.receive(host)
        except (EOFError, ConnectionError):
            print("the weight host has ended", file=sys.stderr, flush=True)
            os._exit(9)

    threading.Thread(target=end_with, daemon=True).start()


def host() -> None:
    """Lends nothing, but knows its followers and answers questions."""
    path = Path(json.loads(sys.stdin.readline())["socket"])
    me = Owner.me()
    status = WeightStatus("ready", me.pid, me.start_ticks, WEIGHTS_BYTES, 0.5)
    weights.write_status(path.with_suffix(".json"), status)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(str(path))
    listener.listen()
    kept = []
    while True:
        connection, _ = listener.accept()
        kept.append(connection)
        message, _ = weights.receive(connection)
        if message["ask"] == "verify":
            weights.send(connection, {"intact": True})


if __name__ == "__main__":
    {"worker": worker, "host": host}[sys.argv[1]]()
