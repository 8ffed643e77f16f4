"""What is settled before an engine starts on a GPU: the plan on a given card, and whether and how MPS runs."""

from __future__ import annotations

import json
import logging
import os
import shlex
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from deployments import gpu_setup, mps, numeric_check
from deployments.config import ConfigError, parse_args
from deployments.gpu_house import GpuHouse
from deployments.gpu_setup import check, model_path, plan, uses_mps
from deployments.memory import GIB, KNOWN_CARDS, Card, MemoryPlanError

H200 = KNOWN_CARDS["H200"]
STAND_IN = Path(__file__).with_name("mps_stand_in.py")
OPT = {
    "model_type": "opt", "hidden_size": 768, "ffn_dim": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
    "vocab_size": 50272, "max_position_embeddings": 2048, "torch_dtype": "float16",
}  # fmt: skip


class House:
    """A model's folder, a card, and a stand-in for the MPS control daemon that can be taken away."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.model = folder / "model"
        self.model.mkdir()
        self.configure(OPT)
        self.state = folder / "state.json"
        self.binary = folder / "bin" / "nvidia-cuda-mps-control"
        self.binary.parent.mkdir()
        words = [sys.executable, "-S", "-E", str(STAND_IN), str(self.state), str(self.binary)]
        self.binary.write_text(f'#!/bin/sh\nexec {shlex.join(words)} "$@"\n')
        self.binary.chmod(0o700)
        self.state.write_text("{}")
        self.paths = mps.private_paths(os.getuid(), folder)
        monkeypatch.setenv("PATH", f"{self.binary.parent}:{os.environ['PATH']}")
        monkeypatch.setattr(gpu_setup, "mps_paths", lambda name: self.paths)
        monkeypatch.setattr(gpu_setup, "chosen_gpus", lambda count: tuple(range(count)))
        monkeypatch.setattr(gpu_setup, "gpu_facts", lambda index: mps.GpuFacts())
        monkeypatch.setattr(gpu_setup, "uuid_of", lambda index: f"GPU-{index}")
        self.board = folder / "board"
        self.show(monkeypatch, H200)

    def show(self, monkeypatch: pytest.MonkeyPatch, card: Card) -> None:
        monkeypatch.setattr(gpu_setup, "this_card", lambda index=0: card)

    def configure(self, config: dict[str, Any]) -> None:
        (self.model / "config.json").write_text(json.dumps(config))

    def gpus(self, **changes: Any) -> GpuHouse:
        return GpuHouse(self.args(**changes), "1-1", self.board, lambda gpus: [], logging.getLogger("test"))

    def args(self, **changes: Any) -> Any:
        return parse_args({"model": str(self.model), "replicas": 4, **changes})


@pytest.fixture
def house(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[House]:
    """Afterwards no daemon runs and its folders are gone."""
    house = House(tmp_path, monkeypatch)
    yield house
    assert mps.running_daemon(house.paths.pipe) is None
    assert not house.paths.pipe.exists()
    house.state.unlink()


class Driver:
    """NVML with two GPUs, which answers nothing before it is opened and after it was closed."""

    NVML_CLOCK_MEM = 2

    def __init__(self) -> None:
        self.opened = 0

    def nvmlInit(self) -> None:  # noqa: N802 - NVML's names
        self.opened += 1

    def nvmlShutdown(self) -> None:  # noqa: N802
        self.opened -= 1

    def __getattr__(self, name: str) -> Any:
        facts = {
            "nvmlDeviceGetCount": 2, "nvmlDeviceGetUUID": "GPU-1", "nvmlDeviceGetName": "NVIDIA X",
            "nvmlDeviceGetMemoryInfo": types.SimpleNamespace(total=40 * GIB, used=GIB), "nvmlDeviceGetComputeMode": 0,
            "nvmlDeviceGetComputeRunningProcesses": (), "nvmlDeviceGetHandleByIndex": "handle",
        }  # fmt: skip

        def answer(*_: Any) -> Any:
            assert self.opened, f"{name} before nvmlInit"
            return facts[name]

        return answer


@pytest.mark.parametrize(
    ("ask", "answer"),
    [
        (gpu_setup.uuid_of, "GPU-1"),
        (gpu_setup.this_card, Card("NVIDIA X", 40 * GIB, GIB)),
        (gpu_setup.gpu_facts, mps.GpuFacts("Default", ())),
    ],
)
def test_nvml_is_opened_by_whoever_asks_it_and_closed_again(
    monkeypatch: pytest.MonkeyPatch, ask: Callable[[int], object], answer: object
) -> None:
    """Nobody may count on another part of the process having it open."""
    driver = Driver()
    monkeypatch.setattr(gpu_setup, "pynvml", driver)
    assert ask(1) == answer
    assert driver.opened == 0


def test_the_plan_takes_the_users_engine_arguments(house: House) -> None:
    """Replicas, lengths, sequences, block size and the reserve of the plan are those of the configuration."""
    engine = {"max_model_len": "1k", "max_num_seqs": 32, "max_num_batched_tokens": 4096, "block_size": 32}
    made = plan(house.args(engine=engine, monitoring={"memory_reserve_gib": 3}), H200)
    demand = made.demand
    assert (demand.replicas, demand.max_model_len_tokens, demand.max_num_seqs) == (4, 1000, 32)
    assert (demand.max_num_batched_tokens, demand.kv_block_tokens) == (4096, 32)
    assert (made.reserve_bytes, demand.mps) == (3 * GIB, True)
    assert made.needed_bytes + made.reserve_bytes <= H200.total_bytes


@pytest.mark.parametrize("length", [None, -1, "auto"])
def test_the_models_longest_sequence_stands_for_vllms_choice(house: House, length: Any) -> None:
    """Without a length, or with vLLM's automatic one, the plan holds the model's longest sequence."""
    assert plan(house.args(engine={"max_model_len": length}), H200).demand.max_model_len_tokens == 2048


def test_a_model_without_a_longest_sequence_asks_for_one(house: House) -> None:
    """Where the model does not say, the user has to."""
    house.configure({key: value for key, value in OPT.items() if key != "max_position_embeddings"})
    (house.model / "model.safetensors").write_bytes(b"x" * 1000)
    with pytest.raises(MemoryPlanError, match=r"set `engine\.max_model_len`"):
        plan(house.args(), H200)
    assert plan(house.args(engine={"max_model_len": 512}), H200).demand.max_model_len_tokens == 512


def test_arguments_set_to_nothing_take_the_defaults(house: House) -> None:
    """`max_num_seqs:` without a value plans as if it were not there."""
    nothing = dict.fromkeys(("max_num_seqs", "max_num_batched_tokens", "block_size", "dtype", "kv_cache_dtype"))
    assert plan(house.args(engine=nothing), H200) == plan(house.args(), H200)


def test_weights_are_measured_where_they_lie(house: House) -> None:
    """The checkpoint's files count as they are; only without them is the size worked out from the shape."""
    assert plan(house.args(), H200).shape.weights_estimated
    (house.model / "a.safetensors").write_bytes(b"x" * 3000)
    (house.model / "b.safetensors").write_bytes(b"x" * 2000)
    shape = plan(house.args(), H200).shape
    assert (shape.weights_bytes, shape.weights_estimated) == (5000, False)


def test_a_pinned_kv_cache_is_kept(house: House) -> None:
    """What the user pins for each replica is what the plan gives, in whole blocks."""
    made = plan(house.args(engine={"kv_cache_memory_bytes": "4G"}), H200)
    assert 4 * GIB - made.kv_cache_bytes < 1 << 20
    assert made.kv_cache_bytes <= 4 * GIB


def test_a_check_shows_the_plan(house: House) -> None:
    """What fits is shown as a table before anything starts, and nothing was started."""
    table = check(house.args(), "1-1")
    assert table.startswith("H200: 139.70 GiB, 4 replica(s)")
    assert "KV cache" in table
    assert not house.paths.pipe.exists()


LLAMA_2_7B = {
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "vocab_size": 32000, "max_position_embeddings": 2048, "torch_dtype": "float16",
}  # fmt: skip


def test_weights_are_counted_once_where_replicas_share_a_gpu(house: House) -> None:
    """`auto` shares them between several replicas; one alone has nothing to share, and a wish is obeyed."""
    assert plan(house.args(), H200).demand.weights_shared
    assert not plan(house.args(replicas=1), H200).demand.weights_shared
    assert not plan(house.args(weights="private"), H200).demand.weights_shared
    house.configure(LLAMA_2_7B)
    twice = {"replicas": 2, "engine": {"max_num_batched_tokens": 2048}}
    assert plan(house.args(**twice), KNOWN_CARDS["A10"]).demand.weights_shared
    with pytest.raises(MemoryPlanError, match="at most 1 would"):
        plan(house.args(weights="private", **twice), KNOWN_CARDS["A10"])


def test_a_model_that_cannot_be_shared_is_planned_privately_and_says_why(house: House) -> None:
    """The table ends with the reason, and the plan counts every replica's own weights."""
    house.configure(OPT | {"quantization_config": {"quant_method": "gptq"}})
    (house.model / "model.safetensors").write_bytes(b"x" * 1000)
    assert not plan(house.args(weights="shared"), H200).demand.weights_shared
    assert check(house.args(), "1-1").endswith(
        "the weights are not shared: a quantized model's layers repack their weights in each engine"
    )


def test_a_house_can_go_back_to_private_weights(house: House) -> None:
    """When the host finds that the model cannot be shared, later replicas get a smaller KV cache each."""
    manager = house.gpus(mps="off", weights="shared")
    before = manager.settings(0).engine["kv_cache_memory_bytes"]
    assert manager.weights_shared
    manager.plan_private_weights()
    assert not manager.weights_shared
    assert manager.settings(0).engine["kv_cache_memory_bytes"] < before
    manager.close()


def test_what_does_not_fit_is_refused(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    """Too many replicas for the card: one sentence that names how many would fit."""
    house.show(monkeypatch, Card("small", 8 * GIB))
    with pytest.raises(ConfigError, match=r"4 replica\(s\) of .* do not fit into .*: at most 2 would"):
        check(house.args(), "1-1")


def test_memory_that_others_hold_is_not_planned(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is in use on the card before is left to those who use it."""
    house.show(monkeypatch, Card("busy", H200.total_bytes, H200.total_bytes - GIB))
    with pytest.raises(ConfigError, match="busy has for them"):
        check(house.args(), "1-1")


@pytest.mark.parametrize(
    ("wish", "replicas", "installed", "uses"),
    [
        ("auto", 4, True, True), ("auto", 1, True, False), ("auto", 4, False, False),
        ("on", 1, True, True), ("off", 4, True, False), ("off", 4, False, False),
    ],
)  # fmt: skip
def test_mps_is_used_where_it_helps_and_exists(
    house: House, wish: str, replicas: int, installed: bool, uses: bool
) -> None:
    """Several replicas share the GPU through MPS where the driver has it, unless the user says otherwise."""
    if not installed:
        house.binary.unlink()
    assert uses_mps(house.args(mps=wish, replicas=replicas)) is uses


def test_mps_that_is_asked_for_and_absent_is_refused(house: House) -> None:
    """`mps: on` without the driver's program is an error with a mend, not a silent fallback."""
    house.binary.unlink()
    with pytest.raises(ConfigError, match="mps is 'on' but this machine cannot run MPS: set it to 'auto' or 'off'"):
        check(house.args(mps="on"), "1-1")


def test_a_folder_that_cannot_be_ours_is_refused(house: House) -> None:
    """Something in the way of the daemon's folder is found before the daemon is started."""
    house.paths.pipe.parent.parent.write_text("in the way")
    with pytest.raises(ConfigError, match="is not a folder: remove it"):
        check(house.args(), "1-1")
    house.paths.pipe.parent.parent.unlink()


def test_engines_get_what_was_planned_and_the_way_to_the_daemon(house: House) -> None:
    """Every engine is pinned to the plan's numbers and told where the daemon is; the daemon lives until the close."""
    manager = house.gpus(engine={"max_model_len": 1024})
    try:
        settings, made = manager.settings(0), plan(house.args(engine={"max_model_len": 1024}), H200)
        assert settings.engine["kv_cache_memory_bytes"] == made.kv_cache_bytes
        assert settings.engine["max_model_len"] == 1024
        assert 0 < settings.engine["gpu_memory_utilization"] < 0.2
        assert settings.mps
        assert settings.environment[mps.PIPE_VARIABLE] == str(house.paths.pipe)
        assert settings.environment["CUDA_VISIBLE_DEVICES"] == "0"
    finally:
        manager.close()


def test_without_mps_engines_are_kept_out_of_it(house: House) -> None:
    """A daemon that somebody else runs at the default place is not joined by accident, and there is none to watch."""
    manager = house.gpus(mps="off")
    settings = manager.settings(1)
    assert not settings.mps
    assert settings.environment.items() >= mps.ENVIRONMENT_OUTSIDE_MPS.items()
    assert settings.environment["CUDA_VISIBLE_DEVICES"] == "1"
    manager.started(0, [1])
    assert manager.terminate([1]) == ""
    manager.close()


def test_an_engine_that_is_no_client_is_refused(house: House) -> None:
    """An engine may not serve before it is proven to be a client, and one that is passes."""
    house.state.write_text(json.dumps({"servers": {"427": {"clients": [os.getpid()]}}}))
    manager = house.gpus()
    try:
        manager.started(0, [os.getpid()])
        with pytest.raises(mps.MpsError, match="before process 1048576 became an MPS client"):
            manager.started(0, [1 << 20])
    finally:
        manager.close()


def test_replicas_are_alike_on_all_gpus(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    """With several GPUs the fullest card decides how much KV cache every replica gets, and each is told its GPU."""
    cards = [H200, Card("busy", H200.total_bytes, 50 * GIB)]
    monkeypatch.setattr(gpu_setup, "this_card", lambda index=0: cards[index])
    manager = house.gpus(gpus=2)
    try:
        first, second = manager.settings(0), manager.settings(1)
        assert first.engine == second.engine
        assert first.engine["kv_cache_memory_bytes"] == plan(house.args(), cards[1]).kv_cache_bytes
        assert [s.environment["CUDA_VISIBLE_DEVICES"] for s in (first, second)] == ["0", "1"]
    finally:
        manager.close()
    assert check(house.args(gpus=2), "1-1").endswith("the same on each of the GPUs 0, 1")


def test_the_first_replica_is_measured_before_the_others_start(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the plan must not be trusted, others wait for the first; one that is larger than fits refuses them."""
    manager = house.gpus(start="first_alone")
    try:
        assert not manager.must_wait(0, others_starting=0)
        assert manager.must_wait(0, others_starting=1)
        made = plan(house.args(), H200)
        house.show(monkeypatch, Card("H200", H200.total_bytes, made.needed_bytes - 3 * made.replica_bytes))
        manager.started(0, [])
        assert not manager.must_wait(0, others_starting=1)
        assert manager.refusal == ""
    finally:
        manager.close()


def test_a_first_replica_that_is_too_large_refuses_the_others(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sentence names the setting to change, before any other has loaded."""
    manager = house.gpus(start="first_alone")
    try:
        made = plan(house.args(), H200)
        held = made.needed_bytes - 3 * made.replica_bytes
        house.show(monkeypatch, Card("H200", H200.total_bytes, held + 10 * GIB))
        manager.started(0, [])
        assert "the first replica on GPU 0 was measured, and the first replica takes" in manager.refusal
        assert "set replicas to 3 or kv_cache_bytes" in manager.refusal
    finally:
        manager.close()


@pytest.mark.parametrize(("start", "reserve_gib", "waits"), [
    ("auto", 4.0, False), ("auto", 0.5, True), ("together", 0.5, False), ("first_alone", 4.0, True),
])  # fmt: skip
def test_replicas_start_together_where_the_plan_leaves_room_for_error(
    house: House, start: str, reserve_gib: float, waits: bool
) -> None:
    """A reserve that could take larger engines lets all start at once; else the first is measured, unless told so."""
    manager = house.gpus(start=start, monitoring={"memory_reserve_gib": reserve_gib})
    try:
        assert manager.must_wait(0, others_starting=1) is waits
    finally:
        manager.close()


def test_a_manager_that_is_restarted_plans_as_the_first_one(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    """What this run's own replicas hold by then is not taken for somebody else's."""
    first = house.gpus()
    settings = first.settings(0)
    first.close()
    house.board.touch()
    house.show(monkeypatch, Card("H200", H200.total_bytes, 130 * GIB))
    monkeypatch.setattr(gpu_setup, "board_path", lambda name: house.board)
    assert check(house.args(), "1-1").startswith("H200: 139.70 GiB, 4 replica(s)")  # as for a change while it serves
    second = house.gpus()
    try:
        assert second.settings(0).engine == settings.engine
    finally:
        second.close()


def test_clients_are_capped_as_planned(house: House) -> None:
    """`mps_limits.memory: plan` gives every client its share of the plan; beyond it that client alone fails."""
    manager = house.gpus(mps_limits={"memory": "plan"})
    try:
        limit = manager.settings(0).environment["CUDA_MPS_PINNED_DEVICE_MEM_LIMIT"]
        assert limit == f"0={plan(house.args(), H200).client_limit_bytes >> 20}M"
    finally:
        manager.close()


@pytest.mark.parametrize("verdict", ["", "matrix products are wrong under this SM cap"])
def test_an_sm_cap_is_used_only_where_products_are_right(
    house: House, monkeypatch: pytest.MonkeyPatch, verdict: str
) -> None:
    """The check runs as a client with the cap; its sentence is the refusal."""
    asked: list[dict[str, str]] = []
    monkeypatch.setattr(numeric_check, "refusal", lambda environment: asked.append(environment) or verdict)
    manager = house.gpus(mps_limits={"thread_percentage": 50})
    try:
        assert manager.refusal == verdict
        assert asked[0]["CUDA_MPS_ACTIVE_THREAD_PERCENTAGE"] == "50"
        assert manager.settings(0).environment["CUDA_MPS_ACTIVE_THREAD_PERCENTAGE"] == "50"
    finally:
        manager.close()


def test_a_model_is_a_folder_or_a_name_unless_it_is_the_demo(
    house: House, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Paths and hub names go to vLLM as they are; `demo` is made on the spot."""
    monkeypatch.setattr(gpu_setup, "ensure_demo_model", lambda: tmp_path / "made")
    assert model_path(house.args()) == str(house.model)
    assert model_path(parse_args({"model": "org/name"})) == "org/name"
    assert model_path(parse_args({"model": "demo"})) == str(tmp_path / "made")


@pytest.mark.parametrize(
    ("wish", "mode", "says"),
    [
        ("on", "Prohibited", "the GPU's compute mode is Prohibited: have it set to Default"),
        ("on", "Exclusive_Process", r"processes outside MPS hold it \(77\): end them"),
        ("off", "Exclusive_Process", r"which does not let 4 replica\(s\) in without MPS: have it set to Default"),
        ("off", "Prohibited", "the GPU's compute mode is Prohibited"),
    ],
)
def test_a_compute_mode_that_keeps_replicas_out_is_named(
    house: House, monkeypatch: pytest.MonkeyPatch, wish: str, mode: str, says: str
) -> None:
    """Before weights load; CUDA would only say that the device is busy or unavailable."""
    monkeypatch.setattr(gpu_setup, "gpu_facts", lambda index: mps.GpuFacts(mode, (77,)))
    with pytest.raises(ConfigError, match=says):
        check(house.args(mps=wish), "1-1")


def test_an_exclusive_gpu_is_enough_for_one_process(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    """One replica without MPS, or several as clients of the one server."""
    monkeypatch.setattr(gpu_setup, "gpu_facts", lambda index: mps.GpuFacts("Exclusive_Process"))
    assert check(house.args(mps="off", replicas=1), "1-1")
    assert check(house.args(mps="on"), "1-1")


def test_what_an_older_run_noted_is_not_believed(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a living board there is no run that could hold the memory."""
    house.gpus().close()
    house.show(monkeypatch, Card("H200", H200.total_bytes, 100 * GIB))
    second = house.gpus()
    try:
        assert second.settings(0).engine["kv_cache_memory_bytes"] < 10 * GIB
    finally:
        second.close()
