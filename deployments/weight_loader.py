"""The vLLM model loader that maps a weight host's tensors instead of loading its own.

vLLM finds it by the load format `splitwiser_shared`. The model is built without memory for its parameters, vLLM's own
post-processing runs over that skeleton, then each parameter becomes the host's tensor. Only models whose layers use
vLLM's unquantized methods are shared: these leave the weights as they were loaded (on CPUs they would pack them, and
for parameters without memory they do not: vLLM takes `torch.nn.functional.linear` then). Everything else is loaded
privately, and the log says why.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from vllm.config.utils import replace
from vllm.logger import init_logger
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod
from vllm.model_executor.model_loader import get_model_loader, register_model_loader
from vllm.model_executor.model_loader.base_loader import BaseModelLoader
from vllm.model_executor.model_loader.utils import initialize_model, process_weights_after_loading
from vllm.utils.torch_utils import set_default_torch_dtype

from deployments import weights
from deployments.processes import ENGINE_VARIABLE
from deployments.weight_memory import fingerprint, named_tensors, open_chunks, view_of
from deployments.weights import SHARED_FORMAT, Follower, Manifest, NotShareableError, Shape, WeightsError

# vLLM shows what its own loggers say.
logger = init_logger("vllm.splitwiser.weights")

_SHAREABLE_METHODS = (UnquantizedLinearMethod, UnquantizedEmbeddingMethod)
# Buffers from here on (rotary tables) are mapped; smaller ones are copied, as an engine may write them (KV scales).
_MAPPED_BUFFER_BYTES = 1 << 20
_LOOK_DEPTH = 4


def register() -> None:
    """Make the loader known to vLLM in this process; a second call changes nothing."""
    from vllm.model_executor.model_loader import _LOAD_FORMAT_TO_MODEL_LOADER

    if SHARED_FORMAT not in _LOAD_FORMAT_TO_MODEL_LOADER:
        register_model_loader(SHARED_FORMAT)(SharedLoader)


class SharedLoader(BaseModelLoader):  # type: ignore[misc]
    """Maps the weights that a host holds; loads them privately where the model cannot be shared."""

    def __init__(self, load_config: Any) -> None:
        super().__init__(load_config)
        wish = load_config.model_loader_extra_config
        self._socket, self._wait_s = Path(wish["socket"]), float(wish["wait_s"])
        own = replace(load_config, load_format=wish["load_format"], model_loader_extra_config=wish["extra"])
        self._private = get_model_loader(own)

    def download_model(self, model_config: Any) -> None:
        self._private.download_model(model_config)

    def load_weights(self, model: torch.nn.Module, model_config: Any) -> None:
        """vLLM calls this to load anew into a running engine."""
        raise WeightsError(
            "shared weights cannot be replaced in a running engine: restart it, or set `weights: private`"
        )

    def load_model(self, vllm_config: Any, model_config: Any, prefix: str = "") -> torch.nn.Module:
        """The model on the host's tensors. Raises WeightsError when the host holds something else or is damaged."""
        layers = vllm_config.compilation_config.static_forward_context
        before = dict(layers)
        try:
            return self._shared_model(vllm_config, model_config, prefix)
        except NotShareableError as why:
            logger.warning("Weights are loaded privately, not shared: %s.", why)
            # vLLM refuses to build a model's attention layers twice under one name.
            layers.clear()
            layers.update(before)
        return self._private.load_model(vllm_config=vllm_config, model_config=model_config, prefix=prefix)

    def _shared_model(self, vllm_config: Any, model_config: Any, prefix: str) -> torch.nn.Module:
        began_s = time.monotonic()
        model = skeleton(vllm_config, model_config, prefix)
        with contextlib.ExitStack() as undo:
            host = undo.enter_context(weights.connect(self._socket, self._wait_s))
            waiting_s = time.monotonic()
            manifest, chunks = mapped(host)
            came_s = time.monotonic()
            weights.check_identity(manifest.identity, identity(vllm_config, model_config))
            private_bytes = attach(model, manifest, chunks)
            verify(host, manifest, chunks)
            attach_s = time.monotonic() - came_s
            me = Follower(os.getpid(), _replica_pid(), private_bytes, round(attach_s, 3))
            weights.send(host, {"ask": "follow", **{f: getattr(me, f) for f in me.__slots__}})
            undo.pop_all()
        threading.Thread(target=_end_with, args=(host,), daemon=True, name="weight-host").start()
        logger.info(
            "Mapped %.2f GiB of shared weights in %.2f s (%.2f s to build the model, %.2f s of waiting for the host).",
            manifest.total_bytes / 2**30, attach_s, waiting_s - began_s, came_s - waiting_s,
        )  # fmt: skip
        return model.eval()


def _replica_pid() -> int:
    """The replica that this engine belongs to, or this process where there is none."""
    return int(os.environ.get(ENGINE_VARIABLE) or os.getpid())


# --- the model without its weights ---


class _EmptyOnMeta(TorchDispatchMode):  # type: ignore[misc]
    """Memory that is not filled as it is allocated, which is how layers make their parameters, is not allocated."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in (torch.ops.aten.empty.memory_format, torch.ops.aten.empty_strided.default):
            kwargs |= {"device": torch.device("meta"), "pin_memory": False}
        return func(*args, **kwargs)


def skeleton(vllm_config: Any, model_config: Any, prefix: str = "") -> torch.nn.Module:
    """The model as vLLM leaves it after loading, but with parameters that have no memory (device `meta`).

    Raises NotShareableError where that is not possible.
    """
    device = torch.device(vllm_config.load_config.device or vllm_config.device_config.device)
    try:
        with set_default_torch_dtype(model_config.dtype):
            with device, _EmptyOnMeta():
                model = initialize_model(vllm_config=vllm_config, model_config=model_config, prefix=prefix)
            check_shareable(model)
            originals = _strip(model)
            # That a checkpoint's tied embeddings are really the same was found out by the host, who has their bytes.
            untied = copy.copy(model_config)
            untied.word_embeddings_untied_by_checkpoint = False
            process_weights_after_loading(model, untied, device)
    except (NotImplementedError, RuntimeError) as error:
        if isinstance(error, (NotShareableError, WeightsError)):
            raise
        raise NotShareableError(f"it cannot be built without its weights ({' '.join(str(error).split())})") from error
    if place := _elsewhere(model, originals):
        raise NotShareableError(f"{place} refers to a parameter by a way of its own")
    return model


def check_shareable(model: torch.nn.Module) -> None:
    """Raises NotShareableError for a layer whose post-processing may leave more than its parameters."""
    for name, module in model.named_modules():
        method = getattr(module, "quant_method", None)
        if isinstance(method, QuantizeMethodBase) and type(method) not in _SHAREABLE_METHODS:
            raise NotShareableError(f"{name} is processed by {type(method).__name__}, which repacks weights")


def _strip(model: torch.nn.Module) -> list[torch.Tensor]:
    """Takes every parameter's memory away; returns what they were."""
    stripped: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                meta = stripped.setdefault(id(parameter), (parameter, _like(parameter, parameter.data.to("meta"))))[1]
                module._parameters[name] = meta
    return [original for original, _ in stripped.values()]


def _like(parameter: torch.Tensor, data: torch.Tensor) -> torch.Tensor:
    """`data` as the same kind of parameter, with the attributes that vLLM gave it."""
    data.__class__ = parameter.__class__
    data.__dict__ = parameter.__dict__.copy()
    return data


def _elsewhere(model: torch.nn.Module, originals: list[torch.Tensor]) -> str | None:
    """Where a layer holds, outside of its parameters and buffers, a tensor that has no memory or has lost it."""
    lost = {id(original) for original in originals}
    for name, module in model.named_modules():
        own = {k: v for k, v in vars(module).items() if k not in ("_parameters", "_buffers", "_modules")}
        for key, tensor in _tensors_in(own, _LOOK_DEPTH, set()):
            if tensor.is_meta or id(tensor) in lost:
                return f"{name}.{key}"
    return next((entry.name for entry in named_tensors(model) if entry.buffer and entry.tensor.is_meta), None)


def _tensors_in(held: Any, depth: int, seen: set[int], path: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(held, torch.Tensor):
        yield path, held
        return
    if depth < 0 or id(held) in seen or isinstance(held, (torch.nn.Module, type)):
        return
    seen.add(id(held))
    if isinstance(held, Mapping):
        inner = [(str(key), value) for key, value in held.items()]
    elif isinstance(held, (list, tuple)):
        inner = [(str(index), value) for index, value in enumerate(held)]
    else:
        inner = list(getattr(held, "__dict__", {}).items())
    for key, value in inner:
        yield from _tensors_in(value, depth - 1, seen, f"{path}.{key}" if path else key)


# --- the host's tensors ---


def identity(vllm_config: Any, model_config: Any) -> dict[str, str]:
    """What host and replica must agree on, so that the same names mean the same weights."""
    import vllm

    described = {k: v for k, v in model_config.hf_config.to_dict().items() if k != "tie_word_embeddings"}
    return {
        "model": str(model_config.model),
        "revision": str(model_config.revision),
        "dtype": str(model_config.dtype),
        "configuration": _digest(json.dumps(described, sort_keys=True, default=str)),
        "checkpoint": _digest(str(_checkpoint(Path(model_config.model)))),
        "device": str(vllm_config.device_config.device_type),
        "vllm": vllm.__version__,
        "torch": torch.__version__,
    }


def _checkpoint(folder: Path) -> list[tuple[str, int, int]]:
    files = sorted(file for kind in ("*.safetensors", "*.bin", "*.pt") for file in folder.glob(kind))
    return [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def mapped(host: socket.socket) -> tuple[Manifest, list[torch.Tensor]]:
    """The host's manifest and its chunks in this process; waits until it has loaded.

    Raises NotShareableError with the host's reason, and WeightsError when the host ends meanwhile.
    """
    weights.send(host, {"ask": "attach"})
    try:
        answer, descriptors = weights.receive(host)
    except (EOFError, ConnectionError):
        raise WeightsError("the weight host ended while it loaded the model: its log says why") from None
    if answer["state"] == "refused":
        raise NotShareableError(answer["why"])
    manifest = Manifest.from_json(answer["manifest"])
    return manifest, open_chunks(manifest.device, manifest.chunk_bytes, answer["handles"], descriptors)


def attach(model: torch.nn.Module, manifest: Manifest, chunks: list[torch.Tensor]) -> int:
    """Gives each parameter and buffer of a skeleton the host's bytes; returns how many bytes are private copies.

    Raises WeightsError when names, number types or shapes differ.
    """
    mine: dict[str, Shape] = {
        n.name: (str(n.tensor.dtype).removeprefix("torch."), tuple(n.tensor.shape)) for n in named_tensors(model)
    }
    weights.check_tensors(manifest.tensors, mine)
    private_bytes = 0
    placed: dict[int, torch.Tensor] = {}
    for entry in manifest.tensors:
        parent, _, name = entry.name.rpartition(".")
        module = model.get_submodule(parent)
        held: dict[str, Any] = module._buffers if entry.buffer else module._parameters
        data = view_of(chunks[entry.chunk], entry)
        if entry.buffer and data.nbytes < _MAPPED_BUFFER_BYTES:
            held[name].copy_(data)
            private_bytes += data.nbytes
        elif entry.buffer:
            held[name] = data
        else:
            held[name] = placed.setdefault(id(held[name]), _like(held[name], data))
    if chunks and chunks[0].is_cuda:
        torch.cuda.empty_cache()
    return private_bytes


def verify(host: socket.socket, manifest: Manifest, chunks: list[torch.Tensor]) -> None:
    """Raises WeightsError unless the mapped bytes are those that the host loaded; tells the host, too."""
    found = fingerprint(chunks)
    if found != manifest.fingerprint:
        weights.send(host, {"ask": "verify"})
        raise WeightsError(
            f"the shared weights are damaged (fingerprint {found} instead of {manifest.fingerprint}):"
            " the weight host checks them and ends if they are, start the replica again"
        )


def _end_with(host: socket.socket) -> None:
    """Ends this engine when the weight host ends: on a GPU its memory goes with it, and no answer is better than a
    wrong one. vLLM then answers every request with an explicit error."""
    watch = select.poll()
    watch.register(host, select.POLLIN)
    watch.poll()
    print("splitwiser: the weight host has ended; this engine ends with it and is started anew", file=sys.stderr)
    sys.stderr.flush()
    os.kill(os.getpid(), signal.SIGKILL)
