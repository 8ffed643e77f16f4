"""The weight host: loads a model once through vLLM's own loader and lends its tensors to every replica of a GPU.

    python -m deployments.weight_host < spec.json

It outlives the replicas and ends with the run: when the process named by the spec's `lifeline` has ended, when it is
told to (SIGTERM; it waits a little for its followers to leave), or when its GPU has had a fault. Whoever is connected
sees the connection close.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import select
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from balancer.board import Owner
from deployments import weights
from deployments.weight_memory import Memory, fingerprint, new_memory, pack
from deployments.weights import Follower, Manifest, NotShareableError, WeightStatus

_LOOK_EVERY_S = 1.0
# How long a planned end waits for the followers, who are being ended too.
_FAREWELL_S = 8.0
DAMAGED_STATUS = 3
FAULT_STATUS = 4


@dataclass(frozen=True, slots=True)
class HostSpec:
    """What a host loads and where it serves. `args` are the application's, `settings` the plan's engine arguments."""

    args: dict[str, Any]
    model: str
    settings: dict[str, Any]
    socket: str
    lifeline_pid: int
    lifeline_ticks: int


@dataclass(frozen=True, slots=True)
class Loaded:
    """The copy that is lent."""

    manifest: Manifest
    memory: Memory
    chunks: list[torch.Tensor]


# --- loading ---


def load(spec: HostSpec) -> Loaded:
    """Load the model and move it into shared memory. Raises NotShareableError, in one sentence, where it cannot be."""
    from deployments.config import parse_args
    from deployments.engine import server_arguments

    arguments = server_arguments(parse_args(spec.args), spec.model, spec.settings)
    return load_engine(arguments)


def load_engine(arguments: Any) -> Loaded:
    """As `load`, from the namespace that `vllm serve` would have made."""
    from vllm.config import set_current_vllm_config
    from vllm.engine.arg_utils import AsyncEngineArgs

    from deployments.weight_loader import identity

    config = AsyncEngineArgs.from_cli_args(arguments).create_engine_config()
    device = config.device_config.device_type
    if device == "cuda":
        torch.cuda.set_device(0)
    with set_current_vllm_config(config), _alone(), torch.inference_mode():
        model = _loaded_model(config)
        memory = new_memory(device)
        tensors = pack(model, memory)
        del model
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
    chunks = memory.seal()
    sizes = tuple(chunk.numel() for chunk in chunks)
    found = identity(config, config.model_config)
    return Loaded(Manifest(found, device, sizes, tuple(tensors), fingerprint(chunks)), memory, chunks)


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """The process groups of one, without which vLLM builds no layer."""
    from vllm.distributed import (
        destroy_distributed_environment,
        destroy_model_parallel,
        ensure_model_parallel_initialized,
        init_distributed_environment,
    )

    with tempfile.TemporaryDirectory(prefix="weights-") as folder:
        init_distributed_environment(1, 0, f"file://{folder}/group", 0, "gloo")
        ensure_model_parallel_initialized(1, 1)
        try:
            yield
        finally:
            destroy_model_parallel()
            destroy_distributed_environment()


def _loaded_model(config: Any) -> torch.nn.Module:
    """The steps of vLLM's `BaseModelLoader.load_model`, which also tell whether a loader keeps to them."""
    from vllm.model_executor.model_loader import get_model_loader
    from vllm.model_executor.model_loader.base_loader import BaseModelLoader
    from vllm.model_executor.model_loader.utils import initialize_model, process_weights_after_loading
    from vllm.model_executor.model_loader.weight_tying import maybe_retie_word_embeddings
    from vllm.utils.torch_utils import set_default_torch_dtype

    from deployments.weight_loader import check_shareable

    loader = get_model_loader(config.load_config)
    if type(loader).load_model is not BaseModelLoader.load_model:
        raise NotShareableError(f"{type(loader).__name__} does its loading in one piece")
    device = torch.device(config.device_config.device)
    with set_default_torch_dtype(config.model_config.dtype):
        with device:
            model = initialize_model(vllm_config=config)
        check_shareable(model)
        loader.load_weights(model, config.model_config)
        if device.type == "cpu":
            # vLLM's processing on a CPU packs the weights into oneDNN's own memory and drops the parameters.
            maybe_retie_word_embeddings(model, config.model_config)
        else:
            process_weights_after_loading(model, config.model_config, device)
    return model


# --- serving ---


class Server:
    """Answers followers at a socket in a private folder, from before the model is loaded until the end."""

    def __init__(self, path: Path, me: Owner) -> None:
        self._path = path
        self._changed = threading.Condition()
        self._loaded: Loaded | None = None
        self._followers: dict[int, Follower] = {}
        self._status = WeightStatus("loading", me.pid, me.start_ticks)
        self._damaged = threading.Event()
        self._publish()
        path.unlink(missing_ok=True)
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(str(path))
        path.chmod(0o600)
        self._listener.listen(64)
        threading.Thread(target=self._accept, daemon=True, name="accept").start()

    @property
    def damaged(self) -> bool:
        """Whether a follower found the weights changed, and they are."""
        return self._damaged.is_set()

    @property
    def followers(self) -> int:
        return len(self._followers)

    def lend(self, loaded: Loaded, load_s: float) -> None:
        """From now on followers get the weights."""
        manifest = loaded.manifest
        with self._changed:
            self._loaded = loaded
            self._status = replace(
                self._status, state="ready", shared_bytes=manifest.total_bytes, fingerprint=manifest.fingerprint,
                load_s=round(load_s, 3),
            )  # fmt: skip
            self._announce()

    def refuse(self, why: str) -> None:
        """From now on followers are told to load privately."""
        with self._changed:
            self._status = replace(self._status, state="refused", why=why)
            self._announce()

    def close(self) -> None:
        """Takes socket and status file away; connections end with the process."""
        self._path.unlink(missing_ok=True)
        self._path.with_suffix(".json").unlink(missing_ok=True)

    def _announce(self) -> None:
        self._publish()
        self._changed.notify_all()

    def _publish(self) -> None:
        followers = tuple(self._followers[pid] for pid in sorted(self._followers))
        self._status = replace(self._status, followers=followers)
        weights.write_status(self._path.with_suffix(".json"), self._status)

    def _accept(self) -> None:
        while True:
            connection, _ = self._listener.accept()
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        pid = None
        with connection, contextlib.suppress(EOFError, ConnectionError):
            try:
                while True:
                    message, _ = weights.receive(connection)
                    ask = message.pop("ask")
                    if ask == "attach":
                        self._attach(connection)
                    elif ask == "verify":
                        weights.send(connection, {"intact": self._verify()})
                    elif ask == "follow":
                        pid = self._follow(Follower(**message))
            finally:
                if pid is not None:
                    self._left(pid)

    def _attach(self, connection: socket.socket) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._status.state != "loading")
            loaded, why = self._loaded, self._status.why
        if loaded is None:
            weights.send(connection, {"state": "refused", "why": why})
            return
        answer = {"state": "ready", "manifest": loaded.manifest.to_json(), "handles": loaded.memory.handles()}
        weights.send(connection, answer, loaded.memory.descriptors())

    def _verify(self) -> bool:
        """Whether the bytes are still those that were loaded."""
        with self._changed:
            intact = self._loaded is None or fingerprint(self._loaded.chunks) == self._loaded.manifest.fingerprint
        if not intact:
            self._damaged.set()
        return intact

    def _follow(self, follower: Follower) -> int:
        with self._changed:
            self._followers[follower.pid] = follower
            self._publish()
        return follower.pid

    def _left(self, pid: int) -> None:
        with self._changed:
            self._followers.pop(pid, None)
            self._publish()


# --- the process ---


def main() -> int:
    """The host's life; its exit status."""
    spec = HostSpec(**json.loads(sys.stdin.readline()))
    asked_to_end = _asked_to_end()
    # Before anything else: whoever started this may already have ended.
    threading.Thread(target=_end_with, args=(spec, asked_to_end), daemon=True, name="lifeline").start()
    server = Server(Path(spec.socket), Owner.me())
    try:
        began_s = time.monotonic()
        try:
            loaded = load(spec)
        except NotShareableError as why:
            server.refuse(str(why))
            _say(f"the weights are not shared: {why}")
        else:
            server.lend(loaded, time.monotonic() - began_s)
            _say(f"lends {loaded.manifest.total_bytes / 2**30:.2f} GiB of {spec.model}")
        return _watch(server, asked_to_end)
    finally:
        server.close()


def _asked_to_end() -> threading.Event:
    asked = threading.Event()

    def ask(number: int, frame: FrameType | None) -> None:
        if asked.is_set():
            sys.exit(0)
        asked.set()

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, ask)
    return asked


def _end_with(spec: HostSpec, asked_to_end: threading.Event) -> None:
    try:
        descriptor = os.pidfd_open(spec.lifeline_pid)
    except ProcessLookupError:
        descriptor = -1
    if descriptor >= 0 and Owner(spec.lifeline_pid, spec.lifeline_ticks).alive():
        select.select([descriptor], [], [])
    asked_to_end.set()
    time.sleep(_FAREWELL_S + 2 * _LOOK_EVERY_S)
    os._exit(1)  # it was still loading, or hangs


def _watch(server: Server, asked_to_end: threading.Event) -> int:
    while not asked_to_end.wait(_LOOK_EVERY_S):
        if server.damaged:
            _say("the shared weights were changed after they were loaded; all replicas of this GPU start anew")
            return DAMAGED_STATUS
        if fault := _gpu_fault():
            _say(f"the GPU has had a fault ({fault}); all its replicas start anew")
            return FAULT_STATUS
    deadline_s = time.monotonic() + _FAREWELL_S
    while server.followers and time.monotonic() < deadline_s:
        time.sleep(0.05)
    return 0


def _gpu_fault() -> str | None:
    """A fault under MPS is everybody's, and each client's next call reports it for ever."""
    if not torch.cuda.is_initialized():
        return None
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        return str(error).partition("\n")[0]
    return None


def _say(what: str) -> None:
    print(f"weight host: {what}", flush=True)


if __name__ == "__main__":
    status = main()
    # Not by the interpreter's own way: daemon threads and CUDA's clean-up after a fault may hang.
    os._exit(status)
