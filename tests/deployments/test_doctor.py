"""`splitwiser doctor`: useful with and without a GPU; every line is fine or says how to mend."""

from __future__ import annotations

import os
import shutil
import socket
import types
from pathlib import Path
from typing import Any

import pytest

from deployments import doctor, launch, mps
from deployments.config import parse_args
from deployments.doctor import Finding, examine
from deployments.memory import GIB, Card, MemoryPlanError


@pytest.fixture(autouse=True)
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine without a GPU, with free ports and no earlier runs, whatever the real one is."""
    monkeypatch.setattr(doctor.device, "gpu_count", lambda: 0)
    monkeypatch.setattr(doctor.device, "resolve", lambda args: "cpu")
    monkeypatch.setattr(doctor.processes, "known_to_vllm", lambda: True)
    monkeypatch.setattr(doctor.processes, "runs_folder", lambda: tmp_path / "runs")
    monkeypatch.setattr(launch, "ray_ports", lambda: {})
    monkeypatch.setattr(doctor, "_memory", lambda: iter(()))
    return tmp_path


def look(monkeypatch: pytest.MonkeyPatch, port: int | None = None, **args: Any) -> dict[str, list[Finding]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        free = probe.getsockname()[1]
    document = {"http_options": {"port": port or free}}
    found: dict[str, list[Finding]] = {}
    for finding in examine(parse_args({"monitoring": {"exporter_port": None}, **args}), document):
        found.setdefault(finding.what, []).append(finding)
    return found


def test_a_machine_without_a_gpu_can_be_fine(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """No line asks for anything, the status is 0, and it is said what could not be looked at."""
    found = look(monkeypatch)
    assert not any(finding.mend for findings in found.values() for finding in findings)
    assert set(found) >= {"device", "driver", "/dev/shm", "port", "HAProxy", "leftovers"}
    assert "nothing is said of MPS" in found["driver"][0].said
    monkeypatch.setattr(doctor, "examine", lambda *_: [Finding("driver", "no GPU"), Finding("port", "free")])
    assert doctor.doctor(parse_args({}), {}) == 0
    assert capsys.readouterr().out == "ok    driver          no GPU\nok    port            free\n"


def test_a_package_that_is_only_on_the_path_is_to_be_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM finds plugins among what is installed; without ours engines know neither their replica nor the loader."""
    assert look(monkeypatch)["package"][0].mend == ""
    monkeypatch.setattr(doctor.processes, "known_to_vllm", lambda: False)
    assert "pip install -e ." in look(monkeypatch)["package"][0].mend


def test_one_line_to_mend_is_status_1(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The line says what is so and how to mend it."""
    monkeypatch.setattr(doctor, "examine", lambda *_: [Finding("port", "8000 is taken", "end it")])
    assert doctor.doctor(parse_args({}), {}) == 1
    assert capsys.readouterr().out == "mend  port            8000 is taken: end it\n"


def test_a_taken_port_names_its_holder(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a start would."""
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        (finding,) = look(monkeypatch, holder.getsockname()[1])["port"]
    assert f"pid {os.getpid()}" in finding.said
    assert finding.mend == "end it, or set another http_options.port"


def test_a_gpu_that_is_asked_for_and_absent_is_to_be_mended(monkeypatch: pytest.MonkeyPatch) -> None:
    """With `device: auto` its absence is no fault, with `gpu` it is."""
    assert look(monkeypatch, device="auto")["driver"][0].mend == ""
    assert "install the NVIDIA driver" in look(monkeypatch, device="gpu")["driver"][0].mend


def test_too_little_shared_memory_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Containers have 64 MiB by default; less than the board needs is said as such."""
    for free, said in (
        (64 << 20, "give the container --shm-size=2g, or free it"),
        (1000, "cannot hold even the board"),
    ):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: types.SimpleNamespace(free=free))
        assert said in look(monkeypatch)["/dev/shm"][0].mend


def test_what_an_earlier_run_left_is_found(monkeypatch: pytest.MonkeyPatch, machine: Path) -> None:
    """A run whose supervisor is dead, with its processes."""
    (machine / "runs" / "999999-1").mkdir(parents=True)
    monkeypatch.setattr(launch, "left_of", lambda folder: ["raylet (pid 7)"])
    (finding,) = look(monkeypatch)["leftovers"]
    assert finding.said == "1 earlier run(s) with 1 processes (raylet (pid 7))"
    assert finding.mend


def nvml() -> Any:
    """One GPU, as pynvml shows it."""
    memory = types.SimpleNamespace(free=30 * GIB, total=40 * GIB)
    return types.SimpleNamespace(
        NVMLError=RuntimeError,
        nvmlInit=lambda: None,
        nvmlShutdown=lambda: None,
        nvmlSystemGetDriverVersion=lambda: "580.1",
        nvmlDeviceGetCount=lambda: 1,
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetName=lambda handle: "NVIDIA X",
        nvmlDeviceGetMemoryInfo=lambda handle: memory,
        nvmlGpmQueryDeviceSupport=lambda handle: types.SimpleNamespace(isSupportedDevice=1),
    )


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, machine: Path) -> Any:
    found = nvml()
    monkeypatch.setattr(doctor.device, "gpu_count", lambda: 1)
    monkeypatch.setattr(doctor, "pynvml", found)
    monkeypatch.setattr(doctor, "gpus_here", lambda args: [Card("NVIDIA X", 40 * GIB)])
    monkeypatch.setattr(doctor.gpu_setup, "tightest", lambda args, cards: types.SimpleNamespace(kv_cache_bytes=GIB))
    monkeypatch.setattr(mps.ControlProgram, "resolve", lambda self: "/usr/bin/nvidia-cuda-mps-control")
    monkeypatch.setattr(doctor.gpu_setup, "chosen_gpus", lambda count: (0,))
    monkeypatch.setattr(doctor.gpu_setup, "gpu_facts", lambda index: mps.GpuFacts())
    monkeypatch.setattr(mps, "preflight", lambda *_, **__: None)
    monkeypatch.setattr(mps, "running_daemon", lambda *_: None)
    return found


def test_a_gpu_that_is_fine_is_described(monkeypatch: pytest.MonkeyPatch, gpu: Any) -> None:
    """Driver, memory, who measures its SMs, the plan, and whose MPS daemon a start would use."""
    found = look(monkeypatch)
    assert not any(finding.mend for findings in found.values() for finding in findings)
    assert found["driver"][0].said == "580.1, 1 GPU(s)"
    assert [finding.said for finding in found["GPU 0"]] == [
        "NVIDIA X, 30.0 of 40.0 GiB free",
        "SM utilization comes from GPM",
    ]
    assert found["memory plan"][0].said == "2 replica(s) fit, 1.00 GiB of KV each"
    assert [finding.said for finding in found["MPS"]][1].startswith("a start starts a daemon of its own")
    gpu.nvmlGpmQueryDeviceSupport = lambda handle: types.SimpleNamespace(isSupportedDevice=0)
    assert look(monkeypatch)["GPU 0"][1].said.startswith("no GPM")


def test_what_keeps_a_gpu_from_serving_is_named(monkeypatch: pytest.MonkeyPatch, gpu: Any) -> None:
    """A plan that does not hold, MPS that cannot be used."""

    def refuse(*_: Any, **__: Any) -> Any:
        raise MemoryPlanError("too little: lower max_model_len")

    def in_fault(*_: Any, **__: Any) -> None:
        raise mps.MpsError(mps.MpsCause.SERVER_FAULT, "MPS server 4 is in fault state: end its clients")

    monkeypatch.setattr(doctor.gpu_setup, "tightest", refuse)
    monkeypatch.setattr(mps, "preflight", in_fault)
    found = look(monkeypatch)
    assert found["memory plan"][0].mend == "too little: lower max_model_len"
    assert (found["MPS"][1].said, found["MPS"][1].mend) == ("MPS server 4 is in fault state", "end its clients")


def test_missing_mps_is_a_fault_only_where_it_is_asked_for(monkeypatch: pytest.MonkeyPatch, gpu: Any) -> None:
    """Otherwise it is said that replicas take turns."""

    def absent(self: Any) -> str:
        raise mps.MpsError(mps.MpsCause.NO_BINARY, "it is not installed: install it")

    monkeypatch.setattr(mps.ControlProgram, "resolve", absent)
    assert look(monkeypatch)["MPS"] == [Finding("MPS", "it is not installed; replicas will take turns on the GPU")]
    assert look(monkeypatch, mps="on")["MPS"] == [Finding("MPS", "it is not installed", "install it")]
