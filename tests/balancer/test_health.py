"""Who is in rotation, on a simulated clock: exact times, and every way out paired with the way back."""

from __future__ import annotations

from dataclasses import replace

import pytest

from balancer.health import ERRORS_IN_A_ROW, SLOW_START_S, Health
from balancer.knobs import Knobs
from balancer.readings import ReplicaReading, ReplicaState, Snapshot

IDLE = ReplicaReading(
    0, "replica-0", 0, ReplicaState.READY, 0.0, 0, 0, 0, 0, 0, 0, 0, 1000, 16, 64, 0.005, 0, 0, 0, 0, 0
)  # fmt: skip

# A multiple of what binary fractions hold exactly, so that times can be exact; longer than between two judgements.
STEP_S = 0.125


class Node:
    """Replicas whose readings a test changes, and one router's view of them. Time passes in steps of a judgement."""

    def __init__(self, replicas: int = 3) -> None:
        self.now_s = 1000.0
        self.health = Health(Knobs())
        self.replicas = [replace(IDLE, slot=k, replica_id=f"replica-{k}") for k in range(replicas)]
        self.silent: set[int] = set()
        self.ejected: list[str] = []

    def set(self, slot: int, **changes: object) -> None:
        self.replicas[slot] = replace(self.replicas[slot], **changes)  # type: ignore[arg-type]

    def in_rotation(self) -> set[int]:
        for slot in range(len(self.replicas)):
            if slot not in self.silent:
                self.set(slot, written_at_s=self.now_s)
        seen = self.health.look(Snapshot(self.now_s, tuple(self.replicas)))
        self.ejected += self.health.ejected()
        return {r.slot for r in seen.ready(2.0)}

    def wait(self, seconds: float) -> set[int]:
        end_s = self.now_s + seconds
        while self.now_s < end_s - 1e-9:
            self.now_s += min(end_s - self.now_s, STEP_S if end_s - self.now_s <= 1.0 or seconds < 15.0 else 0.5)
            found = self.in_rotation()
        return found

    def err(self, slot: int, times: int = 1) -> None:
        now: ReplicaReading = self.replicas[slot]
        self.set(slot, server_errors_in_a_row=now.server_errors_in_a_row + times)


@pytest.fixture
def node() -> Node:
    node = Node()
    assert node.in_rotation() == {0, 1, 2}
    return node


def test_five_errors_in_a_row_take_a_replica_out_and_four_do_not(node: Node) -> None:
    """At the fifth, by name; a success in between begins a new row."""
    node.err(1, 4)
    assert node.wait(1.0) == {0, 1, 2}
    node.set(1, server_errors_in_a_row=0)
    node.wait(STEP_S)
    node.err(1, 4)
    assert node.wait(1.0) == {0, 1, 2}
    node.err(1)
    assert node.wait(STEP_S) == {0, 2}
    assert node.ejected == ["errors"]


def test_it_returns_after_thirty_seconds_times_n(node: Node) -> None:
    """30, 60, 90 ... at most 300 s, exact to a judgement; each return asks for five new errors."""
    for n in range(1, 13):
        node.err(1, ERRORS_IN_A_ROW)
        assert 1 not in node.wait(STEP_S)
        out_s = min(300.0, 30.0 * n)
        assert 1 not in node.wait(out_s - STEP_S)
        assert 1 in node.wait(STEP_S)
        node.err(1, 4)
        assert 1 in node.wait(STEP_S)
        node.set(1, server_errors_in_a_row=0)
        node.wait(1.0)
    assert node.ejected == ["errors"] * 12


def test_a_good_while_is_a_new_beginning(node: Node) -> None:
    """Five minutes in rotation, and the next ejection lasts 30 s again."""
    for _ in range(2):
        node.err(1, ERRORS_IN_A_ROW)
        node.wait(STEP_S)
        node.set(1, server_errors_in_a_row=0)
        assert 1 in node.wait(60.125)
    assert node.wait(301.0) == {0, 1, 2}
    node.err(1, ERRORS_IN_A_ROW)
    assert 1 not in node.wait(STEP_S)
    assert 1 not in node.wait(30.0 - STEP_S)
    assert 1 in node.wait(2 * STEP_S)


def test_one_always_stays(node: Node) -> None:
    """When all err, the last is kept; when the only good one dies, the one that would be back first takes over."""
    for slot in range(3):
        node.err(slot, ERRORS_IN_A_ROW)
    assert node.wait(STEP_S) == {2}
    node.set(2, state=ReplicaState.FAILED)
    assert node.wait(STEP_S) == {0}


def test_it_returns_gently(node: Node) -> None:
    """At first one request, then a growing share of what the others have, and all of it after the slow start."""
    for slot in (0, 2):
        node.set(slot, in_flight_requests=20)
    node.err(1, ERRORS_IN_A_ROW)
    assert node.wait(STEP_S) == {0, 2}
    assert 1 in node.wait(30.0)
    node.set(1, in_flight_requests=1)
    assert 1 not in node.in_rotation()
    assert 1 in node.wait(SLOW_START_S / 2)
    node.set(1, in_flight_requests=11)
    assert 1 not in node.in_rotation()
    node.set(1, in_flight_requests=100)
    assert 1 in node.wait(SLOW_START_S)


def test_an_engine_that_makes_no_step_while_requests_wait_is_out_until_it_steps(node: Node) -> None:
    """Out within 10 s, back at its next step; an idle engine makes none either and stays."""
    node.set(0, awaiting_requests=0)
    node.set(1, awaiting_requests=2, engine_steps_total=7)
    assert node.wait(7.875) == {0, 1, 2}
    assert node.wait(0.25) == {0, 2}
    assert node.wait(60.0) == {0, 2}
    node.set(1, engine_steps_total=8)
    assert 1 in node.wait(STEP_S)
    assert node.ejected == ["stalled"]


def test_a_slow_engine_is_not_a_stopped_one(node: Node) -> None:
    """A step every few seconds is a sign of life."""
    for step in range(20):
        node.set(1, awaiting_requests=5, engine_steps_total=step)
        assert 1 in node.wait(6.0)
    assert node.ejected == []


def test_a_silent_process_and_a_failed_one_are_counted_once_and_come_back(node: Node) -> None:
    """Stale heartbeats and a dead engine are left out by their reading; here they are counted, once."""
    node.silent.add(1)
    assert node.wait(2.125) == {0, 2}
    assert node.wait(10.0) == {0, 2}
    node.silent.clear()
    assert 1 in node.wait(STEP_S)
    node.set(2, state=ReplicaState.FAILED)
    assert node.wait(1.0) == {0, 1}
    assert node.ejected == ["stale", "failed"]


def test_a_new_replica_in_an_old_slot_has_no_past(node: Node) -> None:
    """Another id is another life."""
    node.err(1, ERRORS_IN_A_ROW)
    assert node.wait(STEP_S) == {0, 2}
    node.set(1, replica_id="another", server_errors_in_a_row=0)
    assert node.wait(STEP_S) == {0, 1, 2}


def test_a_torn_slot_keeps_its_record(node: Node) -> None:
    """A reading that could not be made is no return."""
    node.err(1, ERRORS_IN_A_ROW)
    node.wait(STEP_S)
    whole = tuple(r for r in node.replicas if r.slot != 1)
    node.health.look(Snapshot(node.now_s + STEP_S, whole, (), (1,)))
    node.now_s += 2 * STEP_S
    assert node.in_rotation() == {0, 2}


def test_a_healthy_node_costs_nothing(node: Node) -> None:
    """The snapshot is passed on as it is."""
    snapshot = Snapshot(node.now_s, tuple(node.replicas))
    assert node.health.look(snapshot) is snapshot
