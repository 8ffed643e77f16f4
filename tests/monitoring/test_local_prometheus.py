"""`make monitoring`: a Prometheus with this project's configuration, of which nothing stays."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from monitoring import local_prometheus
from monitoring.local_prometheus import PrometheusError

ROOT = Path(__file__).parents[2]


@pytest.fixture
def started(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The command as `make monitoring` runs it, and the address that it prints."""
    port = local_prometheus.free_port()
    command = [sys.executable, "-m", "monitoring.local_prometheus", "--port", str(port)]
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        assert f"http://127.0.0.1:{port}" in process.stdout.readline()
        yield process, f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_it_runs_with_our_rules_and_jobs_until_it_is_interrupted_and_leaves_nothing(
    started: tuple[subprocess.Popen[str], str], tmp_path: Path, number: signal.Signals
) -> None:
    """Rules and jobs are the committed ones; afterwards neither the folder nor the server is there."""
    process, url = started
    with urllib.request.urlopen(f"{url}/api/v1/rules", timeout=10) as answer:
        groups = json.load(answer)["data"]["groups"]
    assert "SplitwiserNoReplica" in {rule["name"] for group in groups for rule in group["rules"]}
    assert len(list(tmp_path.iterdir())) == 1
    process.send_signal(number)
    assert process.wait(30) == 0
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(OSError, match="refused"):
        urllib.request.urlopen(url, timeout=1)


def test_without_the_program_it_says_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    assert local_prometheus.main([]) == 2
    said = capsys.readouterr().err
    assert "apt-get install prometheus" in said
    assert "docker compose up -d" in said


def test_a_port_that_is_taken_is_told(tmp_path: Path) -> None:
    """Another server on the port is not mistaken for ours."""
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    port = local_prometheus.free_port()
    with (
        local_prometheus.running(local_prometheus.CONFIGURATION, tmp_path / "one", port),
        pytest.raises(PrometheusError, match=f"port {port} of 127.0.0.1 is taken"),
        local_prometheus.running(local_prometheus.CONFIGURATION, tmp_path / "two", port),
    ):
        pass
