"""A replica's life around its engine, with a stand-in for the engine and for the device manager."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import time
import types
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.applications import Starlette

from balancer.board import Board
from balancer.readings import ReplicaReading, ReplicaState
from deployments import cores, notices, replica
from deployments.device_manager import Permission
from deployments.gpu_house import EngineSettings
from deployments.notices import LossFile

SECONDS = 20.0


class Engine:
    """An engine whose process is a sleeping child."""

    def __init__(self) -> None:
        command = [sys.executable, "-S", "-E", "-c", "import time; time.sleep(60)"]
        self.process = subprocess.Popen(command)
        self.errored = False
        self.shut_down = False

    async def check_health(self) -> None:
        if self.errored:
            raise RuntimeError("engine dead")

    def shutdown(self, timeout: float) -> None:
        self.shut_down = True


class Method:
    """A method of the manager's handle: notes the call, and answers."""

    def __init__(self, calls: list[Any], name: str, answers: list[Any]) -> None:
        self._calls, self._name, self._answers = calls, name, answers

    async def remote(self, *arguments: Any) -> Any:
        self._calls.append((self._name, *arguments))
        return self._answers.pop(0) if len(self._answers) > 1 else self._answers[0]


class Manager:
    def __init__(self) -> None:
        self.calls: list[Any] = []
        self.permissions: list[Any] = [Permission(place=0, settings=EngineSettings(mps=True, together=True))]
        self.trouble = ""

    def __getattr__(self, name: str) -> Method:
        answers = {"may_start": self.permissions, "terminate": [self.trouble]}.get(name, [None])
        return Method(self.calls, name, answers)

    def names(self) -> list[str]:
        return [call[0] for call in self.calls]


class Home:
    """One replica with its board, manager and engine."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.path = folder / "board"
        self.manager = Manager()
        self.engine: Engine | None = None
        self.said: list[str] = []
        context = types.SimpleNamespace(
            replica_id=types.SimpleNamespace(to_full_id_str=lambda: "app#Replica#x"),
            replica_tag="x",
            rank=types.SimpleNamespace(rank=0),
        )
        monkeypatch.setattr(replica.serve, "get_replica_context", lambda: context)
        monkeypatch.setattr(replica.engine, "server_arguments", lambda *_: None)
        monkeypatch.setattr(replica.engine, "start_engine", lambda *_: self.start())
        monkeypatch.setattr(replica.engine, "warm_up", self.nothing)
        monkeypatch.setattr(replica.engine, "process_ids", lambda engine: [engine.process.pid])
        monkeypatch.setattr(replica.engine, "build_openai_app", self.app)
        monkeypatch.setattr(replica.engine, "cache_environment", lambda: None)
        monkeypatch.setattr(replica, "model_path", lambda args: "model")
        monkeypatch.setattr(replica, "stat_logger", lambda slot: None)
        monkeypatch.setattr(replica, "_LOOK_EVERY_S", 0.005)
        monkeypatch.setattr(replica.Replica.__mro__[1], "_say", lambda _, what: self.said.append(what))
        self.board = Board.open(self.path)
        self.replica: Any = replica.Replica.__mro__[1]({"drain_s": 5}, str(self.path), True, self.manager)

    def start(self) -> Engine:
        self.engine = Engine()
        return self.engine

    async def nothing(self, *_: Any) -> None:
        return None

    async def app(self, *_: Any) -> Starlette:
        return Starlette()

    def seen(self) -> ReplicaReading:
        (reading,) = self.board.snapshot(time.monotonic()).replicas
        return reading

    async def until(self, holds: Callable[[], bool]) -> None:
        deadline_s = time.monotonic() + SECONDS
        while not holds():
            assert time.monotonic() < deadline_s
            await asyncio.sleep(0.005)

    def live(self, story: Callable[[], Awaitable[None]]) -> None:
        """Start the replica, let the story happen, end the replica as Serve does."""

        async def whole() -> None:
            await self.replica.__serve_build_asgi_app__()
            await story()
            await self.replica.__del__()

        asyncio.run(whole())


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Home]:
    """Afterwards the engine's process has ended."""
    folder = tmp_path / "shm"
    folder.mkdir()
    home = Home(folder, monkeypatch)
    yield home
    if home.engine:
        home.engine.process.kill()
        home.engine.process.wait()
    home.board.leave()


def test_a_replica_is_ready_only_after_its_engine_is_proven(home: Home) -> None:
    """It asks, starts, has its engine's processes proven, and says so; in the end the engine is shut down."""

    async def story() -> None:
        assert home.seen().state is ReplicaState.READY
        assert home.engine is not None
        assert home.manager.calls[1] == ("started", "app#Replica#x", 0, [home.engine.process.pid])
        assert home.said[-1].endswith("proven to be an MPS client")
        await home.replica.check_health()

    home.live(story)
    assert home.manager.names() == ["may_start", "started"]
    assert home.engine is not None
    assert home.engine.shut_down


def test_it_asks_again_until_it_may_start(home: Home) -> None:
    """While MPS is being healed or another replica is measured, it waits."""
    home.manager.permissions.insert(0, Permission(ask_again_s=0.01))

    async def story() -> None:
        assert home.manager.names() == ["may_start", "may_start", "started"]

    home.live(story)


def test_a_replica_in_a_crash_loop_waits_instead_of_dying_again(home: Home) -> None:
    """It says why once and stays, so that Serve starts no other in its place, and no engine is started."""
    home.manager.permissions[:] = [Permission(refusal="its last 3 starts failed")]

    async def story() -> None:
        building = asyncio.create_task(home.replica.__serve_build_asgi_app__())
        await home.until(lambda: home.seen().state is ReplicaState.FAILED)
        await asyncio.sleep(0.05)
        assert not building.done()
        assert home.said == ["its last 3 starts failed"]
        assert home.engine is None
        building.cancel()
        await home.replica.__del__()

    asyncio.run(story())


def test_a_dead_engine_takes_its_replica_out_at_once(home: Home) -> None:
    """Within a look it receives nothing more, new requests are answered, the manager knows, and Serve is told."""

    async def story() -> None:
        assert home.engine is not None
        home.engine.errored = True
        await home.until(lambda: "ended" in home.manager.names())
        assert home.seen().state is ReplicaState.FAILED
        assert home.replica._door._closed == "the replica's engine has died"
        assert home.manager.calls[-1] == ("ended", "app#Replica#x", False)
        with pytest.raises(RuntimeError, match="the replica's engine has died"):
            await home.replica.check_health()

    home.live(story)


def test_a_lost_gpu_ends_a_healthy_engine(home: Home) -> None:
    """An idle engine does not feel a fault, but the server waits for its end: it is killed, with the fault's reason."""

    async def story() -> None:
        LossFile(home.path).lose([1], "another GPU")
        await asyncio.sleep(0.05)
        assert home.seen().state is ReplicaState.READY
        LossFile(home.path).lose([0], "a fatal GPU error in process 7")
        await home.until(lambda: "ended" in home.manager.names())
        assert home.engine is not None
        assert home.engine.process.wait(SECONDS) == -signal.SIGKILL
        assert home.replica._door._closed == "a fatal GPU error in process 7"

    home.live(story)


def test_an_engine_that_started_into_a_loss_does_not_serve(home: Home) -> None:
    """What was permitted before the GPU was lost must not go on after it."""
    LossFile(home.path).lose([0], "the MPS control daemon has died")
    with pytest.raises(RuntimeError, match="the MPS control daemon has died"):
        asyncio.run(home.replica.__serve_build_asgi_app__())
    assert home.seen().state is ReplicaState.STARTING


def test_a_planned_restart_drains_then_ends_the_gpu_work_then_kills(home: Home) -> None:
    """Nothing new is taken, what is under way may finish, and only then is the client terminated and killed."""

    async def story() -> None:
        assert home.engine is not None
        number = home.replica._slot.received(replica_ticket())
        notices.ask_restart(home.path, home.seen().slot)
        await home.until(lambda: home.seen().state is ReplicaState.DRAINING)
        await asyncio.sleep(0.05)
        assert "terminate" not in home.manager.names()
        assert home.engine.process.poll() is None
        home.replica._slot.finished(number)
        await home.until(lambda: "ended" in home.manager.names())
        assert home.manager.calls[-2:] == [
            ("terminate", [home.engine.process.pid]),
            ("ended", "app#Replica#x", True),
        ]
        assert home.engine.process.wait(SECONDS) == -signal.SIGKILL

    home.live(story)


def test_a_replica_keeps_to_its_cores_once_it_is_up(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own process and the engine's are pinned, and the start message names the cores."""
    home.manager.permissions[:] = [Permission(place=0, cores=(3, 4, 5))]
    pinned: list[Any] = []
    monkeypatch.setattr(cores, "pin", lambda pids, mine: pinned.append((len(list(pids)), tuple(mine))))

    async def story() -> None:
        assert pinned == [(2, (3, 4, 5))]
        assert home.said[-1].endswith("on cores 3-5")

    home.live(story)


def replica_ticket() -> Any:
    from balancer.ticket import DIRECT

    return DIRECT
