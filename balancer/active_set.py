"""How many replicas of a GPU should receive new work: what the measured step times say.

Every quarter of a second each busy replica yields one observation: how long its steps took, its batch, and how many
replicas were busy beside it. `balancer.step_model` is fitted to them. For a batch of n over k replicas it predicts
n / step tokens a second, and so the best k. A small model is mostly `own`: more replicas pay. A large one is mostly
`shared`, the reading of its weights repeated by each replica: one is best. The SM reading tells the two apart while
only one replica was ever at work; every change then measures what it bought, and the fit is bent by that.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from balancer.front_end import FrontEnd
from balancer.knobs import Knobs
from balancer.readings import GpuReading, GpuSource, ReplicaReading
from balancer.step_model import StepModel

# A step of 3 to 30 ms is seen 8 to 80 times in this time: enough for a mean, short against a change of load.
WINDOW_S = 0.25
# How often batches are sampled within a window.
SAMPLE_S = 0.01
# Fewer steps than this in a window say more about prefill than about decode.
MIN_STEPS = 6.0
# How fast prompts and requests for each output token follow: a mean of about the last 20 windows.
RATIO_BLEND = 0.05
# Beyond these another replica has nothing left to use: at 95 % SM, four OPT-125m engines already did best on an H200,
# and 85 % of DRAM bandwidth is what a streaming kernel gets.
SM_FULL = 0.95
DRAM_FULL = 0.85
# A change of demand by half is news: the set follows at once instead of waiting for its dwell. Among few requests,
# chance alone doubles their number.
NEWS_RATIO = 1.5
FEW_REQUESTS = 8.0
# Between changes for throughput's sake: two windows, so that what the last one bought was measured.
DWELL_S = 2 * WINDOW_S
# A smaller set takes effect only as answers end, and a mistake is paid by all: it promises twice as much or lasts so.
SHRINK_PATIENCE = 2.0
# A lead below `Knobs.gain_ratio` is followed when it was there in eight windows on end.
LASTING_S = 8 * WINDOW_S
# A neighbouring size that was never measured is tried when the fit, which errs by about so much, says it loses less.
UNTRIED_RATIO = 0.05
# What it is worth to the clients that nobody waits for a place: first tokens come seconds earlier. The whole of it
# where over a second 2 % of the requests wait (their p99 is made of these), or at one moment a tenth does.
WAITING_COSTS = 0.15
WAITING_HURTS = 50.0
MANY_WAIT = 10.0
# A smaller set must hold the highest demand of about this time, or the next fluctuation would make it grow again.
PEAK_MEMORY_S = 5.0
# A size at which requests waited is avoided for this long, while demand is not much lower than it was then.
HURT_MEMORY_S = 60.0
HURT_DEMAND_RATIO = 0.8
# Patience stops doubling here: 32 s between changes that noise alone makes.
MOST_TURNS = 4


@dataclass(slots=True)
class Meter:
    """One replica's counters since its window began."""

    replica_id: str
    started_s: float
    output_tokens: int
    prompt_tokens: int
    requests: int
    front_end_cpu_s: float
    seen_s: float
    sequence_seconds: float = 0.0
    idle: bool = False


def start_meter(reading: ReplicaReading, now_s: float) -> Meter:
    return Meter(
        reading.replica_id, now_s, reading.output_tokens_total, reading.prompt_tokens_total, reading.received_total,
        reading.front_end_cpu_s_total, now_s,
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Demand:
    """What a GPU is asked for now: requests in all, those of them that wait for room, the most that an active replica
    has (a new one has few, and is not full), and a guess of how many it could have."""

    requests: float
    waiting: float
    held: float
    room: float


@dataclass(frozen=True, slots=True)
class Hurt:
    """Requests waited for long: when, under what demand, and how many the fullest replica had."""

    at_s: float
    demand: float
    held: float


def is_news(requests: float, before: float) -> bool:
    """Whether demand changed so much that it cannot wait for the next look."""
    high, low = max(requests, before), min(requests, before)
    return high + FEW_REQUESTS > NEWS_RATIO * (low + FEW_REQUESTS)


class ActiveSet:
    """The number of active replicas of one GPU. Time is the snapshots'; nothing here reads a clock."""

    def __init__(self, knobs: Knobs) -> None:
        self.knobs = knobs
        self.size = 1
        read_s = knobs.weights_read_s
        self.model = StepModel() if read_s is None else StepModel.foreseen(read_s)
        self.front_end = FrontEnd()
        self.prompt_ratio = 1.0  # prompt tokens for each output token, as measured
        self.request_ratio = 0.0  # and requests
        self._meters: dict[int, Meter] = {}
        self._busy_seconds = 0.0
        self._busy_before = 0.0
        self._sm: list[tuple[float, float]] = []
        self._window_s = -math.inf
        self._sampled_s = -math.inf
        self._changed_s = -math.inf
        self._demand = 0.0
        self._demand_s = -math.inf
        self._demand_at_change = 0.0
        self._peak = 0.0
        self._waited = 0.0
        self._room = 1.0
        self._hurt: dict[int, Hurt] = {}
        self._news_s = -math.inf
        self._turns = 0
        self._grew = True
        self._leading = 0
        self._leads_since_s = -math.inf

    def due(self, now_s: float) -> bool:
        """Whether it is time to `sample`."""
        return now_s - self._sampled_s >= SAMPLE_S

    def sample(self, now_s: float, replicas: Sequence[ReplicaReading], gpu: GpuReading | None) -> None:
        """Follow the counters of the GPU's ready replicas; closes a window every WINDOW_S."""
        gap_s = now_s - self._sampled_s
        busy = sum(r.running_requests > 0 for r in replicas)
        self._busy_seconds += busy * gap_s if gap_s < WINDOW_S else 0.0
        self._sampled_s = now_s
        for reading in replicas:
            self._follow(reading, now_s)
        guard = self._guard(gpu, now_s)
        self._sm = [*self._sm, guard] if guard else []
        if now_s - self._window_s >= WINDOW_S:
            self._close_window(now_s, replicas)

    def _follow(self, reading: ReplicaReading, now_s: float) -> None:
        meter = self._meters.get(reading.slot)
        if meter is None or meter.replica_id != reading.replica_id:
            self._meters[reading.slot] = start_meter(reading, now_s)
            return
        meter.sequence_seconds += reading.running_requests * (now_s - meter.seen_s)
        meter.idle = meter.idle or reading.running_requests == 0
        meter.seen_s = now_s

    def _guard(self, gpu: GpuReading | None, now_s: float) -> tuple[float, float] | None:
        """SM and DRAM ratios, where both are fresh and counted by the device (GPM)."""
        if gpu is None or gpu.source is not GpuSource.GPM or now_s - gpu.taken_at_s > self.knobs.stale_after_s:
            return None
        if gpu.sm_ratio is None:
            return None
        return gpu.sm_ratio, gpu.dram_bandwidth_ratio or 0.0

    def _close_window(self, now_s: float, replicas: Sequence[ReplicaReading]) -> None:
        length_s = now_s - self._window_s
        if length_s < 2 * WINDOW_S:
            busy = self._busy_seconds / length_s
            # The counters lag by a tenth of a second or two: the first busy window still shows the calm before it.
            steady = abs(busy - self._busy_before) < 0.5
            sm = sum(s for s, _ in self._sm) / len(self._sm) if self._sm and steady else None
            for reading in replicas:
                self._measure(reading, now_s, busy, sm)
            self.model.fit()
        self._meters = {r.slot: start_meter(r, now_s) for r in replicas}
        self._busy_before = self._busy_seconds / max(length_s, WINDOW_S)
        self._window_s, self._busy_seconds = now_s, 0.0
        self._sm = self._sm[-1:]

    def _measure(self, reading: ReplicaReading, now_s: float, busy: float, sm: float | None) -> None:
        meter = self._meters[reading.slot]
        made = reading.output_tokens_total - meter.output_tokens
        length_s = now_s - meter.started_s
        if meter.idle or made <= 0 or length_s < WINDOW_S / 2:
            return
        batch = max(1.0, meter.sequence_seconds / length_s)
        steps = made / batch
        prompts = max(0, reading.prompt_tokens_total - meter.prompt_tokens)
        if steps < MIN_STEPS:
            return
        requests = max(0, reading.received_total - meter.requests)
        self.prompt_ratio += RATIO_BLEND * (prompts / made - self.prompt_ratio)
        self.request_ratio += RATIO_BLEND * (requests / made - self.request_ratio)
        self.model.observe(batch, max(1.0, busy), prompts / steps, length_s / steps, sm)
        cpu_s = reading.front_end_cpu_s_total - meter.front_end_cpu_s
        self.front_end.observe(batch, requests / steps, cpu_s / steps, length_s / max(1.0, busy))

    def resize(self, now_s: float, demand: Demand, ready: int) -> int:
        """The number of replicas that should receive new work, of `ready` ones."""
        if self.knobs.active_set is not None:
            self.size = max(1, min(self.knobs.active_set, ready))
            return self.size
        size = max(1, min(self.size, ready))
        news = demand.requests > self._demand and is_news(demand.requests, self._demand)
        if size == self.size and now_s - self._demand_s < SAMPLE_S and not news:
            return size
        self.size = size
        self._track(now_s, demand, at_once=news)
        news = is_news(self._demand, self._demand_at_change)
        if news:
            self._turns, self._news_s = self._turns // 2, now_s
        patience_s = DWELL_S if self._pain(self.size, demand) >= 1.0 else DWELL_S * self._calm
        if news or now_s - self._changed_s >= patience_s:
            self._change(now_s, self._wanted(demand, ready))
        return self.size

    @property
    def _calm(self) -> float:
        """Each change of direction under a steady demand doubles the patience: two sizes that do equally well."""
        return float(1 << min(self._turns, MOST_TURNS))

    def _track(self, now_s: float, demand: Demand, at_once: bool) -> None:
        """Demand is smoothed over a second, but a great rise is believed at once, and a peak is forgotten slowly."""
        gap_s = min(now_s - self._demand_s, 60.0)
        self._demand_s = now_s
        blend = 1.0 - math.exp(-gap_s)
        self._demand += (1.0 if at_once else blend) * (demand.requests - self._demand)
        self._peak = max(demand.requests, self._peak * math.exp(-gap_s / PEAK_MEMORY_S))
        self._waited += blend * (demand.waiting / max(1.0, demand.requests) - self._waited)
        self._room = max(1.0, demand.held, demand.room)
        if self._waited * WAITING_HURTS >= 1.0:
            self._hurt[self.size] = Hurt(now_s, self._demand, max(1.0, demand.held))

    def _change(self, now_s: float, size: int) -> None:
        self._demand_at_change = max(1.0, self._demand)
        if size != self.size:
            self._turns += (size > self.size) is not self._grew
            self._grew = size > self.size
            self.size, self._changed_s = size, now_s

    def _wanted(self, demand: Demand, ready: int) -> int:
        """The present size while it does about as well as any other, else the best."""
        if not any(self.model.terms):
            return self._holding(ready) if demand.waiting else self.size
        sizes = range(1, self._limit(ready) + 1)
        worth = {k: self._worth(k, demand) for k in sizes}
        best = max(sizes, key=worth.__getitem__)
        needed = self.knobs.gain_ratio * (SHRINK_PATIENCE if best < self.size else 1.0)
        clear = worth[self.size] < worth[best] * (1.0 - needed)
        if clear or self._lasting(best):
            return best
        return self._untried(worth) if best == self.size and self.model.most_replicas_seen else self.size

    def _worth(self, size: int, demand: Demand) -> float:
        """Tokens a second, less a share where requests would have to wait for room."""
        rate = self.predict(size)
        return rate * (1.0 - WAITING_COSTS * min(1.0, self._pain(size, demand)))

    def _pain(self, size: int, demand: Demand) -> float:
        """How much requests wait for room, 1 being much: as seen at the present size, as foreseen at any other."""
        if size == self.size:
            return max(self._waited * WAITING_HURTS, demand.waiting / max(1.0, demand.requests) * MANY_WAIT)
        if self._remembered(size):
            return 1.0
        held = size * self._room
        asked = self._demand if size > self.size else self._peak
        return max(0.0, 1.0 - held / max(1.0, asked)) * MANY_WAIT

    def _untried(self, worth: dict[int, float]) -> int:
        """A neighbour never measured, and predicted nearly as good, once all has been calm: to know, not to guess."""
        if self._demand_s - max(self._changed_s, self._news_s) < LASTING_S * self._calm:
            return self.size
        full, enough = self._full(), worth[self.size] * (1.0 - UNTRIED_RATIO)
        for size in (self.size - 1, self.size if full else self.size + 1):
            if worth.get(size, 0.0) >= enough and not self.model.measured(size):
                return size
        return self.size

    def _lasting(self, best: int) -> bool:
        """Whether smaller sizes, or larger ones, have led for so long that even a small lead is no noise.

        Which of them leads may change: beside each other they differ by less than the noise.
        """
        side = (best > self.size) - (best < self.size)
        if side == 0 or side != self._leading:
            self._leading, self._leads_since_s = side, self._demand_s
        needed_s = LASTING_S * self._calm * (SHRINK_PATIENCE if best < self.size else 1.0)
        return best != self.size and self._demand_s - self._leads_since_s >= needed_s

    def _holding(self, ready: int) -> int:
        """The fewest replicas that hold the whole demand at once."""
        return max(self.size, min(ready, math.ceil(self._demand / self._room)))

    def _limit(self, ready: int) -> int:
        """How far growth may go: as far as holds the demand; for throughput's sake at most twice what was ever
        measured, and nowhere on a full device."""
        foreseen = ready if not self.model.most_replicas_seen else 2 * self.model.most_replicas_seen
        known = self.size if self._full() else foreseen
        return min(ready, max(known, self.size, self._holding(ready)))

    def _full(self) -> bool:
        """Whether the device's last reading leaves another replica nothing."""
        return bool(self._sm) and (self._sm[-1][0] >= SM_FULL or self._sm[-1][1] >= DRAM_FULL)

    def _remembered(self, size: int) -> Hurt | None:
        """When lately, under a demand like this, requests had to wait at this smaller size, or at one between."""
        for hurt_size, hurt in self._hurt.items():
            recent = self._demand_s - hurt.at_s < HURT_MEMORY_S
            if size <= hurt_size < self.size and recent and self._peak >= HURT_DEMAND_RATIO * hurt.demand:
                return hurt
        return None

    def predict(self, replicas: int) -> float:
        """Output tokens a second of `replicas` active ones under the present demand."""
        hurt = self._remembered(replicas)
        room = min(self._room, hurt.held) if hurt else self._room
        running = min(max(self._demand, 1.0), replicas * room)
        used = min(replicas, running)
        batch = running / used
        engine_s = self.model.step_s(batch, used, batch * self.prompt_ratio)
        return running / max(1e-9, engine_s, self.front_end.step_s(batch, batch * self.request_ratio))
