"""Why a request went where it went: a decision with what it was made from, for people to read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from balancer.readings import Decision, ReplicaReading, RequestCost, Snapshot

# The answer carries it where the request asked for it; HAProxy strips this from what clients send.
HEADER = "x-serve-router-decision"


@dataclass(frozen=True, slots=True)
class Record:
    """One decision, the cost it was asked about, and what stood on the board."""

    at_s: float
    request_id: str
    cost: RequestCost
    decision: Decision
    snapshot: Snapshot


def as_dict(record: Record) -> dict[str, Any]:
    """For JSON: the decision, its request and every replica as the policy saw it."""
    decision, cost = record.decision, record.cost
    return {
        "at_s": round(record.at_s, 6),
        "request": record.request_id,
        "verdict": decision.verdict.value,
        "reason": decision.reason,
        "slot": decision.slot,
        "prompt_tokens": cost.prompt_tokens,
        "output_tokens": cost.output_tokens,
        "sequences": cost.sequences,
        "priority": cost.priority,
        **{name: round(value, 6) for name, value in decision.inputs.items()},
        "replicas": [_replica(r, record.at_s) for r in record.snapshot.replicas],
    }


def as_line(record: Record) -> str:
    """For a header: `name=value` pairs, without the quotes and braces that HAProxy's Lua could not read."""
    whole = as_dict(record)
    replicas = whole.pop("replicas")
    seen = ",".join(f"{r['slot']}:{r['requests']}/{r['kv_ratio']}" for r in replicas)
    return " ".join([*(f"{name}={value}" for name, value in whole.items()), f"replicas={seen or 'none'}"])


def _replica(reading: ReplicaReading, now_s: float) -> dict[str, Any]:
    return {
        "slot": reading.slot,
        "state": reading.state.name.lower(),
        "requests": reading.engine_requests,
        "tokens": reading.assigned_tokens,
        "kv_ratio": round(reading.kv_ratio, 4),
        "age_s": round(now_s - reading.written_at_s, 4),
    }
