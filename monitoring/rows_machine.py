"""Rows about what serves them: GPU and MPS, saturation, life cycle, ingress.

Ray counts nothing as 0, so its counters of failures are or-ed with a zero.
"""

from __future__ import annotations

from grafana_foundation_sdk.cog.builder import Builder
from grafana_foundation_sdk.models.dashboard import Panel

from monitoring.metrics import STATES
from monitoring.panels import Query, Words, graph, tile, timeline
from monitoring.promql import (
    NODE,
    OCCUPIED,
    OURS,
    RATE,
    RAY_EVERY,
    SM_IS_COUNTED,
    STATE_COLOURS,
    USE,
    haproxy_per_slot,
    per_slot,
    quantiles,
    rate_per_slot,
    state_number,
    total_rate,
)


def gpu_and_mps() -> list[Builder[Panel]]:
    own = f"{{{OURS}}}"
    held = f"sum(splitwiser_replica_gpu_memory_bytes{own})"
    shared = f"(sum(splitwiser_gpu_shared_weights_bytes{own}) or vector(0))"  # recordings of before have none
    used = f"sum(splitwiser_gpu_memory_used_bytes{own})"
    return [
        graph(
            Words(
                "GPU in use",
                "SM: share of the multiprocessors at work, only where GPM counts it (the driver's `utilization.gpu` "
                "says 99 % while 14 % are); without a GPU, the host's CPUs. DRAM: share of the memory bandwidth.",
            ),
            "percentunit",
            Query(f"max by (gpu) (splitwiser_gpu_sm_ratio{own}) and {SM_IS_COUNTED}", "SM, GPU {{gpu}}"),
            Query(f"max by (gpu) (splitwiser_gpu_sm_occupancy_ratio{own})", "occupancy, GPU {{gpu}}"),
            Query(f"max by (gpu) (splitwiser_gpu_dram_bandwidth_ratio{own})", "DRAM, GPU {{gpu}}"),
            ceiling=1.0,
        ),
        graph(
            Words(
                "Memory by holder",
                "Each replica's own, the weights that replicas share, everything else: together what is used.",
            ),
            "bytes",
            Query(per_slot("splitwiser_replica_gpu_memory_bytes"), "replica {{slot}}"),
            Query(shared, "shared weights"),
            Query(f"clamp_min({used} - {held} - {shared}, 0)", "others"),
            stacked=True,
        ),
        graph(
            Words("Memory and its limit", "Used; the limit, above which the reserve is touched; the device's size."),
            "bytes",
            Query(f"max by (gpu) (splitwiser_gpu_memory_used_bytes{own})", "used, GPU {{gpu}}"),
            Query(
                f"max by (gpu) (splitwiser_gpu_memory_size_bytes{own} - splitwiser_gpu_memory_reserve_bytes{own})",
                "limit, GPU {{gpu}}",
            ),
            Query(f"max by (gpu) (splitwiser_gpu_memory_size_bytes{own})", "size, GPU {{gpu}}"),
        ),
        graph(
            Words("Power", "Power draw of each GPU."),
            "watt",
            Query(f"max by (gpu) (splitwiser_gpu_power_watts{own})", "GPU {{gpu}}"),
            span=5,
        ),
        graph(
            Words("Temperature", "Temperature of each GPU's core."),
            "celsius",
            Query(f"max by (gpu) (splitwiser_gpu_temperature_celsius{own})", "GPU {{gpu}}"),
            span=5,
        ),
        graph(
            Words("SM clock", "It falls when the GPU is throttled for power or heat."),
            "hertz",
            Query(f"max by (gpu) (splitwiser_gpu_sm_clock_hertz{own})", "GPU {{gpu}}"),
            span=5,
        ),
        graph(
            Words("MPS", "Clients of the MPS daemon: one for each replica. Faults end all clients of the GPU."),
            "short",
            Query(f"sum(splitwiser_mps_clients{own})", "clients"),
            Query(f"sum(splitwiser_mps_up{own})", "daemon up"),
            Query(f"sum(increase(splitwiser_mps_faults_total{own}[{RATE}]))", "faults"),
            span=5,
        ),
        tile(
            Words("Who measures", "gpm counts SMs; nvml only says that a kernel ran; host is a machine without a GPU."),
            "short",
            Query(f"max by (gpu, source) (splitwiser_gpu_source{own}) == 1", "GPU {{gpu}}: {{source}}"),
            span=4,
            no_value="nobody",
            name_only=True,
        ),
    ]  # fmt: skip


def saturation() -> list[Builder[Panel]]:
    hits, queries = "vllm:prefix_cache_hits_total", "vllm:prefix_cache_queries_total"
    return [
        graph(
            Words("KV cache in use", "Share of each replica's KV cache; near 100 % the engine puts requests back."),
            "percentunit",
            Query(f"max by (slot) (splitwiser:kv_use:ratio{{{OURS}}})", "replica {{slot}}"),
            ceiling=1.0,
        ),
        graph(
            Words("Preemptions", "Requests put back for want of KV cache, each second: their work is done twice."),
            "ops",
            Query(rate_per_slot("splitwiser_replica_preemptions_total"), "replica {{slot}}"),
        ),
        graph(
            Words("Waiting in the engines by reason", "capacity: no room in KV cache or batch; deferred: held back."),
            "short",
            Query(f"sum by (reason) (vllm:num_requests_waiting_by_reason{{{OURS}}})", "{{reason}}"),
            stacked=True,
        ),
        graph(
            Words("Share of each limit in use", "SMs, memory bandwidth, and memory but for the reserve."),
            "percentunit",
            Query(f"max by (gpu, limit) ({USE})", "{{limit}}, GPU {{gpu}}"),
        ),
        graph(
            Words("Output against SM use", "Tokens a second over SM use: falls when replicas are in each other's way."),
            "suffix: tok/s",
            Query(
                f"sum(splitwiser:output_tokens:rate1m{{{OURS}}}) / (max(splitwiser_gpu_sm_ratio{{{OURS}}}) > 0)",
                "tokens/s at 100 %",
            ),
        ),
        graph(
            Words("Prefix cache", "Share of the prompt tokens that the engines had cached."),
            "percentunit",
            Query(f"{total_rate(hits)} / ({total_rate(queries)} > 0)", "hits"),
            ceiling=1.0,
        ),
    ]  # fmt: skip


def life_cycle() -> list[Builder[Panel]]:
    failures = f"sum(rate(ray_serve_health_check_failures_total[{RATE}])) or vector(0)"
    return [
        timeline(
            Words("State of each replica", "Only a ready replica receives work; a draining one finishes what it has."),
            list(zip(STATES, STATE_COLOURS, strict=True)),
            Query(f"({state_number()}) and {OCCUPIED}", "replica {{slot}}"),
            span=12,
        ),
        graph(
            Words("Starts", "Replicas that began in each slot in the last 15 minutes; more than one is a restart."),
            "short",
            Query(
                f"round(sum by (slot) (increase(splitwiser_replica_starts_total{{{OURS}}}[15m]))) and {OCCUPIED}",
                "replica {{slot}}",
            ),
            span=6,
        ),
        graph(
            Words("Time to load", "From a replica's start to ready, the wait for its turn to load included."),
            "s",
            Query(f"max by (slot) (splitwiser_replica_load_seconds{{{OURS}}}) and {OCCUPIED}", "replica {{slot}}"),
            span=6,
        ),
        graph(
            Words("Age of the readings", "Since each replica and each GPU was last heard of; normal is below 1 s."),
            "s",
            Query(per_slot("splitwiser_replica_reading_age_seconds"), "replica {{slot}}"),
            Query(f"max by (gpu) (splitwiser_gpu_reading_age_seconds{{{OURS}}})", "GPU {{gpu}}"),
            span=12,
        ),
        graph(
            Words("Health checks failed", "By Ray Serve, which replaces a replica after three in a row."),
            "ops",
            Query(failures, "failures", RAY_EVERY),
            span=6,
        ),
        graph(
            Words("Ejected, retried, lost", "Replicas out of routing; requests decided twice, or never received."),
            "ops",
            Query(f"sum(rate(splitwiser_router_ejections_total{{{OURS}}}[{RATE}]))", "ejections"),
            Query(f"sum(rate(splitwiser_router_retries_total{{{OURS}}}[{RATE}]))", "retries"),
            Query(f"sum(rate(splitwiser_router_lost_total{{{OURS}}}[{RATE}]))", "lost"),
            Query(f"sum(rate(splitwiser_router_cancelled_total{{{OURS}}}[{RATE}]))", "left while waiting"),
            span=6,
        ),
    ]  # fmt: skip


def ingress() -> list[Builder[Panel]]:
    requests = f"sum by (status_code) (rate(ray_serve_num_http_requests_total[{RATE}]))"
    failures = f"sum by (reason) (rate(ray_serve_haproxy_ingress_router_failures_total[{RATE}])) or on () vector(0)"
    return [
        graph(
            Words("Answers by status", "As Ray Serve's ingress counted them; 499 is a client that went away."),
            "reqps",
            Query(requests, "{{status_code}}", RAY_EVERY),
            stacked=True,
        ),
        graph(
            Words("Latency at the ingress", "Whole requests as the ingress saw them, percentiles of Ray's buckets."),
            "ms",
            *quantiles("ray_serve_http_request_latency_ms", every=RAY_EVERY, scope=""),
        ),
        graph(
            Words("Router failures", "Times that HAProxy asked the router and got no usable answer, by reason."),
            "reqps",
            Query(failures, "{{reason}}", RAY_EVERY),
        ),
        graph(
            Words("Sessions at each replica", "Connections that HAProxy holds open to each replica."),
            "short",
            Query(haproxy_per_slot("haproxy_server_current_sessions", rate=False), "replica {{slot}}"),
        ),
        graph(
            Words("Errors at each replica", "Connections that failed, and answers with a 5xx status."),
            "ops",
            Query(haproxy_per_slot("haproxy_server_connection_errors_total"), "connect, replica {{slot}}"),
            Query(haproxy_per_slot("haproxy_server_http_responses_total", more=',code="5xx"'), "5xx, replica {{slot}}"),
        ),
        graph(
            Words("Queue in HAProxy", "Requests that wait in HAProxy itself; the balancer's queue comes before it."),
            "short",
            Query(f"sum by (proxy) (haproxy_backend_current_queue{{{NODE}}})", "{{proxy}}"),
        ),
    ]  # fmt: skip
