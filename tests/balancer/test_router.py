"""The router behind Serve's own proxy: Ray's RequestRouter interface over the board, without a Ray cluster."""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

from ray.serve._private.common import DeploymentHandleSource, DeploymentID, ReplicaID  # noqa: E402 - after the mark
from ray.serve.request_router import RequestRouter  # noqa: E402

from balancer.board import Board, SlotWriter  # noqa: E402
from balancer.readings import ReplicaState  # noqa: E402
from balancer.router import BoardRouter  # noqa: E402

DEPLOYMENT = DeploymentID("Replica", "default")


class Candidate:
    """What Serve knows of a running replica, as far as a router asks."""

    def __init__(self, unique: str) -> None:
        self.replica_id = ReplicaID(unique, DEPLOYMENT)

    @property
    def name(self) -> str:
        return str(self.replica_id.to_full_id_str())


class House:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.board = Board.open(path)
        self.slots: dict[str, SlotWriter] = {}

    def replica(self, unique: str, state: ReplicaState = ReplicaState.READY) -> Candidate:
        candidate = Candidate(unique)
        slot = self.slots[unique] = self.board.claim_slot(candidate.name)
        slot.fields.state = state
        slot.publish(time.monotonic())
        return candidate

    def router(self, policy: str = "least_queue") -> BoardRouter:
        router = BoardRouter(DEPLOYMENT, DeploymentHandleSource.PROXY)
        router.initialize_state(board_path=str(self.path), knobs={"policy": policy, "stale_after_s": 60.0})
        return router

    def on_the_way(self) -> dict[str, int]:
        return {r.replica_id: r.on_the_way_requests for r in self.board.snapshot(time.monotonic()).replicas}


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    house = House(tmp_path / "board")
    yield house
    for slot in house.slots.values():
        slot.release()
    for row in range(house.board.router_rows()):  # a router lives as long as its proxy, so nobody closes it
        assert row >= 0
    house.board.close()
    house.path.unlink()
    assert not list(tmp_path.iterdir())


def chosen(router: BoardRouter, candidates: list[Candidate]) -> list[str]:
    ranks: list[list[Any]] = asyncio.run(router.choose_replicas(candidates))
    return [candidate.replica_id.unique_id for rank in ranks for candidate in rank]


def test_it_keeps_to_rays_interface() -> None:
    """The two methods that Serve calls take what Serve 2.60 gives them, and nothing abstract is left."""
    assert issubclass(BoardRouter, RequestRouter)
    assert not BoardRouter.__abstractmethods__
    ours, theirs = (inspect.signature(cls.choose_replicas) for cls in (BoardRouter, RequestRouter))
    assert list(ours.parameters) == list(theirs.parameters)
    assert inspect.iscoroutinefunction(BoardRouter.choose_replicas)


def test_serve_can_make_one_from_its_configuration() -> None:
    """The class is found under the name that the application gives to Serve, with arguments that survive its checks."""
    from ray.serve.config import RequestRouterConfig

    config = RequestRouterConfig(
        request_router_class="balancer.router:BoardRouter",
        request_router_kwargs={"board_path": "/nowhere", "knobs": {"policy": "round_robin"}},
    )
    assert config.get_request_router_class() is BoardRouter


def test_requests_spread_over_the_candidates(house: House) -> None:
    """Two idle replicas get every other request, and the board shows what is on its way."""
    candidates = [house.replica("a"), house.replica("b")]
    router = house.router()
    assert sorted(chosen(router, candidates)[0] for _ in range(6)) == ["a"] * 3 + ["b"] * 3
    assert set(house.on_the_way().values()) == {3}


def test_what_a_replica_received_is_no_longer_on_its_way(house: House) -> None:
    """All that the replica received counts, for Serve's proxy adds no ticket."""
    candidates = [house.replica("a"), house.replica("b")]
    router = house.router()
    first = chosen(router, candidates)[0]
    slot = house.slots[first]
    slot.fields.received_total += 1
    slot.publish(time.monotonic())
    chosen(router, candidates)
    assert sum(house.on_the_way().values()) == 1


def test_only_candidates_are_chosen(house: House) -> None:
    """A replica on the board that Serve does not offer, or the other way round, receives nothing."""
    house.replica("a")
    offered = house.replica("b")
    router = house.router("round_robin")
    assert [chosen(router, [offered, Candidate("elsewhere")]) for _ in range(3)] == [["b"]] * 3


@pytest.mark.parametrize("state", [ReplicaState.STARTING, ReplicaState.DRAINING, ReplicaState.FAILED])
def test_nobody_ready_makes_serve_wait(house: House, state: ReplicaState) -> None:
    """No replica may take the request: nothing is chosen, so that Serve asks again; then one is ready."""
    candidate, router = house.replica("a", state), house.router()
    assert chosen(router, [candidate]) == []
    assert chosen(router, []) == []
    house.slots["a"].fields.state = ReplicaState.READY
    house.slots["a"].publish(time.monotonic())
    assert chosen(router, [candidate]) == ["a"]


def test_a_board_made_anew_is_followed(house: House) -> None:
    """A router whose board was replaced opens the new one."""
    candidate, router = house.replica("a"), house.router()
    assert chosen(router, [candidate]) == ["a"]
    house.path.unlink()
    assert chosen(router, [candidate]) == []
    house.board.close()
    house.board = Board.open(house.path)
    assert chosen(router, [house.replica("a")]) == ["a"]
