"""Shared weights with real engines on the CPU: one copy in memory, the same texts, and who dies with whom."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from conftest import running

from deployments.demo_model import DemoSpec, ensure_demo_model
from deployments.processes import WEIGHTS_VARIABLE, runs_folder
from deployments.weight_house import WeightHouse
from deployments.weights import WeightStatus, statuses

pytestmark = pytest.mark.system

ROOT = Path(__file__).parent.parent.parent
# 270 MB of weights: enough to be seen beside what an engine takes for itself.
SPEC = DemoSpec(hidden_size=1024, layers=8, heads=16, ffn_size=4096, padded_vocab_size=16384)
ENGINE = {
    "max_model_len": 256, "max_num_seqs": 8, "dtype": "bfloat16", "kv_cache_memory_bytes": 32 << 20,
    "enforce_eager": True,
}  # fmt: skip
START_LIMIT_S = 240.0


class Worker:
    """One engine, and orders to it."""

    def __init__(self, model: Path, log: Path, extra: dict[str, Any]) -> None:
        # Everything in one process, so that its memory is the engine's.
        own = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", WEIGHTS_VARIABLE: "1", "VLLM_NO_USAGE_STATS": "1"}
        self.log = log
        with log.open("w") as sink:
            self.process = subprocess.Popen(
                [sys.executable, str(Path(__file__).with_name("weights_worker.py"))],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=sink, text=True, cwd=ROOT,
                env={**os.environ, **own, "PYTHONPATH": str(ROOT)},
            )  # fmt: skip
        self._say(json.dumps({"model": str(model), "engine": {**ENGINE, **extra}}))

    def _say(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def hear(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, f"the engine ended: ...{self.log.read_text()[-3000:]}"
        return json.loads(line)

    def ask(self, order: str) -> Any:
        self._say(order)
        return self.hear()

    def end(self) -> None:
        self.process.kill()
        self.process.communicate()


@dataclass
class Site:
    """A host with two engines that share its weights, and a third that has its own."""

    house: WeightHouse
    start: Callable[[bool], Worker]
    shared: list[Worker]
    private: Worker

    def status(self) -> WeightStatus:
        status = self.house.status()
        assert status is not None
        return status


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """Afterwards neither host nor engine runs, and the host's files are gone."""
    folder = tmp_path_factory.mktemp("weights")
    model = ensure_demo_model(folder / "models", SPEC)
    home = folder / "run"
    home.mkdir(mode=0o700)
    house = WeightHouse(home, {"model": str(model), "engine": ENGINE}, str(model), {})
    workers: list[Worker] = []

    def start(shared: bool) -> Worker:
        workers.append(Worker(model, folder / f"{len(workers)}.log", house.arguments() if shared else {}))
        return workers[-1]

    try:
        house.ensure({})
        made = Site(house, start, [start(True), start(True)], start(False))
        for worker in workers:
            worker.hear()
        yield made
    finally:
        for worker in workers:
            worker.end()
        house.stop(10.0)
        assert house.status() is None
        assert list(home.iterdir()) == []


@pytest.mark.timeout(START_LIMIT_S + 60)
def test_one_copy_serves_all(site: Site) -> None:
    """Each engine holds less memory of its own by about the weights, and the shared pages are counted in parts."""
    weights_bytes = site.status().shared_bytes
    private, shared = site.private.ask("memory"), [worker.ask("memory") for worker in site.shared]
    assert weights_bytes > 250e6
    for memory in shared:
        assert memory["Pss_Anon"] < private["Pss_Anon"] - 0.7 * weights_bytes
        assert 0.2 * weights_bytes < memory["Pss_Shmem"] < 0.6 * weights_bytes
    assert {follower.pid for follower in site.status().followers} == {w.process.pid for w in site.shared}
    assert all(follower.private_bytes < 1 << 20 for follower in site.status().followers)


def test_texts_are_those_of_private_weights(site: Site) -> None:
    """With the same kernels the greedy texts of all engines are the same, whoever owns the weights."""
    wanted = site.private.ask("texts")
    assert all(wanted)
    assert [worker.ask("texts") for worker in site.shared] == [wanted, wanted]


@pytest.mark.timeout(START_LIMIT_S + 60)
def test_a_replica_that_dies_takes_nothing_with_it(site: Site) -> None:
    """The host and the other engine go on; the next engine maps the same weights instead of loading them."""
    victim, witness = site.shared
    before = site.status()
    victim.end()
    wanted = witness.ask("texts")
    fresh = site.start(True)
    site.shared[0] = fresh
    fresh.hear()
    assert fresh.ask("texts") == wanted
    after = site.status()
    assert (after.pid, after.fingerprint) == (before.pid, before.fingerprint)
    assert {follower.pid for follower in after.followers} == {witness.process.pid, fresh.process.pid}
    assert "Mapped 0.25 GiB of shared weights" in fresh.log.read_text()
    assert "Loading safetensors" not in fresh.log.read_text()


def test_with_the_host_all_that_share_end_and_say_why(site: Site) -> None:
    """No engine goes on with weights whose owner is gone; the private one is not touched, and nothing hangs."""
    os.kill(site.status().pid, signal.SIGKILL)
    for worker in site.shared:
        assert worker.process.wait(30) == -signal.SIGKILL
        assert "the weight host has ended; this engine ends with it" in worker.log.read_text()
    assert all(site.private.ask("texts"))


@pytest.mark.long
@pytest.mark.timeout(900)
def test_the_system_lends_one_copy_and_survives_its_host(tmp_path: Path) -> None:
    """`weights: shared` serves from one host; when that is killed all replicas start anew with another, by themselves.

    Meanwhile every request gets an answer, and in the end both replicas answer again.
    """

    def share(document: dict[str, Any]) -> None:
        document["applications"][0]["args"]["weights"] = "shared"

    with running(tmp_path, change=share) as system:
        folder = runs_folder() / system.run_id
        (first,) = statuses(folder)
        assert (first.state, len(first.followers)) == ("ready", 2)
        wanted = system.complete(max_tokens=4, temperature=0).text
        os.kill(first.pid, signal.SIGKILL)
        deadline_s = time.monotonic() + 600
        seen: set[str] = set()
        while len(seen) < 2:
            assert time.monotonic() < deadline_s, system.log.read_text()[-4000:]
            answer = system.complete(max_tokens=4, temperature=0)
            assert answer.status == 200 or answer.status >= 429
            second = next((status for status in statuses(folder) if status.pid != first.pid), None)
            if answer.status == 200 and second is not None and len(second.followers) == 2:
                seen.add(answer.replica)
                assert answer.text == wanted
            time.sleep(0.5)
        assert "the weight host has ended; this engine ends with it" in system.log.read_text()
