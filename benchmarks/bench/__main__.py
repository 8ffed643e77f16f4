"""`splitwiser bench`, or `python -m benchmarks.bench`: measure, then write the report."""

from __future__ import annotations

import argparse
import json
import shlex
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

from rich.console import Console

from benchmarks.bench import rows as record
from benchmarks.bench.fit import fitted
from benchmarks.bench.machine import facts, look, room
from benchmarks.bench.phases import USUAL_LIMITS, Limits
from benchmarks.bench.plan import FULL, H200, QUICK, SYSTEMS, TWO_CORES, Machine, Plan, Sizes, make_plan, plan_s
from benchmarks.bench.progress import Bar
from benchmarks.bench.prompts import Source
from benchmarks.bench.report import write_report
from benchmarks.bench.run import Bench, Setting
from benchmarks.device_readings import Watch
from benchmarks.replay import ReplayError, Shape
from benchmarks.shapes import OPT_125M
from benchmarks.workloads import Arrival
from deployments.demo_model import DEMO, ensure_demo_model

# OPT-125m's shape, for machines that have no checkpoint: random weights cost what trained ones do.
_MADE = {True: "the demo model, random weights", False: "OPT-125m's shape, random weights"}
GPU_SECONDS, CPU_SECONDS = 560.0, 540.0


def main(arguments: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if arguments is None else arguments)
    options = _parser().parse_args(words)
    if options.report_only:
        write_report(record.read(options.report_only), options.out)
        return 0
    try:
        return _bench(options, shlex.join(words))
    except ReplayError as error:
        print(f"splitwiser bench: {error}", file=sys.stderr)
        return 2


def _bench(options: argparse.Namespace, words: str) -> int:
    """Raises ReplayError where the trace cannot be read."""
    console = Console(stderr=True)
    machine = look()
    sizes = QUICK if options.quick else FULL
    shaped = _trace(options.trace, sizes)
    cost = H200 if machine.gpu else TWO_CORES
    plan = make_plan(machine, sizes, cost, options.systems, options.repeats, len(shaped))
    if options.estimate:
        for tier in (1, 2, 3):
            console.print(f"down to tier {tier}: about {plan_s(plan, cost, sizes, tier):.0f} s")
        return 0
    _refuse(machine, options)
    begun_s = time.monotonic()
    end_s = begun_s + (options.seconds or (GPU_SECONDS if machine.gpu else CPU_SECONDS))
    signal.signal(signal.SIGTERM, _leave)
    model = options.model or ensure_demo_model(spec=DEMO if options.quick else OPT_125M)
    if machine.gpu:
        plan = fitted(plan, room(model))
    setting = Setting(
        machine, sizes, cost, model, Source(model, shaped), Limits(options.ttft_limit, options.tpot_limit),
        options.engine, options.seed, options.nvtx, client_processes=4 if machine.gpu else 1,
    )  # fmt: skip
    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / "rows.jsonl"
    try:
        with file.open("a") as out:
            rows = record.Rows(out, datetime.now(UTC).strftime("%Y%m%dT%H%M%S"))
            rows.write("run", _about(setting, options, words, plan))
            with Watch() as watch, Bar(console, plan) as bar:
                Bench(plan, setting, rows, watch, bar, end_s).run()
    finally:  # what an interrupted run has measured is reported, too
        write_report(record.read([file]), options.out)
    console.print(f"{time.monotonic() - begun_s:.0f} s; report: {options.out / 'report.html'}, rows: {file}")
    return 0


def _trace(file: Path | None, sizes: Sizes) -> list[Arrival]:
    if file is None:
        return []
    scale, total = sizes.trace_scale, sizes.max_model_len
    shape = Shape(sizes.trace_speed, sizes.trace_seconds, None, scale, scale, max_total=total)
    return shape.arrivals(file)


def _refuse(machine: Machine, options: argparse.Namespace) -> None:
    if options.nvtx and not machine.gpu:
        raise ReplayError("--nvtx marks ranges for a CUDA profiler, and there is no GPU here: leave it out")


def _about(setting: Setting, options: argparse.Namespace, words: str, plan: Plan) -> record.Json:
    return {
        **facts(setting.machine),
        "machine": asdict(setting.machine),
        "command": f"splitwiser bench {words}".strip(),
        "model": options.model.name
        if options.model
        else ("demo" if options.quick else "OPT-125m's shape, random weights"),
        "sizes": {**asdict(setting.sizes), "long_batches": list(setting.sizes.long_batches)},
        "limits": asdict(setting.limits),
        "trace": options.trace.name if options.trace else None,
        "seed": setting.seed,
        "planned_rounds": sum(len(rounds) for rounds in plan.stages.values()),
    }


def _leave(signum: int, frame: object) -> None:
    raise SystemExit(128 + signum)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="splitwiser bench", description="Splitwiser's experiments on this machine")
    today = datetime.now(UTC).date().isoformat()
    parser.add_argument("--out", type=Path, default=Path(f"bench-{today}"), metavar="FOLDER", help="rows and report")
    parser.add_argument("--quick", action="store_true", help="small sizes, for two CPU cores")
    parser.add_argument("--model", type=Path, metavar="FOLDER", help="a checkpoint; default: one made on the spot")
    parser.add_argument("--trace", type=Path, metavar="FILE", help="CSV: TIMESTAMP, ContextTokens, GeneratedTokens")
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS), metavar="SYSTEM", help=_NAMES)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seconds", type=float, help=f"all ends by then (GPU {GPU_SECONDS:g}, CPU {CPU_SECONDS:g})")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--nvtx", action="store_true", help="mark prompt and token phases for Nsight Systems")
    parser.add_argument("--engine", type=json.loads, default={}, metavar="JSON", help="more arguments for every engine")
    parser.add_argument(
        "--ttft-limit", type=float, default=USUAL_LIMITS.ttft_s, metavar="S", help="goodput: first token"
    )
    parser.add_argument(
        "--tpot-limit", type=float, default=USUAL_LIMITS.tpot_s, metavar="S", help="goodput: each further"
    )
    parser.add_argument("--estimate", action="store_true", help="say how long it would take, and leave")
    parser.add_argument(
        "--report-only", type=Path, nargs="+", metavar="ROWS", help="only write the report of such rows"
    )
    return parser


_NAMES = f"some of {', '.join(SYSTEMS)}"


if __name__ == "__main__":
    sys.exit(main())
