"""What the engine holds on the device stands in the replica's slot."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from balancer.board import Board
from deployments import engine_memory
from deployments.engine_memory import held_bytes, weigh
from deployments.slot import Slot
from monitoring.sampler import ReadingError


class FakeReader:
    """Names clients and what they hold, or fails as NVML does when a GPU is lost."""

    def __init__(self, held: dict[int, int] | None) -> None:
        self.held = held
        self.closed = False

    def read(self, now_s: float) -> tuple[()]:
        return ()

    def memory_by_pid(self) -> dict[int, int]:
        if self.held is None:
            raise ReadingError("GPU 0's clients are unknown")
        return self.held

    def mps_client_pids(self) -> frozenset[int]:
        return frozenset(self.held or ())

    def close(self) -> None:
        self.closed = True


@pytest.mark.parametrize(
    ("held", "expected"),
    [({4: 700, 5: 30, 6: 1}, 730), ({6: 1}, 0), (None, 0)],
)
def test_only_the_engines_own_processes_are_weighed(held: dict[int, int] | None, expected: int) -> None:
    """Neighbours do not count, and where NVML does not answer or names others only, 0 says that it is unknown."""
    assert held_bytes(FakeReader(held), [4, 5]) == expected


def test_the_slot_tells_what_is_held_until_the_replica_ends(tmp_path: Path) -> None:
    """The heartbeat publishes it, and the reader is given back."""
    slot = Slot(tmp_path / "board", "app#Replica#x1", 0, lambda: 1.0)
    reader = FakeReader({4: 700})

    async def go() -> None:
        task = asyncio.create_task(weigh(slot, [4], reader))
        async with asyncio.timeout(10):
            while not slot.fields.gpu_memory_bytes:
                await asyncio.sleep(0.001)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    asyncio.run(go())
    slot.publish()
    board = Board.open(tmp_path / "board")
    assert board.snapshot(1.0).replicas[0].gpu_memory_bytes == 700
    assert reader.closed
    board.close()
    slot.close()


def test_a_device_that_cannot_be_opened_is_no_reason_not_to_serve(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ReadingError("NVML could not be opened")

    monkeypatch.setattr(engine_memory, "open_reader", broken)
    slot = Slot(tmp_path / "board", "app#Replica#x1", 0, lambda: 1.0)
    asyncio.run(weigh(slot, [4]))
    assert slot.fields.gpu_memory_bytes == 0
    assert "unknown: NVML could not be opened" in caplog.text
    slot.close()


def test_without_a_gpu_the_processes_own_memory_is_weighed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    slot = Slot(tmp_path / "board", "app#Replica#x1", 0, lambda: 1.0)

    async def go() -> None:
        task = asyncio.create_task(weigh(slot, [os.getpid()]))
        async with asyncio.timeout(10):
            while slot.fields.gpu_memory_bytes < 1 << 20:
                await asyncio.sleep(0.001)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    asyncio.run(go())
    assert 1 << 20 < slot.fields.gpu_memory_bytes < 1 << 40
    slot.close()
