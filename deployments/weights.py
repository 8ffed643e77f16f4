"""One copy of the weights for all replicas of a GPU: when that is done, and what host and replicas tell each other.

Nothing here imports torch or vLLM. `weight_host.py` is the process that owns the copy, `weight_loader.py` the loader by
which vLLM maps it, `weight_memory.py` the memory they share, `weight_house.py` the supervisor of the host.
"""

from __future__ import annotations

import json
import os
import socket
import struct
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from balancer.board import process_start_ticks
from deployments import processes

# The `load_format` under which vLLM finds our loader.
SHARED_FORMAT = "splitwiser_shared"
MODES = ("auto", "shared", "private")
# The kernel passes at most 253 descriptors in one message.
_MOST_DESCRIPTORS = 253
_CONNECT_EVERY_S = 0.1
_LENGTH = struct.Struct("!I")


class WeightsError(RuntimeError):
    """The shared weights cannot be used, and private ones would be wrong too; one sentence, cause and mend."""


class NotShareableError(RuntimeError):
    """This model cannot be shared and is loaded privately instead; one sentence that says why."""


# --- the decision, before anything starts ---


def why_private(config: Mapping[str, Any], engine: Mapping[str, Any]) -> str | None:
    """Why a model's weights (its config.json) with these engine arguments are not shared; None where they can be.

    Only what is known without loading: the loader looks again at the model itself.
    """
    if not processes.known_to_vllm():
        return f"vLLM does not know splitwiser-serve's loader; {processes.MAKE_KNOWN}"
    if config.get("quantization_config") or engine.get("quantization"):
        return "a quantized model's layers repack their weights in each engine"
    if any(config.get(key) for key in ("num_experts", "num_local_experts", "n_routed_experts")):
        return "a mixture of experts repacks its weights in each engine"
    for key, what in _WRITERS.items():
        if engine.get(key):
            return f"`engine.{key}` {what}"
    if engine.get("load_format", "auto") in _OWN_LOADING:
        return f"the load format '{engine['load_format']}' does its loading in one piece"
    return None


_WRITERS = {
    "enable_sleep_mode": "moves the weights out of the engine and back",
    "weight_transfer_config": "writes new weights into a running engine",
    "cpu_offload_gb": "keeps part of the weights elsewhere",
    "enable_eplb": "moves experts between engines",
}
_OWN_LOADING = ("tensorizer", "modelexpress", "runai_streamer_sharded", "sharded_state", SHARED_FORMAT)


def wanted(mode: str, replicas: int, on: str) -> bool:
    """Whether one copy is wished for: `auto` wishes it where several replicas share a GPU.

    On CPUs only `shared` does: vLLM's oneDNN kernels keep a packed copy of their own, which sharing has to give up.
    """
    return mode == "shared" or (mode == "auto" and on == "gpu" and replicas > 1)


# --- the manifest ---


@dataclass(frozen=True, slots=True)
class Tensor:
    """Where one parameter or buffer lies: `offset_bytes` into chunk `chunk`; strides are in elements."""

    name: str
    buffer: bool
    dtype: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    chunk: int
    offset_bytes: int

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> Tensor:
        return cls(**{**raw, "shape": tuple(raw["shape"]), "stride": tuple(raw["stride"])})


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a host holds. `identity` names model, checkpoint and versions; `fingerprint` is over all chunks' bytes."""

    identity: Mapping[str, str]
    device: str
    chunk_bytes: tuple[int, ...]
    tensors: tuple[Tensor, ...]
    fingerprint: str

    @property
    def total_bytes(self) -> int:
        return sum(self.chunk_bytes)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> Manifest:
        tensors = tuple(Tensor.from_json(entry) for entry in raw["tensors"])
        return cls(**{**raw, "chunk_bytes": tuple(raw["chunk_bytes"]), "tensors": tensors})


def check_identity(host: Mapping[str, str], mine: Mapping[str, str]) -> None:
    """Raises WeightsError when the host holds another model, checkpoint or version than this replica needs."""
    for key in sorted(host.keys() | mine.keys()):
        if host.get(key) != mine.get(key):
            raise WeightsError(
                f"the weight host holds {key} {host.get(key)!r} and this replica needs {mine.get(key)!r}:"
                " restart the system, so that both load the same model"
            )


Shape = tuple[str, tuple[int, ...]]


def check_tensors(host: Sequence[Tensor], mine: Mapping[str, Shape]) -> None:
    """Raises WeightsError unless the host has exactly the tensors `mine` (name -> number type and shape)."""
    theirs: dict[str, Shape] = {t.name: (t.dtype, t.shape) for t in host}
    if missing := sorted(mine.keys() - theirs.keys()) or sorted(theirs.keys() - mine.keys()):
        raise WeightsError(f"the weight host and this replica disagree on whether the model has {missing[0]}: {_MEND}")
    for name, shape in mine.items():
        if theirs[name] != shape:
            raise WeightsError(
                f"the weight host holds {name} as {theirs[name]} and this replica needs {shape}: {_MEND}"
            )


_MEND = "restart the system, so that both load the same model, or set `weights: private`"


# --- the wire ---


def send(to: socket.socket, message: Mapping[str, Any], descriptors: Sequence[int] = ()) -> None:
    """One message: its length, its JSON, and with it open files that the receiver gets as its own."""
    body = json.dumps(message).encode()
    socket.send_fds(to, [_LENGTH.pack(len(body))], list(descriptors))
    to.sendall(body)


def receive(source: socket.socket) -> tuple[dict[str, Any], list[int]]:
    """The next message and its descriptors. Raises EOFError when the other side has gone."""
    head, descriptors, _, _ = socket.recv_fds(source, _LENGTH.size, _MOST_DESCRIPTORS)
    head += _exactly(source, _LENGTH.size - len(head)) if head else b""
    if not head:
        raise EOFError("the other side has closed the connection")
    (length,) = _LENGTH.unpack(head)
    return json.loads(_exactly(source, length)), descriptors


def _exactly(source: socket.socket, size: int) -> bytes:
    parts = bytearray()
    while len(parts) < size:
        part = source.recv(min(1 << 20, size - len(parts)))
        if not part:
            raise EOFError("the other side has closed the connection in the middle of a message")
        parts += part
    return bytes(parts)


# --- what is seen from outside ---


@dataclass(frozen=True, slots=True)
class Follower:
    """An engine that maps the host's weights. `replica_pid` is the process that owns the replica's slot on the board.

    `private_bytes` are the parameters and buffers that it holds itself; `attach_s` is how long mapping them took.
    """

    pid: int
    replica_pid: int
    private_bytes: int
    attach_s: float


@dataclass(frozen=True, slots=True)
class WeightStatus:
    """A weight host as its status file shows it. `state`: loading, ready or refused (`why` says so)."""

    state: str
    pid: int
    start_ticks: int
    shared_bytes: int = 0
    load_s: float = 0.0
    why: str = ""
    fingerprint: str = ""
    followers: tuple[Follower, ...] = ()


def write_status(path: Path, status: WeightStatus) -> None:
    """Replaces the file in one step: a reader sees the old or the new, never half. Host and device manager write."""
    scratch = path.with_suffix(f".{os.getpid()}.tmp")
    scratch.write_text(json.dumps(asdict(status)))
    scratch.replace(path)


def read_status(path: Path) -> WeightStatus | None:
    """What the status file says; None where no host has written one."""
    try:
        raw = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    return WeightStatus(**{**raw, "followers": tuple(Follower(**entry) for entry in raw["followers"])})


def gpu_folder(run_folder: Path, gpu: int) -> Path:
    """Where the hosts of a GPU have their sockets and status files."""
    return run_folder / f"gpu{gpu}"


def statuses(run_folder: Path) -> list[WeightStatus]:
    """Every weight host of the run whose private folder this is: what an exporter shows."""
    found = (read_status(path) for path in sorted(run_folder.glob("gpu*/weights-*.json")))
    return [status for status in found if status is not None]


def connect(path: Path, wait_s: float) -> socket.socket:
    """A connection to the host, who may still be starting. Raises WeightsError when it has ended or takes too long."""
    deadline_s = time.monotonic() + wait_s
    host = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    while True:
        try:
            host.connect(str(path))
            return host
        except (FileNotFoundError, ConnectionRefusedError):
            status = read_status(path.with_suffix(".json"))
            if status is not None and process_start_ticks(status.pid) != status.start_ticks:
                raise WeightsError(f"the weight host (process {status.pid}) has ended: its log says why") from None
            if time.monotonic() > deadline_s:
                raise WeightsError(f"no weight host answers at {path} after {wait_s:.0f} s: its log says why") from None
            time.sleep(_CONNECT_EVERY_S)
