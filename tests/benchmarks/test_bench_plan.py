"""What the bench plans for a machine, in which order, and what it leaves out with a reason."""

from dataclasses import replace

import pytest

from benchmarks.bench.fit import Room, fitted
from benchmarks.bench.plan import (
    FULL,
    H200,
    QUICK,
    SYSTEMS,
    TWO_CORES,
    Cell,
    Kind,
    Machine,
    Plan,
    Stage,
    estimate_s,
    kv_tokens,
    make_plan,
    plan_s,
    reserve_s,
    workloads,
)

GPU = Machine(gpu="H200", cores=16)
CPU = Machine(no_mps="no NVIDIA GPU here")


def gpu_plan(trace_requests: int = 600, repeats: int = 3) -> Plan:
    return make_plan(GPU, FULL, H200, SYSTEMS, repeats, trace_requests)


def test_without_a_gpu_every_mps_cell_is_listed_as_skipped() -> None:
    """With the reason, for each of its workloads and numbers of processes, and no round of them is planned."""
    plan = make_plan(CPU, QUICK, TWO_CORES, SYSTEMS, 3)
    assert plan.stages[Stage.MPS] == ()
    skipped = {(s.facts["system"], s.facts["workload"]) for s in plan.skipped if s.reason == "no NVIDIA GPU here"}
    wanted = {(system, w.name) for system in ("vllm-mps", "hf-split-mps") for w in workloads(QUICK, 0)}
    assert skipped == wanted


@pytest.mark.parametrize("missing", ["no_vllm", "no_hf"])
def test_a_missing_library_skips_its_systems_alone(missing: str) -> None:
    plan = make_plan(replace(CPU, **{missing: "not installed"}), QUICK, TWO_CORES, SYSTEMS, 1)  # type: ignore[arg-type]
    systems = {r.cell.system for rounds in plan.stages.values() for r in rounds}
    assert {name.startswith("hf-") for name in systems} == {missing == "no_vllm"}


def test_every_cell_is_either_planned_for_every_repeat_or_skipped_once() -> None:
    """Nothing vanishes between the wanted systems and the plan."""
    plan = gpu_plan()
    planned = [(r.cell.system, r.cell.processes, r.cell.workload.name) for rs in plan.stages.values() for r in rs]
    skipped = [(s.facts["system"], s.facts["processes"], s.facts["workload"]) for s in plan.skipped]
    assert {planned.count(cell) for cell in planned} == {3}
    assert len(skipped) == len(set(skipped))
    assert not set(planned) & set(skipped)
    cells = 3 * 1 + 2 * 2 + 2 * 3 + 1  # systems with one number of processes, with two, with three; the served one
    assert len(set(planned)) + len(skipped) == cells * len(workloads(FULL, 600))


def test_within_a_stage_lower_tiers_and_earlier_repeats_come_first() -> None:
    """So that a cut run has every cell of a tier equally often."""
    for rounds in gpu_plan().stages.values():
        order = [(r.tier, r.repeat) for r in rounds]
        assert order == sorted(order)
        assert len(rounds) == len(set(rounds))


def test_the_seeds_two_workloads_are_measured_on_every_engine_system_first() -> None:
    first = {(r.cell.system, r.cell.workload.name) for rs in gpu_plan().stages.values() for r in rs if r.tier == 1}
    engines = ("vllm-single", "vllm-mp", "vllm-mps", "splitwiser-serve")
    names = ("radiology 512/20", "1024/1024, batch 10", "1024/1024, batch 160")
    assert {(system, name) for system in engines for name in names} <= first
    assert {w for system, w in first if system == "vllm-mixed-off"} == {names[0], names[2]}
    assert {"hf-sequential", "hf-split", "hf-split-mps"} <= {system for system, _ in first}


def test_hugging_face_rounds_longer_than_the_limit_are_skipped_with_their_estimate() -> None:
    """The seed's long batches: the smallest is run, the largest is not, by the stated rule."""
    plan = gpu_plan()
    ran = {r.cell.workload.name for rs in plan.stages.values() for r in rs if r.cell.system == "hf-sequential"}
    assert "1024/1024, batch 10" in ran
    reasons = {s.facts["workload"]: s.reason for s in plan.skipped if s.facts["system"] == "hf-sequential"}
    assert "a Hugging Face round may take 15 s" in reasons["1024/1024, batch 160"]


def test_without_a_trace_its_workload_says_how_to_give_one() -> None:
    reasons = {s.reason for s in gpu_plan(trace_requests=0).skipped if s.facts["workload_kind"] == Kind.TRACE}
    assert reasons == {"no trace was given (--trace FILE)"}


def test_the_default_plan_fits_a_stay_of_ten_minutes_on_an_h200() -> None:
    """The first tier of everything, and within seven minutes the seed's own systems (all but the served one)."""
    seed = make_plan(GPU, FULL, H200, [s for s in SYSTEMS if s != "splitwiser-serve"], 3)
    assert plan_s(seed, H200, FULL, 1) < 400
    assert plan_s(gpu_plan(), H200, FULL, 1) < 600


def test_the_quick_plan_fits_a_machine_of_two_cores() -> None:
    """It promises ten minutes; the run that is kept took 8:48 of them, where the plan foresees 8:10."""
    plan = make_plan(CPU, QUICK, TWO_CORES, SYSTEMS, 3, 40)
    assert plan_s(plan, TWO_CORES, QUICK, 2) < 540


def test_later_stages_keep_time_for_their_start_and_first_tier() -> None:
    plan = gpu_plan()
    served_s = reserve_s(plan, Stage.MPS, H200, FULL)
    tier_1 = [r for r in plan.stages[Stage.SERVED] if r.tier == 1]
    assert served_s == pytest.approx(H200.start_s[Stage.SERVED] + sum(estimate_s(r.cell, H200, FULL) for r in tier_1))
    assert reserve_s(plan, Stage.SERVED, H200, FULL) == 0.0
    assert reserve_s(plan, Stage.APART, H200, FULL) > served_s


def test_an_engines_kv_cache_holds_the_largest_share_it_is_given() -> None:
    """The first engine serves alone, too; the fourth only ever has a quarter."""
    rounds = gpu_plan().stages[Stage.APART]
    assert kv_tokens(rounds, 0) == 160 * 2048
    assert kv_tokens(rounds, 3) == 40 * 2048
    assert kv_tokens(rounds, 7) == 0


def test_a_smaller_gpu_loses_its_largest_batches_first() -> None:
    """24 GB, as the seed's A10 has: batch 160 goes, batch 10 stays; an H200 keeps everything."""
    plan = gpu_plan()
    opt_125m = {"weights_bytes": 250_000_000, "kv_bytes_per_token": 36_864}
    assert fitted(plan, Room(150_000_000_000, **opt_125m)) == plan
    small = fitted(plan, Room(24_000_000_000, **opt_125m))
    left = {r.cell.workload.name for r in small.stages[Stage.MPS] if not r.cell.is_hf}
    assert "1024/1024, batch 10" in left
    assert "1024/1024, batch 160" not in left
    dropped = [s for s in small.skipped if "GiB of GPU memory" in s.reason]
    rounds = [sum(len(rs) for rs in p.stages.values()) for p in (plan, small)]
    assert rounds[0] - rounds[1] == 3 * len(dropped) > 0


def test_a_gpu_that_is_too_small_for_anything_keeps_its_smallest_workload() -> None:
    """The engines then say themselves what they lack."""
    tiny = fitted(gpu_plan(), Room(1, 1, 1))
    assert len({r.cell.workload.name for r in tiny.stages[Stage.MPS] if not r.cell.is_hf and r.tier < 3}) >= 1


@pytest.mark.parametrize(("requests", "processes"), [(10, 4), (160, 4), (7, 7)])
def test_requests_are_dealt_out_whole(requests: int, processes: int) -> None:
    workload = replace(workloads(FULL, 0)[0], requests=requests)
    shares = [Cell("vllm-mp", processes, workload).share(rank) for rank in range(processes)]
    assert sum(shares) == requests
    assert max(shares) - min(shares) <= 1


def test_long_hugging_face_rounds_are_estimated_from_their_waves() -> None:
    """More pairs of processes take fewer waves of batches, and a wave lasts as long as its tokens."""
    radiology = workloads(FULL, 0)[0]
    times = [estimate_s(Cell("hf-split", n, radiology), H200, FULL) for n in (2, 4, 8)]
    assert times == sorted(times, reverse=True)
    assert times[0] > 8 * 20 * H200.hf_step_s
