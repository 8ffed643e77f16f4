"""The dispatcher: every request ends exactly once, nobody waits for ever, no KV cache is promised twice."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from balancer.admission import Dispatcher, DrainRate
from balancer.knobs import Knobs
from balancer.readings import Decision, ReplicaReading, ReplicaState, RequestCost, Snapshot, Verdict

NOW_S = 100.0
KV_TOKENS = 16_000
IDLE = ReplicaReading(
    0, "replica-0", 0, ReplicaState.READY, NOW_S, 0, 0, 0, 0, 0, 0, 0, KV_TOKENS // 16, 16, 8, 0.005, 0, 0, 0, 0, 0
)  # fmt: skip
SMALL, LARGE = RequestCost(100, 100), RequestCost(8000, 2000)


def replica(slot: int, requests: int = 0, tokens: int = 0, **other: Any) -> ReplicaReading:
    fields = {"in_flight_requests": requests, "in_flight_tokens": tokens, **other}
    return replace(IDLE, slot=slot, replica_id=f"replica-{slot}", **fields)


def at(now_s: float, *replicas: ReplicaReading, torn: tuple[int, ...] = ()) -> Snapshot:
    return Snapshot(now_s, tuple(replace(r, written_at_s=now_s) for r in replicas), torn_slots=torn)


def dispatcher(**knobs: Any) -> Dispatcher:
    return Dispatcher(Knobs(**{"active_set": 1, **knobs}), random.Random(1))


FULL, HALF_FULL = replica(0, 8, 12_000), replica(0, 4, 12_000)


def test_a_request_that_fits_is_assigned_at_once() -> None:
    """With room and nobody waiting, submit answers with a slot and the inputs that led to it."""
    d = dispatcher()
    decision = d.submit("a", SMALL, at(NOW_S, replica(0)))
    assert (decision.verdict, decision.slot, d.waiting) == (Verdict.ASSIGN, 0, 0)
    assert decision.inputs["active"] == 1.0


def test_a_request_without_room_waits_until_there_is_some() -> None:
    """A queued request is released, once, by the snapshot that shows room."""
    d = dispatcher()
    assert d.submit("a", SMALL, at(NOW_S, FULL)).verdict is Verdict.WAIT
    assert d.release(at(NOW_S + 0.1, FULL)) == []
    released = d.release(at(NOW_S + 0.2, HALF_FULL))
    assert [(name, decision.slot) for name, decision in released] == [("a", 0)]
    assert d.release(at(NOW_S + 0.3, replica(0))) == []


@pytest.mark.parametrize("limit", ["kv_blocks_total", "max_running_requests"])
def test_a_replica_seen_before_its_engine_started_is_held_to_the_limits_it_names_later(limit: str) -> None:
    """A router often starts first, and sees no KV cache and no batch limit yet."""
    d = dispatcher()
    unborn = replica(0, kv_blocks_total=0, max_running_requests=0)
    assert d.submit("early", SMALL, at(NOW_S, replace(unborn, state=ReplicaState.STARTING))).status == 503
    ready = replica(0, requests=8, tokens=15_500, kv_blocks_total=1 << 20, max_running_requests=1 << 20)
    later = at(NOW_S + 1.0, replace(ready, **{limit: getattr(IDLE, limit)}))
    assert d.submit("late", SMALL, later).verdict is Verdict.WAIT


def test_higher_priority_first_then_first_come() -> None:
    """Release follows priority, and arrival among equals."""
    d = dispatcher()
    for name, priority in (("a", 0), ("b", 5), ("c", 0), ("d", 5)):
        d.submit(name, replace(SMALL, priority=priority), at(NOW_S, FULL))
    assert [name for name, _ in d.release(at(NOW_S + 0.1, replica(0)))] == ["b", "d", "a", "c"]


def test_one_release_shares_one_room() -> None:
    """Several assignments on one snapshot never exceed the room it shows."""
    d = dispatcher()
    for i in range(10):
        d.submit(f"{i}", RequestCost(3000, 1000), at(NOW_S, FULL))
    assert len(d.release(at(NOW_S + 0.1, replica(0)))) == 3
    assert d.waiting == 7


def test_a_small_request_overtakes_one_that_cannot_fit_but_not_for_ever() -> None:
    """Small requests pass a large one for its patience, then the replica drains until the large one fits."""
    d = dispatcher(overtake_patience_s=1.0)
    assert d.submit("large", LARGE, at(NOW_S, HALF_FULL)).verdict is Verdict.WAIT
    assert d.submit("small-1", SMALL, at(NOW_S + 0.5, HALF_FULL)).verdict is Verdict.ASSIGN
    assert d.submit("small-2", SMALL, at(NOW_S + 1.5, HALF_FULL)).verdict is Verdict.WAIT
    assert d.release(at(NOW_S + 2.0, HALF_FULL)) == []
    released = d.release(at(NOW_S + 3.0, replica(0, 1, 4000)))
    assert [name for name, _ in released] == ["large", "small-2"]


def test_only_so_many_overtake() -> None:
    """After `overtake_limit` passings nobody passes any more, however soon."""
    d = dispatcher(overtake_limit=3, overtake_patience_s=1e9)
    d.submit("large", LARGE, at(NOW_S, HALF_FULL))
    verdicts = [d.submit(f"{i}", SMALL, at(NOW_S + 0.01 * i, HALF_FULL)).verdict for i in range(5)]
    assert verdicts == [Verdict.ASSIGN] * 3 + [Verdict.WAIT] * 2


def test_waiting_long_beats_priority() -> None:
    """Half a deadline of waiting puts a request before newer ones of higher priority."""
    d = dispatcher(queue_deadline_s=10.0)
    d.submit("old", SMALL, at(NOW_S, FULL))
    d.submit("urgent", replace(SMALL, priority=9), at(NOW_S + 5.5, FULL))
    assert [name for name, _ in d.release(at(NOW_S + 6.0, replica(0)))] == ["old", "urgent"]


def test_the_queue_is_bounded() -> None:
    """Beyond the limit a request is turned away with 429 and a time to come back."""
    d = dispatcher(queue_limit=2)
    answers = [d.submit(f"{i}", SMALL, at(NOW_S, FULL)) for i in range(4)]
    assert [a.verdict for a in answers] == [Verdict.WAIT, Verdict.WAIT, Verdict.REJECT, Verdict.REJECT]
    assert answers[3].status == 429
    assert answers[3].retry_after_s >= 1.0


def test_a_deadline_ends_the_wait() -> None:
    """At its deadline a request is turned away, exactly once, and those behind it are not."""
    d = dispatcher(queue_deadline_s=5.0)
    d.submit("a", SMALL, at(NOW_S, FULL))
    d.submit("b", SMALL, at(NOW_S + 3.0, FULL))
    assert d.release(at(NOW_S + 4.9, FULL)) == []
    assert [(name, x.status) for name, x in d.release(at(NOW_S + 5.0, FULL))] == [("a", 429)]
    nobody = at(NOW_S + 8.5, replica(0, state=ReplicaState.FAILED))
    assert [(name, x.status) for name, x in d.release(nobody)] == [("b", 503)]


def test_retry_after_follows_the_drain_rate() -> None:
    """Ten requests finished a second and 39 ahead: come back in four seconds."""
    rate = DrainRate()
    for second in range(200):
        rate.follow(at(NOW_S + second, replica(0, finished_total=10 * second)))
    assert rate.per_s == pytest.approx(10.0, rel=1e-3)
    assert rate.retry_after_s(39) == 4.0
    assert rate.retry_after_s(10_000) == 60.0


def test_nobody_ready_is_503_at_once() -> None:
    """With no replica at all, or none fresh, the answer is 503."""
    d = dispatcher()
    assert d.submit("a", SMALL, at(NOW_S)).status == 503
    assert d.submit("b", SMALL, at(NOW_S, replica(0, state=ReplicaState.STARTING))).status == 503
    assert d.submit("c", SMALL, Snapshot(NOW_S + 10.0, (replica(0),))).status == 503


def test_a_torn_slot_is_waited_for_not_taken_for_idle() -> None:
    """When the only slot is torn, a request waits for the next whole reading."""
    d = dispatcher()
    assert d.submit("a", SMALL, at(NOW_S, torn=(0,))).verdict is Verdict.WAIT
    assert [name for name, _ in d.release(at(NOW_S + 0.1, replica(0)))] == ["a"]


def test_a_client_that_hangs_up_is_forgotten() -> None:
    """A cancelled request is never released; cancelling twice, or a stranger, is no error."""
    d = dispatcher()
    d.submit("a", SMALL, at(NOW_S, FULL))
    for name in ("a", "a", "stranger"):
        d.cancel(name)
    assert d.waiting == 0
    assert d.release(at(NOW_S + 0.1, replica(0))) == []


def test_an_id_waits_only_once() -> None:
    """Submitting an id that already waits is an error of the caller, said clearly."""
    d = dispatcher()
    d.submit("a", SMALL, at(NOW_S, FULL))
    with pytest.raises(ValueError, match="already waiting"):
        d.submit("a", SMALL, at(NOW_S + 0.1, FULL))


def test_knobs_change_without_losing_the_queue() -> None:
    """A new deadline holds for those who wait; a policy without a queue assigns them at once."""
    d = dispatcher(queue_deadline_s=100.0)
    for name in ("a", "b"):
        d.submit(name, SMALL, at(NOW_S, FULL))
    d.reconfigure(Knobs(active_set=1, queue_deadline_s=100.0, queue_limit=2))
    assert d.waiting == 2
    d.reconfigure(Knobs(policy="round_robin"))
    released = d.release(at(NOW_S + 1.0, FULL, replica(1)))
    assert [(name, x.slot) for name, x in released] == [("a", 0), ("b", 1)]
    assert d.active == (0, 1)


def test_the_simple_policies_never_queue() -> None:
    """Round robin assigns to a full replica, as the field does."""
    d = dispatcher(policy="round_robin")
    assert d.submit("a", LARGE, at(NOW_S, FULL)).verdict is Verdict.ASSIGN


def test_recent_decisions_are_kept_with_their_inputs() -> None:
    """The ring holds time, id and decision of submits and releases, newest last."""
    d = dispatcher()
    d.submit("a", SMALL, at(NOW_S, FULL))
    d.release(at(NOW_S + 1.0, replica(0)))
    assert [(r.at_s, r.request_id, r.decision.verdict) for r in d.recent] == [
        (NOW_S, "a", Verdict.WAIT),
        (NOW_S + 1.0, "a", Verdict.ASSIGN),
    ]


# ---------------------------------------------------------------- any sequence of events


@dataclass
class World:
    """Replicas that serve what they are given, and what happened to each request."""

    dispatchers: list[Dispatcher]
    kv_tokens: int
    slots: int
    now_s: float = NOW_S

    def __post_init__(self) -> None:
        self.held: dict[int, dict[str, RequestCost]] = {slot: {} for slot in range(self.slots)}
        self.dead: set[int] = set()
        self.outcomes: dict[str, list[str]] = {}

    def snapshot(self) -> Snapshot:
        self.now_s += 0.01
        return Snapshot(self.now_s, tuple(self._reading(slot) for slot in self.held))

    def _reading(self, slot: int) -> ReplicaReading:
        held = self.held[slot].values()
        state = ReplicaState.FAILED if slot in self.dead else ReplicaState.READY
        tokens = sum(cost.tokens for cost in held)
        return replica(
            slot, len(held), tokens, state=state, written_at_s=self.now_s, kv_blocks_total=self.kv_tokens // 16
        )

    def settle(self, request_id: str, cost: RequestCost, decision: Decision) -> None:
        if decision.verdict is Verdict.WAIT:
            return
        self.outcomes[request_id].append(decision.verdict.value)
        if decision.verdict is Verdict.ASSIGN:
            assert decision.slot not in self.dead
            self.held[decision.slot][request_id] = cost
            self._check_kv(decision.slot)

    def _check_kv(self, slot: int) -> None:
        held = self.held[slot].values()
        assert sum(c.tokens for c in held) <= self.kv_tokens or len(held) == 1
        assert len(held) <= IDLE.max_running_requests


EVENTS = st.lists(
    st.one_of(
        st.tuples(st.just("submit"), st.integers(1, 9000), st.integers(0, 2)),
        st.tuples(st.just("finish"), st.integers(0, 3), st.just(0)),
        st.tuples(st.just("release"), st.integers(0, 2000), st.just(0)),
        st.tuples(st.just("cancel"), st.integers(0, 60), st.just(0)),
        st.tuples(st.just("kill"), st.integers(0, 3), st.just(0)),
        st.tuples(st.just("revive"), st.integers(0, 3), st.just(0)),
    ),
    max_size=60,
)


@settings(max_examples=150, deadline=None)
@given(EVENTS, st.integers(1, 4), st.integers(1, 2), st.sampled_from([None, 1, 3]))
def test_every_request_ends_exactly_once_and_no_kv_cache_is_promised_twice(
    events: list[tuple[str, int, int]], slots: int, routers: int, active_set: int | None
) -> None:
    """Under any mix of arrivals, ends, hang-ups, deaths and returns, over one or two routers that see one another."""
    knobs = Knobs(active_set=active_set, queue_limit=6, queue_deadline_s=8.0, overtake_limit=3)
    world = World([Dispatcher(knobs, random.Random(i)) for i in range(routers)], KV_TOKENS, slots)
    costs: dict[str, RequestCost] = {}
    for n, (kind, value, extra) in enumerate(events):
        _play(world, costs, kind, value, extra, n)
    _drain(world, costs, knobs)
    assert all(len(ends) == 1 for ends in world.outcomes.values()), world.outcomes
    assert all(d.waiting == 0 for d in world.dispatchers)


def _play(world: World, costs: dict[str, RequestCost], kind: str, value: int, extra: int, n: int) -> None:
    router = world.dispatchers[n % len(world.dispatchers)]
    slot = value % world.slots
    if kind == "submit":
        name = f"r{len(costs)}"
        costs[name] = RequestCost(value, 50, priority=extra)
        world.outcomes[name] = []
        world.settle(name, costs[name], router.submit(name, costs[name], world.snapshot()))
    elif kind == "release":
        world.now_s += value / 1000
        _release(world, costs, router)
    elif kind == "cancel":
        _cancel(world, f"r{value}")
    elif kind == "finish" and world.held[slot]:
        world.held[slot].pop(next(iter(world.held[slot])))
    elif kind == "kill":
        world.dead.add(slot)
    elif kind == "revive":
        world.dead.discard(slot)


def _release(world: World, costs: dict[str, RequestCost], router: Dispatcher) -> None:
    for name, decision in router.release(world.snapshot()):
        world.settle(name, costs[name], decision)


def _cancel(world: World, name: str) -> None:
    for router in world.dispatchers:
        before = router.waiting
        router.cancel(name)
        if router.waiting < before:
            world.outcomes[name].append("cancelled")


def _drain(world: World, costs: dict[str, RequestCost], knobs: Knobs) -> None:
    """Deadlines bound every wait, so a while later nobody is left."""
    for _ in range(3):
        world.now_s += knobs.queue_deadline_s
        for router in world.dispatchers:
            _release(world, costs, router)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 4000), min_size=1, max_size=40), st.integers(9000, 15_000))
def test_a_large_request_never_starves_behind_small_ones(small: list[int], large: int) -> None:
    """Under a stream of small requests that always fit, the large one is assigned before its deadline."""
    d = dispatcher(queue_deadline_s=1e6, overtake_patience_s=1.0)
    world = World([d], KV_TOKENS, 1)
    costs = {"large": RequestCost(large, 50)}
    world.outcomes["large"] = []
    world.held[0] = {"first": RequestCost(8000, 50)}
    world.settle("large", costs["large"], d.submit("large", costs["large"], world.snapshot()))
    for n in range(400):
        name = f"s{n}"
        costs[name] = RequestCost(small[n % len(small)], 50)
        world.outcomes[name] = []
        world.settle(name, costs[name], d.submit(name, costs[name], world.snapshot()))
        if n % 2 and world.held[0]:
            world.held[0].pop(next(iter(world.held[0])))
        _release(world, costs, d)
        if world.outcomes["large"]:
            break
    assert world.outcomes["large"] == ["assign"]
