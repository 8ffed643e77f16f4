"""What it costs to read weights that another process owns: `python -m benchmarks.gpu_reads --out rows.jsonl`.

One process owns a few GiB, readers multiply a small batch with matrices that lie there (or in memory of their own) as
an engine's decode steps do, alone and four at once, with and without MPS. A row is the bandwidth that each reader got.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.workers import answers_on_stdout
from deployments import mps, weights

ROOT = Path(__file__).parent.parent
CHUNK_BYTES = 1 << 30
CHUNKS = 4
ROWS, COLUMNS, BATCH = 14336, 4096, 16
MEASURED_S = 1.5
KINDS = ("own", "ipc", "mapped")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.gpu_reads", description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--work", nargs=2, metavar=("ROLE", "ARGUMENT"), help="for its own processes")
    options = parser.parse_args(arguments)
    if options.work:
        role, argument = options.work
        own(argument) if role == "own" else read(argument)
        return 0
    with options.out.open("a") as file:
        for row in rows():
            print(json.dumps(row), flush=True)
            file.write(json.dumps(row) + "\n")
    return 0


def rows() -> Iterator[dict[str, Any]]:
    for with_mps in (False, True):
        with contextlib.ExitStack() as stack:
            environment = stack.enter_context(_mps_clients()) if with_mps else dict(mps.ENVIRONMENT_OUTSIDE_MPS)
            for kind in KINDS:
                for readers in (1, 4) if with_mps else (1,):
                    try:
                        found = measured(kind, readers, environment)
                        yield {"kind": kind, "mps": with_mps, "readers": readers, "gib_per_s": found}
                    except (RuntimeError, OSError, ValueError) as error:
                        yield {"kind": kind, "mps": with_mps, "readers": readers, "failure": str(error)[-800:]}


def measured(kind: str, readers: int, environment: dict[str, str]) -> list[float]:
    """GiB/s of each reader."""
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        argument, log = f"{kind}:{folder}/owner", Path(folder, "log")
        if kind != "own":
            _said(stack.enter_context(_process(["own", argument], environment, log)), log)
        children = [stack.enter_context(_process(["read", argument], environment, log)) for _ in range(readers)]
        for child in children:
            _said(child, log)
        begin = time.monotonic() + 0.5
        for child in children:
            assert child.stdin is not None
            child.stdin.write(f"{begin}\n")
            child.stdin.flush()
        return [round(_said(child, log)["gib_per_s"], 1) for child in children]


@contextlib.contextmanager
def _process(words: list[str], environment: dict[str, str], log: Path) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "benchmarks.gpu_reads", "--work", *words]
    everything, pipe = {**os.environ, **environment}, subprocess.PIPE
    with log.open("a") as said:
        child = subprocess.Popen(command, env=everything, cwd=ROOT, text=True, stdin=pipe, stdout=pipe, stderr=said)
    try:
        yield child
    finally:
        child.kill()
        child.communicate()


def _said(child: subprocess.Popen[str], log: Path) -> Any:
    assert child.stdout is not None
    line = child.stdout.readline()
    if not line:
        raise RuntimeError(log.read_text()[-800:])
    return json.loads(line)


@contextlib.contextmanager
def _mps_clients() -> Iterator[dict[str, str]]:
    daemon = mps.MpsDaemon(mps.ControlProgram(), mps.private_paths(os.getuid(), name=f"reads-{os.getpid()}"))
    daemon.start()
    try:
        yield mps.client_environment(daemon.paths)
    finally:
        daemon.stop()


def own(argument: str) -> None:
    """The owner's life: memory, a socket that lends it, until it is killed."""
    import torch

    from deployments.weight_memory import CudaMemory, MappedMemory

    kind, path = argument.split(":")
    answer = answers_on_stdout()
    torch.cuda.set_device(0)
    torch.cuda.init()
    memory = CudaMemory() if kind == "ipc" else MappedMemory()
    for _ in range(CHUNKS):
        memory.add(CHUNK_BYTES)
    memory.seal()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(path)
        listener.listen(8)
        answer({"owns": CHUNKS * CHUNK_BYTES})
        while True:
            connection, _ = listener.accept()
            weights.send(connection, {"handles": memory.handles()}, memory.descriptors())


def read(argument: str) -> None:
    """A reader's life: map, wait for the beginning, multiply for a while, say how fast."""
    import torch

    kind, path = argument.split(":")
    answer = answers_on_stdout()
    torch.cuda.set_device(0)
    torch.cuda.init()
    size = ROWS * COLUMNS * 2
    matrices = [
        chunk[at : at + size].view(torch.bfloat16).view(ROWS, COLUMNS)
        for chunk in _chunks(kind, path)
        for at in range(0, CHUNK_BYTES - size, size)
    ]
    batch = torch.ones(BATCH, COLUMNS, dtype=torch.bfloat16, device="cuda")
    _multiply(batch, matrices)
    answer({"matrices": len(matrices)})
    begin = float(sys.stdin.readline())
    time.sleep(max(0.0, begin - time.monotonic()))
    done = 0
    while time.monotonic() < begin + MEASURED_S:
        _multiply(batch, matrices)
        done += 1
    answer({"gib_per_s": done * len(matrices) * size / (1 << 30) / (time.monotonic() - begin)})


def _chunks(kind: str, path: str) -> Any:
    import torch

    from deployments import weight_memory

    if kind == "own":
        return [torch.zeros(CHUNK_BYTES, dtype=torch.uint8, device="cuda") for _ in range(CHUNKS)]
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.connect(path)
        message, descriptors = weights.receive(connection)
    if kind == "ipc":
        return [weight_memory._open_cuda(handle, CHUNK_BYTES) for handle in message["handles"]]
    return [weight_memory._open_mapped(descriptor, CHUNK_BYTES) for descriptor in descriptors]


def _multiply(batch: Any, matrices: Any) -> None:
    import torch

    for matrix in matrices:
        torch.nn.functional.linear(batch, matrix)
    torch.cuda.synchronize()


if __name__ == "__main__":
    sys.exit(main())
