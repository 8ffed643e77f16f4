"""N vLLM engines on one simulated GPU: continuous batching, chunked prefill, paged KV cache, preemption by recompute.

An event is the end of a step, or of several like steps in which nothing can change (no prompt waits, nobody ends);
an arrival cuts such a run short. Step times come from `benchmarks.engine_model`, with each engine's share of time on
the GPU taken from its own last steps.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections import deque
from dataclasses import dataclass

from balancer.kv_peak import expected_remaining, peak_tokens
from balancer.readings import GpuReading, GpuSource, ReplicaReading, ReplicaState, RequestCost
from benchmarks.engine_model import (
    HBM_BYTES_PER_S,
    HBM_PEAK_BYTES_PER_S,
    LATENCY_SHARE,
    SHARPNESS,
    Curves,
)

KV_BLOCK_TOKENS = 16
# Half a block is lost at the end of each sequence.
BLOCK_LOSS_TOKENS = KV_BLOCK_TOKENS // 2
# vLLM's max_num_batched_tokens for its server on a card of this size.
STEP_BUDGET_TOKENS = 8192
# Like steps taken as one event, at most: so far apart are the moments at which engines notice each other.
MOST_LIKE_STEPS = 8
# Weight of the newest step in an engine's share of time on the GPU, and time constant of the GPU's readings.
SHARE_BLEND = 0.5
READING_S = 0.1
HEARTBEAT_S = 0.25
PEAK_EVERY_S = 0.1


@dataclass(frozen=True, slots=True)
class Deployment:
    """Replicas of one model on one GPU, as deployed: `kv_tokens` each."""

    model: str
    replicas: int
    kv_tokens: int
    max_running: int = 256
    forecast: bool = True  # whether replicas tell the peak of their KV cache
    weights_read_s: float | None = None  # what the balancer is told; see Knobs


class Request:
    """One request and what became of it; `made` counts its output tokens so far, `stalled_s` is the longest time that a
    preemption kept it without another."""

    __slots__ = (
        "arrived_s", "client", "context", "cost", "ended_s", "first_s", "index", "made", "output", "preempted",
        "prompt", "rejected", "since_step", "slot", "stalled_s", "stopped_s", "tokens",
    )  # fmt: skip

    def __init__(self, index: int, arrived_s: float, prompt: int, output: int, client: int = -1) -> None:
        self.index = index
        self.arrived_s = arrived_s
        self.prompt = prompt
        self.output = output
        self.client = client
        self.cost: RequestCost | None = None
        self.first_s = math.nan
        self.ended_s = math.nan
        self.rejected = 0
        self.preempted = 0
        self.stopped_s = math.nan
        self.stalled_s = 0.0
        self.made = 0
        self.slot = -1
        self.tokens = 0
        self.context = 0
        self.since_step = -1


class Device:
    """What the engines share: the sums over engines of their share of time on the GPU, and of demand."""

    def __init__(self, curves: Curves) -> None:
        self.curves = curves
        self.on_gpu = 0.0
        self.demand = 0.0
        self.busy = 0


class Engine:
    """One engine. `begin` starts a step and says when it ends; `end` completes it and returns who finished."""

    def __init__(self, slot: int, deployment: Deployment, device: Device) -> None:
        self.slot = slot
        self.name = f"replica-{slot}"
        self.device = device
        self.kv_total = deployment.kv_tokens
        self.max_running = deployment.max_running
        self.forecast = deployment.forecast
        self.waiting: deque[Request] = deque()
        self.prefilling: deque[tuple[Request, int]] = deque()
        self.decoding: list[tuple[int, int, Request]] = []
        self.admitted: list[Request] = []
        self.decoders = 0
        self.kv = 0
        self.steps = 0
        self.like_steps = 0
        self.step_s = 0.0
        self.began_s = 0.0
        self.ends_s = math.nan
        self.version = 0
        self.prompts_done: list[Request] = []
        self.step_prompts = 0
        self.share = 0.0
        self.use = 0.0
        self.streamed_s = 0.0
        self.in_flight = 0
        self.in_flight_tokens = 0
        self.kv_peak = 0
        self._peak_at_s = -math.inf
        self.prompt_total = 0
        self.output_total = 0
        self.preemptions = 0
        self.received = 0
        self.finished = 0
        self._reading: ReplicaReading | None = None
        self._changed = True

    def accept(self, request: Request, now_s: float) -> bool:
        """Queue a request; True when a run of like steps was cut short (`ends_s` is new, under a new version)."""
        self.waiting.append(request)
        self.in_flight += 1
        self.in_flight_tokens += request.tokens
        self.kv_peak += request.tokens
        self.received += 1
        self._changed = True
        if self.like_steps > 1:
            done = max(1, math.ceil((now_s - self.began_s) / self.step_s))
            if done < self.like_steps:
                self.like_steps = done
                self.ends_s = self.began_s + done * self.step_s
                self.version += 1
                return True
        return False

    def begin(self, now_s: float) -> bool:
        """Start the next step; False when there is nothing to do."""
        self._make_room(now_s)
        prompts = self._schedule_prompts()
        batch = self.decoders
        self._changed = True
        if not batch and not prompts:
            self._leave_gpu()
            self.like_steps = 0
            return False
        self.step_prompts = prompts
        self.like_steps = 1 if prompts or self.waiting else self._steps_alike(batch)
        self.step_s = self._cost(batch + len(self.prompts_done), self.kv, prompts)
        self.began_s = now_s
        self.ends_s = now_s + self.like_steps * self.step_s
        self.version += 1
        return True

    def _steps_alike(self, batch: int) -> int:
        until_end = self.decoding[0][0] - self.steps
        until_full = (self.kv_total - self.kv) // batch
        return max(1, min(MOST_LIKE_STEPS, until_end, until_full))

    def _make_room(self, now_s: float) -> None:
        """Preempt the newest until the next step's tokens fit (vLLM's recompute preemption)."""
        while self.kv + self.decoders > self.kv_total and len(self.admitted) > 1:
            self._preempt(self.admitted.pop(), now_s)

    def _preempt(self, request: Request, now_s: float) -> None:
        if request.since_step < 0:
            self.prefilling = deque((r, left) for r, left in self.prefilling if r is not request)
        else:
            made = self.steps - request.since_step
            request.made += made
            request.context += made
            self.decoding = [entry for entry in self.decoding if entry[2] is not request]
            heapq.heapify(self.decoding)
            self.decoders -= 1
        self.kv -= request.context + BLOCK_LOSS_TOKENS
        request.preempted += 1
        if math.isnan(request.stopped_s):
            request.stopped_s = now_s
        request.since_step = -1
        self.preemptions += 1
        self.waiting.appendleft(request)

    def _schedule_prompts(self) -> int:
        budget = STEP_BUDGET_TOKENS - self.decoders
        total = 0
        self.prompts_done = []
        while budget > 0:
            if not self.prefilling and not self._admit():
                break
            request, left = self.prefilling.popleft()
            chunk = min(left, budget)
            budget -= chunk
            total += chunk
            if chunk < left:
                self.prefilling.appendleft((request, left - chunk))
                break
            self.prompts_done.append(request)
        return total

    def _admit(self) -> bool:
        if not self.waiting or self.decoders + len(self.prompts_done) >= self.max_running:
            return False
        request = self.waiting[0]
        context = request.prompt + request.made
        if self.kv + context + BLOCK_LOSS_TOKENS + self.decoders > self.kv_total and self.admitted:
            return False
        self.waiting.popleft()
        request.context = context
        self.kv += context + BLOCK_LOSS_TOKENS
        self.admitted.append(request)
        self.prefilling.append((request, context))
        return True

    def _cost(self, batch: int, context: int, prompts: int) -> float:
        device, c = self.device, self.device.curves
        if not self.share:
            device.busy += 1
        host_s = c.host_s(batch, prompts, device.busy)
        streamed_s = c.weights_s + c.kv_token_s * context
        work_s = streamed_s + c.sequence_s * batch + c.prompt_s * prompts
        alone_s = c.latency_s + work_s
        use = (c.latency_s * LATENCY_SHARE + work_s) / alone_s
        others = device.on_gpu - self.share
        demand = use + device.demand - self.share * self.use
        shared: float = (1.0 + demand**SHARPNESS) ** (1.0 / SHARPNESS) * (1.0 + c.interference * others)
        step_s = host_s + alone_s * shared
        share = self.share + SHARE_BLEND * (1.0 - host_s / step_s - self.share) if self.share else 1.0 - host_s / step_s
        device.on_gpu = others + share
        device.demand += share * use - self.share * self.use
        self.share, self.use = share, use
        self.streamed_s = streamed_s / step_s
        return step_s

    def _leave_gpu(self) -> None:
        if self.share:
            self.device.on_gpu = max(0.0, self.device.on_gpu - self.share)
            self.device.demand = max(0.0, self.device.demand - self.share * self.use)
            self.device.busy -= 1
        self.share = self.use = self.streamed_s = 0.0

    def end(self, now_s: float) -> list[Request]:
        """Complete the step: tokens made, first tokens of finished prompts, and the requests that ended."""
        made = self.like_steps * self.decoders
        self.steps += self.like_steps
        self.output_total += made
        self.kv += made
        self.prompt_total += self.step_prompts
        self.like_steps = self.step_prompts = 0
        for request in self.prompts_done:
            self._first_token(request, now_s)
        self.prompts_done = []
        ended = []
        while self.decoding and self.decoding[0][0] <= self.steps:
            ended.append(self._finish(heapq.heappop(self.decoding)[2], now_s))
        self._changed = True
        return ended

    def _first_token(self, request: Request, now_s: float) -> None:
        if request.made == 0:
            request.first_s = now_s
        else:
            request.stalled_s = max(request.stalled_s, now_s - request.stopped_s)
        request.stopped_s = math.nan
        request.made += 1
        request.context += 1
        request.since_step = self.steps
        self.output_total += 1
        self.kv += 1
        self.decoders += 1
        heapq.heappush(self.decoding, (self.steps + request.output - request.made, request.index, request))

    def _finish(self, request: Request, now_s: float) -> Request:
        self.kv -= request.context + self.steps - request.since_step + BLOCK_LOSS_TOKENS
        request.made = request.output
        request.ended_s = now_s
        self.decoders -= 1
        self.admitted.remove(request)
        self.in_flight -= 1
        self.in_flight_tokens -= request.tokens
        self.finished += 1
        return request

    def reading(self, now_s: float) -> ReplicaReading:
        """The slot as a replica would have written it at its last step or heartbeat."""
        old = self._reading
        pause_s = self.step_s if self.like_steps > 1 else HEARTBEAT_S
        if old is not None and not self._changed and now_s - old.written_at_s < pause_s:
            return old
        made = int((now_s - self.began_s) / self.step_s) * self.decoders if self.like_steps > 1 else 0
        self._changed = False
        self._reading = ReplicaReading(
            self.slot, self.name, 0, ReplicaState.READY, now_s, self.in_flight, self.in_flight_tokens, 0, 0,
            self.decoders + len(self.prefilling) + len(self.prompts_done), len(self.waiting),
            (self.kv + made) // KV_BLOCK_TOKENS, self.kv_total // KV_BLOCK_TOKENS, KV_BLOCK_TOKENS, self.max_running,
            self.step_s, self.prompt_total, self.output_total + made, self.preemptions, self.received, self.finished,
            kv_tokens_peak=self._peak(now_s),
        )  # fmt: skip
        return self._reading

    def _peak(self, now_s: float) -> int:
        if not self.forecast:
            return 0
        if now_s - self._peak_at_s >= PEAK_EVERY_S:
            self._peak_at_s = now_s
            self.kv_peak = peak_tokens(self._growth())
        return self.kv_peak

    def _growth(self) -> list[tuple[int, int]]:
        steps, grows = self.steps, []
        for request in itertools.chain(self.admitted, self.waiting):
            made = request.made + (steps - request.since_step if request.since_step >= 0 else 0)
            to_come = expected_remaining(request.tokens - request.prompt, made)
            grows.append((to_come, request.prompt + made + BLOCK_LOSS_TOKENS))
        return grows


class Sampler:
    """The GPU's readings: exponential means of SM use and DRAM traffic, written every READING_S / 2."""

    def __init__(self, engines: list[Engine]) -> None:
        self._engines = engines
        self._sm = 0.0
        self._dram = 0.0
        self._at_s = -math.inf
        self.reading: GpuReading | None = None

    def sample(self, now_s: float) -> None:
        gap_s = now_s - self._at_s
        if gap_s < READING_S / 2:
            return
        blend = -math.expm1(-gap_s / READING_S)
        idle = math.prod(1.0 - min(1.0, e.share * e.use) for e in self._engines)
        dram = sum(e.streamed_s for e in self._engines) * HBM_BYTES_PER_S / HBM_PEAK_BYTES_PER_S
        self._sm += blend * (1.0 - idle - self._sm)
        self._dram += blend * (min(1.0, dram) - self._dram)
        self._at_s = now_s
        self.reading = GpuReading(
            0, GpuSource.GPM, self._sm, None, self._dram, 100 << 30, 139 << 30, 4 << 30, None, None, None, now_s
        )
