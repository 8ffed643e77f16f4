"""A router's ledger: what its row says is under way is under way, and nothing stays there for ever."""

from __future__ import annotations

from collections import deque
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from balancer.board import ROUTER_ROWS
from balancer.on_the_way import LOST_AFTER_S, OnTheWay
from balancer.readings import ReplicaReading, ReplicaState, Snapshot

ROW = 3
IDLE = ReplicaReading(
    0, "replica-0", 0, ReplicaState.READY, 0.0, 0, 0, 0, 0, 0, 0, 0, 1000, 16, 64, 0.005, 0, 0, 0, 0, 0,
    received_by_router=(0,) * ROUTER_ROWS,
)  # fmt: skip


class Row:
    """A row of the board: its sums now, and as last published."""

    index = ROW

    def __init__(self) -> None:
        self.sums: dict[int, tuple[int, int]] = {}
        self.published: dict[int, tuple[int, int]] = {}

    def add(self, slot: int, requests: int, tokens: int) -> None:
        now = self.sums.get(slot, (0, 0))
        self.sums[slot] = (now[0] + requests, now[1] + tokens)
        assert min(self.sums[slot]) >= 0

    def publish(self, now_s: float) -> None:
        self.published = dict(self.sums)


class World:
    """A router, its row, and two replicas that count what reaches them."""

    def __init__(self) -> None:
        self.row = Row()
        self.ledger = OnTheWay(self.row)
        self.now_s = 50.0
        self.received = [10, 20]
        self.names = ["a", "b"]

    def replica(self, slot: int) -> ReplicaReading:
        counts = tuple(self.received[slot] if row == ROW else 99 for row in range(ROUTER_ROWS))
        return replace(IDLE, slot=slot, replica_id=self.names[slot], received_by_router=counts)

    def assign(self, slot: int, tokens: int = 1, sequences: int = 1) -> None:
        self.ledger.assigned(self.replica(slot), tokens, self.now_s, sequences)

    def arrive(self, slot: int, count: int = 1) -> None:
        self.received[slot] += count

    def look(self, *, without: tuple[int, ...] = (), torn: tuple[int, ...] = ()) -> bool:
        replicas = tuple(self.replica(slot) for slot in range(2) if slot not in (*without, *torn))
        return self.ledger.reconcile(Snapshot(self.now_s, replicas, torn_slots=torn))

    def row_says(self, slot: int = 0) -> tuple[int, int]:
        return self.row.published.get(slot, (0, 0))


@pytest.fixture
def world() -> World:
    return World()


def test_an_assignment_is_published_at_once(world: World) -> None:
    """Other routers see an assignment before the replica has it."""
    world.assign(0, tokens=30)
    world.assign(0, tokens=12)
    assert world.row_says(0) == (2, 42)
    assert world.row_says(1) == (0, 0)


def test_what_a_replica_received_is_struck(world: World) -> None:
    """The replica's counter of this router's requests takes them off the row, and reconcile says that it did."""
    world.assign(0, tokens=30)
    assert not world.look()
    world.arrive(0)
    assert world.look()
    assert world.row_says() == (0, 0)
    assert not world.look()


def test_what_other_routers_sent_is_not_struck(world: World) -> None:
    """Counters of other rows do not matter: here they stand at 99 from the start."""
    world.assign(0, tokens=30)
    world.look()
    assert world.row_says() == (1, 30)


def test_a_request_that_never_arrives_expires(world: World) -> None:
    """A lost request looks like work for LOST_AFTER_S and no longer."""
    world.assign(0, tokens=30)
    world.now_s += LOST_AFTER_S
    world.look()
    assert world.row_says() == (1, 30)
    world.now_s += 0.01
    world.look()
    assert (world.row_says(), world.ledger.lost_total) == ((0, 0), 1)


def test_a_lost_request_expires_under_steady_traffic(world: World) -> None:
    """Requests that keep arriving do not keep a lost one's place on the row."""
    world.assign(0, tokens=1000)
    for _ in range(60):
        world.now_s += 0.1
        world.assign(0, tokens=1)
        world.arrive(0)
        world.look()
    assert (world.row_says(), world.ledger.lost_total) == ((0, 0), 1)


def test_a_late_arrival_does_not_count_twice(world: World) -> None:
    """One that arrives after it was given up takes nothing below zero, and what is assigned next is counted in full."""
    world.assign(0, tokens=30)
    world.now_s += LOST_AFTER_S + 1
    world.look()
    world.arrive(0)
    world.look()
    assert world.row_says() == (0, 0)
    world.assign(0, tokens=7)
    world.look()
    assert world.row_says() == (1, 7)
    world.arrive(0)
    world.look()
    assert world.row_says() == (0, 0)


@pytest.mark.parametrize("how", ["left", "another in its slot"])
def test_a_replica_that_is_gone_takes_its_requests_along(world: World, how: str) -> None:
    """What was under way to a replica that left, or whose slot another has, is under way no more."""
    world.assign(0, tokens=30)
    world.assign(1, tokens=5)
    if how != "left":
        world.names[0] = "heir"
        world.received[0] = 0
    world.look(without=(0,) if how == "left" else ())
    assert (world.row_says(0), world.row_says(1)) == ((0, 0), (1, 5))
    world.look()
    world.assign(0, tokens=9)
    assert world.row_says(0) == (1, 9)


def test_a_torn_slot_changes_nothing(world: World) -> None:
    """A slot that cannot be read right now is not taken for a replica that left."""
    world.assign(0, tokens=30)
    assert not world.look(torn=(0,))
    assert world.row_says() == (1, 30)
    world.arrive(0)
    world.look()
    assert world.row_says() == (0, 0)


def test_another_counter_may_tell_what_arrived() -> None:
    """Behind Serve's own proxy, where no ticket tells routers apart, all that the replica received counts."""
    row = Row()
    ledger = OnTheWay(row, received=lambda replica: replica.received_total)
    ledger.assigned(IDLE, 0, 0.0)
    ledger.reconcile(Snapshot(0.1, (replace(IDLE, received_total=1),)))
    assert row.published == {0: (0, 0)}


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("assign"), st.integers(0, 1), st.integers(0, 500)),
        st.tuples(st.just("arrive"), st.integers(0, 1), st.integers(1, 4)),
        st.tuples(st.just("look"), st.just(0), st.just(0)),
    ),
    max_size=60,
)


@given(STEPS)
def test_the_row_says_what_is_really_under_way(steps: list[tuple[str, int, int]]) -> None:
    """In any order of assignments, arrivals and looks the row counts exactly what is under way."""
    world = World()
    under_way = [0, 0]
    for what, slot, number in steps:
        world.now_s += 0.01
        if what == "assign":
            world.assign(slot, number)
            under_way[slot] += 1
        elif what == "arrive":
            arrived = min(number, under_way[slot])
            world.arrive(slot, arrived)
            under_way[slot] -= arrived
        else:
            world.look()
            assert [world.row_says(slot)[0] for slot in (0, 1)] == under_way
    world.look()
    assert [world.row_says(slot)[0] for slot in (0, 1)] == under_way
    for slot in (0, 1):
        world.arrive(slot, under_way[slot])
    world.look()
    assert [world.row_says(slot) for slot in (0, 1)] == [(0, 0), (0, 0)]


FATES = st.lists(
    st.tuples(st.sampled_from(["prompt", "late", "never"]), st.integers(0, 500), st.floats(0.0, 3.0)), max_size=40
)


@settings(max_examples=200)
@given(FATES)
def test_whatever_becomes_of_requests_the_row_comes_back_to_zero(fates: list[tuple[str, int, float]]) -> None:
    """With lost and late requests among them the row never goes below zero, never says more than was assigned within
    LOST_AFTER_S, and is empty once nothing has been assigned for that long."""
    world, late, recent = World(), deque[float](), deque[float]()
    for fate, tokens, pause_s in fates:
        world.assign(0, tokens)
        recent.append(world.now_s)
        if fate == "prompt":
            world.arrive(0)
        elif fate == "late":
            late.append(world.now_s + LOST_AFTER_S + 2.0)
        world.now_s += pause_s
        while late and late[0] <= world.now_s:
            late.popleft()
            world.arrive(0)
        world.look()
        while recent and recent[0] < world.now_s - LOST_AFTER_S:
            recent.popleft()
        assert 0 <= world.row_says()[0] <= len(recent)
    world.arrive(0, len(late))
    world.now_s += LOST_AFTER_S + 0.01
    world.look()
    assert world.row_says() == (0, 0)


def test_a_request_of_many_sequences_weighs_as_many(world: World) -> None:
    """A part of a batch takes a place for each of its sequences, and gives all of them back when it arrives."""
    world.assign(0, tokens=50, sequences=20)
    world.assign(0, tokens=5)
    assert world.row_says() == (21, 55)
    world.arrive(0)
    world.look()
    world.arrive(0)
    world.look()
    assert world.row_says() == (0, 0)
