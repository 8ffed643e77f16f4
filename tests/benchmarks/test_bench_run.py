"""A whole run of the bench with workers that only speak its protocol, and what it does when they break or time ends."""

import io
import json
import os
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks.bench import members as crew
from benchmarks.bench import run as bench_run
from benchmarks.bench.phases import Limits
from benchmarks.bench.plan import QUICK, SYSTEMS, TWO_CORES, Cost, Machine, Plan, Stage, make_plan
from benchmarks.bench.prompts import Source
from benchmarks.bench.rows import Rows
from benchmarks.bench.run import Bench, Setting
from benchmarks.client import Answer
from deployments.config import parse_args
from deployments.engine import argument_names

# Serves every request in 20 ms; `--die-in-round` and `--die-at-start` say where it breaks instead.
WORKER = """
import json, os, sys, time
open(os.path.join(os.environ["SEEN"], str(os.getpid())), "w").close()
def answer(message):
    print(json.dumps(message), flush=True)
spec = json.loads(sys.stdin.readline())
if "--die-at-start" in sys.argv:
    sys.exit("no room for the model")
answer({"kv_tokens": 1, "environment": os.environ.get("CUDA_MPS_PIPE_DIRECTORY")})
rounds = 0
while line := sys.stdin.readline():
    order = json.loads(line)
    answer({"ready": True})
    sys.stdin.readline()
    rounds += 1
    if "--die-in-round" in sys.argv and rounds > 2:
        sys.exit("illegal memory access")
    now = time.monotonic()
    requests = [[now, now, now + 0.01, now + 0.02, n] for n in order["output_tokens"]]
    time.sleep(0.02)
    answer({"requests": requests, "made": [[now + 0.01, len(requests)]]})
"""
MACHINE = Machine(no_mps="no NVIDIA GPU here")
FAST = replace(TWO_CORES, start_s=dict.fromkeys(Stage, 10.0))
ENGINES = ("vllm-single", "vllm-mp", "hf-sequential", "hf-split")


class Told:
    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def say(self, text: str) -> None:
        assert text

    def done(self, row: dict[str, Any]) -> None:
        self.rows.append(row)

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [row for row in self.rows if row["kind"] == kind]


@pytest.fixture
def worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Sets the worker of both groups, with what it is to do wrong."""
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    (tmp_path / "seen").mkdir()
    monkeypatch.setenv("SEEN", str(tmp_path / "seen"))
    monkeypatch.setattr(crew, "GRACE_S", 1.0)

    def use(vllm: str = "", hf: str = "") -> None:
        monkeypatch.setattr(crew, "VLLM", (sys.executable, str(script), vllm))
        monkeypatch.setattr(crew, "HF", (sys.executable, str(script), hf))

    use()
    return use


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    config = {"vocab_size": 50, "num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 8}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


class NoWatch:
    def means(self, start_s: float, end_s: float) -> dict[str, Any]:
        assert start_s <= end_s
        return {"sm_ratio": 0.5}


def run(model: Path, plan: Plan, seconds: float = 120.0, cost: Cost = FAST) -> tuple[Told, list[dict[str, Any]]]:
    """What the progress was told, and the rows that were written."""
    setting = Setting(MACHINE, QUICK, cost, model, Source(model, [(0.0, 4, 2)]), Limits(), {}, 1, False, 1)
    told, out = Told(), io.StringIO()
    end_s = time.monotonic() + seconds + bench_run.END_S
    Bench(plan, setting, Rows(out, "r1"), NoWatch(), told, end_s).run()  # type: ignore[arg-type]
    return told, [json.loads(line) for line in out.getvalue().splitlines()]


def left_running(tmp_path: Path) -> list[int]:
    return [int(p.name) for p in (tmp_path / "seen").iterdir() if Path(f"/proc/{p.name}").exists()]


def offline_plan(repeats: int = 2, systems: tuple[str, ...] = ENGINES) -> Plan:
    return make_plan(MACHINE, QUICK, FAST, systems, repeats)


def test_every_planned_round_becomes_a_row_and_no_process_is_left(
    model: Path, tmp_path: Path, worker: Callable[..., None]
) -> None:
    """Two vLLM engines and one Hugging Face host are started once for all rounds; every row is in the file, too."""
    plan = offline_plan()
    told, rows = run(model, plan)
    assert len(told.of("round")) == len(plan.stages[Stage.APART])
    assert rows == told.rows
    assert [set(row["groups"]) for row in told.of("start")] == [{"vllm", "hf"}]
    assert len(list((tmp_path / "seen").iterdir())) == 3
    assert left_running(tmp_path) == []
    radiology = next(row for row in told.of("round") if row["workload"] == "radiology 256/20")
    assert (radiology["requests"], radiology["failed"], radiology["output_tokens"]) == (40, 0, 800)
    assert radiology["device"] == radiology["device_token"] == {"sm_ratio": 0.5}


def test_without_mps_no_process_can_meet_a_daemon(model: Path, worker: Callable[..., None]) -> None:
    told, _ = run(model, offline_plan(1, ("vllm-single",)))
    assert told.of("start")[0]["groups"]["vllm"]["environment"] == os.devnull


@pytest.mark.parametrize("how", ["--die-at-start", "--die-in-round"])
def test_a_broken_group_is_written_down_and_the_other_goes_on(
    model: Path, tmp_path: Path, worker: Callable[..., None], how: str
) -> None:
    """What broke is a failure with the end of its log; its other rounds are skipped, and none is lost."""
    worker(hf=how)
    plan = offline_plan()
    told, _ = run(model, plan)
    reason = "no room for the model" if how == "--die-at-start" else "illegal memory access"
    (failure,) = told.of("failure")
    assert reason in failure["error"]
    systems = {row["system"] for row in told.of("round")}
    assert {"vllm-single", "vllm-mp"} <= systems
    skipped = [row for row in told.of("skip") if "repeat" in row]
    assert {row["reason"] for row in skipped} == {"the processes of group 'hf' failed"}
    in_a_round = how == "--die-in-round"
    assert len(told.of("round")) + len(skipped) + in_a_round == len(plan.stages[Stage.APART])
    assert left_running(tmp_path) == []


def test_when_the_time_is_up_what_did_not_fit_is_listed(model: Path, worker: Callable[..., None]) -> None:
    """A round that would take longer than what is left is skipped with both figures; shorter ones still run."""
    slow = replace(FAST, hf_step_s=500.0)
    plan = offline_plan(1)
    told, _ = run(model, plan, seconds=90.0, cost=slow)
    assert {row["system"] for row in told.of("round")} == {"vllm-single", "vllm-mp"}
    skipped = [row for row in told.of("skip") if "repeat" in row]
    assert {row["system"] for row in skipped} == {"hf-sequential", "hf-split"}
    assert [row["reason"] for row in skipped if "were left for it" not in row["reason"]] == []


def test_a_stage_that_cannot_start_in_time_is_not_started(
    model: Path, tmp_path: Path, worker: Callable[..., None]
) -> None:
    plan = offline_plan(1)
    told, _ = run(model, plan, cost=replace(FAST, start_s=dict.fromkeys(Stage, 1000.0)))
    assert len([row for row in told.of("skip") if "starting takes about 1000 s" in row["reason"]]) == len(
        plan.stages[Stage.APART]
    )
    assert list((tmp_path / "seen").iterdir()) == []


def test_mps_clients_that_never_showed_up_fail_their_stage(
    model: Path, worker: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that misses the daemon runs without MPS and says nothing: no row may then claim MPS."""

    @contextmanager
    def daemon_without_clients(wanted: bool) -> Any:
        yield {}, SimpleNamespace(client_pids=lambda: (1,)) if wanted else None

    monkeypatch.setattr(crew, "mps_environment", daemon_without_clients)
    plan = make_plan(replace(MACHINE, no_mps=None), QUICK, FAST, ("vllm-mps",), 1)
    told, _ = run(model, plan)
    assert told.of("round") == []
    assert "only 1 processes became MPS clients" in told.of("failure")[0]["error"]
    assert {row["reason"] for row in told.of("skip") if "repeat" in row} == {"the stage mps failed"}


def test_the_served_system_is_measured_through_http_and_its_failures_are_counted(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of four answers failed; the row says so, and how the answers were spread over the replicas."""

    @contextmanager
    def serving(application: dict[str, Any], limit_s: float) -> Any:
        assert application["args"]["replicas"] == QUICK.replicas
        yield "http://127.0.0.1:1"

    class FakeClients:
        def __init__(self, processes: int) -> None:
            assert processes == 1

        def __enter__(self) -> "FakeClients":
            return self

        def __exit__(self, *_: object) -> None:
            return None

        def run(self, target: Any, wishes: Any, limit: int | None = None) -> list[Answer]:
            good = [Answer(200, 1.0, 3.0, 2.0, 4, f"r{n % 2}", 1.0, True, (2.0, 2.5, 3.0)) for n in range(3)]
            return [*good, Answer(503, 1.0, 1.1, 0.0, 0, "", 1.0, False)]

    monkeypatch.setattr(bench_run, "serving", serving)
    monkeypatch.setattr(bench_run, "Clients", FakeClients)
    told, _ = run(model, make_plan(MACHINE, QUICK, FAST, ("splitwiser-serve",), 1))
    row = told.of("round")[0]
    assert (row["requests"], row["failed"], row["output_tokens"]) == (4, 1, 12)
    assert row["replicas"] == {"": 1, "r0": 2, "r1": 1}


def test_requests_are_alike_for_every_system_and_differ_between_repeats(model: Path) -> None:
    source = Source(model, [])
    workload = offline_plan().stages[Stage.APART][0].cell.workload
    assert source.wishes(workload, 1) == source.wishes(workload, 1)
    assert source.wishes(workload, 1) != source.wishes(workload, 2)


@pytest.mark.parametrize("machine", [MACHINE, Machine(gpu="H200", cores=16)])
def test_the_served_systems_arguments_are_ones_it_takes(model: Path, machine: Machine) -> None:
    """Checked as `splitwiser serve` checks them, without starting it; MPS is asked for where there is a GPU."""
    setting = Setting(machine, QUICK, FAST, model, Source(model, []), Limits(), {}, 1, False, 1)
    plan = make_plan(machine, QUICK, FAST, ("splitwiser-serve",), 1)
    bench = Bench(plan, setting, Rows(io.StringIO(), "r"), NoWatch(), Told(), 0.0)  # type: ignore[arg-type]
    wish = bench.serve_arguments(plan.stages[Stage.SERVED])
    args = parse_args(wish)
    assert (args.replicas, args.mps, args.device) == (2, *(("on", "gpu") if machine.gpu else ("off", "cpu")))
    assert set(args.engine) <= argument_names()
    # Together twice the largest round: 40 requests of 192 tokens, at 64 bytes a token in this model.
    assert 2 * args.engine["kv_cache_memory_bytes"] >= 2 * 40 * 192 * 64


@pytest.mark.parametrize("machine", [MACHINE, Machine(gpu="H200", cores=16)])
def test_offline_engines_take_their_arguments_too(model: Path, machine: Machine) -> None:
    setting = Setting(machine, QUICK, FAST, model, Source(model, []), Limits(), {"seed": 7}, 1, False, 1)
    plan = make_plan(machine, QUICK, FAST, SYSTEMS, 1)
    bench = Bench(plan, setting, Rows(io.StringIO(), "r"), NoWatch(), Told(), 0.0)  # type: ignore[arg-type]
    groups = {recruits.name: recruits for recruits in bench.recruits(plan.stages[Stage.APART])}
    assert {name: len(group.specs) for name, group in groups.items()} == {"vllm": 2, "unmixed": 1, "hf": 1}
    assert groups["hf"].specs[0]["processes"] == groups["hf"].clients == 4
    engines = [spec["engine"] for name in ("vllm", "unmixed") for spec in groups[name].specs]
    assert all(set(engine) <= argument_names() and engine["seed"] == 7 for engine in engines)
    assert [engine.get("enable_chunked_prefill") for engine in engines] == [None, None, False]
    assert engines[0]["kv_cache_memory_bytes"] >= engines[1]["kv_cache_memory_bytes"]
