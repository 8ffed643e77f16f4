"""The dashboard of one replica, chosen by its slot on the board."""

from __future__ import annotations

from grafana_foundation_sdk.cog.builder import Builder
from grafana_foundation_sdk.models.dashboard import Panel

from monitoring.metrics import STATES
from monitoring.panels import GREEN, RED, YELLOW, Query, Words, graph, tile, timeline
from monitoring.promql import (
    OURS,
    STATE_COLOURS,
    haproxy_per_slot,
    mean,
    state_number,
    total_rate,
)
from monitoring.rows_requests import answers_by_end, between_tokens, first_token

_SLOT = ',slot=~"$slot"'
_ONE = f"{{{OURS}{_SLOT}}}"


def sections() -> list[tuple[str, list[Builder[Panel]]]]:
    return [("Now", _now()), ("Work", _work()), ("Latency", _latency()), ("Life", _life())]


def _now() -> list[Builder[Panel]]:
    return [
        tile(
            Words("Replica", "The id under which Ray and HAProxy know the replica in this slot, and its GPU."),
            "short",
            Query(f"splitwiser_replica_info{_ONE}", "{{replica}} on GPU {{gpu}}"),
            span=6,
            name_only=True,
        ),
        tile(
            Words("State", "Only a ready replica receives work."),
            "short",
            Query(f"max by (state) (splitwiser_replica_state{_ONE}) == 1", "{{state}}"),
            span=4,
            name_only=True,
        ),
        tile(
            Words("Receives new work", "1 while a router sends it new work, 0 while it only finishes what it has."),
            "short",
            Query(f"max(splitwiser_replica_active{_ONE})"),
            span=3,
        ),
        tile(
            Words("In flight", "Requests accepted and not yet answered in full."),
            "short",
            Query(f"sum(splitwiser_replica_in_flight_requests{_ONE})"),
            span=3,
        ),
        tile(
            Words("KV cache in use", "Near 100 % the engine puts requests back, and does their work twice."),
            "percentunit",
            Query(f"max(splitwiser:kv_use:ratio{_ONE})"),
            span=3,
            steps=((None, GREEN), (0.85, YELLOW), (0.95, RED)),
        ),
        tile(
            Words("Last heard of", "Seconds since the replica wrote its slot; normal is below 1."),
            "s",
            Query(f"max(splitwiser_replica_reading_age_seconds{_ONE})"),
            span=5,
            steps=((None, GREEN), (2, YELLOW), (5, RED)),
        ),
    ]  # fmt: skip


def _work() -> list[Builder[Panel]]:
    return [
        graph(
            Words("Requests", "Assigned to this replica, received and finished by it, each second."),
            "reqps",
            Query(total_rate("splitwiser_router_decisions_total", more=_SLOT), "assigned"),
            Query(total_rate("splitwiser_replica_received_requests_total", more=_SLOT), "received"),
            Query(total_rate("splitwiser_replica_finished_requests_total", more=_SLOT), "finished"),
        ),
        graph(
            Words("Load", "What the engine runs, what waits in it or is on its way, and the most it runs at once."),
            "short",
            Query(f"sum(splitwiser_replica_running_requests{_ONE})", "running"),
            Query(f"sum(splitwiser_replica_waiting_requests{_ONE})", "waiting"),
            Query(f"sum(splitwiser_replica_on_the_way_requests{_ONE})", "on the way"),
            Query(f"sum(splitwiser_replica_batch_limit_requests{_ONE})", "limit"),
        ),
        graph(
            Words("Tokens", "Prompt tokens processed and tokens generated, each second."),
            "suffix: tok/s",
            Query(total_rate("splitwiser_replica_prompt_tokens_total", more=_SLOT), "prompt"),
            Query(total_rate("splitwiser_replica_output_tokens_total", more=_SLOT), "output"),
        ),
        graph(
            Words("KV cache", "Tokens held, tokens predicted for the requests in flight, and the cache's size."),
            "short",
            Query(f"sum(splitwiser_replica_kv_used_tokens{_ONE})", "used"),
            Query(f"sum(splitwiser_replica_in_flight_tokens{_ONE})", "predicted"),
            Query(f"sum(splitwiser_replica_kv_size_tokens{_ONE})", "size"),
        ),
        graph(
            Words("Why it was chosen", "Assignments to this replica by the policy's reason."),
            "reqps",
            Query(f"{total_rate('splitwiser_router_decisions_total', 'reason', _SLOT)} > 0", "{{reason}}"),
            stacked=True,
        ),
        graph(
            Words("Preemptions", "Requests put back for want of KV cache, each second."),
            "ops",
            Query(total_rate("splitwiser_replica_preemptions_total", more=_SLOT), "preemptions"),
        ),
    ]  # fmt: skip


def _latency() -> list[Builder[Panel]]:
    return [
        first_token(_SLOT),
        between_tokens(_SLOT),
        graph(
            Words("Engine step", "How long one step takes; the last one while the engine is idle."),
            "s",
            Query(f"max(splitwiser_replica_step_seconds{_ONE})", "step"),
        ),
        graph(
            Words("Queue in the engine", "Mean time before the engine began: near 0, as requests wait in the router."),
            "s",
            Query(mean("vllm:request_queue_time_seconds", _SLOT), "mean"),
        ),
        answers_by_end(_SLOT),
        graph(
            Words("Sessions in HAProxy", "Connections that HAProxy holds open to this replica."),
            "short",
            Query(haproxy_per_slot("haproxy_server_current_sessions", rate=False, slot=_SLOT), "sessions"),
        ),
    ]  # fmt: skip


def _life() -> list[Builder[Panel]]:
    return [
        timeline(
            Words("States", "What the slot was in over time."),
            list(zip(STATES, STATE_COLOURS, strict=True)),
            Query(state_number(_SLOT), "replica {{slot}}"),
        ),
        graph(
            Words("Memory", "Device memory of this replica's own (the host's without a GPU); shared weights it maps."),
            "bytes",
            Query(f"sum(splitwiser_replica_gpu_memory_bytes{_ONE})", "its own"),
            Query(f"sum(splitwiser_replica_shared_weights_bytes{_ONE}) or vector(0)", "shared weights"),
        ),
        graph(
            Words("Starts and time to load", "Replicas seen to begin here; how long the present one took to be ready."),
            "short",
            Query(f"sum(splitwiser_replica_starts_total{_ONE})", "starts"),
            Query(f"max(splitwiser_replica_load_seconds{_ONE})", "seconds to load"),
        ),
        graph(
            Words("Checks by HAProxy", "Failed checks of this replica's address, each second."),
            "ops",
            Query(haproxy_per_slot("haproxy_server_check_failures_total", slot=_SLOT), "failed"),
        ),
        graph(
            Words("Up in HAProxy", "1 while HAProxy may send requests to this replica."),
            "short",
            # Each replica stands in two of HAProxy's backends.
            Query(haproxy_per_slot("haproxy_server_status", False, ',state="UP"', _SLOT) + " > bool 0", "up"),
        ),
        graph(
            Words("Scrape of vLLM's metrics", "How long Prometheus needs to get vLLM's own metrics from here."),
            "s",
            Query(f"max(scrape_duration_seconds{_ONE})", "scrape"),
        ),
    ]  # fmt: skip
