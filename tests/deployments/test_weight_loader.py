"""Host and loader with a real vLLM model load on the CPU, in this one process: map, verify, refuse, fall back."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("vllm")

from balancer.board import Owner  # noqa: E402
from deployments import weight_host, weight_loader  # noqa: E402
from deployments.config import parse_args  # noqa: E402
from deployments.demo_model import DemoSpec, ensure_demo_model  # noqa: E402
from deployments.engine import server_arguments  # noqa: E402
from deployments.weight_host import Loaded, Server, load_engine  # noqa: E402
from deployments.weight_house import engine_arguments  # noqa: E402
from deployments.weights import WeightsError, WeightStatus, read_status  # noqa: E402

SMALL = DemoSpec(hidden_size=64, layers=2, heads=2, ffn_size=128, vocab_size=512)
ENGINE = {"max_model_len": 256, "dtype": "bfloat16", "enforce_eager": True, "kv_cache_memory_bytes": 16 << 20}


@dataclass
class Site:
    """A small model's folder, a host of it in this process, and a replica's way to load."""

    model: Path
    loaded: Loaded
    folder: Path

    def serve(self, name: str, prepare: Callable[[Server], None]) -> Path:
        path = self.folder / f"{name}.sock"
        prepare(Server(path, Owner.me()))
        return path

    def lend(self, name: str, **changes: Any) -> Path:
        loaded = replace(self.loaded, manifest=replace(self.loaded.manifest, **changes))
        return self.serve(name, lambda server: server.lend(loaded, 1.0))

    def config(self, host_socket: Path, model: Path | None = None, **engine: Any) -> Any:
        from vllm.engine.arg_utils import AsyncEngineArgs

        settings = {**ENGINE, **engine, **engine_arguments(host_socket, ENGINE, wait_s=5.0)}
        arguments = server_arguments(
            parse_args({"model": str(model or self.model)}), str(model or self.model), settings
        )
        return AsyncEngineArgs.from_cli_args(arguments).create_engine_config()

    def load(self, host_socket: Path, model: Path | None = None, **engine: Any) -> torch.nn.Module:
        """As vLLM's worker does it."""
        from vllm.config import set_current_vllm_config
        from vllm.model_executor.model_loader import get_model

        config = self.config(host_socket, model, **engine)
        with set_current_vllm_config(config), weight_host._alone():
            return get_model(vllm_config=config)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Site:
    """The host's part, done once: loaded through vLLM's own loader and packed."""
    folder = tmp_path_factory.mktemp("weights")
    model = ensure_demo_model(folder, SMALL)
    arguments = server_arguments(parse_args({"model": str(model), "engine": ENGINE}), str(model), {})
    return Site(model, load_engine(arguments), folder)


@pytest.fixture
def site(made: Site, monkeypatch: pytest.MonkeyPatch) -> Site:
    """The loader is registered, and the end of a host does not end the tests."""
    weight_loader.register()
    connections: list[object] = []
    monkeypatch.setattr(weight_loader, "_end_with", connections.append)
    return made


def checkpoint(site: Site) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return dict(load_file(site.model / "model.safetensors"))


def followed(path: Path) -> WeightStatus:
    """The host's status once it has a follower."""
    deadline_s = time.monotonic() + 30
    while (status := read_status(path.with_suffix(".json"))) is None or not status.followers:
        assert time.monotonic() < deadline_s
        time.sleep(0.01)
    return status


def test_a_model_is_mapped_not_loaded(site: Site) -> None:
    """Every parameter lies in the host's chunks with the checkpoint's values, and the host knows its follower."""
    path = site.lend("map")
    model = site.load(path)
    stored = checkpoint(site)
    weights = dict(model.named_parameters())
    assert torch.equal(weights["model.decoder.layers.1.fc1.weight"], stored["model.decoder.layers.1.fc1.weight"])
    assert torch.equal(weights["lm_head.weight"], stored["lm_head.weight"])
    assert len({parameter.untyped_storage().data_ptr() for parameter in weights.values()}) == 1
    assert not any(tensor.is_meta for tensor in [*weights.values(), *model.buffers()])
    status = followed(path)
    assert (status.state, status.shared_bytes) == ("ready", site.loaded.manifest.total_bytes)
    assert [follower.pid for follower in status.followers] == [os.getpid()]


def test_damaged_weights_are_refused(site: Site) -> None:
    """Bytes that are not those which the host loaded are never served."""
    with pytest.raises(WeightsError, match=r"the shared weights are damaged \(fingerprint .* instead of 0123\)") as no:
        site.load(site.lend("damaged", fingerprint="0123"))
    assert "\n" not in str(no.value)


def test_a_host_of_another_checkpoint_is_refused(site: Site, tmp_path: Path) -> None:
    """The same shape from newer files is another model."""
    other = shutil.copytree(site.model, tmp_path / "other")
    os.utime(other / "model.safetensors", (1, 1))
    with pytest.raises(WeightsError, match=r"the weight host holds checkpoint .* and this replica needs"):
        site.load(site.lend("other"), other)


def test_a_host_with_other_tensors_is_refused(site: Site) -> None:
    """A tensor that the host lacks is named."""
    fewer = tuple(t for t in site.loaded.manifest.tensors if t.name != "lm_head.weight")
    with pytest.raises(WeightsError, match=r"disagree on whether the model has lm_head\.weight"):
        site.load(site.lend("fewer", tensors=fewer))


def test_what_a_host_refuses_is_loaded_privately(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    """The model is there all the same, from its checkpoint, and the log says why it is not shared."""
    said: list[str] = []
    path = site.serve("refused", lambda server: server.refuse("it is too strange"))
    weight_loader.logger.warning = lambda text, *rest: said.append(text % rest)  # type: ignore[method-assign]
    try:
        model = site.load(path)
    finally:
        del weight_loader.logger.warning
    assert said == ["Weights are loaded privately, not shared: it is too strange."]
    stored = checkpoint(site)["model.decoder.layers.0.self_attn_layer_norm.weight"]
    assert torch.equal(dict(model.named_parameters())["model.decoder.layers.0.self_attn_layer_norm.weight"], stored)


def test_weights_are_not_replaced_in_a_running_engine(site: Site) -> None:
    """vLLM's reloading would write into everybody's weights."""
    from vllm.model_executor.model_loader import get_model_loader

    loader = get_model_loader(site.config(site.lend("reload")).load_config)
    with pytest.raises(WeightsError, match="shared weights cannot be replaced"):
        loader.load_weights(torch.nn.Linear(1, 1), None)


class Peculiar(torch.nn.Module):
    """Keeps a second way to its weight, as some layers do."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(2, 2))
        self.kept = {"deep": [self.weight]}


def test_a_second_way_to_a_parameter_is_noticed() -> None:
    """A layer that holds its weight outside of its parameters would keep memory without weights: not shareable."""
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), Peculiar())
    lost = weight_loader._strip(model)
    assert weight_loader._elsewhere(model, lost) == "1.kept.deep.0"
    plain = torch.nn.Sequential(torch.nn.Linear(2, 2))
    assert weight_loader._elsewhere(plain, weight_loader._strip(plain)) is None


def test_tied_parameters_stay_one() -> None:
    """A parameter under two names stays one object when its memory is taken away."""
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    model[1].weight = model[0].weight
    weight_loader._strip(model)
    assert model[1].weight is model[0].weight
    assert model[0].weight.is_meta
