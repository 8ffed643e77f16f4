"""Who may start where, and when a crash loop ends: on a clock that the test moves."""

from __future__ import annotations

from balancer.board import Owner
from deployments.places import Leave, Places, RestartPolicy

POLICY = RestartPolicy(deaths=3, within_s=120, first_wait_s=1, longest_wait_s=30)


class Node:
    """Places, and the processes that live."""

    def __init__(self, count: int, policy: RestartPolicy = POLICY) -> None:
        self.living: set[Owner] = set()
        self.places = Places(count, policy, self.living.__contains__)

    def ask(self, name: str, now_s: float) -> Leave:
        process = Owner(hash(name), 1)
        self.living.add(process)
        return self.places.ask(name, process, now_s)

    def dies(self, name: str) -> None:
        self.living.discard(Owner(hash(name), 1))


def test_each_replica_gets_a_place_of_its_own_and_keeps_it() -> None:
    """Asking again is always safe, and a replica too many is told to ask later."""
    node = Node(2)
    assert [node.ask("a", 0).place, node.ask("b", 0).place, node.ask("a", 1).place] == [0, 1, 0]
    surplus = node.ask("c", 1)
    assert (surplus.place, surplus.refusal) == (None, "")
    assert surplus.ask_again_s > 0
    assert node.places.starting() == [0, 1]


def test_a_successor_takes_the_place_of_the_dead() -> None:
    """Whichever replica died, its place (and with it its GPU and cores) goes to the next that asks."""
    node = Node(3)
    for name in "abc":
        node.ask(name, 0)
        node.places.ready(name, 1)
    node.dies("b")
    assert node.ask("d", 500).place == 1
    assert set(node.places.processes()) == {0, 1, 2}


def test_a_replica_that_gave_up_its_engine_leaves_its_place_before_its_process_ends() -> None:
    """Serve takes seconds to end the process of a replica whose engine is dead."""
    node = Node(1)
    node.ask("a", 0)
    node.places.ready("a", 10)
    node.places.ended("a", planned=False, now_s=500)
    assert node.ask("b", 501).place == 0


def test_after_a_long_life_a_successor_starts_at_once() -> None:
    """Back-off is for those that keep dying."""
    node = Node(1)
    node.ask("a", 0)
    node.places.ready("a", 10)
    node.dies("a")
    assert node.ask("b", 130) == Leave(0)


def test_early_deaths_wait_longer_and_longer_and_then_end() -> None:
    """The second life waits 1 s, the third 2 s, and there is no fourth; the sentence says what to do."""
    node = Node(1)
    node.ask("a", 0)
    node.dies("a")
    assert node.ask("b", 10) == Leave(ask_again_s=1)
    assert node.ask("b", 11).place == 0
    node.places.ready("b", 20)
    node.dies("b")
    assert node.ask("c", 139.9) == Leave(ask_again_s=2)
    node.dies("c")
    refused = node.ask("d", 150)
    assert refused.place is None
    assert refused.refusal.startswith("its last 3 starts (place 1 of 1) each ended within 120 s")
    assert node.ask("d", 10_000) == refused
    assert node.places.all_given_up()


def test_one_long_life_ends_a_row_of_deaths() -> None:
    """Only deaths in a row make a loop."""
    node = Node(1)
    for number in range(10):
        name = f"life {number}"
        assert node.ask(name, 1000 * number).refusal == ""
        node.places.ready(name, 1000 * number + 10)
        node.places.ended(name, planned=False, now_s=1000 * number + (20 if number % 3 else 500))


def test_a_planned_stop_is_no_death() -> None:
    """However often and soon a replica is restarted on purpose."""
    node = Node(1)
    for number in range(10):
        assert node.ask(f"{number}", number).place == 0
        node.places.ended(f"{number}", planned=True, now_s=number + 0.5)


def test_others_are_not_given_up_with_one_that_loops() -> None:
    """A crash loop costs its own place only."""
    node = Node(2)
    node.ask("steady", 0)
    node.places.ready("steady", 1)
    for number in range(4):
        node.ask(f"{number}", 100 * number)
        node.dies(f"{number}")
    assert node.ask("last", 1000).refusal
    assert node.places.starting() == []
    assert not node.places.all_given_up()
    assert node.ask("steady", 1000).place == 0


def test_the_wait_has_an_upper_end() -> None:
    """Doubling stops at the longest wait."""
    assert [RestartPolicy(deaths=99).wait_s(n) for n in (0, 1, 2, 3, 6, 60)] == [0, 1, 2, 4, 30, 30]
