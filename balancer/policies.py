"""Who takes a request: each policy is a function of a snapshot, plus small explicit state and injected randomness.

The three simple ones are what the field uses: they assign at once, over all ready replicas. `gpu_aware` has a file of
its own, and a queue in front of it (`balancer.admission`).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from balancer.gpu_aware import GpuAware
from balancer.knobs import Knobs
from balancer.readings import Decision, ReplicaReading, RequestCost, Snapshot, assign, reject
from balancer.selection import Policy, kv_tokens_free, least

__all__ = [
    "POLICIES", "GpuAware", "Knobs", "LeastQueue", "Policy", "PowerOfTwo", "RoundRobin", "decide", "kv_tokens_free",
    "least", "make_policy",
]  # fmt: skip


class RoundRobin:
    """Each replica in turn, whatever it is doing."""

    name = "round_robin"

    def __init__(self, knobs: Knobs, rng: random.Random) -> None:
        self._last_slot = -1

    def choose(self, cost: RequestCost, replicas: Sequence[ReplicaReading], snapshot: Snapshot) -> Decision:
        later = [r for r in replicas if r.slot > self._last_slot]
        self._last_slot = (later or replicas)[0].slot
        return assign(self._last_slot, "turn")


class LeastQueue:
    """The replica with the fewest requests in flight or on the way; ties at random."""

    name = "least_queue"

    def __init__(self, knobs: Knobs, rng: random.Random) -> None:
        self._rng = rng

    def choose(self, cost: RequestCost, replicas: Sequence[ReplicaReading], snapshot: Snapshot) -> Decision:
        return assign(least(replicas, lambda r: r.engine_requests, self._rng).slot, "least_queue")


class PowerOfTwo:
    """The less loaded of two replicas drawn at random (Mitzenmacher 2001; Ray Serve's default router)."""

    name = "power_of_two"

    def __init__(self, knobs: Knobs, rng: random.Random) -> None:
        self._rng = rng

    def choose(self, cost: RequestCost, replicas: Sequence[ReplicaReading], snapshot: Snapshot) -> Decision:
        pair = self._rng.sample(replicas, min(2, len(replicas)))
        return assign(least(pair, lambda r: r.engine_requests, self._rng).slot, "of_two")


POLICIES: dict[str, Callable[[Knobs, random.Random], Policy]] = {
    RoundRobin.name: RoundRobin,
    LeastQueue.name: LeastQueue,
    PowerOfTwo.name: PowerOfTwo,
    GpuAware.name: GpuAware,
}


def make_policy(knobs: Knobs) -> Policy:
    """The policy that `knobs.policy` names; `knobs.seed` fixes its choices between equals."""
    return POLICIES[knobs.policy](knobs, random.Random(knobs.seed))


def decide(policy: Policy, knobs: Knobs, cost: RequestCost, snapshot: Snapshot) -> Decision:
    """Ask `policy` about the replicas that may receive work; with none, turn the request away."""
    replicas = snapshot.ready(knobs.stale_after_s)
    if not replicas:
        return reject(503, "no_replica_ready", retry_after_s=1.0)
    return policy.choose(cost, replicas, snapshot)
