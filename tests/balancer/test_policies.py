"""Who takes a request: the simple policies, and the choices of `gpu_aware`."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from balancer.gpu_aware import GpuAware
from balancer.knobs import Knobs
from balancer.policies import POLICIES, decide, make_policy
from balancer.readings import GpuReading, GpuSource, ReplicaReading, ReplicaState, RequestCost, Snapshot, Verdict

NOW_S = 100.0
IDLE = ReplicaReading(
    0, "replica-0", 0, ReplicaState.READY, NOW_S, 0, 0, 0, 0, 0, 0, 0, 1000, 16, 64, 0.005, 0, 0, 0, 0, 0
)  # fmt: skip
COST = RequestCost(100, 50)


def replica(slot: int, requests: int = 0, tokens: int = 0, **other: Any) -> ReplicaReading:
    fields = {"in_flight_requests": requests, "in_flight_tokens": tokens, **other}
    return replace(IDLE, slot=slot, replica_id=f"replica-{slot}", **fields)


def snapshot(*replicas: ReplicaReading, gpus: tuple[GpuReading, ...] = (), now_s: float = NOW_S) -> Snapshot:
    return Snapshot(now_s, replicas, gpus)


def gpu(free_bytes: int, reserve_bytes: int = 1000, taken_at_s: float = NOW_S) -> GpuReading:
    return GpuReading(
        0, GpuSource.GPM, 0.5, None, 0.1, 10_000 - free_bytes, 10_000, reserve_bytes, None, None, None, taken_at_s
    )


def aware(seed: int = 1, **knobs: Any) -> GpuAware:
    return GpuAware(Knobs(**knobs), random.Random(seed))


def placed(policy: GpuAware, cost: RequestCost, shot: Snapshot) -> int | None:
    policy.refresh(shot)
    decision = policy.place(cost)
    return None if decision is None else decision.slot


def test_round_robin_takes_turns() -> None:
    """Round robin gives each replica its turn, whatever they are doing."""
    policy, shot = make_policy(Knobs(policy="round_robin")), snapshot(replica(0, 60), replica(3), replica(5))
    slots = [decide(policy, Knobs(), COST, shot).slot for _ in range(6)]
    assert slots == [0, 3, 5, 0, 3, 5]


def test_least_queue_counts_what_is_on_its_way() -> None:
    """Least queue prefers the replica with fewer requests, those on their way included."""
    shot = snapshot(replica(0, 2, on_the_way_requests=3), replica(1, 4))
    assert decide(make_policy(Knobs(policy="least_queue")), Knobs(), COST, shot).slot == 1


def test_answers_on_their_way_out_are_no_load() -> None:
    """A replica whose engine has finished a burst gets the clients' next requests, though it has yet to answer some."""
    shot = snapshot(replica(0, 10, 4000, ending_requests=8), replica(1, 5, 2000))
    assert decide(make_policy(Knobs(policy="least_queue")), Knobs(), COST, shot).slot == 0
    assert placed(aware(active_set=2), COST, shot) == 0


def test_answers_on_their_way_out_take_no_place_in_the_batch() -> None:
    """The engine can begin with as many new requests as it has finished."""
    assert placed(aware(active_set=1), COST, snapshot(replica(0, 64, 100, ending_requests=1))) == 0
    assert placed(aware(active_set=1), COST, snapshot(replica(0, 64, 100))) is None


def test_power_of_two_never_takes_the_busiest_of_three() -> None:
    """Of two drawn replicas the less loaded wins, so the busiest of three never does."""
    policy, shot = (
        make_policy(Knobs(policy="power_of_two", seed=3)),
        snapshot(replica(0, 9), replica(1, 1), replica(2, 5)),
    )
    taken = Counter(decide(policy, Knobs(), COST, shot).slot for _ in range(200))
    assert taken[0] == 0
    assert taken[1] > taken[2] > 0


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_no_policy_assigns_to_nobody(name: str) -> None:
    """With no replica ready, every policy answers 503 with a time to come back."""
    shot = snapshot(replica(0, state=ReplicaState.DRAINING), replica(1, written_at_s=NOW_S - 10.0))
    decision = decide(make_policy(Knobs(policy=name)), Knobs(), COST, shot)
    assert (decision.verdict, decision.status) == (Verdict.REJECT, 503)
    assert decision.retry_after_s > 0.0


@pytest.mark.parametrize("name", sorted(POLICIES))
@given(data=st.data())
def test_every_policy_names_a_ready_and_fresh_replica(name: str, data: st.DataObject) -> None:
    """Whatever the states and ages, an assignment names a replica that is READY and was heard of."""
    states = st.sampled_from(ReplicaState)
    ages = st.floats(0.0, 5.0)
    rows = data.draw(st.lists(st.tuples(states, ages, st.integers(0, 64)), min_size=1, max_size=6))
    shot = snapshot(*(replica(i, n, n * 10, state=s, written_at_s=NOW_S - age) for i, (s, age, n) in enumerate(rows)))
    decision = decide(make_policy(Knobs(policy=name, seed=1)), Knobs(), COST, shot)
    ready = {r.slot for r in shot.ready(Knobs().stale_after_s)}
    assert decision.slot in ready if ready else decision.status == 503


def test_gpu_aware_prefers_the_replica_with_less_ahead() -> None:
    """Among active replicas with room, the one with fewer requests and tokens ahead is chosen."""
    assert placed(aware(active_set=2), COST, snapshot(replica(0, 10, 4000), replica(1, 5, 2000))) == 1


def test_gpu_aware_leaves_inactive_replicas_alone() -> None:
    """A pinned active set of one sends everything to one replica, though another is idle."""
    assert placed(aware(active_set=1), COST, snapshot(replica(0, 10, 4000), replica(1))) == 0


def test_a_request_without_room_is_not_placed() -> None:
    """No place is found where the KV cache, or the batch, is promised in full."""
    assert placed(aware(active_set=1), COST, snapshot(replica(0, 5, 15_900))) is None
    assert placed(aware(active_set=1), COST, snapshot(replica(0, 64, 100))) is None


def test_what_is_on_its_way_takes_room() -> None:
    """Tokens assigned by any router and not yet received count as promised."""
    assert (
        placed(aware(active_set=1), COST, snapshot(replica(0, 5, 100, on_the_way_requests=9, on_the_way_tokens=15_800)))
        is None
    )


def test_a_forecast_of_the_peak_counts_instead_of_final_sizes() -> None:
    """Where a replica tells its expected KV peak, that decides, not the sum of all final sizes."""
    assert placed(aware(active_set=1), COST, snapshot(replica(0, 20, 16_000, kv_tokens_peak=9_000))) == 0
    assert placed(aware(active_set=1), COST, snapshot(replica(0, 20, 9_000, kv_tokens_peak=15_900))) is None


def test_one_snapshot_is_never_promised_twice() -> None:
    """Assignments on one snapshot are added up until the next snapshot shows them."""
    policy, shot = aware(active_set=1), snapshot(replica(0))
    slots = [placed(policy, RequestCost(3000, 1000), shot) for _ in range(5)]
    assert slots == [0, 0, 0, None, None]


def test_a_request_larger_than_any_cache_goes_to_an_empty_replica() -> None:
    """What can never fit is not kept waiting for ever: an empty engine will refuse it in its own words."""
    huge = RequestCost(1_000_000, 1)
    assert placed(aware(active_set=1), huge, snapshot(replica(0, 1, 10))) is None
    assert placed(aware(active_set=1), huge, snapshot(replica(0))) == 0


def test_short_gpu_memory_stops_admission_until_it_has_recovered() -> None:
    """Below its reserve nothing is placed; it takes a tenth more than the reserve to start again."""
    policy = aware(active_set=1)
    assert placed(policy, COST, snapshot(replica(0), gpus=(gpu(900),))) is None
    assert placed(policy, COST, snapshot(replica(0), gpus=(gpu(1050),))) is None
    assert placed(policy, COST, snapshot(replica(0), gpus=(gpu(1200),))) == 0


def test_a_pressure_that_comes_and_goes_closes_the_gate_once_and_opens_it_once() -> None:
    """GPU memory use rises from 0 to 0.95 and falls back, with readings that scatter by 2 % of the reserve."""
    policy, rng = aware(active_set=1), random.Random(3)
    uses = [step / 400 for step in range(381)]
    open_at = []
    for k, use in enumerate(uses + uses[::-1]):
        now_s, free = NOW_S + k / 20, round(10_000 * (1.0 - use) + rng.uniform(-20, 20))
        shot = snapshot(replica(0, written_at_s=now_s), gpus=(gpu(free, taken_at_s=now_s),), now_s=now_s)
        open_at.append(placed(policy, COST, shot) == 0)
    turns = [k for k in range(1, len(open_at)) if open_at[k] is not open_at[k - 1]]
    assert len(turns) == 2
    assert [(uses + uses[::-1])[k] for k in turns] == [pytest.approx(0.9, abs=0.005), pytest.approx(0.89, abs=0.005)]


def test_a_stale_gpu_reading_steers_nothing() -> None:
    """An old reading of too little memory does not stop admission."""
    assert placed(aware(active_set=1), COST, snapshot(replica(0), gpus=(gpu(0, taken_at_s=NOW_S - 60.0),))) == 0


def test_a_gate_closed_by_a_sampler_that_then_died_opens_again() -> None:
    """When no reading has come for the limit, the last one no longer keeps requests out."""
    policy, low = aware(active_set=1), gpu(900)
    assert placed(policy, COST, snapshot(replica(0), gpus=(low,))) is None
    later = NOW_S + 5.0
    assert placed(policy, COST, snapshot(replica(0, written_at_s=later), gpus=(low,), now_s=later)) == 0


def test_a_replica_that_falls_silent_is_left_out_and_comes_back() -> None:
    """A reading that grows stale in later snapshots stops steering, also when the object is the same."""
    policy, silent = aware(active_set=2), replica(0)
    assert placed(policy, COST, snapshot(silent, replica(1, 50, 500))) == 0
    later = NOW_S + 5.0
    assert placed(policy, COST, snapshot(silent, replica(1, 50, 500, written_at_s=later), now_s=later)) == 1
    back = snapshot(replica(0, written_at_s=later + 0.1), replica(1, 50, 500, written_at_s=later), now_s=later + 0.1)
    assert placed(policy, COST, back) == 0


def test_a_shared_prefix_goes_home_while_that_pays() -> None:
    """A prompt seen before goes where it went, past a slightly shorter wait, but not past a much longer one."""
    policy, prompt = aware(active_set=2, seed=5), RequestCost(1000, 10, prefix=77)
    home = placed(policy, prompt, snapshot(replica(0), replica(1)))
    assert home is not None
    busier = [replica(i, 10 + (i == home), 1000) for i in (0, 1)]
    assert placed(policy, prompt, snapshot(*busier)) == home
    overloaded = [replica(i, 40 if i == home else 4, 4000 if i == home else 400) for i in (0, 1)]
    assert placed(policy, prompt, snapshot(*overloaded)) == 1 - home


def test_a_session_sticks_to_its_replica() -> None:
    """The turns of one session go to one replica among equals."""
    policy, turn = aware(active_set=4), RequestCost(1000, 10, session="abc")
    shots = [
        snapshot(*(replica(i, 8, 800, written_at_s=NOW_S + t / 100) for i in range(4)), now_s=NOW_S + t / 100)
        for t in range(9)
    ]
    assert len({placed(policy, turn, shot) for shot in shots}) == 1


def test_affinity_never_beats_load() -> None:
    """With nine of ten requests on one prefix, no replica exceeds 1.5 times the mean."""
    policy, rng = aware(active_set=4), random.Random(2)
    held = [0, 0, 0, 0]
    for t in range(200):
        now_s = NOW_S + t / 100
        shot = snapshot(*(replica(i, n, n * 20, written_at_s=now_s) for i, n in enumerate(held)), now_s=now_s)
        slot = placed(policy, RequestCost(10, 10, prefix=1 if rng.random() < 0.9 else t + 2), shot)
        assert slot is not None
        held[slot] += 1
    assert max(held) <= 1.5 * sum(held) / 4 + 1


def test_a_replica_that_was_replaced_is_no_ones_home() -> None:
    """A new replica in the slot of an old one has no cache, so a session has no preference for it."""
    policy, turn = aware(active_set=2), RequestCost(5000, 10, session="abc")
    home = placed(policy, turn, snapshot(replica(0), replica(1)))
    renewed = [replica(i, 5 if i == home else 4, 100) for i in (0, 1)]
    renewed = [replace(r, replica_id=f"new-{r.slot}") for r in renewed]
    assert placed(policy, turn, snapshot(*renewed)) == 1 - (home or 0)


def test_replicas_of_two_gpus_have_active_sets_of_their_own() -> None:
    """A pinned set of one means one replica of each GPU."""
    policy = aware(active_set=1)
    policy.refresh(snapshot(replica(0), replica(1), replica(2, gpu=1), replica(3, gpu=1)))
    assert policy.active == (0, 2)


def test_a_caller_that_cannot_queue_gets_the_replica_with_the_most_room() -> None:
    """`choose` assigns even when nothing fits, to the emptiest KV cache."""
    shot = snapshot(replica(0, 64, 15_000), replica(1, 64, 9_000))
    assert decide(make_policy(Knobs(active_set=2)), Knobs(), COST, shot).slot == 1
