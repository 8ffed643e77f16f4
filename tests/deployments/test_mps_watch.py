"""MPS as it is exported: from /proc, NVML and the keeper, without asking the daemon."""

from __future__ import annotations

import types
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest

from deployments.mps import ControlProgram, MpsDaemon, MpsPaths, identify
from deployments.mps_watch import MpsWatch
from monitoring.sampler import ReadingError


@pytest.fixture
def keeper(tmp_path: Path) -> Any:
    program = ControlProgram(program="no-such-program")  # asking the daemon would fail
    daemon = MpsDaemon(program, MpsPaths(tmp_path / "pipe", tmp_path / "log"))
    return types.SimpleNamespace(daemon=daemon, faults=2)


def test_a_dead_daemon_is_down_and_its_clients_are_nvmls(keeper: Any) -> None:
    view = MpsWatch(keeper, lambda: {11, 12, 13}).view()
    assert (view.wanted, view.up, view.clients, view.faults) == (True, False, 3, 2)


def test_a_daemon_started_in_place_of_a_dead_one_is_up(keeper: Any) -> None:
    watch = MpsWatch(keeper, frozenset)
    assert not watch.view().up
    keeper.daemon = MpsDaemon(keeper.daemon.program, keeper.daemon.paths)
    keeper.daemon.identity = identify(1)
    assert watch.view().up


def test_a_gpu_that_cannot_be_read_does_not_cost_the_scrape(keeper: Any) -> None:
    def lost() -> Collection[int]:
        raise ReadingError("GPU 0's clients are unknown")

    assert MpsWatch(keeper, lost).view().clients == 0
