"""What N vLLM engines on one GPU cost: decode step times and prefill times, with and without MPS, without HTTP.

    python -m benchmarks.gpu_engines --plan benchmarks/gpu_engines_plan.json --out engines.jsonl --seconds 560
    python -m benchmarks.gpu_engines --plan benchmarks/gpu_engines_plan.json --estimate

A plan lists groups. A group starts all engines of one model once; its rounds then use the first `engines` of them
while the others wait idle. A round shares `batch` requests out among its engines, all sent at once, and ends when
all are answered. Engines are `vllm.LLM` engines with random weights, each in processes of its own.

A row is one line of JSON, its `kind` one of
    start    a group's engines are ready: start_s, engine arguments, KV tokens of each engine
    round    one measured round, see `round_row`
    skip     a round that was not run, and why
    failure  a group that broke, and the end of the log that says why

Within a round, t = 0 is when the engines are let go. Its parts:
    prefill  from 0 until every request of every engine has its first token. With `output_tokens` 1 this is prefill
             alone; otherwise early requests already decode meanwhile.
    decode   from then until the first request of any engine ends: every sequence of every engine decodes.
Step times are between time stamps set by the engine core, so a slow front end does not count as a slow engine.
Units are in the names; `*_ratio` is 0 to 1.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import math
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TextIO

from benchmarks.workers import Engine, answers_on_stdout
from deployments.gpu_setup import visible_gpus

Json = dict[str, Any]
WORKER_COMMAND = (sys.executable, "-m", "benchmarks.gpu_engines", "--worker")
STOP_MARGIN_S = 22.0  # what ending the engines (10 s), MPS (8 s) and the interpreter may take after the last round
ENGINE_GRACE_S = 10.0
MPS_GRACE_S = 8.0
SAMPLE_EVERY_S = 0.1
CONTEXT_POINTS = 4


# ---------------------------------------------------------------- the plan


class PlanError(ValueError):
    """The plan cannot be run; says which entry and why."""


@dataclass(frozen=True, slots=True)
class Round:
    """`batch` requests in all, over the first `engines` engines of the group."""

    engines: int
    batch: int
    prompt_tokens: int
    output_tokens: int
    seed: int = 0

    def share(self, rank: int) -> int:
        """Requests of engine `rank`: as equal as whole numbers allow, the first engines take the rest."""
        return self.batch // self.engines + (rank < self.batch % self.engines)


@dataclass(frozen=True, slots=True)
class Cost:
    """A rough cost of a model, only to know how long a round will take."""

    prefill_tokens_per_s: float
    step_s: float
    step_s_per_sequence: float = 0.0
    step_s_per_extra_engine: float = 0.0

    def round_s(self, r: Round) -> float:
        step_s = self.step_s + self.step_s_per_sequence * r.batch + self.step_s_per_extra_engine * (r.engines - 1)
        return r.batch * r.prompt_tokens / self.prefill_tokens_per_s + r.output_tokens * step_s


@dataclass(frozen=True, slots=True)
class Group:
    """One model, its engines started together. `seconds` is its share of the time, its start included."""

    model: str
    engines: int
    mps: bool
    seconds: float
    config: Json
    engine: Json
    cost: Cost
    rounds: tuple[Round, ...]
    warmup: tuple[Round, ...] = ()
    env: dict[str, str] = field(default_factory=dict)
    start_s: float = 50.0

    def estimate_s(self) -> float:
        return self.start_s + sum(self.cost.round_s(r) for r in (*self.warmup, *self.rounds))


def parse_plan(plan: Json) -> list[Group]:
    """The groups of a plan, in order. Raises PlanError on unknown or missing keys and on impossible rounds.

    Engine arguments are the plan's, then the model's, then the group's. `warmup` lists rounds that no row holds, as
    [requests for each engine, prompt tokens, output tokens].
    """
    _check_keys("the plan", plan, {"models", "groups"}, {"env", "engine", "seed", "start_s", "warmup"})
    groups = [_parse_group(plan, entry) for entry in plan["groups"]]
    seeds = itertools.count(plan.get("seed", 0))
    return [replace(g, rounds=tuple(replace(r, seed=next(seeds)) for r in g.rounds)) for g in groups]


def _parse_group(plan: Json, entry: Json) -> Group:
    where = f"group {entry.get('model')!r}"
    _check_keys(where, entry, {"model", "engines", "mps", "seconds", "rounds"}, {"engine"})
    if entry["model"] not in plan["models"]:
        raise PlanError(f"{where} names no model of the plan; `models` has {sorted(plan['models'])}")
    model = plan["models"][entry["model"]]
    _check_keys(f"model {entry['model']!r}", model, {"config", "cost"}, {"engine"})
    rounds = tuple(r for block in entry["rounds"] for r in _expand(where, block))
    for r in rounds:
        _check_round(where, r, entry["engines"])
    return Group(
        model=entry["model"],
        engines=entry["engines"],
        mps=entry["mps"],
        seconds=entry["seconds"],
        config=model["config"],
        engine={**plan.get("engine", {}), **model.get("engine", {}), **entry.get("engine", {})},
        cost=Cost(**model["cost"]),
        rounds=rounds,
        warmup=tuple(Round(entry["engines"], entry["engines"] * b, i, o) for b, i, o in plan.get("warmup", [])),
        env={name: str(value) for name, value in plan.get("env", {}).items()},
        start_s=plan.get("start_s", 50.0),
    )


def _expand(where: str, block: Json) -> Iterator[Round]:
    """Rounds of a block: `repeats` times every batch with every number of engines."""
    needed = {"engines", "batch", "prompt_tokens", "output_tokens"}
    _check_keys(f"a block of rounds of {where}", block, needed, {"repeats"})
    for _, batch, engines in itertools.product(range(block.get("repeats", 1)), block["batch"], block["engines"]):
        yield Round(engines, batch, block["prompt_tokens"], block["output_tokens"])


def _check_keys(where: str, given: Mapping[str, object], needed: set[str], optional: set[str]) -> None:
    if missing := needed - given.keys():
        raise PlanError(f"{where} lacks {sorted(missing)}")
    if unknown := given.keys() - needed - optional:
        raise PlanError(f"{where} has unknown keys {sorted(unknown)}; known are {sorted(needed | optional)}")


def _check_round(where: str, r: Round, engines: int) -> None:
    if not 1 <= r.engines <= engines:
        raise PlanError(f"{where}: a round wants {r.engines} engines of the {engines} that the group starts")
    if r.batch < r.engines:
        raise PlanError(f"{where}: a batch of {r.batch} leaves some of {r.engines} engines without a request")
    if r.prompt_tokens < 1 or r.output_tokens < 1:
        raise PlanError(f"{where}: prompt_tokens and output_tokens must be at least 1")


def group_deadlines(groups: Sequence[Group], start_s: float, seconds: float) -> list[float]:
    """When each group must have run its rounds; what one leaves unused, the next may use."""
    shares = list(itertools.accumulate(g.seconds for g in groups))
    return [start_s + seconds * share / shares[-1] for share in shares]


def why_skip(group: Group, r: Round, kv_tokens: int | None, now_s: float, deadline_s: float) -> str | None:
    """Why the round should not be run now, or None."""
    needed = r.share(0) * (r.prompt_tokens + r.output_tokens)
    if r.output_tokens > 1 and kv_tokens is not None and needed > kv_tokens:
        return f"needs {needed} KV tokens on one engine, which has {kv_tokens}"
    left_s = deadline_s - now_s
    if (estimate_s := group.cost.round_s(r)) > left_s:
        return f"would take {estimate_s:.1f} s, {max(0.0, left_s):.1f} s are left"
    return None


# ---------------------------------------------------------------- what an engine reports, and its arithmetic


@dataclass(frozen=True, slots=True)
class Step:
    """One engine step: when its tokens came out, how many, how many were first or last of their request."""

    end_s: float
    tokens: int
    first_tokens: int
    finished: int


@dataclass(frozen=True, slots=True)
class EngineRun:
    """What one engine did in a round. Times are `time.monotonic()` seconds."""

    sequences: int
    submitted_s: float
    answered_s: float
    steps: tuple[Step, ...]

    @classmethod
    def from_report(cls, report: Json) -> EngineRun:
        steps = tuple(Step(*step) for step in report["steps"])
        return cls(report["sequences"], report["submitted_s"], report["answered_s"], steps)

    @property
    def output_tokens(self) -> int:
        return sum(s.tokens for s in self.steps)

    @property
    def first_token_s(self) -> float:
        return next(s.end_s for s in self.steps if s.first_tokens)

    @property
    def prefill_end_s(self) -> float:
        seen = itertools.accumulate(s.first_tokens for s in self.steps)
        return next(s.end_s for s, total in zip(self.steps, seen, strict=True) if total == self.sequences)

    @property
    def first_finish_s(self) -> float:
        return next(s.end_s for s in self.steps if s.finished)

    def decode_steps(self, prompt_tokens: int, start_s: float, end_s: float) -> list[tuple[float, float]]:
        """(mean context tokens of a sequence, step seconds) of each step that lies wholly in the window."""
        made = itertools.accumulate(s.tokens for s in self.steps)
        return [
            (prompt_tokens + tokens / self.sequences, after.end_s - before.end_s)
            for (before, after), tokens in zip(itertools.pairwise(self.steps), made, strict=False)
            if before.end_s >= start_s and after.end_s <= end_s
        ]

    def prefill_steps_s(self) -> list[float]:
        """Seconds of each step from the second to give a token to the one that ends prefill."""
        ends = [s.end_s for s in self.steps if s.end_s <= self.prefill_end_s]
        return [after - before for before, after in itertools.pairwise(ends)]


@dataclass(frozen=True, slots=True)
class GpuSample:
    """The GPU over the interval that ends at `at_s`; memory is that moment's."""

    at_s: float
    sm_ratio: float
    sm_occupancy_ratio: float
    dram_bandwidth_ratio: float
    memory_used_bytes: int


def quantile(values: Sequence[float], q: float) -> float | None:
    """The value that `q` of the values do not exceed (nearest rank); None of nothing."""
    return sorted(values)[max(0, math.ceil(q * len(values)) - 1)] if values else None


def decode_window(runs: Sequence[EngineRun]) -> tuple[float, float]:
    """When every sequence of every engine decodes; empty (end before start) if prefill outlasts an answer."""
    return max(r.prefill_end_s for r in runs), min(r.first_finish_s for r in runs)


def context_points(steps: Sequence[tuple[float, float]], points: int = CONTEXT_POINTS) -> list[list[float]]:
    """[mean context tokens, median step seconds] of `points` equal parts of the steps, by growing context."""
    ordered = sorted(steps)
    size = len(ordered) / points
    parts = [ordered[int(i * size) : int((i + 1) * size)] for i in range(points)]
    return [[statistics.fmean(c for c, _ in part), statistics.median(s for _, s in part)] for part in parts if part]


def gpu_means(samples: Sequence[GpuSample], start_s: float, end_s: float) -> Json:
    """Means of the samples whose whole interval lies in the window; all None where there are none."""
    inside = [s for s in samples if s.at_s - SAMPLE_EVERY_S >= start_s and s.at_s <= end_s]
    names = ("sm_ratio", "sm_occupancy_ratio", "dram_bandwidth_ratio")
    means = {n: statistics.fmean(getattr(s, n) for s in inside) if inside else None for n in names}
    memory = max((s.memory_used_bytes for s in inside), default=None)
    return {**means, "memory_used_bytes": memory, "samples": len(inside)}


def engine_summary(run: EngineRun, r: Round, go_s: float, window: tuple[float, float]) -> Json:
    """One engine's part of a round; see `round_row` for the keys that need saying."""
    decode_s = [s for _, s in run.decode_steps(r.prompt_tokens, *window)]
    prefill_s = run.prefill_steps_s()
    return {
        "sequences": run.sequences,
        "submit_s": run.submitted_s - go_s,
        "first_token_s": run.first_token_s - go_s,
        "prefill_s": run.prefill_end_s - go_s,
        "prefill_steps": len(prefill_s),
        "prefill_step_s_p50": quantile(prefill_s, 0.5),
        "steps": len(run.steps),
        "decode_steps": len(decode_s),
        "decode_step_s_p10": quantile(decode_s, 0.1),
        "decode_step_s_p50": quantile(decode_s, 0.5),
        "decode_step_s_p90": quantile(decode_s, 0.9),
        "last_token_s": run.steps[-1].end_s - go_s,
        "answered_s": run.answered_s - go_s,
    }


def round_row(r: Round, runs: Sequence[EngineRun], go_s: float, samples: Sequence[GpuSample]) -> Json:
    """The measured part of a `round` row.

    wall_s                     from letting go to the last engine's last answer, front end included
    prefill_s, ..._tokens_per_s   the last engine's prefill; all prompt tokens over it
    decode_s                   length of the decode window (0: it is empty, and every decode_* is None)
    decode_step_s_p50          median over the steps of all engines in the window
    decode_tokens_per_s        sequences that decode over each engine's mean step, summed over the engines
    decode_points              [[context tokens of a sequence, step seconds], ...]: how steps grow with context
    per_engine                 `engine_summary` of each; submit_s is when its last request had been sent
    gpu, gpu_decode            `gpu_means` of the round and of the decode window (GPM, 0.1 s samples)
    """
    start_s, end_s = decode_window(runs)
    steps = [run.decode_steps(r.prompt_tokens, start_s, end_s) for run in runs]
    flat = [step for part in steps for step in part]
    wall_s = max(run.answered_s for run in runs) - go_s
    prefill_s = max(run.prefill_end_s for run in runs) - go_s
    return {
        "wall_s": wall_s,
        "output_tokens": sum(run.output_tokens for run in runs),
        "output_tokens_per_s": sum(run.output_tokens for run in runs) / wall_s,
        "prefill_s": prefill_s,
        "prefill_tokens_per_s": r.batch * r.prompt_tokens / prefill_s,
        "decode_s": max(0.0, end_s - start_s),
        "decode_step_s_p50": quantile([s for _, s in flat], 0.5),
        "decode_tokens_per_s": _decode_tokens_per_s(runs, steps),
        "decode_points": context_points(flat),
        "per_engine": [engine_summary(run, r, go_s, (start_s, end_s)) for run in runs],
        "gpu": gpu_means(samples, go_s, go_s + wall_s),
        "gpu_decode": gpu_means(samples, start_s, end_s),
    }


def _decode_tokens_per_s(runs: Sequence[EngineRun], steps: Sequence[Sequence[tuple[float, float]]]) -> float | None:
    if not all(steps):
        return None
    return sum(run.sequences / statistics.fmean(s for _, s in part) for run, part in zip(runs, steps, strict=True))


# ---------------------------------------------------------------- the GPU


class GpuSampler:
    """Samples GPM and memory of GPU 0 in a thread. Raises pynvml.NVMLError where there is no such GPU."""

    def __init__(self) -> None:
        import pynvml  # type: ignore[import-untyped]  # nvidia-ml-py has no types

        self._nvml = pynvml
        pynvml.nvmlInit()
        self._gpu = pynvml.nvmlDeviceGetHandleByIndex(visible_gpus()[0])
        self._samples: list[GpuSample] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def facts(self) -> Json:
        name, driver = self._nvml.nvmlDeviceGetName(self._gpu), self._nvml.nvmlSystemGetDriverVersion()
        return {"gpu_name": name, "driver": driver}

    def mps_clients(self) -> int | None:
        """How many processes really are clients of an MPS server; None if the driver cannot say."""
        try:
            return len(self._nvml.nvmlDeviceGetMPSComputeRunningProcesses(self._gpu))
        except self._nvml.NVMLError:
            return None

    def since(self, start_s: float) -> list[GpuSample]:
        return [s for s in list(self._samples) if s.at_s >= start_s]

    def close(self) -> None:
        self._stop.set()
        self._thread.join(2.0)
        self._nvml.nvmlShutdown()

    def _run(self) -> None:
        before, after = self._nvml.nvmlGpmSampleAlloc(), self._nvml.nvmlGpmSampleAlloc()
        self._nvml.nvmlGpmSampleGet(self._gpu, before)
        while not self._stop.wait(SAMPLE_EVERY_S):
            self._nvml.nvmlGpmSampleGet(self._gpu, after)
            self._samples.append(self._sample(before, after))
            before, after = after, before

    def _sample(self, before: object, after: object) -> GpuSample:
        nvml = self._nvml
        ids = (nvml.NVML_GPM_METRIC_SM_UTIL, nvml.NVML_GPM_METRIC_SM_OCCUPANCY, nvml.NVML_GPM_METRIC_DRAM_BW_UTIL)
        query = nvml.c_nvmlGpmMetricsGet_t()
        query.version = nvml.NVML_GPM_METRICS_GET_VERSION
        query.sample1, query.sample2, query.numMetrics = before, after, len(ids)
        for i, metric in enumerate(ids):
            query.metrics[i].metricId = metric
        nvml.nvmlGpmMetricsGet(query)
        sm, occupancy, dram = (query.metrics[i].value / 100 for i in range(len(ids)))
        return GpuSample(time.monotonic(), sm, occupancy, dram, nvml.nvmlDeviceGetMemoryInfo(self._gpu).used)


@contextlib.contextmanager
def gpu_sampler() -> Iterator[GpuSampler | None]:
    """A running sampler, or None on a machine whose NVML or GPU is missing (said on stderr)."""
    try:
        sampler = GpuSampler()
    except Exception as error:  # pynvml may be missing, so its error types cannot be named here
        print(f"no GPU readings: {error!r}", file=sys.stderr)
        yield None
        return
    try:
        yield sampler
    finally:
        sampler.close()


@contextlib.contextmanager
def mps_environment(enabled: bool) -> Iterator[dict[str, str]]:
    """The environment of a group's engines: clients of an MPS daemon of its own, or surely of none.

    Without MPS the pipe directory is an empty one: with none named, CUDA would join a daemon at the default place.
    """
    with tempfile.TemporaryDirectory(prefix="mps-", ignore_cleanup_errors=True) as folder:
        env = {"CUDA_MPS_PIPE_DIRECTORY": f"{folder}/pipe", "CUDA_MPS_LOG_DIRECTORY": f"{folder}/log"}
        for path in env.values():
            os.mkdir(path)
        if not enabled:
            yield env
            return
        subprocess.run(["nvidia-cuda-mps-control", "-d"], env={**os.environ, **env}, check=True, timeout=20)
        try:
            yield env
        finally:
            _quit_mps(env)


def _quit_mps(env: dict[str, str]) -> None:
    """Ask the daemon to quit, and kill it if it still runs after MPS_GRACE_S."""
    pid_file = Path(env["CUDA_MPS_PIPE_DIRECTORY"], "nvidia-cuda-mps-control.pid")
    pid = int(pid_file.read_text()) if pid_file.exists() else None
    deadline_s = time.monotonic() + MPS_GRACE_S
    with contextlib.suppress(subprocess.TimeoutExpired):
        everything = {**os.environ, **env}
        control = ["nvidia-cuda-mps-control"]
        subprocess.run(control, input="quit\n", text=True, env=everything, timeout=MPS_GRACE_S, check=False)
    while pid is not None and _is_mps(pid):
        if time.monotonic() > deadline_s:
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)


def _is_mps(pid: int) -> bool:
    """Whether `pid` runs and is the daemon; a zombie's command line is empty."""
    try:
        return b"nvidia-cuda-mps" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except FileNotFoundError:
        return False


# ---------------------------------------------------------------- an engine, seen from outside


@contextlib.contextmanager
def engines_of(group: Group, command: Sequence[str], mps_env: dict[str, str], folder: Path) -> Iterator[list[Engine]]:
    """The group's engines, started together and told their model; none is left when the block ends."""
    model = folder / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(group.config))
    env = {**os.environ, **group.env, **mps_env}
    engines: list[Engine] = []
    try:
        for rank in range(group.engines):
            engines.append(Engine(command, env, folder / f"engine-{rank}.log"))
            engines[-1].send({"model": str(model), "engine": group.engine})
        yield engines
    finally:
        for engine in engines:
            engine.close()
        deadline_s = time.monotonic() + ENGINE_GRACE_S
        for engine in engines:
            engine.end(deadline_s)


# ---------------------------------------------------------------- running


def run_round(engines: Sequence[Engine], r: Round, deadline_s: float) -> tuple[list[EngineRun], float]:
    """Runs of the round's engines and when they were let go (monotonic)."""
    active = engines[: r.engines]
    for rank, engine in enumerate(active):
        engine.send(
            {
                "sequences": r.share(rank),
                "prompt_tokens": r.prompt_tokens,
                "output_tokens": r.output_tokens,
                "seed": f"{r.seed}/{rank}",
            }
        )
    for engine in active:
        engine.receive(deadline_s)
    go_s = time.monotonic()
    for engine in active:
        engine.send({"go": True})
    return [EngineRun.from_report(engine.receive(deadline_s)) for engine in active], go_s


class Run:
    """Writes the rows of a plan's groups to `out` as they are made."""

    def __init__(self, out: TextIO, sampler: GpuSampler | None, command: Sequence[str]) -> None:
        self._out = out
        self._sampler = sampler
        self._command = command
        self._facts: Json = sampler.facts() if sampler else {"gpu_name": None, "driver": None}

    def group(self, group: Group, deadline_s: float, hard_deadline_s: float) -> None:
        """Run one group; what breaks it is a `failure` row, and the next group may still run."""
        left_s = deadline_s - time.monotonic()
        if left_s < group.start_s:
            self._skip(group, group.rounds, f"a start takes {group.start_s:.0f} s, {max(0.0, left_s):.0f} s are left")
            return
        todo = list(group.rounds)
        try:
            with contextlib.ExitStack() as stack:
                folder = Path(
                    stack.enter_context(tempfile.TemporaryDirectory(prefix="engines-", ignore_cleanup_errors=True))
                )
                mps_env = stack.enter_context(mps_environment(group.mps))
                engines = stack.enter_context(engines_of(group, self._command, mps_env, folder))
                hello = self._start(group, engines, min(hard_deadline_s, time.monotonic() + 3 * group.start_s))
                while todo:
                    self._round(group, engines, todo[0], hello, deadline_s, hard_deadline_s)
                    todo.pop(0)
        except Exception as error:  # whatever it was, the machine is lent: it is written down and the next group runs
            self._write(group, "failure", {"error": f"{type(error).__name__}: {error}"})
            self._skip(group, todo, "the group failed")

    def _start(self, group: Group, engines: Sequence[Engine], deadline_s: float) -> Json:
        begun_s = time.monotonic()
        hellos = [engine.receive(deadline_s) for engine in engines]
        ready_s = time.monotonic()
        for r in group.warmup:
            run_round(engines, r, deadline_s)
        self._facts |= {"vllm": hellos[0]["vllm"], "torch": hellos[0]["torch"]}
        times = {"start_s": ready_s - begun_s, "warmup_s": time.monotonic() - ready_s}
        self._write(group, "start", {**times, "engine_arguments": group.engine, "kv_tokens": hellos[0]["kv_tokens"]})
        return hellos[0]

    def _round(
        self, group: Group, engines: Sequence[Engine], r: Round, hello: Json, deadline_s: float, hard_deadline_s: float
    ) -> None:
        estimate_s = group.cost.round_s(r)
        now_s = time.monotonic()
        if reason := why_skip(group, r, hello["kv_tokens"], now_s, deadline_s):
            self._skip(group, [r], reason)
            return
        runs, go_s = run_round(engines, r, min(hard_deadline_s, now_s + 5 * estimate_s + 10))
        samples = self._sampler.since(go_s) if self._sampler else []
        row = {**_round_facts(r), **round_row(r, runs, go_s, samples), "estimate_s": estimate_s}
        self._write(group, "round", row)

    def _skip(self, group: Group, rounds: Sequence[Round], reason: str) -> None:
        for r in rounds:
            self._write(group, "skip", {**_round_facts(r), "reason": reason})

    def _write(self, group: Group, kind: str, row: Json) -> None:
        head = {"kind": kind, "model": group.model, "mps": group.mps, "engines_started": group.engines}
        clients = self._sampler.mps_clients() if self._sampler else None
        tail = {"mps_clients": clients, **self._facts, "date": datetime.now(UTC).isoformat(timespec="seconds")}
        self._out.write(json.dumps({**head, **_rounded(row), **tail}) + "\n")
        self._out.flush()


def _round_facts(r: Round) -> Json:
    return {
        "engines": r.engines,
        "batch": r.batch,
        "prompt_tokens": r.prompt_tokens,
        "output_tokens_each": r.output_tokens,
        "seed": r.seed,
    }


def _rounded(value: Any) -> Any:
    """Floats to six significant digits, however deep they lie."""
    match value:
        case float():
            return float(f"{value:.6g}")
        case dict():
            return {key: _rounded(item) for key, item in value.items()}
        case list():
            return [_rounded(item) for item in value]
        case _:
            return value


def run_plan(groups: Sequence[Group], out: TextIO, seconds: float, command: Sequence[str] = WORKER_COMMAND) -> None:
    """Run all groups within `seconds`; the last STOP_MARGIN_S of them (or a third) are kept to end engines and MPS."""
    start_s = time.monotonic()
    usable_s = max(seconds - STOP_MARGIN_S, seconds * 2 / 3)
    with gpu_sampler() as sampler:
        run = Run(out, sampler, command)
        for group, deadline_s in zip(groups, group_deadlines(groups, start_s, usable_s), strict=True):
            run.group(group, deadline_s, start_s + usable_s)


def print_estimate(groups: Sequence[Group]) -> None:
    for g in groups:
        print(f"{g.model:12} mps={g.mps!s:5} {len(g.rounds):3} rounds {g.estimate_s():6.1f} s of {g.seconds:.0f} s")
    print(f"in all {sum(len(g.rounds) for g in groups)} rounds, {sum(g.estimate_s() for g in groups):.0f} s")


# ---------------------------------------------------------------- an engine, seen from inside


def work() -> None:
    """A worker's life: model in, greeting out, then rounds until the input closes."""
    answer = answers_on_stdout()
    spec = json.loads(sys.stdin.readline())
    engine = _vllm_engine(spec)
    answer(_greeting(engine))
    while line := sys.stdin.readline():
        order = json.loads(line)
        requests = _requests(engine, order)
        answer({"ready": True})
        if not sys.stdin.readline():
            return
        answer(_measure(engine, requests))


def _vllm_engine(spec: Json) -> Any:
    from vllm import LLM

    return LLM(model=spec["model"], skip_tokenizer_init=True, load_format="dummy", **spec["engine"]).llm_engine


def _greeting(engine: Any) -> Json:
    import torch
    import vllm

    cache = engine.vllm_config.cache_config
    return {
        "vllm": vllm.__version__,
        "torch": torch.__version__,
        "kv_tokens": cache.num_gpu_blocks * cache.block_size if cache.num_gpu_blocks else None,
    }


def _requests(engine: Any, order: Json) -> list[Any]:
    """The round's requests, made before time runs. Temperature 1: greedy random weights repeat one token for ever."""
    from vllm import SamplingParams
    from vllm.inputs import TokensPrompt

    rng = random.Random(order["seed"])
    vocabulary = range(10, engine.vllm_config.model_config.get_vocab_size())
    params = SamplingParams(temperature=1.0, max_tokens=order["output_tokens"], ignore_eos=True, detokenize=False)
    tasks = engine.get_supported_tasks()
    prompts = [rng.choices(vocabulary, k=order["prompt_tokens"]) for _ in range(order["sequences"])]
    return [
        engine.input_processor.process_inputs(f"{n}", TokensPrompt(prompt_token_ids=p), params, supported_tasks=tasks)
        for n, p in enumerate(prompts)
    ]


def _measure(engine: Any, requests: Sequence[Any]) -> Json:
    for request in requests:
        engine.add_request(request.request_id, request, request.params)
    submitted_s = time.monotonic()
    waiting_for_first = {request.request_id for request in requests}
    steps = []
    while engine.has_unfinished_requests():
        outputs = _step(engine)
        if made := [o for o in outputs.outputs if o.new_token_ids]:
            first = {o.request_id for o in made} & waiting_for_first
            waiting_for_first -= first
            tokens, finished = sum(len(o.new_token_ids) for o in made), sum(o.finished for o in made)
            steps.append([outputs.timestamp, tokens, len(first), finished])
    answered_s = time.monotonic()
    return {"sequences": len(requests), "submitted_s": submitted_s, "answered_s": answered_s, "steps": steps}


def _step(engine: Any) -> Any:
    """`LLMEngine.step` of vLLM 0.29 without its statistics; its outputs carry the engine core's own time stamp."""
    outputs = engine.engine_core.get_output()
    processed = engine.output_processor.process_outputs(outputs.outputs, engine_core_timestamp=outputs.timestamp)
    engine.engine_core.abort_requests(processed.reqs_to_abort)
    return outputs


# ---------------------------------------------------------------- the command line


def _leave(signum: int, frame: object) -> None:
    raise SystemExit(128 + signum)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Measure vLLM engines that share one GPU; rows as JSON lines.")
    parser.add_argument("--plan", type=Path, required=True)
    parser.add_argument("--out", type=Path, help="JSON lines are appended here")
    parser.add_argument("--seconds", type=float, default=560.0, help="everything, cleaning up included, ends by then")
    parser.add_argument("--estimate", action="store_true", help="say how long the plan should take and leave")
    args = parser.parse_args(arguments)
    groups = parse_plan(json.loads(args.plan.read_text()))
    if args.estimate:
        print_estimate(groups)
        return
    if args.out is None:
        parser.error("--out is needed: rows are written there")
    if any(g.mps for g in groups) and shutil.which("nvidia-cuda-mps-control") is None:
        parser.error("the plan wants MPS, but nvidia-cuda-mps-control is not on the PATH: install it or set mps false")
    signal.signal(signal.SIGTERM, _leave)
    with args.out.open("a") as out:
        run_plan(groups, out, args.seconds)


if __name__ == "__main__":
    if sys.argv[1:] == ["--worker"]:
        work()
    else:
        main()
