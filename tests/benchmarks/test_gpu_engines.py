"""The script that measures several engines on one GPU, run here with a worker that only speaks its protocol."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu_engines as ge
from benchmarks.gpu_engines import Cost, EngineRun, GpuSample, Group, Round, Step

ROOT = Path(ge.__file__).parents[1]
SHIPPED = json.loads((ROOT / "benchmarks/gpu_engines_plan.json").read_text())
TINY_ROUND = {"engines": [1, 2], "batch": [4], "prompt_tokens": 8, "output_tokens": 3}

# Speaks the worker's side of the protocol. `behaviour` in the engine arguments says where it misbehaves, and each
# worker leaves a file named by its process id, filled with the orders it got.
WORKER = """
import json, os, sys, time
spec = json.loads(sys.stdin.readline())
behaviour, seen = spec["engine"]["behaviour"], open(os.path.join(spec["engine"]["seen"], str(os.getpid())), "w")
def answer(message):
    print(json.dumps(message), flush=True)
if behaviour == "dies at the start":
    sys.exit("no room for the KV cache")
answer({"vllm": "fake", "torch": "fake", "kv_tokens": 1000})
while line := sys.stdin.readline():
    order = json.loads(line)
    seen.write(line)
    seen.flush()
    answer({"ready": True})
    sys.stdin.readline()
    if behaviour == "hangs in a round":
        time.sleep(3600)
    n, now = order["sequences"], time.monotonic()
    steps = [[now + 0.01 * i, n, n if i == 0 else 0, n if i == order["output_tokens"] - 1 else 0]
             for i in range(order["output_tokens"])]
    answer({"sequences": n, "submitted_s": now, "answered_s": now + 0.1, "steps": steps})
"""


def plan(tmp_path: Path, *behaviours: str, start_s: float = 10.0, **group: Any) -> list[Group]:
    """One group of two engines for each behaviour."""
    entries = [
        {
            "model": "tiny",
            "engines": 2,
            "mps": False,
            "seconds": 10,
            "rounds": [TINY_ROUND],
            "engine": {"behaviour": behaviour, "seen": str(tmp_path)},
            **group,
        }
        for behaviour in behaviours
    ]
    models = {"tiny": {"config": {"model_type": "opt"}, "cost": {"prefill_tokens_per_s": 1e6, "step_s": 1e-4}}}
    return ge.parse_plan({"models": models, "groups": entries, "seed": 7, "start_s": start_s})


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setattr(ge, "ENGINE_GRACE_S", 0.5)
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    return [sys.executable, str(script)]


def run(groups: list[Group], command: list[str], seconds: float = 90.0) -> list[dict[str, object]]:
    out = io.StringIO()
    ge.run_plan(groups, out, seconds, command)
    return [json.loads(line) for line in out.getvalue().splitlines()]


def workers_seen(tmp_path: Path) -> list[int]:
    return [int(path.name) for path in tmp_path.iterdir() if path.name.isdigit()]


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


# ---------------------------------------------------------------- the plan


def test_a_block_of_rounds_becomes_every_batch_with_every_number_of_engines(tmp_path: Path) -> None:
    block = {**TINY_ROUND, "batch": [4, 9], "repeats": 2}
    (group,) = plan(tmp_path, "works", rounds=[block])
    assert [(r.batch, r.engines) for r in group.rounds] == [(4, 1), (4, 2), (9, 1), (9, 2)] * 2


def test_every_round_of_a_plan_has_a_seed_of_its_own(tmp_path: Path) -> None:
    groups = plan(tmp_path, "works", "works")
    assert [r.seed for g in groups for r in g.rounds] == [7, 8, 9, 10]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rounds": [{**TINY_ROUND, "engines": [3]}]}, "wants 3 engines of the 2"),
        ({"rounds": [{**TINY_ROUND, "batch": [1]}]}, "leaves some of 2 engines without a request"),
        ({"rounds": [{**TINY_ROUND, "output_tokens": 0}]}, "at least 1"),
        ({"rounds": [{**TINY_ROUND, "out": 3}]}, r"unknown keys \['out'\]"),
        ({"rounds": [{"engines": [1], "batch": [4], "prompt_tokens": 8}]}, r"lacks \['output_tokens'\]"),
        ({"model": "huge"}, "names no model of the plan"),
        ({"gpus": 2}, r"unknown keys \['gpus'\]"),
    ],
)
def test_an_impossible_plan_is_refused_and_says_why(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ge.PlanError, match=message):
        plan(tmp_path, "works", **change)


@pytest.mark.parametrize("batch", [2, 7, 40, 161])
@pytest.mark.parametrize("engines", [1, 2, 3, 6])
def test_a_batch_is_shared_out_whole_and_evenly(batch: int, engines: int) -> None:
    shares = [Round(engines, batch, 1, 1).share(rank) for rank in range(engines)]
    assert sum(shares) == batch
    assert max(shares) - min(shares) <= 1


def test_the_shipped_plan_fits_the_time_of_a_lent_machine() -> None:
    groups = ge.parse_plan(SHIPPED)
    assert sum(g.estimate_s() for g in groups) < 560 - ge.STOP_MARGIN_S
    assert all(g.estimate_s() <= g.seconds for g in groups)


def kv_bytes_per_token(config: dict[str, int]) -> int:
    heads = config.get("num_key_value_heads", config["num_attention_heads"])
    return 2 * 2 * config["num_hidden_layers"] * heads * config["hidden_size"] // config["num_attention_heads"]


def test_the_shipped_plan_never_asks_an_engine_for_more_than_its_kv_cache_and_sequences() -> None:
    for group in ge.parse_plan(SHIPPED):
        kv_tokens = group.engine["kv_cache_memory_bytes"] // kv_bytes_per_token(group.config)
        for r in group.rounds:
            assert ge.why_skip(group, r, kv_tokens, now_s=0.0, deadline_s=1e9) is None
            assert r.output_tokens == 1 or r.share(0) <= group.engine["max_num_seqs"]
            assert r.prompt_tokens + r.output_tokens <= group.engine["max_model_len"]


# ---------------------------------------------------------------- deadlines


def test_time_that_a_group_leaves_unused_goes_to_the_next(tmp_path: Path) -> None:
    first, second = plan(tmp_path, "works", "works")
    assert ge.group_deadlines([first, second], start_s=100.0, seconds=60.0) == [130.0, 160.0]


def test_a_round_longer_than_the_time_left_is_skipped_and_a_shorter_one_is_not(tmp_path: Path) -> None:
    (group,) = plan(tmp_path, "works")
    long, short = Round(1, 4, 8, 20_000), Round(1, 4, 8, 10)
    assert "would take 2.0 s, 1.0 s are left" in str(ge.why_skip(group, long, None, now_s=9.0, deadline_s=10.0))
    assert ge.why_skip(group, short, None, now_s=9.0, deadline_s=10.0) is None


def test_a_round_that_would_preempt_is_skipped_but_prefill_alone_may_queue(tmp_path: Path) -> None:
    (group,) = plan(tmp_path, "works")
    assert "1000 KV tokens on one engine, which has 999" in str(ge.why_skip(group, Round(2, 20, 90, 10), 999, 0, 10))
    assert ge.why_skip(group, Round(2, 20, 99, 1), 999, 0, 10) is None


def test_the_estimate_grows_with_prompts_sequences_and_engines() -> None:
    cost = Cost(prefill_tokens_per_s=1000, step_s=0.01, step_s_per_sequence=0.001, step_s_per_extra_engine=0.1)
    assert cost.round_s(Round(3, 10, 50, 4)) == pytest.approx(0.5 + 4 * (0.01 + 0.01 + 0.2))


def test_no_engine_is_started_when_the_time_left_is_shorter_than_a_start(tmp_path: Path, command: list[str]) -> None:
    rows = run(plan(tmp_path, "works"), command, seconds=0.1)
    assert [row["kind"] for row in rows] == ["skip", "skip"]
    assert "a start takes" in str(rows[0]["reason"])
    assert workers_seen(tmp_path) == []


# ---------------------------------------------------------------- arithmetic of a row

# Two engines let go at 100. The first: 2 sequences, prefilled one by one until 101, then steps of 10 ms; the second:
# 1 sequence, prefilled at 101.005, then steps of 20 ms.
DECODE = [Step(101 + i / 100, 2, 0, 0) for i in range(1, 6)]
FIRST = EngineRun(
    2,
    100.001,
    102.0,
    (Step(100.9, 1, 1, 0), Step(101.0, 2, 1, 0), *DECODE, Step(101.06, 2, 0, 1), Step(101.07, 1, 0, 1)),
)
SECOND = EngineRun(
    1, 100.001, 101.5, (Step(101.005, 1, 1, 0), Step(101.025, 1, 0, 0), Step(101.045, 1, 0, 0), Step(101.065, 1, 0, 1))
)
ROUND = Round(2, 3, 100, 8)


def test_decode_counts_only_while_every_sequence_of_every_engine_decodes() -> None:
    assert ge.decode_window([FIRST, SECOND]) == (101.005, 101.06)
    row = ge.round_row(ROUND, [FIRST, SECOND], 100.0, [])
    assert row["decode_s"] == pytest.approx(0.055)
    assert [e["decode_steps"] for e in row["per_engine"]] == [5, 2]
    assert [e["decode_step_s_p50"] for e in row["per_engine"]] == pytest.approx([0.01, 0.02])
    assert row["decode_step_s_p50"] == pytest.approx(0.01)
    assert row["decode_tokens_per_s"] == pytest.approx(2 / 0.01 + 1 / 0.02)


def test_prefill_lasts_until_the_last_request_has_its_first_token() -> None:
    row = ge.round_row(ROUND, [FIRST, SECOND], 100.0, [])
    assert row["prefill_s"] == pytest.approx(1.005)
    assert row["prefill_tokens_per_s"] == pytest.approx(300 / 1.005)
    assert [e["first_token_s"] for e in row["per_engine"]] == pytest.approx([0.9, 1.005])
    assert [e["prefill_s"] for e in row["per_engine"]] == pytest.approx([1.0, 1.005])
    assert row["per_engine"][0]["prefill_step_s_p50"] == pytest.approx(0.1)


def test_throughput_is_over_the_wall_time_to_the_last_answer() -> None:
    row = ge.round_row(ROUND, [FIRST, SECOND], 100.0, [])
    assert row["output_tokens"] == 16 + 4
    assert row["wall_s"] == pytest.approx(2.0)
    assert row["output_tokens_per_s"] == pytest.approx(10.0)


def test_context_points_follow_the_growing_sequences() -> None:
    steps = SECOND.decode_steps(prompt_tokens=100, start_s=101.0, end_s=102.0)
    assert [context for context, _ in steps] == [101, 102, 103]
    points = ge.context_points([(float(c), 2.0 * c) for c in range(8)], points=4)
    assert points == [[0.5, 1.0], [2.5, 5.0], [4.5, 9.0], [6.5, 13.0]]


def test_a_round_of_one_output_token_has_no_decode() -> None:
    only = EngineRun(2, 100.0, 100.5, (Step(100.2, 1, 1, 1), Step(100.4, 1, 1, 1)))
    row = ge.round_row(Round(1, 2, 50, 1), [only], 100.0, [])
    assert (row["decode_s"], row["decode_step_s_p50"], row["decode_tokens_per_s"], row["decode_points"]) == (
        0.0, None, None, [],
    )  # fmt: skip
    assert row["prefill_tokens_per_s"] == pytest.approx(100 / 0.4)


def test_gpu_means_take_only_intervals_that_lie_in_the_window() -> None:
    samples = [GpuSample(10.05, 0.9, 0.1, 0.5, 9), GpuSample(10.2, 0.2, 0.1, 0.5, 5), GpuSample(10.3, 0.4, 0.1, 0.5, 7)]
    means = ge.gpu_means(samples, 10.0, 10.35)
    assert means["sm_ratio"] == pytest.approx(0.3)
    assert (means["memory_used_bytes"], means["samples"]) == (7, 2)
    assert ge.gpu_means(samples, 20.0, 30.0)["sm_ratio"] is None


@pytest.mark.parametrize(("q", "expected"), [(0.1, 1.0), (0.5, 5.0), (0.9, 9.0), (1.0, 10.0)])
def test_quantiles_are_by_nearest_rank(q: float, expected: float) -> None:
    assert ge.quantile([float(i) for i in range(10, 0, -1)], q) == expected


# ---------------------------------------------------------------- a whole run


def test_a_group_yields_a_start_row_and_a_row_for_each_round(tmp_path: Path, command: list[str]) -> None:
    rows = run(plan(tmp_path, "works"), command)
    assert [row["kind"] for row in rows] == ["start", "round", "round"]
    assert [row.get("engines") for row in rows] == [None, 1, 2]
    assert [row["output_tokens"] for row in rows[1:]] == [12, 12]
    assert {"model", "mps", "seed", "date", "vllm", "torch", "driver", "gpu_name", "mps_clients"} <= rows[1].keys()


def test_a_round_leaves_the_engines_beyond_its_number_alone(tmp_path: Path, command: list[str]) -> None:
    run(plan(tmp_path, "works"), command)
    orders = sorted(len((tmp_path / str(pid)).read_text().splitlines()) for pid in workers_seen(tmp_path))
    assert orders == [1, 2]


def test_an_engine_that_dies_is_written_down_and_the_next_group_runs(tmp_path: Path, command: list[str]) -> None:
    rows = run(plan(tmp_path, "dies at the start", "works"), command)
    assert [row["kind"] for row in rows] == ["failure", "skip", "skip", "start", "round", "round"]
    assert "no room for the KV cache" in str(rows[0]["error"])


def test_an_engine_that_hangs_is_killed_at_the_deadline(tmp_path: Path, command: list[str]) -> None:
    rows = run(plan(tmp_path, "hangs in a round", start_s=0.5), command, seconds=3.0)
    assert [row["kind"] for row in rows][-3:] == ["failure", "skip", "skip"]
    assert "did not answer in time" in str(rows[-3]["error"])
    assert [pid for pid in workers_seen(tmp_path) if is_running(pid)] == []


@pytest.mark.parametrize("behaviour", ["works", "dies at the start"])
def test_no_engine_outlives_the_run(tmp_path: Path, command: list[str], behaviour: str) -> None:
    run(plan(tmp_path, behaviour), command)
    assert len(workers_seen(tmp_path)) == 2
    assert [pid for pid in workers_seen(tmp_path) if is_running(pid)] == []


def test_a_terminated_run_takes_its_engines_with_it(tmp_path: Path, command: list[str]) -> None:
    driver = (
        "import json, signal, sys; from benchmarks import gpu_engines as ge; signal.signal(signal.SIGTERM, ge._leave);"
        "ge.ENGINE_GRACE_S = 0.2; g = ge.Group(**json.loads(sys.argv[1]));"
        "g = ge.replace(g, cost=ge.Cost(1e6, 1e-4), rounds=(ge.Round(2, 4, 8, 3),)); "
        "ge.run_plan([g], sys.stdout, 90, json.loads(sys.argv[2]))"
    )
    group = {"model": "tiny", "engines": 2, "mps": False, "seconds": 10, "config": {}, "cost": None, "rounds": [],
             "engine": {"behaviour": "hangs in a round", "seen": str(tmp_path)}, "start_s": 10}  # fmt: skip
    process = subprocess.Popen([sys.executable, "-c", driver, json.dumps(group), json.dumps(command)], cwd=ROOT)
    while len(orders := [p for p in tmp_path.iterdir() if p.name.isdigit() and p.read_text()]) < 2:
        assert process.poll() is None
        time.sleep(0.02)
    process.terminate()
    assert process.wait(30) == 128 + signal.SIGTERM
    assert [int(p.name) for p in orders if is_running(int(p.name))] == []


# ---------------------------------------------------------------- MPS


def test_without_mps_engines_get_an_empty_pipe_folder_so_that_they_join_no_daemon() -> None:
    with ge.mps_environment(False) as env:
        pipe = Path(env["CUDA_MPS_PIPE_DIRECTORY"])
        assert list(pipe.iterdir()) == []
    assert not pipe.exists()


@pytest.mark.parametrize("behaviour", ["works", "dies at the start"])
def test_the_mps_daemon_of_a_group_is_told_to_quit_however_the_group_ends(
    tmp_path: Path, command: list[str], monkeypatch: pytest.MonkeyPatch, behaviour: str
) -> None:
    (tmp_path / "bin").mkdir()
    control, log = tmp_path / "bin/nvidia-cuda-mps-control", tmp_path / "control.log"
    control.write_text(f'#!/bin/sh\nif [ "$1" = -d ]; then echo daemon >> {log}; else cat >> {log}; fi\n')
    control.chmod(0o755)
    monkeypatch.setenv("PATH", f"{control.parent}:{os.environ['PATH']}")
    run(plan(tmp_path, behaviour, mps=True), command)
    assert log.read_text().splitlines() == ["daemon", "quit"]
