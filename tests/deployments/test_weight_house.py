"""The supervisor of a weight host, with a stand-in for the host: start, adopt, start anew, end."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from balancer.board import Owner
from deployments import processes, weight_house, weights
from deployments.weight_house import WeightHouse
from deployments.weights import WeightStatus

# Writes down what it was told, then sleeps until it is ended, as a host does.
STAND_IN = """
import json, os, pathlib, signal, sys, time
spec = json.loads(sys.stdin.readline())
path = pathlib.Path(spec["socket"])
told = {"spec": spec, "pipe": os.environ.get("PIPE"), "engine": os.environ.get("SPLITWISER_ENGINE")}
path.with_suffix(".told").write_text(json.dumps(told))
time.sleep(60)
"""


@pytest.fixture
def house(tmp_path: Path) -> Iterator[WeightHouse]:
    """Afterwards no host runs and its files are gone."""
    command = (sys.executable, "-S", "-E", "-c", STAND_IN)
    made = WeightHouse(tmp_path, {"replicas": 2}, "/a/model", {"max_model_len": 64}, Owner.me(), command)
    yield made
    made.stop(5.0)
    assert made.status() is None
    assert not [path for path in tmp_path.iterdir() if path.suffix != ".told"]


def wait_until(holds: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < deadline_s
        time.sleep(0.01)


def told(house: WeightHouse) -> dict[str, object]:
    path = house.socket.with_suffix(".told")
    wait_until(lambda: path.exists() and path.read_text() != "")
    found: dict[str, object] = json.loads(path.read_text())
    return found


def test_a_host_is_told_what_to_load(house: WeightHouse, monkeypatch: pytest.MonkeyPatch) -> None:
    """It gets model, arguments and its lifeline, and the replicas' environment, but is no engine itself."""
    monkeypatch.setenv(processes.ENGINE_VARIABLE, "1")
    house.ensure({"PIPE": "here"})
    found = told(house)
    me = Owner.me()
    assert found["spec"] == {
        "args": {"replicas": 2}, "model": "/a/model", "settings": {"max_model_len": 64}, "socket": str(house.socket),
        "lifeline_pid": me.pid, "lifeline_ticks": me.start_ticks,
    }  # fmt: skip
    assert (found["pipe"], found["engine"]) == ("here", None)


def test_a_host_that_lives_is_kept_and_a_dead_one_replaced(house: WeightHouse) -> None:
    """Every replica that starts asks for the host; a second is started only when the first has ended."""
    house.ensure({})
    first = house.status()
    house.ensure({})
    assert first is not None
    assert house.status() == first
    os.kill(first.pid, signal.SIGKILL)
    wait_until(lambda: house.status() is None)
    house.ensure({})
    second = house.status()
    assert second is not None
    assert second.pid != first.pid


def test_a_manager_that_comes_back_adopts_the_host(house: WeightHouse, tmp_path: Path) -> None:
    """Another supervisor of the same model finds the living host; one of another model does not take it for its own."""
    house.ensure({})
    again = WeightHouse(tmp_path, {"replicas": 2}, "/a/model", {"max_model_len": 64}, Owner.me(), house.command)
    assert again.status() == house.status()
    other = WeightHouse(tmp_path, {"replicas": 2}, "/b/model", {"max_model_len": 64}, Owner.me(), house.command)
    assert other.status() is None
    assert other.socket != house.socket


def test_a_dismissed_host_ends_by_itself(house: WeightHouse) -> None:
    """The manager's end does not wait for it."""
    house.ensure({})
    told(house)
    house.dismiss()
    wait_until(lambda: house.status() is None)


def test_a_refusal_is_seen(house: WeightHouse) -> None:
    """What the host found out about the model reaches the manager, which then plans for private weights."""
    assert house.refused() is None
    me = Owner.me()
    weights.write_status(house.socket.with_suffix(".json"), WeightStatus("refused", me.pid, me.start_ticks, why="no"))
    assert house.refused() == "no"
    house.socket.with_suffix(".json").unlink()


def test_replicas_are_sent_to_the_host_and_keep_the_users_format(house: WeightHouse) -> None:
    """The loader gets the socket, and what the user wished for, in case the weights are loaded privately after all."""
    arguments = weight_house.engine_arguments(Path("/x"), {"load_format": "pt", "model_loader_extra_config": {"a": 1}})
    assert arguments["load_format"] == weights.SHARED_FORMAT
    assert arguments["model_loader_extra_config"] == {
        "socket": "/x", "wait_s": 600.0, "load_format": "pt", "extra": {"a": 1}
    }  # fmt: skip
    assert house.arguments()["model_loader_extra_config"]["load_format"] == "auto"


def test_a_host_ends_with_its_run_or_with_whoever_started_it() -> None:
    """The supervisor is the lifeline where there is one; a bare `serve run` has none."""
    me = Owner.me()
    assert weight_house.lifeline(f"{me.pid}-{me.start_ticks}") == me
    assert weight_house.lifeline("default") == me
    parent = Owner.of(os.getppid())
    assert weight_house.lifeline(f"{parent.pid}-{parent.start_ticks}") == parent
