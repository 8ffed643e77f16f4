"""What it costs to read weights that another process owns: `python -m benchmarks.gpu_reads --out rows.jsonl`.

One process owns a few GiB, readers multiply a small batch with matrices that lie there (or in memory of their own) as
an engine's decode steps do, alone and four at once, as clients of an MPS daemon. A row is the bandwidth of each.
Memory is shared in both ways that CUDA has: `ipc` handles of `cudaMalloc`, and `mapped` descriptors of its virtual
memory management. `packed` lays the matrices as `deployments.weight_memory` does, 8 KiB after one another; `aligned`
begins each at a multiple of 2 MiB. `odd` is packed into allocations that are no multiple of 2 MiB.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
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

import torch
from cuda.bindings import driver

from benchmarks.workers import answers_on_stdout
from deployments import mps, weight_memory, weights

ROOT = Path(__file__).parent.parent
CHUNKS = 15
ROWS, COLUMNS, BATCH = 14336, 4096, 16
MEASURED_S = 1.5
KINDS = ("own", "ipc", "mapped")
# Bytes of a chunk, and between two matrices in it.
LAYOUTS = {"odd": ((1 << 30) - 123_136, 8192), "packed": (1 << 30, 8192), "aligned": (1 << 30, 0)}
# The granularity of device memory that can be mapped: 2 MiB on every card so far.
_PAGE_BYTES = 2 << 20


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.gpu_reads", description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--work", nargs=2, metavar=("ROLE", "ARGUMENT"), help="for its own processes")
    options = parser.parse_args(arguments)
    if options.work:
        role, argument = options.work
        own(argument) if role == "own" else read(argument)
        return 0
    with options.out.open("a", buffering=1) as file:
        for row in rows(options.kinds):
            print(json.dumps(row), flush=True)
            file.write(json.dumps(row) + "\n")
    return 0


def rows(kinds: Sequence[str]) -> Iterator[dict[str, Any]]:
    with _mps_clients() as environment:
        for kind, layout, readers in itertools.product(kinds, LAYOUTS, (1, 4)):
            row = {"kind": kind, "layout": layout, "mps": True, "readers": readers}
            try:
                yield {**row, "gib_per_s": measured(kind, layout, readers, environment)}
            except (RuntimeError, OSError, ValueError) as error:
                yield {**row, "failure": str(error)[-800:]}


def measured(kind: str, layout: str, readers: int, environment: dict[str, str]) -> list[float]:
    """GiB/s of each reader."""
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        argument, log = f"{kind}:{layout}:{folder}/owner", Path(folder, "log")
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
    kind, layout, path = argument.split(":")
    answer = answers_on_stdout()
    torch.cuda.set_device(0)
    torch.cuda.init()
    odd = {"page_bytes": 1} if layout == "odd" else {}
    memory = weight_memory.CudaMemory(**odd) if kind == "ipc" else MappedMemory()
    for _ in range(CHUNKS):
        memory.add(LAYOUTS[layout][0]).random_()
    memory.seal()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(path)
        listener.listen(8)
        answer({"owns": CHUNKS * LAYOUTS[layout][0]})
        while True:
            connection, _ = listener.accept()
            weights.send(connection, {"handles": memory.handles()}, memory.descriptors())


def read(argument: str) -> None:
    """A reader's life: map, wait for the beginning, multiply for a while, say how fast."""
    kind, layout, path = argument.split(":")
    chunk_bytes, gap_bytes = LAYOUTS[layout]
    answer = answers_on_stdout()
    torch.cuda.set_device(0)
    torch.cuda.init()
    size = ROWS * COLUMNS * 2
    matrices = [
        chunk[at : at + size].view(torch.bfloat16).view(ROWS, COLUMNS)
        for chunk in _chunks(kind, chunk_bytes, path)
        for at in range(gap_bytes, chunk_bytes - size, size + gap_bytes)
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


def _chunks(kind: str, size: int, path: str) -> list[torch.Tensor]:
    if kind == "own":
        return [torch.empty(size, dtype=torch.uint8, device="cuda").random_() for _ in range(CHUNKS)]
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.connect(path)
        message, descriptors = weights.receive(connection)
    if kind == "ipc":
        return [weight_memory._open_cuda(handle, size) for handle in message["handles"]]
    return [_open_mapped(descriptor, size) for descriptor in descriptors]


def _multiply(batch: torch.Tensor, matrices: Sequence[torch.Tensor]) -> None:
    for matrix in matrices:
        torch.nn.functional.linear(batch, matrix)
    torch.cuda.synchronize()


class MappedMemory:
    """Device memory that a process maps where and how it likes, passed on as descriptors (CUDA's virtual memory
    management)."""

    def __init__(self) -> None:
        self._chunks: list[torch.Tensor] = []
        self._files: list[int] = []

    def add(self, size_bytes: int) -> torch.Tensor:
        torch.cuda.synchronize()
        properties = _allocation_properties()
        handle = _ok(driver.cuMemCreate(_whole_pages(size_bytes), properties, 0))
        kind = driver.CUmemAllocationHandleType.CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR
        self._files.append(int(_ok(driver.cuMemExportToShareableHandle(handle, kind, 0))))
        self._chunks.append(_map_handle(handle, size_bytes).zero_())
        return self._chunks[-1]

    def seal(self) -> list[torch.Tensor]:
        torch.cuda.synchronize()
        return self._chunks

    def handles(self) -> list[str]:
        return []

    def descriptors(self) -> list[int]:
        return self._files


def _open_mapped(descriptor: int, size_bytes: int) -> torch.Tensor:
    torch.cuda.synchronize()
    kind = driver.CUmemAllocationHandleType.CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR
    return _map_handle(_ok(driver.cuMemImportFromShareableHandle(descriptor, kind)), size_bytes)


def _map_handle(handle: Any, size_bytes: int) -> torch.Tensor:
    """For as long as this process lives."""
    size, access = _whole_pages(size_bytes), driver.CUmemAccessDesc()
    address = _ok(driver.cuMemAddressReserve(size, _PAGE_BYTES, 0, 0))
    _ok(driver.cuMemMap(address, size, 0, handle, 0))
    access.location = _allocation_properties().location
    access.flags = driver.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
    _ok(driver.cuMemSetAccess(address, size, [access], 1))
    return weight_memory._cuda_bytes(int(address), size_bytes)


def _allocation_properties() -> Any:
    properties = driver.CUmemAllocationProp()
    properties.type = driver.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
    properties.location.type = driver.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
    properties.location.id = torch.cuda.current_device()
    properties.requestedHandleTypes = driver.CUmemAllocationHandleType.CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR
    return properties


def _whole_pages(size_bytes: int) -> int:
    return -(-size_bytes // _PAGE_BYTES) * _PAGE_BYTES


def _ok(answer: tuple[Any, ...]) -> Any:
    """What a driver's call returned. Raises RuntimeError with the driver's word."""
    if answer[0] != 0:
        raise RuntimeError(f"the driver answered {answer[0].name}")
    return answer[1] if len(answer) > 1 else None


if __name__ == "__main__":
    sys.exit(main())
