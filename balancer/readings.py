"""Frozen snapshots of what the GPU and the replicas are doing: all that a policy ever sees.

Times are `time.monotonic()` seconds, which on Linux every process of the machine shares. Ratios run from 0 to 1.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

NO_SLOT = -1


class ReplicaState(enum.IntEnum):
    """Where a replica is in its life; only READY ones receive requests."""

    EMPTY = 0
    STARTING = 1
    READY = 2
    DRAINING = 3
    FAILED = 4


class GpuSource(enum.IntEnum):
    """Who measured a GpuReading, best first.

    GPM counts active SMs. NVML's `utilization.gpu` only says that some kernel was resident (99 % was read
    while 14 % of the SMs were active), so `sm_ratio` from it must not be mistaken for the other. HOST is a
    machine without a GPU: `sm_ratio` is then the CPUs' utilization and memory is the host's.
    """

    NONE = 0
    GPM = 1
    NVML = 2
    HOST = 3


@dataclass(frozen=True, slots=True)
class GpuReading:
    """One GPU (or the host, without one) at one moment. A ratio that its source cannot give is None."""

    index: int
    source: GpuSource
    sm_ratio: float | None
    sm_occupancy_ratio: float | None
    dram_bandwidth_ratio: float | None
    memory_used_bytes: int
    memory_total_bytes: int
    memory_reserve_bytes: int
    power_w: float | None
    temperature_c: float | None
    sm_clock_hz: float | None
    taken_at_s: float

    @property
    def memory_free_bytes(self) -> int:
        return max(0, self.memory_total_bytes - self.memory_used_bytes)


@dataclass(frozen=True, slots=True)
class ReplicaReading:
    """One replica's slot: what its engine reported at its last step, and what its HTTP side counts exactly.

    `in_flight_*` counts what the replica has accepted and not yet answered in full; `on_the_way_*` what routers
    have assigned to it and it has not yet received; both in sequences, as an engine's batch does (a request for three
    prompts with `n` 2 is six). Token counts are the routers' own predictions (prompt plus
    expected output), summed. Counters named `*_total` only grow during one life of the replica.
    `kv_tokens_peak` is the most KV tokens that the requests in flight are expected to hold at any one time
    (`balancer.kv_peak`, at most a heartbeat old, plus all of what was accepted since); 0 where it is not known.
    `predicted`, `answered` and `estimate_error` count answers whose end vLLM reported: the output tokens that were
    predicted for them, those that they had, and the sum of the differences without their signs.
    `awaiting_requests` have arrived whole and wait for the engine's next word; `engine_steps_total` tells a busy engine
    from a stopped one. `server_errors_in_a_row` counts answers that failed by the engine's fault since the last that
    did not; client errors count for nothing.
    `front_end_cpu_s_total` is the CPU time of the thread that serves HTTP and streams; 0 where it is not known.
    `ending_requests`, of those in flight, are over for the engine: only their answers are still on the way out. They
    come in bursts, and clients are back with new requests before the last of the burst was answered.
    `received_total` and `finished_total` count what came to be served: neither probes nor what a router turned away.
    `received_by_router[row]` counts the requests that came from the router holding that row of the board.
    """

    slot: int
    replica_id: str
    gpu: int
    state: ReplicaState
    written_at_s: float
    in_flight_requests: int
    in_flight_tokens: int
    on_the_way_requests: int
    on_the_way_tokens: int
    running_requests: int
    waiting_requests: int
    kv_blocks_used: int
    kv_blocks_total: int
    kv_block_tokens: int
    max_running_requests: int
    step_time_s: float
    prompt_tokens_total: int
    output_tokens_total: int
    preemptions_total: int
    received_total: int
    finished_total: int
    gpu_memory_bytes: int = 0
    received_by_router: tuple[int, ...] = ()
    kv_tokens_peak: int = 0
    predicted_tokens_total: int = 0
    answered_tokens_total: int = 0
    estimate_error_tokens_total: int = 0
    engine_steps_total: int = 0
    awaiting_requests: int = 0
    server_errors_total: int = 0
    server_errors_in_a_row: int = 0
    front_end_cpu_s_total: float = 0.0
    ending_requests: int = 0

    @property
    def assigned_requests(self) -> int:
        """Requests this replica is answering or is about to receive."""
        return self.in_flight_requests + self.on_the_way_requests

    @property
    def engine_requests(self) -> int:
        """Those of them that its engine has, or will have, to work on."""
        return self.assigned_requests - self.ending_requests

    @property
    def assigned_tokens(self) -> int:
        return self.in_flight_tokens + self.on_the_way_tokens

    @property
    def kv_ratio(self) -> float:
        return self.kv_blocks_used / self.kv_blocks_total if self.kv_blocks_total else 0.0

    @property
    def kv_tokens_total(self) -> int:
        return self.kv_blocks_total * self.kv_block_tokens


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What a decision is made from. `replicas` holds every occupied slot that could be read, in slot order."""

    now_s: float
    replicas: tuple[ReplicaReading, ...]
    gpus: tuple[GpuReading, ...] = ()
    torn_slots: tuple[int, ...] = ()

    def ready(self, stale_after_s: float) -> list[ReplicaReading]:
        """The replicas that may receive work: READY, and heard of within `stale_after_s`."""
        oldest = self.now_s - stale_after_s
        return [r for r in self.replicas if r.state is ReplicaState.READY and r.written_at_s >= oldest]


@dataclass(frozen=True, slots=True)
class RequestCost:
    """What a request is expected to need. `prefix` fingerprints the start of its prompt (0: unknown)."""

    prompt_tokens: int
    output_tokens: int
    sequences: int = 1
    prefix: int = 0
    session: str = ""
    priority: int = 0

    @property
    def tokens(self) -> int:
        """KV tokens at the end of the answer: the prompt once, the output for each sequence."""
        return self.prompt_tokens + self.output_tokens * self.sequences


class Verdict(enum.Enum):
    ASSIGN = "assign"
    WAIT = "wait"
    REJECT = "reject"


@dataclass(frozen=True, slots=True)
class Decision:
    """What a policy answers. ASSIGN names a slot; REJECT an HTTP status and when to come back."""

    verdict: Verdict
    reason: str
    slot: int = NO_SLOT
    status: int = 200
    retry_after_s: float = 0.0
    inputs: dict[str, float] = field(default_factory=dict)


def assign(slot: int, reason: str, inputs: dict[str, float] | None = None) -> Decision:
    return Decision(Verdict.ASSIGN, reason, slot=slot, inputs=inputs or {})


def wait(reason: str) -> Decision:
    return Decision(Verdict.WAIT, reason)


def reject(status: int, reason: str, retry_after_s: float) -> Decision:
    return Decision(Verdict.REJECT, reason, status=status, retry_after_s=retry_after_s)
