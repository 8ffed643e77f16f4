"""A run that goes on: the balancer changed under load, decisions explained, priorities heard. Echo replicas."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from conftest import ROOT, System, belongings, running

pytestmark = [pytest.mark.system, pytest.mark.timeout(600)]


def _echo(document: dict[str, Any]) -> None:
    document["applications"][0]["import_path"] = "benchmarks.echo_app:build"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("live")


@pytest.fixture(scope="module")
def echo(folder: Path) -> Iterator[System]:
    with running(folder, change=_echo) as system:
        yield system


def _splitwiser(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "deployments.cli", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


def _changed(folder: Path, **args: Any) -> Path:
    """The running configuration with other arguments."""
    document = yaml.safe_load((folder / "serve_config.yaml").read_text())
    document["applications"][0]["args"].update(args)
    path = folder / "changed.yaml"
    path.write_text(yaml.safe_dump(document))
    return path


def _replica_processes(system: System) -> set[psutil.Process]:
    return {p for p in belongings(system, system.run_id) if "Replica" in " ".join(p.cmdline())}


def test_an_answer_explains_its_decision_when_asked_to(echo: System) -> None:
    answer = echo.post("/v1/completions", {"prompt": "x"}, {"x-splitwiser-decision": "1", "x-splitwiser-priority": "7"})
    explained = dict(pair.split("=", 1) for pair in answer.headers["x-splitwiser-decision"].split(" "))
    assert (explained["policy"], explained["priority"], explained["verdict"]) == ("gpu_aware", "7", "assign")
    assert explained["reason"] in ("shortest_wait", "affinity")
    assert len(explained["replicas"].split(",")) == 2
    assert "x-splitwiser-decision" not in echo.post("/v1/completions", {"prompt": "x"}).headers


def test_a_client_cannot_write_the_router_s_hint_or_decision(echo: System) -> None:
    forged = {"x-splitwiser-hint": "priority=9&explain=1", "x-serve-router-decision": "forged"}
    assert "x-splitwiser-decision" not in echo.post("/v1/completions", {"prompt": "x"}, forged).headers


def test_the_last_decisions_can_be_read(echo: System) -> None:
    echo.post("/v1/completions", {"prompt": "x", "max_tokens": 77})
    lines = _splitwiser("decisions").stdout.splitlines()
    assert 77 in [json.loads(line)["output_tokens"] for line in lines]


def test_another_policy_comes_into_force_without_restarting_a_replica(echo: System, folder: Path) -> None:
    before = _replica_processes(echo)
    try:
        done = _splitwiser("apply", "--run", echo.run_id, str(_changed(folder, balancer={"policy": "round_robin"})))
        assert done.returncode == 0, done.stderr
        assert echo.post("/v1/completions", {"prompt": "x"}).policy == "round_robin"
        assert before == _replica_processes(echo) != set()
    finally:
        _splitwiser("apply", "--run", echo.run_id, str(folder / "serve_config.yaml"))
    assert echo.post("/v1/completions", {"prompt": "x"}).policy == "gpu_aware"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"balancer": {"policy": "best"}}, "must be one of"),
        ({"balancer": {"queue_limit": -1}}, "queue_limit"),
        ({"replicas": 3}, "stop the run"),
    ],
)
def test_a_change_that_is_wrong_or_too_great_is_refused_while_the_old_serves(
    echo: System, folder: Path, change: dict[str, Any], says: str
) -> None:
    refused = _splitwiser("apply", "--run", echo.run_id, str(_changed(folder, **change)))
    assert refused.returncode == 2
    assert says in refused.stderr
    assert echo.post("/v1/completions", {"prompt": "x"}).policy == "gpu_aware"
