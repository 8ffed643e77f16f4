"""Runs a plan: stage after stage, round after round, until all is done or the time is up."""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from benchmarks.bench import members as crew
from benchmarks.bench.machine import engine_arguments, environment, offline_arguments, threads
from benchmarks.bench.members import Members, Recruits, Report
from benchmarks.bench.phases import Limits, measured
from benchmarks.bench.plan import (
    Cell,
    Cost,
    Kind,
    Machine,
    Plan,
    Round,
    Sizes,
    Stage,
    estimate_s,
    group_of,
    kv_tokens,
    reserve_s,
)
from benchmarks.bench.prompts import Source, kv_bytes_per_token
from benchmarks.bench.rows import Json, Rows
from benchmarks.client import Clients, Target, token_events
from benchmarks.device_readings import Watch
from benchmarks.replay import served
from benchmarks.serving import serving
from benchmarks.workers import EngineError

NAME = "bench"
START_SLACK = 3.0
"""A stage may take so many times as long to start as was estimated before it is given up."""
ROUND_SLACK_S = 30.0
END_S = 30.0
"""Kept at the end of the time for ending processes, MPS and the report."""
MIN_KV_TOKENS = 16_384


class Progress(Protocol):
    """Who is told how it goes."""

    def say(self, text: str) -> None: ...

    def done(self, row: Json) -> None: ...


@dataclass(frozen=True, slots=True)
class Setting:
    """Everything that a run depends on."""

    machine: Machine
    sizes: Sizes
    cost: Cost
    model: Path
    source: Source
    limits: Limits
    engine: Json
    seed: int
    nvtx: bool
    client_processes: int


class Bench:
    """One run of a plan until `end_s` (monotonic)."""

    def __init__(
        self, plan: Plan, setting: Setting, rows: Rows, watch: Watch, progress: Progress, end_s: float
    ) -> None:
        self._plan = plan
        self._of = setting
        self._rows = rows
        self._watch = watch
        self._progress = progress
        self._end_s = end_s - END_S
        self._took_s: dict[Cell, float] = {}

    def run(self) -> None:
        for skip in self._plan.skipped:
            self._write("skip", {**skip.facts, "reason": skip.reason})
        for stage in Stage:
            if self._plan.stages[stage]:
                self._stage(stage)

    def _stage(self, stage: Stage) -> None:
        """Run one stage; what breaks it is a failure row, and the next may still run."""
        rounds = self._plan.stages[stage]
        start_s, left_s = self._of.cost.start_s[stage], self._end_s - time.monotonic()
        if left_s < start_s:
            self._skip(rounds, f"starting takes about {start_s:.0f} s, {max(0.0, left_s):.0f} s were left")
            return
        todo = list(rounds)
        try:
            if stage is Stage.SERVED:
                self._served(todo)
            else:
                self._offline(stage, todo)
        except Exception as error:  # whatever it was is written down, and the next stage runs
            self._write("failure", {"stage": str(stage), "error": f"{type(error).__name__}: {error}"})
            self._skip(todo, f"the stage {stage} failed")

    # Engines without HTTP

    def _offline(self, stage: Stage, todo: list[Round]) -> None:
        self._progress.say(f"starting the processes of stage '{stage}'")
        begun_s = time.monotonic()
        with contextlib.ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-", ignore_cleanup_errors=True)))
            mps_env, daemon = stack.enter_context(crew.mps_environment(stage is Stage.MPS))
            env = {**environment(self._of.machine, self._of.sizes, self._of.nvtx), **mps_env}
            groups = stack.enter_context(crew.started(list(self.recruits(todo)), env, folder))
            for members in groups.values():
                crew.greet(members, min(self._end_s, begun_s + START_SLACK * self._of.cost.start_s[stage]))
                self._warm_up(members, todo)
            clients = len(daemon.client_pids()) if daemon else 0
            self._started(stage, groups, time.monotonic() - begun_s, clients if daemon else None)
            if daemon and clients < sum(m.clients for m in groups.values() if not m.broken):
                raise EngineError(f"only {clients} processes became MPS clients")
            while todo:
                self._offline_round(groups[group_of(todo[0].cell)], todo[0], stage)
                todo.pop(0)

    def recruits(self, rounds: Sequence[Round]) -> Iterator[Recruits]:
        """The groups that the rounds need, each with as many processes as its largest round."""
        of = self._of
        for name in ("vllm", "unmixed", "hf"):
            mine = [r for r in rounds if group_of(r.cell) == name]
            if not mine:
                continue
            count = max(r.cell.processes for r in mine)
            base = {"model": str(of.model), "nvtx": of.nvtx}
            if name == "hf":
                device = "cuda" if of.machine.gpu else "cpu"
                host = {**base, "device": device, "processes": count, "threads": threads(of.machine, of.sizes)}
                yield Recruits(name, crew.HF, [host], clients=count)
                continue
            unmixed = {"enable_chunked_prefill": False} if name == "unmixed" else {}
            specs = [{**base, "engine": {**self._engine(mine, rank), **unmixed}} for rank in range(count)]
            yield Recruits(name, crew.VLLM, specs, clients=count)

    def _engine(self, rounds: Sequence[Round], rank: int) -> Json:
        arguments = engine_arguments(self._of.machine, self._of.sizes, self.kv_bytes(rounds, rank), self._of.engine)
        return offline_arguments(self._of.machine, arguments)

    def kv_bytes(self, rounds: Sequence[Round], rank: int) -> int:
        """Room for the largest share that the rounds give this engine, with a twentieth to spare for whole blocks."""
        tokens = max(MIN_KV_TOKENS, int(kv_tokens(rounds, rank) * 1.05))
        return tokens * kv_bytes_per_token(self._of.model)

    def _warm_up(self, members: Members, rounds: Sequence[Round]) -> None:
        """Each process of the group computes once what its first round will ask: first times load kernels."""
        if members.broken:
            return
        mine = [r for r in rounds if group_of(r.cell) == members.name and r.cell.workload.kind is Kind.BATCH]
        # The most processes, and the least work that still reaches each.
        cells = sorted((r.cell for r in mine), key=lambda c: (-c.processes, c.workload.requests))
        for r in [Round(cell, 0, 0) for cell in cells[:1]]:
            wishes = self._of.source.wishes(r.cell.workload, self._of.seed)
            short = [replace(w, output_tokens=min(w.output_tokens, 8)) for w in wishes]
            try:
                crew.play(members, r, short, self._of.sizes.batch, min(self._end_s, time.monotonic() + 60.0))
            except EngineError as error:
                members.broken = str(error)

    def _started(self, stage: Stage, groups: dict[str, Members], seconds: float, mps_clients: int | None) -> None:
        hellos = {name: members.hello for name, members in groups.items() if not members.broken}
        row = {"stage": str(stage), "start_s": seconds, "groups": hellos, "mps_clients": mps_clients}
        self._write("start", row)
        for name, members in groups.items():
            if members.broken:
                self._write("failure", {"stage": str(stage), "group": name, "error": members.broken})

    def _offline_round(self, members: Members, r: Round, stage: Stage) -> None:
        if reason := (members.broken and f"the processes of group '{members.name}' failed") or self._no_time(r, stage):
            self._skip([r], reason)
            return
        wishes = self._of.source.wishes(r.cell.workload, self._seed(r))
        try:
            report = crew.play(members, r, wishes, self._of.sizes.batch, self._deadline_s(r))
        except EngineError as error:
            members.broken = str(error)
            self._write("failure", {**r.facts(), "stage": str(stage), "error": str(error)})
            return
        self._measured(r, report, {})

    # The served system

    def _served(self, todo: list[Round]) -> None:
        self._progress.say("starting splitwiser-serve")
        begun_s = time.monotonic()
        application = {"import_path": "deployments.app:build", "args": self.serve_arguments(todo)}
        limit_s = min(START_SLACK * self._of.cost.start_s[Stage.SERVED], self._end_s - begun_s)
        with serving(application, limit_s=limit_s) as url, Clients(self._of.client_processes) as clients:
            target = Target(url, NAME, limit_s=120.0)
            first = todo[0].cell.workload
            clients.run(target, self._of.source.wishes(first, self._of.seed)[: 8 * todo[0].cell.processes])
            self._write("start", {"stage": str(Stage.SERVED), "start_s": time.monotonic() - begun_s})
            while todo:
                self._served_round(clients, target, todo[0])
                todo.pop(0)

    def serve_arguments(self, rounds: Sequence[Round]) -> Json:
        """The application's `args`. Its replicas' KV caches together hold twice what the largest round needs, because
        the router decides how many replicas share it."""
        of = self._of
        replicas = rounds[0].cell.processes
        asked = [r.cell.workload for r in rounds if r.cell.workload.kind is not Kind.TRACE]
        most = max((w.at_once * (w.prompt_tokens + w.output_tokens) for w in asked), default=0)
        kv_bytes = max(MIN_KV_TOKENS, 2 * most // replicas) * kv_bytes_per_token(of.model)
        mps = "on" if of.machine.gpu and not of.machine.no_mps else "off"
        return {
            "model": str(of.model),
            "served_model_name": NAME,
            "replicas": replicas,
            "device": "gpu" if of.machine.gpu else "cpu",
            "mps": mps,
            "engine": engine_arguments(of.machine, of.sizes, kv_bytes, of.engine),
            "balancer": {"policy": "gpu_aware"},
        }

    def _served_round(self, clients: Clients, target: Target, r: Round) -> None:
        if reason := self._no_time(r, Stage.SERVED):
            self._skip([r], reason)
            return
        wishes = self._of.source.wishes(r.cell.workload, self._seed(r))
        answers = clients.run(target, wishes, r.cell.workload.limit)
        go_s = min(a.due_s for a in answers)
        report = Report(go_s, [served(a) for a in answers], list(token_events(answers)))
        shares: dict[str, int] = {}
        for answer in answers:
            shares[answer.replica] = shares.get(answer.replica, 0) + 1
        self._measured(r, report, {"replicas": dict(sorted(shares.items()))})

    # Both

    def _seed(self, r: Round) -> int:
        """The same requests for every system, others for every repeat."""
        return self._of.seed * 1000 + r.repeat

    def _estimate_s(self, r: Round) -> float:
        return self._took_s.get(r.cell) or estimate_s(r.cell, self._of.cost, self._of.sizes)

    def _no_time(self, r: Round, stage: Stage) -> str | None:
        needed_s = self._estimate_s(r)
        left_s = self._end_s - reserve_s(self._plan, stage, self._of.cost, self._of.sizes) - time.monotonic()
        if needed_s <= left_s:
            return None
        return f"needs about {needed_s:.1f} s, {max(0.0, left_s):.1f} s were left for it"

    def _deadline_s(self, r: Round) -> float:
        return min(self._end_s, time.monotonic() + 5 * self._estimate_s(r) + ROUND_SLACK_S)

    def _measured(self, r: Round, report: Report, more: Json) -> None:
        row = measured(report.requests, report.made, report.go_s, self._of.limits)
        self._took_s[r.cell] = row["wall_s"] + self._of.cost.round_s
        end_s = report.go_s + row["wall_s"]
        readings = {"device": self._watch.means(report.go_s, end_s)}
        if r.cell.workload.kind is Kind.BATCH and row["failed"] < row["requests"]:
            decoding_s = max(q.first_s for q in report.requests if q.tokens)
            readings["device_prompt"] = self._watch.means(report.go_s, decoding_s)
            readings["device_token"] = self._watch.means(decoding_s, end_s)
        self._write("round", {**r.facts(), **row, **readings, **more, "nvtx": self._of.nvtx})

    def _skip(self, rounds: Sequence[Round], reason: str) -> None:
        for r in rounds:
            self._write("skip", {**r.facts(), "reason": reason})

    def _write(self, kind: str, row: dict[str, Any]) -> None:
        self._progress.done(self._rows.write(kind, row))
