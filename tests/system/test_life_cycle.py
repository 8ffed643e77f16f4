"""Starting wrongly, the other data plane, and what a killed run leaves for the next one."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import ROOT, belongings, free_port, running, start, write_config

from balancer.board import board_path
from deployments import launch
from monitoring import discovery

pytestmark = [pytest.mark.system, pytest.mark.timeout(900)]


def serve(config: Path, limit_s: float = 120) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "deployments.cli", "serve", str(config)]
    return subprocess.run(command, capture_output=True, text=True, timeout=limit_s, cwd=ROOT)


def test_a_wrong_key_is_refused_in_one_sentence_before_anything_starts(tmp_path: Path) -> None:
    def misspell(document: dict[str, Any]) -> None:
        document["applications"][0]["args"]["replica"] = 3

    ended = serve(write_config(tmp_path, free_port(), misspell))
    assert ended.returncode == 2
    assert ended.stderr.startswith("splitwiser: unknown key `replica`")
    assert ended.stderr.count("\n") == 1


def test_a_taken_port_is_named_with_its_holder(tmp_path: Path) -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        ended = serve(write_config(tmp_path, holder.getsockname()[1]))
    assert ended.returncode == 2
    assert f"pid {psutil.Process().pid}" in ended.stderr
    assert "http_options.port" in ended.stderr


@pytest.mark.long
def test_without_haproxy_serves_own_proxy_follows_the_same_policies(tmp_path: Path) -> None:
    def take_turns(document: dict[str, Any]) -> None:
        document["applications"][0]["args"]["balancer"] = {"policy": "round_robin"}

    with running(tmp_path, "--plain", change=take_turns) as system:
        answers = [system.complete(temperature=0.0) for _ in range(8)]
        assert {a.status for a in answers} == {200}
        assert {a.policy for a in answers} == {"round_robin"}
        assert len({a.replica for a in answers}) == 2
        assert len({a.text for a in answers}) == 1
        assert system.post("/v1/completions", {"model": "nobody", "prompt": "x"}).status == 404


def echo(document: dict[str, Any]) -> None:
    application = document["applications"][0]
    application["import_path"] = "benchmarks.echo_app:build"
    application["args"] = {"replicas": 2, "device": "cpu"}


def test_what_a_killed_supervisor_leaves_is_ended_by_the_next_start(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    port = free_port()
    system = start(write_config(tmp_path, port, echo), port, tmp_path / "log")
    run_id = system.run_id
    system.process.send_signal(signal.SIGKILL)
    system.process.wait(10)
    assert belongings(system, run_id)
    launch.clean_up_dead_runs()
    assert "processes of an earlier run" in capsys.readouterr().out
    assert not belongings(system, run_id)
    assert not board_path(run_id).exists()
    assert not discovery.targets_file(run_id).exists()
    launch.require_free_port("127.0.0.1", port, "http_options.port")


@pytest.mark.long
def test_a_dead_engine_is_answered_for_and_replaced_and_none_outlives_its_replica(tmp_path: Path) -> None:
    """Its requests get an OpenAI error, whole or in the stream; the next replica's engine dies with its replica."""
    with running(tmp_path, change=one_replica) as system:
        first = system.complete().replica
        (engine,) = [p for p in belongings(system, system.run_id) if "EngineCore" in " ".join(p.cmdline())]
        with ThreadPoolExecutor() as pool:
            whole, streamed = (pool.submit(system.complete, max_tokens=900, ignore_eos=True, stream=s) for s in (0, 1))
            time.sleep(3)
            engine.kill()
            assert whole.result().status in (500, 503)
            assert whole.result().json["error"]["message"]
            assert b'"error"' in streamed.result().body
        deadline_s = time.monotonic() + 400
        while (answer := system.complete()).status != 200:
            assert time.monotonic() < deadline_s
            assert answer.status in (500, 502, 503)
            time.sleep(1)
        assert answer.replica != first
        replica = next(p for p in belongings(system, system.run_id) if ":Replica" in " ".join(p.cmdline()))
        engines = replica.children(recursive=True)
        assert engines
        replica.kill()
        _, alive = psutil.wait_procs(engines, timeout=60)
        assert not alive


@pytest.mark.long
def test_a_crash_loop_ends_the_run_and_says_why(tmp_path: Path) -> None:
    """An engine that can never start is tried so often as the configuration says; then the status is 1."""

    def hopeless(document: dict[str, Any]) -> None:
        args = document["applications"][0]["args"]
        args |= {"replicas": 1, "restarts": {"deaths": 2, "first_wait_s": 0}}
        args["engine"]["max_model_len"] = 100_000_000

    ended = serve(write_config(tmp_path, free_port(), hopeless), limit_s=400)
    assert ended.returncode == 1
    assert "stopping because no replica is left that could be started: its last 2 starts" in ended.stdout
    assert ended.stdout.count("loading weights and starting the engine") == 2


def one_replica(document: dict[str, Any]) -> None:
    document["applications"][0]["args"]["replicas"] = 1
