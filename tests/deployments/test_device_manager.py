"""The device manager: readings reach the board, replicas get places, GPUs and cores, and its end is noticed."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from balancer.board import Board
from balancer.readings import GpuReading, GpuSource
from deployments import device_manager, notices
from deployments.device_manager import DeviceManager, Permission
from deployments.gpu_house import EngineSettings
from deployments.notices import LossFile
from monitoring.sampler import open_reader

SECONDS = 30.0
ARGS = {"monitoring": {"sample_hz": 100, "memory_reserve_gib": 2, "exporter_port": None}}


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A board's place, and no GPU visible; afterwards no file and no sampler is left."""

    def reader_of_host(reserve_bytes: int, log: object) -> object:
        return open_reader(reserve_bytes, log, environ={"CUDA_VISIBLE_DEVICES": ""})  # type: ignore[arg-type]

    monkeypatch.setattr(device_manager, "open_reader", reader_of_host)
    folder = tmp_path / "shm"
    folder.mkdir()
    yield folder / "board"
    assert not list(folder.iterdir())
    assert "sampler" not in {thread.name for thread in threading.enumerate()}


def wait_for(look: Callable[[], GpuReading | None]) -> GpuReading:
    deadline = time.monotonic() + SECONDS
    while (found := look()) is None:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    return found


def latest(board: Board) -> GpuReading | None:
    gpus = board.snapshot(0.0).gpus
    return gpus[0] if gpus else None


def test_the_host_is_read_where_there_is_no_gpu(path: Path) -> None:
    """CPU and memory stand in the GPU's record, again and again, and are named for what they are."""
    manager, board = DeviceManager(ARGS, "cpu", str(path), "test"), Board.open(path)
    first = wait_for(lambda: latest(board))
    assert first.source is GpuSource.HOST
    assert 0 < first.memory_used_bytes < first.memory_total_bytes
    assert first.memory_reserve_bytes == 2 << 30

    def later() -> GpuReading | None:
        found = latest(board)
        return found if found and found.taken_at_s > first.taken_at_s else None

    assert wait_for(later).index == first.index
    manager.check_health()
    manager.__del__()
    board.leave()


def test_what_a_failed_start_has_begun_is_ended_and_the_cause_is_told(path: Path) -> None:
    """Serve takes an instance down that its constructor left half made."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        monitoring = {**ARGS["monitoring"], "exporter_port": taken.getsockname()[1]}
        manager = DeviceManager.__new__(DeviceManager)
        with pytest.raises(OSError, match="in use"):
            manager.__init__({"monitoring": monitoring}, "cpu", str(path), "test")  # type: ignore[misc]
        manager.__del__()


def test_without_a_gpu_a_replica_adds_nothing(path: Path) -> None:
    """There is no plan and no MPS: the engine keeps the user's arguments, and no client need be proven."""
    manager = DeviceManager(ARGS, "cpu", str(path), "test")
    permission = manager.may_start("a", os.getpid())
    assert (permission.place, permission.gpu, permission.settings) == (0, 0, EngineSettings())
    manager.started("a", 0, [1])
    assert manager.terminate([1]) == ""
    manager.__del__()


@pytest.mark.parametrize(
    ("start", "engine", "together"),
    [
        ("auto", {}, False), ("auto", {"kv_cache_memory_bytes": 1 << 28}, True), ("together", {}, True),
        ("first_alone", {"kv_cache_memory_bytes": 1 << 28}, False),
    ],
)  # fmt: skip
def test_without_a_gpu_replicas_start_together_where_none_sizes_its_cache_by_what_is_free(
    path: Path, start: str, engine: dict[str, int], together: bool
) -> None:
    """Two that look for free memory at once would mis-size each other; pinned KV caches leave nothing to see."""
    manager = DeviceManager({**ARGS, "start": start, "engine": engine}, "cpu", str(path), "test")
    assert manager.may_start("a", os.getpid()).settings.together is together
    manager.__del__()


def test_a_replica_that_keeps_dying_is_given_up_and_the_run_ends_with_the_last(path: Path) -> None:
    """Each death postpones the next start; after the last place has been given up the supervisor is told."""
    args = {**ARGS, "replicas": 2, "restarts": {"deaths": 2, "first_wait_s": 0}}
    manager = DeviceManager(args, "cpu", str(path), "test")
    lives = 0

    def dies() -> Permission:
        nonlocal lives
        lives += 1
        permission = manager.may_start(f"life {lives}", os.getpid())
        manager.ended(f"life {lives}", planned=False)
        return permission

    assert [dies().place for _ in range(4)] == [0, 1, 0, 1]
    assert dies().refusal.startswith("its last 2 starts (place 1 of 2) each ended within 120 s")
    assert notices.stop_reason(path) == ""
    assert dies().refusal
    assert notices.stop_reason(path).startswith("no replica is left that could be started: its last 2 starts")
    manager.__del__()
    notices.stop_file(path).unlink()


def test_cores_are_shared_out_only_where_there_are_enough(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two replicas on 8 cores get three each, which are said with the permission; `off` or 7 cores give none."""
    for count, pinning, expected in ((8, "auto", (2, 3, 4)), (7, "auto", ()), (8, "off", ())):
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid, count=count: set(range(count)))
        manager = DeviceManager({**ARGS, "cpu_pinning": pinning}, "cpu", str(path), "test")
        assert manager.may_start("a", os.getpid()).cores == expected
        manager.__del__()


def test_its_record_goes_with_it(path: Path) -> None:
    """When the manager ends, its readings leave the board while others stay on it, and ending twice is no error."""
    manager, board = DeviceManager(ARGS, "cpu", str(path), "test"), Board.open(path)
    wait_for(lambda: latest(board))
    slot = board.claim_slot("a")
    slot.publish(0.0)
    manager.__del__()
    manager.__del__()
    snapshot = board.snapshot(0.0)
    assert (snapshot.gpus, len(snapshot.replicas)) == ((), 1)
    slot.release()
    board.leave()


def test_a_board_made_anew_gets_the_readings(path: Path) -> None:
    """The sampler follows when the board's file was removed and made again."""
    manager = DeviceManager(ARGS, "cpu", str(path), "test")
    path.unlink()
    board = Board.open(path)
    assert wait_for(lambda: latest(board)).source is GpuSource.HOST
    manager.__del__()  # as Serve does; the sampler's thread would keep it alive
    board.leave()


def test_a_sampler_that_ended_is_unhealthy(path: Path) -> None:
    """Serve is told when nobody samples any more, so that it starts the manager again."""
    manager = DeviceManager(ARGS, "cpu", str(path), "test")
    manager.check_health()
    manager._stop.set()
    manager._thread.join(SECONDS)
    with pytest.raises(RuntimeError, match="sampler has stopped"):
        manager.check_health()
    manager.__del__()


class HouseOfWeights:
    """Stands in for the weight host's supervisor, and remembers what it was asked."""

    def __init__(self, folder: Path, args: object, model: str, engine: object, lifeline: object) -> None:
        self.model, self.environments, self.why, self.dismissed = model, [], "", 0
        HouseOfWeights.made = self

    made: HouseOfWeights
    environments: list[dict[str, str]]

    def refused(self) -> str | None:
        return self.why or None

    def ensure(self, environment: dict[str, str]) -> None:
        self.environments.append(environment)

    def arguments(self) -> dict[str, str]:
        return {"load_format": "theirs"}

    def status(self) -> None:
        return None

    def dismiss(self) -> None:
        self.dismissed += 1


@pytest.fixture
def sharing(path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[DeviceManager]:
    """A manager that is asked to share the weights of an ordinary model."""
    (tmp_path / "config.json").write_text('{"model_type": "opt"}')
    monkeypatch.setattr(device_manager, "WeightHouse", HouseOfWeights)
    monkeypatch.setattr(device_manager, "folder_of", lambda run: tmp_path)
    manager = DeviceManager({"weights": "shared", "model": str(tmp_path)}, "cpu", str(path), "test")
    yield manager
    manager.__del__()
    assert HouseOfWeights.made.dismissed == 1


def test_a_replica_is_sent_to_the_weight_host(sharing: DeviceManager, tmp_path: Path) -> None:
    """Whoever starts finds a living host on the same GPU, and its engine knows the loader."""
    settings = sharing.may_start("a", os.getpid()).settings
    assert settings.engine == {"load_format": "theirs"}
    assert settings.environment == {device_manager.WEIGHTS_VARIABLE: "1"}
    assert HouseOfWeights.made.model == str(tmp_path)
    assert HouseOfWeights.made.environments == [{}]


def test_replicas_that_ask_at_once_are_answered_one_after_the_other(
    sharing: DeviceManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray calls from several threads: each replica has a place of its own, and only one of them starts the host."""
    inside = threading.Barrier(2)
    met = []

    def ensure(house: HouseOfWeights, environment: dict[str, str]) -> None:
        try:
            inside.wait(0.2)
            met.append(True)
        except threading.BrokenBarrierError:
            inside.reset()

    monkeypatch.setattr(HouseOfWeights, "ensure", ensure)
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda name: sharing.may_start(name, os.getpid()), "ab"))
    assert {permission.place for permission in found} == {0, 1}
    assert not met, "both looked for a host at the same time, and would have started two"


def test_what_the_host_refuses_is_no_longer_asked_of_it(sharing: DeviceManager) -> None:
    """Once the host has found that the model cannot be shared, it is dismissed and replicas load by themselves."""
    HouseOfWeights.made.why = "too strange"
    assert sharing.may_start("a", os.getpid()).settings == EngineSettings()
    assert HouseOfWeights.made.dismissed == 1
    assert sharing.may_start("a", os.getpid()).settings == EngineSettings()


def test_a_model_that_cannot_be_shared_gets_no_host(path: Path, tmp_path: Path) -> None:
    """A quantized model is known before anything starts."""
    (tmp_path / "config.json").write_text('{"quantization_config": {"quant_method": "awq"}}')
    manager = DeviceManager({"weights": "shared", "model": str(tmp_path)}, "cpu", str(path), "test")
    assert manager.may_start("a", os.getpid()).settings == EngineSettings()
    manager.__del__()


class HouseOfGpus:
    """Stands in for the GPUs' side: two cards, and what it is told to say."""

    def __init__(
        self, args: object, run: str, board: Path, engines: Callable[[list[int]], object], log: object
    ) -> None:
        self.gpus, self.losses, self.keeper = (4, 6), LossFile(board), None
        self.weights_shared, self.wait, self.refusal = False, False, ""
        self.engines = engines
        self.asked: list[tuple[int, int]] = []
        self.proven: list[tuple[int, list[int]]] = []
        HouseOfGpus.made = self

    made: HouseOfGpus

    def settings(self, gpu: int) -> EngineSettings:
        return EngineSettings(environment={"CUDA_VISIBLE_DEVICES": str(gpu)}, together=True)

    def must_wait(self, gpu: int, others_starting: int) -> bool:
        self.asked.append((gpu, others_starting))
        return self.wait

    def started(self, gpu: int, pids: list[int]) -> None:
        self.proven.append((gpu, pids))

    def terminate(self, pids: list[int]) -> str:
        return f"terminated {pids}"

    def watch(self, stop: threading.Event) -> None:
        stop.wait()

    def close(self) -> None:
        pass


@pytest.fixture
def two_gpus(path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[DeviceManager]:
    """Two replicas on each of two GPUs."""
    monkeypatch.setattr(device_manager, "GpuHouse", HouseOfGpus)
    args = {**ARGS, "replicas": 2, "gpus": 2, "weights": "private", "cpu_pinning": "off"}
    manager = DeviceManager(args, "gpu", str(path), "test")
    yield manager
    manager.__del__()
    for left in path.parent.iterdir():
        left.unlink()


def test_places_spread_the_replicas_over_the_gpus(two_gpus: DeviceManager) -> None:
    """So many on each, whatever Ray thought; a successor starts where its predecessor was."""
    permissions = [two_gpus.may_start(name, os.getpid()) for name in "abcd"]
    assert [p.gpu for p in permissions] == [4, 4, 6, 6]
    assert permissions[2].settings.environment == {"CUDA_VISIBLE_DEVICES": "6"}
    assert HouseOfGpus.made.asked == [(4, 0), (4, 1), (6, 0), (6, 1)]
    two_gpus.started("b", 4, [11, 12])
    assert HouseOfGpus.made.proven == [(4, [11, 12])]
    two_gpus.ended("b", planned=True)
    assert two_gpus.may_start("e", os.getpid()).gpu == 4
    assert two_gpus.terminate([7]) == "terminated [7]"


def test_a_permission_carries_the_losses_known_so_far(two_gpus: DeviceManager, path: Path) -> None:
    """Only what is lost afterwards concerns the engine that starts with it."""
    LossFile(path).lose([6], "a fault")
    assert [two_gpus.may_start(name, os.getpid()).epoch for name in "abc"] == [0, 0, 1]


def test_nobody_starts_while_the_gpu_is_healed_or_measured(two_gpus: DeviceManager) -> None:
    """The replica is told to ask again, and keeps its place meanwhile."""
    HouseOfGpus.made.wait = True
    waiting = two_gpus.may_start("a", os.getpid())
    assert (waiting.place, waiting.refusal, waiting.ask_again_s > 0) == (None, "", True)
    HouseOfGpus.made.wait = False
    assert two_gpus.may_start("a", os.getpid()).place == 0


def test_a_gpu_that_cannot_be_used_ends_the_run_with_its_reason(two_gpus: DeviceManager, path: Path) -> None:
    """The plan did not hold, or MPS did not heal: the supervisor is told in the same words."""
    HouseOfGpus.made.refusal = "the first replica on GPU 4 was measured, and it is too large"
    assert two_gpus.may_start("a", os.getpid()).refusal == HouseOfGpus.made.refusal
    assert notices.stop_reason(path) == HouseOfGpus.made.refusal


def test_engines_are_found_by_the_replicas_that_started_them(two_gpus: DeviceManager) -> None:
    """Also those whose replica is still starting and has told nobody; each on its own GPU."""
    sleep = [sys.executable, "-S", "-c", "import time; time.sleep(60)"]
    with subprocess.Popen(sleep) as engine:
        try:
            two_gpus.may_start("a", os.getpid())
            assert engine.pid in [process.pid for process in HouseOfGpus.made.engines([4])]  # type: ignore[attr-defined]
            assert HouseOfGpus.made.engines([6]) == []
        finally:
            engine.kill()
