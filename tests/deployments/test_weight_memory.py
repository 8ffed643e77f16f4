"""Shared chunks on a CPU: what is packed comes out the same elsewhere, cannot be written, and leaves nothing behind."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

import pytest

torch = pytest.importorskip("torch")

from deployments import weight_memory  # noqa: E402
from deployments.weight_memory import fingerprint, named_tensors, new_memory, open_chunks, pack, view_of  # noqa: E402


def model() -> torch.nn.Module:
    """Two layers, one of them with a transposed weight, a tied third, a buffer that is not saved, and a scalar."""
    torch.manual_seed(1)
    net = torch.nn.Sequential(torch.nn.Linear(30, 50, dtype=torch.bfloat16), torch.nn.Linear(50, 30))
    net[1].weight.data = torch.randn(50, 30).t()
    net.add_module("tied", torch.nn.Linear(30, 50, dtype=torch.bfloat16))
    net.tied.weight = net[0].weight
    net.register_buffer("table", torch.arange(77.0), persistent=False)
    net.register_buffer("scale", torch.tensor(2.5))
    return net


def lent(chunk_bytes: int = 4096) -> tuple[object, list[object], list[torch.Tensor]]:
    memory = new_memory("cpu")
    tensors = pack(model(), memory, chunk_bytes)
    return memory, tensors, memory.seal()


def copies(memory: object, chunks: list[torch.Tensor]) -> list[torch.Tensor]:
    descriptors = [os.dup(d) for d in memory.descriptors()]  # type: ignore[attr-defined]
    return open_chunks("cpu", [chunk.numel() for chunk in chunks], memory.handles(), descriptors)  # type: ignore[attr-defined]


def test_what_is_packed_comes_out_the_same() -> None:
    """Every parameter and buffer, transposed, tied, scalar or not saved, has its values and strides when mapped."""
    wanted = {entry.name: entry.tensor.detach().clone() for entry in named_tensors(model())}
    memory, tensors, chunks = lent()
    mapped = copies(memory, chunks)
    found = {entry.name: view_of(mapped[entry.chunk], entry) for entry in tensors}
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert found["1.weight"].stride() == (1, 30)
    assert found["tied.weight"].data_ptr() == found["0.weight"].data_ptr()
    assert len(chunks) > 1


def test_packing_frees_the_originals() -> None:
    """The host holds no second copy: what was packed is taken from the model at once."""
    net = model()
    pack(net, new_memory("cpu"))
    assert all(entry.tensor.numel() == 0 for entry in named_tensors(net))


def test_a_fingerprint_tells_any_change() -> None:
    """The same bytes have the same fingerprint in every process; one bit more, or two words swapped, another."""
    memory, _, chunks = lent()
    assert fingerprint(copies(memory, chunks)) == fingerprint(chunks)
    changed = [chunk.clone() for chunk in chunks]
    changed[0][5] ^= 1
    assert fingerprint(changed) != fingerprint(chunks)
    swapped = [chunk.clone() for chunk in chunks]
    words = swapped[0].view(torch.int64)
    words[[0, 1]] = words[[1, 0]]
    assert not torch.equal(swapped[0], chunks[0])
    assert fingerprint(swapped) != fingerprint(chunks)


def test_what_is_sealed_cannot_be_written_by_anybody(tmp_path: Path) -> None:
    """A process that writes to mapped weights ends by a signal, and the bytes stay as they were."""
    memory, _, chunks = lent()
    before = fingerprint(chunks)
    writer = (
        "import os, sys, torch\n"
        "from deployments.weight_memory import open_chunks\n"
        "chunk = open_chunks('cpu', [int(sys.argv[2])], [], [int(sys.argv[1])])[0]\n"
        "assert chunk.numel() > 0\n"
        "chunk.fill_(7)\n"
    )
    descriptor = memory.descriptors()[0]  # type: ignore[attr-defined]
    ended = subprocess.run(
        [sys.executable, "-c", writer, str(descriptor), str(chunks[0].numel())],
        pass_fds=[descriptor],
        capture_output=True,
    )
    assert ended.returncode == -signal.SIGSEGV, ended.stderr
    assert fingerprint(chunks) == before
    with pytest.raises(OSError, match="Operation not permitted"):
        os.pwrite(descriptor, b"x", 0)


def test_chunks_of_device_memory_are_whole_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other processes read an allocation of odd size at half the speed; the chunk itself is as long as was asked."""

    class Runtime:
        """CUDA's, as far as an allocation needs it."""

        allocated: ClassVar[list[int]] = []

        def cudaMalloc(self, size: int) -> ctypes.c_void_p:  # noqa: N802
            self.allocated.append(size)
            return ctypes.c_void_p(4096)

        def cudaIpcGetMemHandle(self, pointer: ctypes.c_void_p) -> bytes:  # noqa: N802
            return b"handle"

    monkeypatch.setattr(weight_memory, "_cuda_runtime", Runtime)
    monkeypatch.setattr(weight_memory, "_cuda_bytes", lambda address, size: torch.ones(size, dtype=torch.uint8))
    memory = new_memory("cuda")
    assert [memory.add(size).numel() for size in (1, 2 << 20, (2 << 20) + 256)] == [1, 2 << 20, (2 << 20) + 256]
    assert Runtime.allocated == [2 << 20, 2 << 20, 4 << 20]
    assert memory.handles() == [b"handle".hex()] * 3
