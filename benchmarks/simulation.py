"""One simulated run: a workload, a deployment, and the very Dispatcher that serves, under a simulated clock."""

from __future__ import annotations

import heapq
import itertools
import math
import random
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from balancer.admission import Dispatcher
from balancer.cost import CostEstimator, Prompt
from balancer.knobs import Knobs
from balancer.readings import Decision, Snapshot, Verdict
from benchmarks.engine_model import Curves
from benchmarks.engine_sim import Deployment, Device, Engine, Request, Sampler
from benchmarks.workloads import Workload

# How often the route service looks at the board while nothing else makes it.
TICK_S = 0.02
LEARN_S = 0.1
SAMPLE_S = 0.1
# Clients of a closed loop do not start at one instant.
RAMP_S = 0.2
# A prompt's bytes for each token scatter so much around their mean, which the estimator must find.
TRUE_BYTES_PER_TOKEN = 4.4
BYTES_SCATTER = 0.1

SHARED_START = "The prompt that many share begins with these words."
# With fewer requests than these for each active replica, one more or less is a large share of the mean.
ENOUGH_REQUESTS = 8

_ARRIVAL, _STEP, _TICK, _SAMPLE, _CLIENTS = range(5)


@dataclass(frozen=True, slots=True)
class Slo:
    """A request counts for goodput when its first token and its pace keep these."""

    ttft_s: float = 1.0
    tpot_s: float = 0.05


@dataclass(frozen=True, slots=True)
class Case:
    """Everything that determines a run. What happens before `warmup_s` is not counted."""

    deployment: Deployment
    workload: Workload
    knobs: Knobs
    seconds: float
    warmup_s: float = 0.0
    seed: int = 1
    slo: Slo = field(default_factory=Slo)


@dataclass(slots=True)
class Result:
    """What a run showed. Times in seconds; `timeline` rows are (second, active, output tokens/s, KV ratio, waiting).

    `load_ratio_max` is the most requests that one active replica held, over their mean; `preempted_most` how often the
    same request was preempted at most, `stalled_s` the longest that a preemption left one without a token.
    """

    throughput: float
    prompt_throughput: float
    ttft_p50: float
    ttft_p99: float
    tpot_p50: float
    tpot_p99: float
    goodput: float
    completed: int
    rejected: int
    started: int
    preempted_requests: int
    preemptions: int
    preempted_most: int
    stalled_s: float
    kv_mean: float
    kv_max: float
    active_mean: float
    changes: int
    reversals: int
    load_ratio_max: float
    lost: int
    timeline: list[tuple[float, int, float, float, int]]

    def summary(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if name != "timeline"}


class Simulation:
    """Runs one case. Not reusable."""

    def __init__(self, case: Case, curves: Curves) -> None:
        self.case = case
        self.rng = random.Random(case.seed)
        self.now_s = 0.0
        self.device = Device(curves)
        self.engines = [Engine(i, case.deployment, self.device) for i in range(case.deployment.replicas)]
        self.sampler = Sampler(self.engines)
        knobs = replace(case.knobs, weights_read_s=case.deployment.weights_read_s)
        self.dispatcher = Dispatcher(knobs, random.Random(case.seed + 1))
        self.estimator = CostEstimator(case.knobs)
        self.requests: list[Request] = []
        self.waiting: dict[str, Request] = {}
        self.clients = 0
        self.wanted_clients = 0
        self.timeline: list[tuple[float, int, float, float, int]] = []
        self.output_at_warmup = self.prompt_at_warmup = 0
        self.load_ratios: list[float] = []
        self._last_output = 0
        self._learn_at_s = 0.0
        self._order = itertools.count()
        self._events: list[tuple[float, int, int, Any]] = []

    def run(self) -> Result:
        """Play the case to its end."""
        for kind, at, payload in self._starting_events():
            self._at(at, kind, payload)
        handlers = (self._arrive, self._step_ended, self._tick, self._sample, self._set_clients)
        while self._events:
            at, _, kind, payload = heapq.heappop(self._events)
            if at > self.case.seconds:
                break
            self.now_s = at
            handlers[kind](payload)
        return self._result()

    def _starting_events(self) -> list[tuple[int, float, Any]]:
        case = self.case
        arrivals = case.workload.open_arrivals(case.seconds, self.rng)
        events: list[tuple[int, float, Any]] = [(_ARRIVAL, at, self._request(at, p, o)) for at, p, o in arrivals]
        events += [(_CLIENTS, at, n) for at, n in case.workload.clients]
        return [*events, (_TICK, 0.0, None), (_SAMPLE, 0.0, None)]

    def _at(self, at: float, kind: int, payload: Any) -> None:
        heapq.heappush(self._events, (at, next(self._order), kind, payload))

    def _request(self, at: float, prompt: int, output: int, client: int = -1) -> Request:
        deployment = self.case.deployment
        longest = deployment.kv_tokens // 2
        request = Request(len(self.requests), at, min(prompt, longest), min(output, longest), client)
        self.requests.append(request)
        return request

    # ------------------------------------------------------------ events

    def _set_clients(self, wanted: int) -> None:
        self.wanted_clients = wanted
        while self.clients < wanted:
            self.clients += 1
            self._next_of_client(self.now_s + self.rng.uniform(0.0, RAMP_S))

    def _next_of_client(self, at: float) -> None:
        if self.clients > self.wanted_clients:
            self.clients -= 1
            return
        self._at(at, _ARRIVAL, self._request(at, *self.case.workload.lengths.draw(self.rng), client=1))

    def _arrive(self, request: Request) -> None:
        request.cost = self._cost(request)
        snapshot = self._snapshot()
        self._apply(request, self.dispatcher.submit(str(request.index), request.cost, snapshot))

    def _cost(self, request: Request) -> Any:
        scatter = self.rng.gauss(1.0, BYTES_SCATTER)
        text_bytes = max(1, round(request.prompt * TRUE_BYTES_PER_TOKEN * scatter))
        cap = 1 << max(4, (request.output - 1).bit_length())  # clients ask for a round number above what comes
        shared = self.case.workload.shared_prefix_ratio
        alike = shared > 0.0 and self.rng.random() < shared
        return self.estimator.cost(Prompt(text_bytes=text_bytes, start=SHARED_START if alike else ""), cap)

    def _apply(self, request: Request, decision: Decision) -> None:
        if decision.verdict is Verdict.WAIT:
            self.waiting[str(request.index)] = request
            return
        self.waiting.pop(str(request.index), None)
        if decision.verdict is Verdict.REJECT:
            request.rejected = decision.status
            request.ended_s = self.now_s
            if request.client >= 0:
                self._next_of_client(self.now_s + decision.retry_after_s)
            return
        self._give(request, decision.slot)

    def _give(self, request: Request, slot: int) -> None:
        assert request.cost is not None
        engine = self.engines[slot]
        request.slot = slot
        request.tokens = request.cost.tokens
        cut = engine.accept(request, self.now_s)
        if cut:
            self._at(engine.ends_s, _STEP, (engine, engine.version))
        elif not engine.like_steps:
            self._begin(engine)

    def _begin(self, engine: Engine) -> None:
        if engine.begin(self.now_s):
            self._at(engine.ends_s, _STEP, (engine, engine.version))

    def _step_ended(self, payload: tuple[Engine, int]) -> None:
        engine, version = payload
        if version != engine.version:
            return
        ended = engine.end(self.now_s)
        for request in ended:
            if request.client >= 0:
                self._next_of_client(self.now_s)
        if ended and self.waiting:
            self._release()
        if not engine.like_steps:
            self._begin(engine)

    def _tick(self, _: None) -> None:
        if self.now_s >= self._learn_at_s:
            self._learn_at_s = self.now_s + LEARN_S
            self.estimator.learn(self._snapshot())
        if self.case.knobs.policy == "gpu_aware":
            self._release()
        self._at(self.now_s + TICK_S, _TICK, None)

    def _release(self) -> None:
        for request_id, decision in self.dispatcher.release(self._snapshot()):
            self._apply(self.waiting[request_id], decision)

    def _snapshot(self) -> Snapshot:
        self.sampler.sample(self.now_s)
        gpus = (self.sampler.reading,) if self.sampler.reading else ()
        return Snapshot(self.now_s, tuple([e.reading(self.now_s) for e in self.engines]), gpus)

    def _sample(self, _: None) -> None:
        output = sum(e.output_total for e in self.engines)
        kv = sum(e.kv for e in self.engines) / sum(e.kv_total for e in self.engines)
        rate = (output - self._last_output) / SAMPLE_S
        self.timeline.append((round(self.now_s, 3), len(self.dispatcher.active), rate, kv, len(self.waiting)))
        self._last_output = output
        loads = [self.engines[slot].in_flight for slot in self.dispatcher.active]
        if self.now_s > self.case.warmup_s and sum(loads) >= ENOUGH_REQUESTS * len(loads) > 0:
            self.load_ratios.append(max(loads) / mean(loads))
        if self.now_s <= self.case.warmup_s:
            self.output_at_warmup, self.prompt_at_warmup = output, sum(e.prompt_total for e in self.engines)
        self._at(self.now_s + SAMPLE_S, _SAMPLE, None)

    # ------------------------------------------------------------ results

    def _result(self) -> Result:
        case, end_s = self.case, min(self.now_s, self.case.seconds)
        counted_s = max(1e-9, end_s - case.warmup_s)
        counted = [r for r in self.requests if case.warmup_s <= r.arrived_s < end_s and not r.rejected]
        ended = [r for r in counted if not math.isnan(r.ended_s)]
        # A first token that has not come by the end took at least until then.
        ttft = sorted((end_s if math.isnan(r.first_s) else r.first_s) - r.arrived_s for r in counted)
        tpot = sorted((r.ended_s - r.first_s) / (r.output - 1) for r in ended if r.output > 1)
        window = [row for row in self.timeline if row[0] >= case.warmup_s]
        actives = [row[1] for row in self.timeline]
        return Result(
            throughput=(sum(e.output_total for e in self.engines) - self.output_at_warmup) / counted_s,
            prompt_throughput=(sum(e.prompt_total for e in self.engines) - self.prompt_at_warmup) / counted_s,
            ttft_p50=quantile(ttft, 0.5), ttft_p99=quantile(ttft, 0.99),
            tpot_p50=quantile(tpot, 0.5), tpot_p99=quantile(tpot, 0.99),
            goodput=sum(self._good(r) for r in ended) / counted_s,
            completed=len(ended), rejected=sum(r.rejected > 0 for r in self.requests),
            started=sum(not math.isnan(r.first_s) for r in self.requests),
            preempted_requests=sum(r.preempted > 0 for r in self.requests),
            preemptions=sum(e.preemptions for e in self.engines),
            preempted_most=max((r.preempted for r in self.requests), default=0),
            stalled_s=max((r.stalled_s for r in self.requests), default=0.0),
            kv_mean=mean([row[3] for row in window]), kv_max=max((row[3] for row in window), default=0.0),
            active_mean=mean([row[1] for row in window]), changes=changes(actives), reversals=reversals(actives),
            load_ratio_max=max(self.load_ratios, default=math.nan), lost=self._lost(), timeline=self.timeline,
        )  # fmt: skip

    def _good(self, r: Request) -> bool:
        tpot = (r.ended_s - r.first_s) / max(1, r.output - 1)
        return r.first_s - r.arrived_s <= self.case.slo.ttft_s and tpot <= self.case.slo.tpot_s

    def _lost(self) -> int:
        """Requests that are neither ended, nor in an engine, nor waiting: must be none."""
        arrived = sum(r.arrived_s <= self.now_s and r.cost is not None for r in self.requests)
        ended = sum(not math.isnan(r.ended_s) for r in self.requests)
        return arrived - ended - sum(e.in_flight for e in self.engines) - len(self.waiting)


def quantile(ordered: Sequence[float], q: float) -> float:
    return ordered[min(len(ordered) - 1, int(q * len(ordered)))] if ordered else math.nan


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def changes(values: Sequence[int]) -> int:
    return sum(a != b for a, b in itertools.pairwise(values))


def reversals(values: Sequence[int]) -> int:
    """How often the direction of change turned round."""
    signs = [b > a for a, b in itertools.pairwise(values) if a != b]
    return sum(a != b for a, b in itertools.pairwise(signs))


def rate_between(timeline: Sequence[tuple[float, int, float, float, int]], start_s: float, end_s: float) -> float:
    """Mean output tokens/s between two moments of a timeline."""
    times = [row[0] for row in timeline]
    return mean([row[2] for row in timeline[bisect_right(times, start_s) : bisect_right(times, end_s)]])
