"""MPS as it is exported: from /proc, NVML and the logs, without asking the daemon."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import pytest

from deployments.mps import ControlProgram, MpsDaemon, MpsPaths
from deployments.mps_watch import MpsWatch
from monitoring.sampler import ReadingError

FAULT = """\
[2026-11-22 16:0{minute}:12.345 Server    95] Client {{PID: 482, Context: 1}} encountered a fatal GPU error.
[2026-11-22 16:0{minute}:13.345 Server    95] Destroy server context on device 0 (NVIDIA H200)
"""


@pytest.fixture
def daemon(tmp_path: Path) -> MpsDaemon:
    (tmp_path / "log").mkdir()
    program = ControlProgram(program="no-such-program")  # asking the daemon would fail
    return MpsDaemon(program, MpsPaths(tmp_path / "pipe", tmp_path / "log"))


def fault(daemon: MpsDaemon, minute: int) -> None:
    with (daemon.paths.log / "server.log").open("a") as log:
        log.write(FAULT.format(minute=minute))


def test_a_dead_daemon_is_down_and_its_clients_are_nvmls(daemon: MpsDaemon) -> None:
    view = MpsWatch(daemon, lambda: {11, 12, 13}).view()
    assert (view.wanted, view.up, view.clients, view.faults) == (True, False, 3, 0)


def test_every_new_fault_in_the_log_is_counted_once(daemon: MpsDaemon) -> None:
    watch = MpsWatch(daemon, frozenset)
    seen = []
    for minute in (None, 1, None, 2):
        if minute is not None:
            fault(daemon, minute)
        seen.append(watch.view().faults)
    assert seen == [0, 1, 1, 2]


def test_faults_from_before_the_start_are_not_counted(daemon: MpsDaemon) -> None:
    fault(daemon, 1)
    daemon._old_fault = daemon._latest_fault()
    watch = MpsWatch(daemon, frozenset)
    assert watch.view().faults == 0
    fault(daemon, 3)
    assert watch.view().faults == 1


def test_a_gpu_that_cannot_be_read_does_not_cost_the_scrape(daemon: MpsDaemon) -> None:
    def lost() -> Collection[int]:
        raise ReadingError("GPU 0's clients are unknown")

    assert MpsWatch(daemon, lost).view().clients == 0
