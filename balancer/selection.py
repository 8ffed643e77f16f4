"""What every policy shares: its interface, and small questions asked of replicas."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Protocol

from balancer.readings import Decision, ReplicaReading, RequestCost, Snapshot


class Policy(Protocol):
    """Assigns one request at a time. `choose` is called with READY, fresh replicas only, never with none."""

    name: str

    def choose(self, cost: RequestCost, replicas: Sequence[ReplicaReading], snapshot: Snapshot) -> Decision:
        """Name a slot of `replicas`, or say that the request must wait or is turned away."""
        ...


def kv_tokens_committed(replica: ReplicaReading) -> int:
    """Tokens of KV cache that are used or promised.

    Requests in flight count with their expected peak, or where the replica does not tell, each at its final size.
    """
    used = replica.kv_blocks_used * replica.kv_block_tokens
    return max(used, replica.kv_tokens_peak or replica.in_flight_tokens) + replica.on_the_way_tokens


def kv_tokens_free(replica: ReplicaReading) -> int:
    """Tokens of KV cache that are neither used nor promised."""
    return replica.kv_tokens_total - kv_tokens_committed(replica)


def least(
    replicas: Sequence[ReplicaReading], load: Callable[[ReplicaReading], float], rng: random.Random
) -> ReplicaReading:
    """The replica with the smallest load; one of the equals at random, so that no replica is everyone's first."""
    loads = [load(r) for r in replicas]
    smallest = min(loads)
    equals = [r for r, value in zip(replicas, loads, strict=True) if value == smallest]
    return equals[0] if len(equals) == 1 else rng.choice(equals)
