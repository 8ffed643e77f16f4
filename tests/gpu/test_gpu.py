"""What only a GPU can show, one card, about a minute: MPS as it really answers, caps, a fault, and right products."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from deployments import gpu_setup, mps, numeric_check
from deployments.mps import ControlProgram, MpsDaemon, client_environment, private_paths

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]

MIB = 1 << 20
ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[MpsDaemon]:
    """A control daemon of the test's own, ended afterwards; it never touches the card's settings."""
    daemon = MpsDaemon(ControlProgram(), private_paths(os.getuid(), tmp_path))
    daemon.start()
    yield daemon
    daemon.stop()
    assert not daemon.alive()


def start_client(environment: Mapping[str, str], *words: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "benchmarks.gpu_clients", *words]
    pipe = subprocess.PIPE
    return subprocess.Popen(
        command, env={**os.environ, **environment}, cwd=ROOT, text=True, stdin=pipe, stdout=pipe, stderr=pipe
    )


def said(client: subprocess.Popen[str]) -> Any:
    assert client.stdout is not None
    return json.loads(client.stdout.readline())


@pytest.fixture
def holder(daemon: MpsDaemon) -> Iterator[subprocess.Popen[str]]:
    """A client that holds 256 MiB and does nothing."""
    client = start_client(client_environment(daemon.paths), "hold", "256")
    assert said(client) == {"held_mib": 256}
    yield client
    client.kill()
    client.wait()


def test_a_client_is_proven_terminated_and_gone(daemon: MpsDaemon, holder: subprocess.Popen[str]) -> None:
    """By PID: proven while it lives, terminated with the daemon's own word, off the list once its process is killed."""
    daemon.require_client(holder.pid, 20)
    assert daemon.terminate_client(holder.pid)
    holder.kill()
    holder.wait()
    daemon.wait_gone(holder.pid)


def test_a_cap_stops_its_own_client_only(daemon: MpsDaemon, holder: subprocess.Popen[str]) -> None:
    """A client that allocates to its limit gets out-of-memory (2); its neighbour lives on, and there is no fault."""
    capped = start_client(client_environment(daemon.paths, memory_limit_bytes=1024 * MIB), "fill")
    answer = said(capped)
    assert capped.wait(20) == 0
    assert answer["code"] == 2
    assert answer["allocated_mib"] < 1024
    assert holder.poll() is None
    assert daemon.recent_fault() is None


def test_an_illegal_access_is_seen_in_the_log_and_heals(daemon: MpsDaemon, holder: subprocess.Popen[str]) -> None:
    """The log names the fault; once the neighbour has ended too, the server takes new clients again."""
    culprit = start_client(client_environment(daemon.paths), "fault")
    assert said(culprit)["code"] != 0
    culprit.wait(20)
    assert daemon._wait_until(lambda: daemon.recent_fault() is not None, 10)
    holder.kill()
    holder.wait()
    daemon.wait_clean(20)
    again = start_client(client_environment(daemon.paths), "hold", "16")
    assert said(again) == {"held_mib": 16}
    again.communicate(timeout=20)


def test_a_process_outside_is_no_client(daemon: MpsDaemon) -> None:
    """CUDA joins silently or not at all: the environment that keeps replicas out really does."""
    outside = start_client(mps.ENVIRONMENT_OUTSIDE_MPS, "hold", "16")
    assert said(outside) == {"held_mib": 16}
    assert outside.pid not in daemon.client_pids()
    outside.communicate(timeout=20)


def test_products_are_right_without_a_cap() -> None:
    """The numerical check passes where nothing is capped; under a cap its verdict decides."""
    assert numeric_check.refusal({}) == ""


def test_the_card_is_read() -> None:
    """NVML's total and what is in use make the card that is planned for."""
    card = gpu_setup.this_card(gpu_setup.chosen_gpus(1)[0])
    assert 0 < card.used_bytes < card.total_bytes
