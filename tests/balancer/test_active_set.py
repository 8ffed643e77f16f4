"""How many replicas work: the fit finds the best number, the set follows it, and does not flap."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from balancer.active_set import ActiveSet, Demand
from balancer.knobs import Knobs
from balancer.readings import GpuReading, GpuSource, ReplicaReading, ReplicaState
from balancer.step_model import StepModel, crowding

Truth = Callable[[float, int], float]
IDLE = ReplicaReading(0, "r", 0, ReplicaState.READY, 0.0, 0, 0, 0, 0, 0, 0, 0, 10_000, 16, 256, 0.005, 0, 0, 0, 0, 0)
TICK_S = 0.025


def small_model(batch: float, replicas: int) -> float:
    """Step seconds like OPT-125m's on an H200: mostly the engine's own loop."""
    return 1.84e-3 + 0.0135e-3 * batch + replicas * (0.1e-3 + 0.0138e-3 * batch)


def large_model(batch: float, replicas: int) -> float:
    """Step seconds like Llama-3-8B's: the weights are read again by each replica."""
    return 0.5e-3 + replicas * (4e-3 + 0.04e-3 * batch)


def gpu(sm_ratio: float | None, taken_at_s: float, source: GpuSource = GpuSource.GPM) -> GpuReading:
    return GpuReading(0, source, sm_ratio, None, 0.2, 0, 1 << 40, 0, None, None, None, taken_at_s)


class Plant:
    """Replicas that share `demand` requests evenly among the active ones, with the step times of `truth`."""

    def __init__(
        self, truth: Truth, ready: int, noise: float = 0.0, sm: bool = True, seed: int = 1, **knobs: Any
    ) -> None:
        self.truth, self.ready, self.noise, self.sm = truth, ready, noise, sm
        self.set = ActiveSet(Knobs(**knobs))
        self.rng = random.Random(seed)
        self.now_s = 1000.0
        self.made = [0.0] * ready
        self.holds = 256.0
        self.token_cpu_s = 0.0
        self.cpu_s = [0.0] * ready
        self.sizes: list[int] = []

    def run(self, seconds: float, demand: float) -> list[int]:
        """Sizes over time."""
        sizes = []
        for _ in range(round(seconds / TICK_S)):
            self.now_s += TICK_S
            self._advance(demand)
            sizes.append(self.set.resize(self.now_s, self._demand(demand), self.ready))
        self.sizes += sizes
        return sizes

    def _demand(self, demand: float) -> Demand:
        held = min(demand, self.set.size * self.holds)
        return Demand(demand, demand - held, held / self.set.size, self.holds)

    def _advance(self, demand: float) -> None:
        size = self.set.size
        batch = min(demand, size * self.holds) / size
        step_s = self.step_s(batch, size)
        pace = batch / step_s * (1.0 + self.rng.uniform(-self.noise, self.noise))
        for slot in range(size):
            made = TICK_S * pace * self._share(slot, size, batch) / batch
            self.made[slot] += made
            self.cpu_s[slot] += made * self.token_cpu_s
        busy = (self.truth(batch, size) - self.truth(batch, 0)) / step_s
        reading = gpu(busy, self.now_s) if self.sm else None
        self.set.sample(self.now_s, [self._reading(slot, size, batch, step_s) for slot in range(self.ready)], reading)

    def _reading(self, slot: int, size: int, batch: float, step_s: float) -> ReplicaReading:
        running = self._share(slot, size, batch) if slot < size else 0
        return replace(
            IDLE, slot=slot, replica_id=f"r{slot}", written_at_s=self.now_s, running_requests=running,
            output_tokens_total=int(self.made[slot]), step_time_s=step_s, front_end_cpu_s_total=self.cpu_s[slot],
        )  # fmt: skip

    def step_s(self, batch: float, size: int) -> float:
        """The engine's step, or the front end's where that is longer."""
        return max(self.truth(batch, size), batch * self.token_cpu_s)

    def _share(self, slot: int, size: int, batch: float) -> int:
        """Whole requests of one replica: the first take what is left over."""
        return int(round(batch * size) // size + (slot < round(batch * size) % size))

    def rate(self, size: int, demand: float) -> float:
        running = min(demand, size * self.holds)
        return running / self.step_s(running / size, size)


def turns(sizes: list[int]) -> int:
    signs = [b > a for a, b in itertools.pairwise(sizes) if a != b]
    return sum(a != b for a, b in itertools.pairwise(signs))


@pytest.mark.parametrize("demand", [4, 32, 128, 400])
@pytest.mark.parametrize(("truth", "ready"), [(small_model, 8), (large_model, 4)])
def test_the_set_settles_within_three_percent_of_the_best_size(truth: Truth, ready: int, demand: int) -> None:
    """For a small and a large model, light and heavy load, from nothing known; the best of those that hold the load."""
    plant = Plant(truth, ready, noise=0.02)
    settled = plant.run(20.0, demand)[-1]
    best = max(plant.rate(k, demand) for k in range(1, ready + 1) if k * plant.holds >= demand)
    assert plant.rate(settled, demand) >= 0.95 * best
    tail = plant.run(10.0, demand)
    assert sum(plant.rate(k, demand) for k in tail) / len(tail) >= 0.965 * best


@pytest.mark.parametrize("sm", [True, False])
def test_without_an_honest_sm_reading_measuring_alone_finds_the_size(sm: bool) -> None:
    """Where there is no GPM, the large model's second replica is tried at most briefly."""
    plant = Plant(large_model, 4, noise=0.02, sm=sm)
    sizes = plant.run(30.0, 64)
    assert sizes[-1] == 1
    assert sum(size > 1 for size in sizes) <= 0.1 * len(sizes)


def test_an_overstating_gpu_reading_is_not_mistaken_for_the_sms() -> None:
    """`utilization.gpu` of 99 % (NVML) does not keep a small model on one replica."""
    active = ActiveSet(Knobs())
    assert active._guard(gpu(0.99, 10.0, GpuSource.NVML), 10.0) is None
    assert active._guard(gpu(0.99, 10.0, GpuSource.HOST), 10.0) is None
    assert active._guard(gpu(0.99, 10.0), 10.0) == (0.99, 0.2)


def test_a_stale_sm_reading_steers_nothing() -> None:
    """A reading older than the limit is no guard."""
    assert ActiveSet(Knobs(stale_after_s=2.0))._guard(gpu(0.99, 5.0), 10.0) is None


def test_a_change_of_load_by_eight_is_followed_within_two_seconds() -> None:
    """Once the low load is known, eight times as much leads to within a tenth of the new best in two seconds."""
    plant = Plant(small_model, 8, noise=0.02)
    plant.run(20.0, 32)
    after = plant.run(10.0, 256)
    best = max(plant.rate(k, 256) for k in range(1, 9))
    assert all(plant.rate(size, 256) >= 0.9 * best for size in after[round(2.0 / TICK_S) :])
    assert turns(after) <= 2
    back = plant.run(10.0, 32)
    best = max(plant.rate(k, 32) for k in range(1, 9))
    assert all(plant.rate(size, 32) >= 0.9 * best for size in back[round(2.0 / TICK_S) :])
    assert turns(back) <= 2


@settings(max_examples=5, deadline=None)
@given(st.floats(0.1e-3, 4e-3), st.floats(1e-6, 5e-5), st.floats(0.0, 6e-3), st.floats(0.0, 5e-5), st.integers(1, 400))
def test_under_a_steady_load_the_set_does_not_flap(
    own: float, own_sequence: float, shared: float, shared_sequence: float, demand: int
) -> None:
    """For any step times of the family, with noise, half a minute of steady load sees few changes of direction."""

    def truth(batch: float, replicas: int) -> float:
        return own + own_sequence * batch + replicas * (shared + shared_sequence * batch)

    plant = Plant(truth, 6, noise=0.03)
    sizes = plant.run(32.0, demand)
    assert turns(sizes) <= 8
    assert turns(sizes[len(sizes) // 2 :]) <= 3


def test_the_set_grows_at_once_when_the_demand_does_not_fit() -> None:
    """Demand beyond what one replica holds makes the next decision larger, before anything was measured."""
    active = ActiveSet(Knobs())
    assert active.resize(0.0, Demand(4, 0, 4, 100.0), 8) == 1
    assert active.resize(0.001, Demand(350, 250, 100, 100.0), 8) == 4


def test_a_full_gpu_is_given_no_further_replica_for_throughput() -> None:
    """At 97 % SM the set does not grow, whatever the fit promises."""
    plant = Plant(small_model, 8, sm=False)
    plant.run(0.6, 200)
    start = plant.set.size
    plant.set._sm = [(0.97, 0.2)]
    assert plant.set._limit(8) == start


def test_a_pinned_set_stays_pinned() -> None:
    """`active_set: 3` means three, or as many as are ready."""
    plant = Plant(large_model, 4, active_set=3)
    assert set(plant.run(3.0, 100)) == {3}
    assert plant.set.resize(plant.now_s + 1.0, Demand(100, 0, 50, 256.0), 2) == 2


def test_a_front_end_that_is_busy_already_is_not_expected_to_do_four_times_as_much() -> None:
    """One engine alone could make most of what four make; its front end could not stream it."""
    rates = []
    for token_cpu_s in (0.0, 70e-6):
        plant = Plant(small_model, 4, noise=0.02, weights_read_s=5e-5)
        plant.token_cpu_s = token_cpu_s
        assert plant.run(5.0, 160)[-1] == 4
        rates.append(plant.set.predict(1))
    assert rates[0] > 1.25 / 70e-6
    assert rates[1] <= 1.0 / 70e-6


def test_a_set_never_exceeds_what_is_ready() -> None:
    """When replicas fail, the size follows; when they return, it may grow again."""
    plant = Plant(small_model, 8)
    plant.run(10.0, 400)
    assert plant.set.resize(plant.now_s + 0.1, Demand(400, 0, 50, 256.0), 2) <= 2


def test_an_idle_or_replaced_replica_teaches_nothing() -> None:
    """Windows in which a replica idled, or was replaced by another, leave no observation."""
    active = ActiveSet(Knobs())
    for tick in range(100):
        now_s = tick * TICK_S
        idle = replace(IDLE, output_tokens_total=tick * 50, running_requests=tick % 2 * 5)
        fresh = replace(IDLE, slot=1, replica_id=f"life-{tick}", output_tokens_total=tick, running_requests=5)
        active.sample(now_s, [idle, fresh], None)
    assert active.model.cells == {}


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0.0, 5e-3), min_size=4, max_size=4).filter(lambda terms: sum(terms[:1] + terms[2:3]) > 1e-4))
def test_the_fit_recovers_step_times_of_its_family(terms: list[float]) -> None:
    """From observations of several batches and sizes, predictions between them are within a few percent."""
    own, own_sequence, shared, shared_sequence = terms[0], terms[1] / 100, terms[2], terms[3] / 100

    def truth(batch: float, replicas: float) -> float:
        own_s, shared_s = own + own_sequence * batch, shared + shared_sequence * batch
        return own_s + crowding(own_s, shared_s, replicas) * shared_s

    model = StepModel()
    for _ in range(8):
        for replicas, batch in itertools.product((1, 2, 4), (4.0, 32.0, 128.0)):
            model.observe(batch, replicas, 0.0, truth(batch, replicas), None)
    for _ in range(20):
        model.fit()
    assert min(model.terms) >= 0.0
    assert model.step_s(60.0, 3, 0.0) == pytest.approx(truth(60.0, 3), rel=0.1)


@given(st.floats(1e-4, 1e-1), st.floats(1e-4, 1e-1), st.integers(1, 16))
def test_crowding_keeps_within_the_bounds_of_a_closed_network(own_s: float, shared_s: float, replicas: int) -> None:
    """Replicas wait for one another at most each time, and never overlap more than the one device allows."""
    step_s = own_s + crowding(own_s, shared_s, replicas) * shared_s
    assert step_s <= (own_s + replicas * shared_s) * (1 + 1e-9)
    assert step_s >= max(own_s + shared_s, replicas * shared_s) * (1 - 1e-9)


def test_crowding_agrees_with_mean_value_analysis_by_hand() -> None:
    """Two replicas that are half of their time on the device find it taken half of the time; three, 1.2 times over."""
    assert crowding(1.0, 1.0, 1) == pytest.approx(1.0)
    assert crowding(1.0, 1.0, 2) == pytest.approx(1.5)
    assert crowding(1.0, 1.0, 3) == pytest.approx(2.2)
    assert crowding(1.0, 1.0, 1.5) == pytest.approx(1.25)
    assert crowding(0.0, 1.0, 4) == pytest.approx(4.0)


def test_one_replica_alone_tells_that_a_small_model_wants_four() -> None:
    """Steps of a single OPT-125m engine on an H200 with its SM readings foresee what four made, within a quarter.

    The numbers are those of the measured sweep (1024 in, 256 out): batch, decode step in ms, SM ratio.
    """
    model = StepModel()
    for _ in range(4):
        for batch, step_ms, sm in ((40, 3.85, 0.20), (160, 6.98, 0.34), (320, 12.22, 0.35)):
            model.observe(batch, 1.0, 0.0, step_ms * 1e-3, sm)
        model.fit()
    rates = {k: 160 / model.step_s(160 / k, k, 0.0) for k in (1, 2, 4)}
    assert rates[1] < rates[2] < rates[4]
    assert rates[4] == pytest.approx(160 / 3.98e-3, rel=0.25)


# What reading the weights of Llama-3-8B once takes on an H200, and of a model that is hardly there.
LARGE_READ_S, SMALL_READ_S = 3.35e-3, 0.02e-3


def test_a_busy_device_tells_what_several_replicas_ask_of_it() -> None:
    """Two replicas of Llama-3-8B as an H200 showed them: steps as long as one replica's would be, the SMs 90 % busy.

    Step times alone would call most of a step the engine's own; the device's reading says that one does better.
    """
    told, silent = StepModel.foreseen(LARGE_READ_S), StepModel.foreseen(LARGE_READ_S)
    for _ in range(8):
        for batch, step_ms in ((56, 10.8), (8, 10.4)):
            told.observe(batch, 2.0, 0.0, step_ms * 1e-3, 0.9)
            silent.observe(batch, 2.0, 0.0, step_ms * 1e-3, None)
        told.fit()
        silent.fit()

    def lead(model: StepModel) -> float:
        return 2 * model.step_s(32, 2.0, 0.0) / (2 * model.step_s(64, 1.0, 0.0))

    assert lead(told) > lead(silent)
    assert 64 / told.step_s(64, 1.0, 0.0) == pytest.approx(7600, rel=0.1)  # as measured with one


@pytest.mark.parametrize(("read_s", "best"), [(LARGE_READ_S, 1), (SMALL_READ_S, 2)])
def test_a_few_slow_steps_of_a_warming_engine_do_not_overturn_what_was_foreseen(read_s: float, best: int) -> None:
    """First steps load kernels and mix in prompts; they stretch all parts of a step alike."""
    model = StepModel.foreseen(read_s)
    model.observe(32, 1.0, 0.0, 20e-3, None)
    model.fit()
    rates = {k: 64 / model.step_s(64 / k, k, 0.0) for k in (1, 2)}
    assert max(rates, key=rates.__getitem__) == best


def test_what_the_device_showed_before_the_load_came_is_not_believed() -> None:
    """Its counters lag: in the first busy window they still say that it is idle."""
    active = ActiveSet(Knobs(stale_after_s=1.0))

    def run(begin: int, end: int, sm_ratio: float) -> None:
        for tick in range(begin, end):
            now_s = tick * TICK_S
            busy = replace(IDLE, output_tokens_total=tick * 50, running_requests=5)
            active.sample(now_s, [busy if tick > 20 else IDLE], gpu(sm_ratio, now_s))

    run(0, 31, 0.0)
    assert active.model.cells
    assert active.model.sm.mass == 0.0
    run(31, 60, 0.5)
    assert active.model.sm.mass > 0.0
