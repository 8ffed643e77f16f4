"""The start turn: one engine at a time on a node, and a crash never blocks the next."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from pathlib import Path

import pytest

from deployments import start_order
from deployments.start_order import turn

HOLDER = """
import asyncio, sys
from pathlib import Path
from deployments.start_order import turn
async def hold():
    async with turn(Path(sys.argv[1])):
        print("mine", flush=True)
        await asyncio.sleep(600)
asyncio.run(hold())
"""


@pytest.fixture(autouse=True)
def _ask_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(start_order, "_ASK_AGAIN_S", 0.001)


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_turns_do_not_overlap(tmp_path: Path) -> None:
    """Five that ask at once have their turns one after the other, and no descriptor is left open."""
    inside, most, done = 0, 0, 0

    async def start() -> None:
        nonlocal inside, most, done
        async with turn(tmp_path / "start"):
            inside += 1
            most = max(most, inside)
            await asyncio.sleep(0.005)
            inside -= 1
        done += 1

    async def all_of_them() -> None:
        async with asyncio.timeout(20):
            await asyncio.gather(*(start() for _ in range(5)))

    before = descriptors()
    asyncio.run(all_of_them())
    assert (most, done) == (1, 5)
    assert descriptors() == before


def test_a_failed_start_gives_the_turn_back(tmp_path: Path) -> None:
    """An engine that cannot start, or whose start is cancelled, does not block the others."""

    async def fail() -> None:
        async with turn(tmp_path / "start"):
            raise RuntimeError("no memory")

    async def go() -> None:
        async with asyncio.timeout(20):
            with pytest.raises(RuntimeError, match="no memory"):
                await fail()
            async with turn(tmp_path / "start"):
                waiting = asyncio.create_task(fail())
                await asyncio.sleep(0.005)
                waiting.cancel()
                await asyncio.gather(waiting, return_exceptions=True)
            async with turn(tmp_path / "start"):
                reached.append(True)

    reached: list[bool] = []
    asyncio.run(go())
    assert reached == [True]


def test_a_killed_holder_frees_the_turn(tmp_path: Path) -> None:
    """While a process holds the turn nobody else has it; when it is killed the next one does."""
    path = tmp_path / "start"
    root = Path(start_order.__file__).parents[1]
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(path)], stdout=subprocess.PIPE, cwd=root)
    assert holder.stdout is not None
    assert holder.stdout.readline() == b"mine\n"

    async def wait() -> bool:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05), turn(path):
                pass
        holder.kill()
        async with asyncio.timeout(20), turn(path):
            return True

    assert asyncio.run(wait())
    holder.communicate()


def test_only_its_user_may_hold_it(tmp_path: Path) -> None:
    """The file of the turn is private."""

    async def take() -> int:
        async with turn(tmp_path / "start"):
            return (tmp_path / "start").stat().st_mode & 0o777

    assert asyncio.run(take()) == 0o600
