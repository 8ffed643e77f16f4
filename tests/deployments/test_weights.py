"""When weights are shared, and what host and replica say to each other: all without loading anything."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from deployments import weights
from deployments.weights import (
    Follower,
    Manifest,
    Tensor,
    WeightsError,
    WeightStatus,
    read_status,
    why_private,
    write_status,
)

OPT = {"model_type": "opt", "hidden_size": 768}


@pytest.mark.parametrize(
    ("mode", "replicas", "on", "shared"),
    [
        ("auto", 4, "gpu", True), ("auto", 1, "gpu", False), ("auto", 4, "cpu", False),
        ("shared", 1, "gpu", True), ("shared", 2, "cpu", True), ("private", 4, "gpu", False),
    ],
)  # fmt: skip
def test_weights_are_shared_where_several_replicas_share_a_gpu(mode: str, replicas: int, on: str, shared: bool) -> None:
    """`auto` shares on a GPU with several replicas; the two other words decide by themselves."""
    assert weights.wanted(mode, replicas, on) is shared


@pytest.mark.parametrize(
    ("config", "engine", "why"),
    [
        ({"quantization_config": {"quant_method": "gptq"}}, {}, "quantized"),
        ({}, {"quantization": "fp8"}, "quantized"),
        ({"num_local_experts": 8}, {}, "mixture of experts"),
        ({}, {"enable_sleep_mode": True}, "enable_sleep_mode"),
        ({}, {"cpu_offload_gb": 2.0}, "cpu_offload_gb"),
        ({}, {"load_format": "tensorizer"}, "tensorizer"),
    ],
)
def test_what_cannot_be_shared_is_known_before_anything_starts(
    config: dict[str, Any], engine: dict[str, Any], why: str
) -> None:
    """The reason names what stands in the way, so that the plan counts private weights from the start."""
    assert why in str(why_private(OPT | config, engine))


@pytest.mark.parametrize("engine", [{}, {"load_format": "safetensors"}, {"cpu_offload_gb": 0}, {"quantization": None}])
def test_an_ordinary_model_can_be_shared(engine: dict[str, Any]) -> None:
    """Arguments that are there and ask for nothing stand in nobody's way."""
    assert why_private(OPT, engine) is None


def test_nothing_is_shared_by_a_package_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM would not know the loader, and every engine would fail to start; nor where plugins are picked by hand."""
    assert why_private(OPT, {}) is None
    monkeypatch.setenv("VLLM_PLUGINS", "another,splitwiser_die_with_parent")
    assert why_private(OPT, {}) is None
    monkeypatch.setenv("VLLM_PLUGINS", "another")
    assert "VLLM_PLUGINS" in str(why_private(OPT, {}))
    monkeypatch.delenv("VLLM_PLUGINS")
    monkeypatch.setattr("importlib.metadata.entry_points", lambda **_: ())
    assert "pip install -e ." in str(why_private(OPT, {}))


def test_two_may_write_a_status_at_once(tmp_path: Path) -> None:
    """The host and the device manager that started it both say that it loads; the file is whole whoever comes last."""
    path, turns = tmp_path / "weights-1.json", 200
    words = f"import sys; from deployments.weights import *; from pathlib import Path; p = Path({str(path)!r})"
    loop = f"[write_status(p, WeightStatus('loading', 1, n)) for n in range({turns})]"
    other = subprocess.Popen([sys.executable, "-c", f"{words}; print(flush=True); {loop}"], stdout=subprocess.PIPE)
    with other:
        assert other.stdout is not None
        other.stdout.readline()
        while other.poll() is None:
            write_status(path, WeightStatus("loading", 2, 0))
            assert read_status(path) is not None
    assert other.returncode == 0
    assert list(tmp_path.iterdir()) == [path]


def manifest(**changes: Any) -> Manifest:
    tensors = (
        Tensor("a.weight", False, "bfloat16", (4, 2), (2, 1), 0, 0),
        Tensor("b", True, "float32", (), (), 0, 256),
    )
    raw: dict[str, Any] = {"identity": {"model": "m"}, "device": "cpu", "chunk_bytes": (512,), "tensors": tensors}
    return Manifest(**{**raw, "fingerprint": "f", **changes})


def test_a_manifest_travels_as_json() -> None:
    """What the host wrote is what the replica reads, tuples and all."""
    made = manifest()
    assert Manifest.from_json(json.loads(json.dumps(made.to_json()))) == made
    assert made.total_bytes == 512


def test_another_model_is_refused_by_what_differs() -> None:
    """A host with another checkpoint is refused in one sentence that names the difference and the mend."""
    with pytest.raises(WeightsError, match="the weight host holds checkpoint 'old' and this replica needs 'new'") as no:
        weights.check_identity({"model": "m", "checkpoint": "old"}, {"model": "m", "checkpoint": "new"})
    assert "\n" not in str(no.value)
    weights.check_identity({"model": "m"}, {"model": "m"})


SHAPES: dict[str, weights.Shape] = {"a.weight": ("bfloat16", (4, 2)), "b": ("float32", ())}


@pytest.mark.parametrize(
    ("mine", "complaint"),
    [
        (SHAPES | {"c": ("float32", ())}, "disagree on whether the model has c"),
        ({"b": SHAPES["b"]}, "disagree on whether the model has a.weight"),
        (SHAPES | {"b": ("float16", ())}, "holds b as .'float32'.* needs .'float16'"),
        (SHAPES | {"a.weight": ("bfloat16", (2, 4))}, "holds a.weight as"),
    ],
)
def test_tensors_must_be_the_same(mine: dict[str, weights.Shape], complaint: str) -> None:
    """A name too many or too few, another number type or another shape is refused by its name."""
    with pytest.raises(WeightsError, match=complaint):
        weights.check_tensors(manifest().tensors, mine)


def test_the_same_tensors_are_accepted() -> None:
    """Names, number types and shapes that agree raise nothing."""
    weights.check_tensors(manifest().tensors, SHAPES)


def test_a_message_carries_open_files() -> None:
    """A large message and a descriptor arrive whole; a closed connection is an EOFError."""
    ours, theirs = socket.socketpair()
    reading, writing = os.pipe()
    long = {"text": "x" * 3_000_000}
    sender = threading.Thread(target=weights.send, args=(ours, long, [writing]))
    sender.start()
    message, descriptors = weights.receive(theirs)
    sender.join()
    os.write(descriptors[0], b"through")
    assert message == long
    assert os.read(reading, 10) == b"through"
    ours.close()
    with pytest.raises(EOFError):
        weights.receive(theirs)
    theirs.close()
    for descriptor in (reading, writing, *descriptors):
        os.close(descriptor)


def test_a_run_shows_what_its_hosts_share(tmp_path: Path) -> None:
    """What an exporter reads: shared bytes once, private bytes for each follower, nothing where there is no host."""
    assert weights.statuses(tmp_path) == []
    status = WeightStatus(
        "ready", 7, 99, 1 << 30, 2.5, followers=(Follower(11, 10, 128, 0.2), Follower(13, 12, 64, 0.1))
    )
    folder = weights.gpu_folder(tmp_path, 3)
    folder.mkdir()
    weights.write_status(folder / "weights-1.json", status)
    assert weights.statuses(tmp_path) == [status]
    assert [path.name for path in folder.iterdir()] == ["weights-1.json"]


def test_without_a_host_a_replica_says_so(tmp_path: Path) -> None:
    """Neither an endless wait nor private weights that the plan has no room for: one sentence."""
    with pytest.raises(WeightsError, match="no weight host answers at"):
        weights.connect(tmp_path / "nobody.sock", 0.2)


def test_a_host_that_ended_is_not_waited_for(tmp_path: Path) -> None:
    """A status file of a process that has ended says that no one will come."""
    ended = '{"state": "loading", "pid": 1, "start_ticks": 1, "followers": []}'
    (tmp_path / "gone.json").write_text(ended)
    with pytest.raises(WeightsError, match=r"the weight host \(process 1\) has ended"):
        weights.connect(tmp_path / "gone.sock", 600.0)
