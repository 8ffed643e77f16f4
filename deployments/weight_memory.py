"""The memory that weight host and replicas share: chunks of bytes, and the tensors that lie in them.

On a GPU a chunk is device memory, passed on as a CUDA IPC handle. On a CPU it is an anonymous file in memory, sealed
against writing once it is filled and passed on as a descriptor: it has no name, so nothing is left of it when the last
process that holds it has ended, however it ended.
"""

from __future__ import annotations

import fcntl
import hashlib
import mmap
import os
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from deployments.weights import Tensor, WeightsError

CHUNK_BYTES = 1 << 30
# What cudaMalloc aligns to; enough for every vectorized load.
_ALIGN_BYTES = 256
# The pages of device memory on every card so far. A chunk of odd size leaves the driver the choice of smaller ones.
_PAGE_BYTES = 2 << 20
# Fingerprints are summed in pieces, so that their temporaries stay small on a full GPU.
_PIECE_WORDS = 1 << 20
_SEALS = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL


class Memory(Protocol):
    """Chunks in the making, then for ever as they are."""

    def add(self, size_bytes: int) -> torch.Tensor:
        """A new chunk, zeroed and writable, as bytes."""

    def seal(self) -> list[torch.Tensor]:
        """No chunk is written after this; returns them all. What `add` returned must not be used any more."""

    def handles(self) -> list[str]:
        """What a process needs to map each chunk, beside `descriptors`."""

    def descriptors(self) -> list[int]:
        """Open files to be sent along, one a chunk, or none."""


def new_memory(device: str) -> Memory:
    """Memory of `cuda` or `cpu`."""
    return CudaMemory() if device == "cuda" else FileMemory()


def open_chunks(
    device: str, sizes: Sequence[int], handles: Sequence[str], descriptors: Sequence[int]
) -> list[torch.Tensor]:
    """Another process's chunks in this one, as bytes. Takes over the descriptors."""
    if device == "cuda":
        return [_open_cuda(handle, size) for handle, size in zip(handles, sizes, strict=True)]
    chunks = [_map_read_only(descriptor, size) for descriptor, size in zip(descriptors, sizes, strict=True)]
    for descriptor in descriptors:
        os.close(descriptor)
    return chunks


class FileMemory:
    """Anonymous files in memory."""

    def __init__(self) -> None:
        self._files: list[int] = []
        self._sizes: list[int] = []

    def add(self, size_bytes: int) -> torch.Tensor:
        descriptor = os.memfd_create("splitwiser-weights", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(descriptor, size_bytes)
        self._files.append(descriptor)
        self._sizes.append(size_bytes)
        return torch.frombuffer(mmap.mmap(descriptor, size_bytes), dtype=torch.uint8)

    def seal(self) -> list[torch.Tensor]:
        for descriptor in self._files:
            try:
                fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, _SEALS)
            except OSError as error:
                raise WeightsError(
                    f"the weights cannot be sealed ({error.strerror}): a tensor is still in use"
                ) from None
        return [_map_read_only(d, size) for d, size in zip(self._files, self._sizes, strict=True)]

    def handles(self) -> list[str]:
        return []

    def descriptors(self) -> list[int]:
        return self._files


def _map_read_only(descriptor: int, size_bytes: int) -> torch.Tensor:
    """A write to it ends the process: the weights are everybody's."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given buffer is not writable")
        return torch.frombuffer(mmap.mmap(descriptor, size_bytes, mmap.MAP_SHARED, mmap.PROT_READ), dtype=torch.uint8)


class CudaMemory:
    """Device memory, each chunk an allocation of its own: an IPC handle always names a whole allocation."""

    def __init__(self, page_bytes: int = _PAGE_BYTES) -> None:
        self._page_bytes = page_bytes
        self._chunks: list[torch.Tensor] = []
        self._handles: list[str] = []

    def add(self, size_bytes: int) -> torch.Tensor:
        runtime = _cuda_runtime()
        pointer = runtime.cudaMalloc(-(-size_bytes // self._page_bytes) * self._page_bytes)
        self._handles.append(bytes(runtime.cudaIpcGetMemHandle(pointer)).hex())
        self._chunks.append(_cuda_bytes(pointer.value, size_bytes).zero_())
        return self._chunks[-1]

    def seal(self) -> list[torch.Tensor]:
        torch.cuda.synchronize()
        return self._chunks

    def handles(self) -> list[str]:
        return self._handles

    def descriptors(self) -> list[int]:
        return []


def _open_cuda(handle: str, size_bytes: int) -> torch.Tensor:
    from vllm.distributed.device_communicators.cuda_wrapper import cudaIpcMemHandle_t

    opened = _cuda_runtime().cudaIpcOpenMemHandle(cudaIpcMemHandle_t.from_buffer_copy(bytes.fromhex(handle)))
    return _cuda_bytes(opened.value, size_bytes)


def _cuda_runtime() -> Any:
    """vLLM's own binding of the CUDA runtime that torch has loaded, with this process's context in place."""
    from vllm.distributed.device_communicators.cuda_wrapper import CudaRTLibrary

    torch.cuda.synchronize()
    return CudaRTLibrary()


class _DeviceBytes:
    """Device memory in the form of https://numba.readthedocs.io/en/stable/cuda/cuda_array_interface.html"""

    def __init__(self, address: int, size_bytes: int) -> None:
        self.__cuda_array_interface__ = {
            "data": (address, False),
            "shape": (size_bytes,),
            "typestr": "|u1",
            "version": 3,
        }


def _cuda_bytes(address: int, size_bytes: int) -> torch.Tensor:
    seen = torch.as_tensor(_DeviceBytes(address, size_bytes), device="cuda")
    if seen.data_ptr() != address:
        raise WeightsError("this torch copies device memory that it shall only look at: set `weights: private`")
    return seen


# --- tensors in chunks ---


@dataclass(frozen=True, slots=True)
class Named:
    """A parameter or buffer of a model under one of its names."""

    name: str
    buffer: bool
    tensor: torch.Tensor


def named_tensors(model: torch.nn.Module) -> list[Named]:
    """Every parameter and buffer under every name that it has, non-persistent buffers included."""
    parameters = [Named(name, False, p) for name, p in model.named_parameters(remove_duplicate=False)]
    return parameters + [Named(name, True, b) for name, b in model.named_buffers(remove_duplicate=False)]


def pack(model: torch.nn.Module, memory: Memory, chunk_bytes: int = CHUNK_BYTES) -> list[Tensor]:
    """Moves all of a model's tensors into `memory`, one chunk at a time, and frees the originals as it goes.

    Tensors that were the same bytes under several names stay so. The model cannot be used afterwards.
    """
    packed: list[Tensor] = []
    for index, (size_bytes, places) in enumerate(_chunked(_distinct(named_tensors(model)), chunk_bytes)):
        chunk = memory.add(size_bytes)
        for names, offset_bytes in places:
            packed += _move(names, chunk, index, offset_bytes)
        if chunk.is_cuda:
            torch.cuda.empty_cache()
    return packed


def _distinct(named: Iterable[Named]) -> list[list[Named]]:
    """The names of each distinct piece of memory."""
    found: dict[tuple[Any, ...], list[Named]] = {}
    for entry in named:
        t = entry.tensor
        key = (t.data_ptr(), t.dtype, t.shape, t.stride()) if t.numel() else (entry.name,)
        found.setdefault(key, []).append(entry)
    return list(found.values())


Places = list[tuple[list[Named], int]]


def _chunked(distinct: Iterable[list[Named]], chunk_bytes: int) -> list[tuple[int, Places]]:
    """Sizes of chunks and what lies where in them; a tensor larger than `chunk_bytes` gets a chunk of its own."""
    chunks: list[tuple[int, Places]] = []
    places: Places = []
    filled = 0
    for names in distinct:
        size = -(-max(1, names[0].tensor.nbytes) // _ALIGN_BYTES) * _ALIGN_BYTES
        if places and filled + size > chunk_bytes:
            chunks.append((filled, places))
            places, filled = [], 0
        places.append((names, filled))
        filled += size
    return [*chunks, (filled, places)] if places else chunks


def _move(names: list[Named], chunk: torch.Tensor, index: int, offset_bytes: int) -> list[Tensor]:
    original = names[0].tensor.detach()
    stride = original.stride() if _is_dense(original) else original.contiguous().stride()
    dtype, shape = str(original.dtype).removeprefix("torch."), tuple(original.shape)
    entries = [Tensor(n.name, n.buffer, dtype, shape, tuple(stride), index, offset_bytes) for n in names]
    view_of(chunk, entries[0]).copy_(original)
    for entry in names:
        entry.tensor.data = torch.empty(0, dtype=original.dtype, device=original.device)
    return entries


def _is_dense(tensor: torch.Tensor) -> bool:
    """Whether the tensor's elements fill their memory without gaps, in whatever order of the dimensions."""
    expected = 1
    for stride, size in sorted((s, n) for s, n in zip(tensor.stride(), tensor.shape, strict=True) if n != 1):
        if stride != expected:
            return False
        expected *= size
    return True


def view_of(chunk: torch.Tensor, entry: Tensor) -> torch.Tensor:
    """The tensor that lies at an entry's place in its chunk; not a view in autograd's sense, so fit for a parameter."""
    dtype = getattr(torch, entry.dtype)
    empty = torch.empty(0, dtype=dtype, device=chunk.device)
    return empty.set_(chunk.untyped_storage(), entry.offset_bytes // dtype.itemsize, entry.shape, entry.stride)


def fingerprint(chunks: Iterable[torch.Tensor]) -> str:
    """Of all bytes: sums of 64-bit words modulo 2^64, each times an odd number, so that no change of a word is lost.

    The sums do not depend on the order in which a device adds, so CPU and GPU agree.
    """
    digest = hashlib.blake2b(digest_size=16)
    for chunk in chunks:
        digest.update(str(_piece_sums(chunk.view(torch.int64))).encode())
    return digest.hexdigest()


def _piece_sums(words: torch.Tensor) -> list[int]:
    factors = torch.arange(_PIECE_WORDS, dtype=torch.int64, device=words.device) * 0x1E3779B97F4A7C14 + 1
    sums = [(piece * factors[: len(piece)]).sum() for piece in words.split(_PIECE_WORDS)]
    return [int(s) for s in torch.stack(sums).cpu()]
