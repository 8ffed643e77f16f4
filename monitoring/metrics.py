"""The declared set: every metric this project exports, with its type, labels and help. Nothing else may be exported.

Base units throughout (seconds, bytes, hertz, ratios from 0 to 1). Label sets are closed, and every combination is
exported from the first scrape on: a counter that has not moved reads 0, a gauge that its source cannot give reads NaN.
The only label value that is not known beforehand is `replica` on the one info metric, to be joined on `slot`.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator
from dataclasses import dataclass

from balancer.counters import CHOICES, EJECTIONS, REJECTIONS
from balancer.ledger import ENDS
from balancer.readings import GpuSource, ReplicaState

PREFIX = "splitwiser_"
STATES = tuple(state.name.lower() for state in ReplicaState)
SOURCES = tuple(source.name.lower() for source in GpuSource if source is not GpuSource.NONE)
# The values of the labels whose sets do not depend on the machine.
LABEL_VALUES: dict[str, frozenset[str]] = {
    "state": frozenset(STATES),
    "source": frozenset(SOURCES),
    "policy": frozenset(policy for policy, _ in CHOICES),
    "end": frozenset(ENDS),
    "reason": frozenset(reason for _, reason in CHOICES) | frozenset(REJECTIONS) | frozenset(EJECTIONS),
}


class Kind(enum.StrEnum):
    GAUGE = "gauge"
    COUNTER = "counter"
    HISTOGRAM = "histogram"


@dataclass(frozen=True, slots=True)
class Metric:
    """A metric family as Prometheus' text format names it: counters with their `_total`."""

    name: str
    kind: Kind
    help: str
    labels: tuple[str, ...] = ()

    def series_names(self) -> tuple[str, ...]:
        """What a query may name."""
        if self.kind is Kind.HISTOGRAM:
            return tuple(self.name + suffix for suffix in ("_bucket", "_sum", "_count"))
        return (self.name,)


_DECLARED: list[Metric] = []


def _declare(name: str, kind: Kind, help_text: str, *labels: str) -> Metric:
    metric = Metric(PREFIX + name, kind, help_text, labels)
    _DECLARED.append(metric)
    return metric


def _gauge(name: str, help_text: str, *labels: str) -> Metric:
    return _declare(name, Kind.GAUGE, help_text, *labels)


def _counter(name: str, help_text: str, *labels: str) -> Metric:
    return _declare(name, Kind.COUNTER, help_text, *labels)


BUILD_INFO = _gauge("build_info", "1; the version of splitwiser-serve", "version")
BOARD_UP = _gauge("board_up", "1 while the board is there to be read, else 0")
BOARD_TORN_SLOTS = _gauge("board_torn_slots", "Replica slots whose record was left half-written by its replica")

GPU_SOURCE = _gauge("gpu_source", "1 for who measures this GPU; host is a machine without one", "gpu", "source")
GPU_SM = _gauge("gpu_sm_ratio", "SM utilization (gpm); nvml: some kernel was there; host: the CPUs'", "gpu")
GPU_OCCUPANCY = _gauge("gpu_sm_occupancy_ratio", "Warps resident on the SMs, of the most possible", "gpu")
GPU_DRAM = _gauge("gpu_dram_bandwidth_ratio", "DRAM bandwidth in use, of the peak", "gpu")
GPU_MEMORY_USED = _gauge("gpu_memory_used_bytes", "Device memory in use, by whomever", "gpu")
GPU_MEMORY_SIZE = _gauge("gpu_memory_size_bytes", "Device memory in all", "gpu")
GPU_MEMORY_RESERVE = _gauge("gpu_memory_reserve_bytes", "Device memory that the plan keeps free", "gpu")
GPU_WEIGHTS = _gauge("gpu_shared_weights_bytes", "The one copy of the weights that replicas map; 0: none", "gpu")
GPU_POWER = _gauge("gpu_power_watts", "Power draw", "gpu")
GPU_TEMPERATURE = _gauge("gpu_temperature_celsius", "Temperature of the GPU's core", "gpu")
GPU_CLOCK = _gauge("gpu_sm_clock_hertz", "Clock of the SMs", "gpu")
GPU_AGE = _gauge("gpu_reading_age_seconds", "Age of this GPU's last reading; NaN when there was none", "gpu")

REPLICAS_DESIRED = _gauge("replicas_desired", "Replicas that the configuration asks for")
REPLICA_INFO = _gauge("replica_info", "1; the replica in the slot (empty: none) and its GPU", "slot", "replica", "gpu")
REPLICA_STATE = _gauge("replica_state", "1 for the state that the slot is in, else 0", "slot", "state")
REPLICA_ACTIVE = _gauge("replica_active", "1 while a router sends new work to the slot", "slot")
REPLICA_IN_FLIGHT = _gauge("replica_in_flight_requests", "Sequences accepted and not yet answered in full", "slot")
REPLICA_IN_FLIGHT_TOKENS = _gauge("replica_in_flight_tokens", "Tokens predicted for the requests in flight", "slot")
REPLICA_ON_THE_WAY = _gauge("replica_on_the_way_requests", "Sequences assigned and not yet received", "slot")
REPLICA_RUNNING = _gauge("replica_running_requests", "Requests in the engine's batch", "slot")
REPLICA_WAITING = _gauge("replica_waiting_requests", "Requests in the engine's own queue", "slot")
REPLICA_BATCH = _gauge("replica_batch_limit_requests", "The most requests that the engine runs at once", "slot")
REPLICA_KV_USED = _gauge("replica_kv_used_tokens", "KV cache in use, in tokens", "slot")
REPLICA_KV_SIZE = _gauge("replica_kv_size_tokens", "KV cache in all, in tokens", "slot")
REPLICA_STEP = _gauge("replica_step_seconds", "Engine step time, smoothed over 8 steps; the last while idle", "slot")
REPLICA_FRONT_END = _counter(
    "replica_front_end_cpu_seconds_total", "CPU time of the thread that serves HTTP and streams; one core is its limit",
    "slot",
)  # fmt: skip
REPLICA_MEMORY = _gauge("replica_gpu_memory_bytes", "Device memory of its own (or the host's); 0: unknown", "slot")
REPLICA_WEIGHTS = _gauge("replica_shared_weights_bytes", "Weights mapped, beside memory of its own", "slot")
REPLICA_AGE = _gauge("replica_reading_age_seconds", "Since the slot was written last; NaN when empty", "slot")
REPLICA_LOAD = _gauge("replica_load_seconds", "From taking the slot to ready, its wait for its turn included", "slot")
REPLICA_STARTS = _counter("replica_starts_total", "Replicas seen to begin in the slot", "slot")
REPLICA_PROMPT_TOKENS = _counter("replica_prompt_tokens_total", "Prompt tokens processed", "slot")
REPLICA_OUTPUT_TOKENS = _counter("replica_output_tokens_total", "Tokens generated", "slot")
REPLICA_PREEMPTIONS = _counter("replica_preemptions_total", "Requests put back for want of KV cache", "slot")
REPLICA_RECEIVED = _counter("replica_received_requests_total", "Requests received to be served", "slot")
REPLICA_PREDICTED = _counter("replica_predicted_tokens_total", "Output tokens predicted for whole answers", "slot")
REPLICA_ANSWERED = _counter("replica_answered_tokens_total", "Output tokens that those answers had", "slot")
REPLICA_ERROR = _counter("replica_estimate_error_tokens_total", "Sum of the differences, without their signs", "slot")
REPLICA_FINISHED = _counter("replica_finished_requests_total", "Of these, answered or abandoned", "slot")

ENTERED = _counter("requests_entered_total", "Requests that came in, each counted once")
ENDED = _counter("requests_ended_total", "Requests that ended, by how; those lost on their way end nowhere", "end")

ROUTERS = _gauge("routers", "Living routers")
DECISIONS = _counter("router_decisions_total", "Requests assigned to the slot", "slot", "policy", "reason")
DECISION_TIME = _declare("router_decision_seconds", Kind.HISTOGRAM, "Time to decide about a request, waiting apart")
QUEUE = _gauge("router_queue_requests", "Requests that wait in the routers")
QUEUE_WAIT = _declare("router_wait_seconds", Kind.HISTOGRAM, "Time in the queue, of requests that had to wait")
REJECTED = _counter("router_rejections_total", "Requests turned away", "reason")
EJECTED = _counter("router_ejections_total", "Times a replica stopped receiving work against its will", "reason")
RETRIED = _counter("router_retries_total", "Requests that HAProxy took to another replica than the chosen one")
LOST = _counter("router_lost_total", "Assigned requests that never arrived")
CANCELLED = _counter("router_cancelled_total", "Requests whose client went away while they waited")

MPS_WANTED = _gauge("mps_wanted", "1 when the replicas shall be MPS clients")
MPS_UP = _gauge("mps_up", "1 while the MPS control daemon runs")
MPS_CLIENTS = _gauge("mps_clients", "Processes that are MPS clients")
MPS_FAULTS = _counter("mps_faults_total", "Fatal faults in the MPS log since the device manager started")

DECLARED: tuple[Metric, ...] = tuple(_DECLARED)

# What dashboards and rules may use of others' metrics. vLLM's and HAProxy's hold for the releases pinned by
# this project; Ray's counters that never moved are absent, not 0.
FOREIGN: frozenset[str] = frozenset(
    {
        "up",
        "scrape_duration_seconds",
        "ALERTS",
        "vllm:time_to_first_token_seconds_bucket",
        "vllm:inter_token_latency_seconds_bucket",
        "vllm:e2e_request_latency_seconds_bucket",
        "vllm:request_queue_time_seconds_sum",
        "vllm:request_queue_time_seconds_count",
        "vllm:request_prefill_time_seconds_sum",
        "vllm:request_prefill_time_seconds_count",
        "vllm:request_decode_time_seconds_sum",
        "vllm:request_decode_time_seconds_count",
        "vllm:iteration_tokens_total_sum",
        "vllm:iteration_tokens_total_count",
        "vllm:request_success_total",
        "vllm:num_requests_waiting_by_reason",
        "vllm:prefix_cache_hits_total",
        "vllm:prefix_cache_queries_total",
        "ray_serve_num_http_requests_total",
        "ray_serve_http_request_latency_ms_bucket",
        "ray_serve_health_check_failures_total",
        "ray_serve_haproxy_ingress_router_failures_total",
        "haproxy_server_current_sessions",
        "haproxy_server_http_responses_total",
        "haproxy_server_check_failures_total",
        "haproxy_server_connection_errors_total",
        "haproxy_backend_current_queue",
        "haproxy_server_status",
    }
)


def names() -> frozenset[str]:
    """Every series name that this project exports."""
    return frozenset(_series_names())


def _series_names() -> Iterator[str]:
    for metric in DECLARED:
        yield from metric.series_names()
