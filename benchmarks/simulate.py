"""Simulate replicas of one model on one GPU behind the dispatcher, under a simulated clock.

    python -m benchmarks.simulate --goals [--fresh-seed N] [--out DIR]
    python -m benchmarks.simulate --trace FILE [--speed-up X] [--json OUT] [--plot OUT.png]
    python -m benchmarks.simulate --closed 256 | --open 40 | --bursts 10 [--model opt] [--lengths mixed]

Every run compares `gpu_aware` left to itself with the simple policies and, on request (`--fixed 1 2 4`), with fixed
numbers of active replicas. Costs of engine steps are those fitted in `benchmarks/engine_model.json`.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from balancer.knobs import Knobs
from benchmarks import decision_speed, engine_model, route_rate
from benchmarks.engine_sim import Deployment
from benchmarks.goals import DEPLOYMENTS, RIVALS, Goals, Job, Line, Results, run_all, table
from benchmarks.simulation import Case, Result, Slo
from benchmarks.workloads import (
    LONG_OUTPUTS,
    MIXED,
    OVERSIZED,
    UNIFORM,
    Lengths,
    Workload,
    bursts,
    closed,
    poisson,
    read_trace,
    steps,
)

LENGTHS = {"uniform": UNIFORM, "mixed": MIXED, "oversized": OVERSIZED, "long": LONG_OUTPUTS}
DECISION_P50_US, DECISION_P99_US = 50.0, 250.0
DECISIONS_PER_CORE_S = 1500.0


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = p.add_mutually_exclusive_group(required=True)
    what.add_argument("--goals", action="store_true", help="the goals table: all models, loads and rivals")
    what.add_argument("--trace", type=Path, help="CSV with TIMESTAMP, ContextTokens, GeneratedTokens")
    what.add_argument("--closed", type=int, metavar="CLIENTS", help="so many clients, each with one request at a time")
    what.add_argument("--open", type=float, metavar="RATE", help="Poisson arrivals, requests/s")
    what.add_argument("--bursts", type=float, metavar="RATE", help="Poisson arrivals, x8 for 2 s in every 10 s")
    what.add_argument("--steps", type=int, metavar="CLIENTS", help="so many clients, x8 in the middle third")
    p.add_argument("--fresh-seed", type=int, metavar="N", help="with --goals: on random numbers and lengths drawn anew")
    p.add_argument("--model", choices=sorted(DEPLOYMENTS), default="opt")
    p.add_argument("--parameters", type=Path, default=engine_model.PARAMETERS, help="fitted engine model")
    p.add_argument("--replicas", type=int, help="instead of the model's default deployment")
    p.add_argument("--kv-tokens", type=int, help="KV tokens of each replica")
    p.add_argument("--lengths", choices=sorted(LENGTHS), default="uniform")
    p.add_argument("--shared-prefix", type=float, default=0.0, metavar="RATIO", help="so many prompts begin alike")
    p.add_argument("--speed-up", type=float, default=1.0, help="play the trace so many times as fast")
    p.add_argument("--requests", type=int, help="only the first so many of the trace")
    p.add_argument("--seconds", type=float, help="simulated seconds (default: 60, or the whole trace)")
    p.add_argument("--warmup-s", type=float, default=0.0, help="not counted")
    p.add_argument("--fixed", type=int, nargs="*", default=[], help="fixed numbers of active replicas to compare with")
    p.add_argument("--slo-ttft-s", type=float, default=Slo().ttft_s)
    p.add_argument("--slo-tpot-s", type=float, default=Slo().tpot_s)
    p.add_argument("--seed", type=int, default=1)
    p.add_argument("--processes", type=int, default=2)
    p.add_argument("--json", type=Path, help="write every number there")
    p.add_argument("--plot", type=Path, help="write a picture of the runs there")
    p.add_argument("--out", type=Path, default=Path("benchmarks/results/simulate"), help="with --goals: where files go")
    return p


def workload(args: argparse.Namespace) -> tuple[Workload, float]:
    """What the arguments ask for, and for how many simulated seconds."""
    lengths: Lengths = LENGTHS[args.lengths]
    seconds = args.seconds or 60.0
    if args.trace is not None:
        trace = read_trace(args.trace, args.speed_up, args.requests)
        last = trace.arrivals[-1][0] if trace.arrivals else 0.0
        return trace, args.seconds or last + 60.0
    if args.closed is not None:
        return closed(args.closed, lengths), seconds
    if args.open is not None:
        return poisson(args.open, lengths), seconds
    if args.steps is not None:
        thirds = [(0.0, args.steps), (seconds / 3, 8 * args.steps), (2 * seconds / 3, args.steps)]
        return steps(thirds, lengths), seconds
    return bursts(args.bursts, 8.0, 10.0, 2.0, seconds, lengths), seconds


def compare(args: argparse.Namespace) -> dict[str, Result]:
    """The same workload under every contender."""
    work, seconds = workload(args)
    work = replace(work, shared_prefix_ratio=args.shared_prefix)
    default = DEPLOYMENTS[args.model]
    deployment = Deployment(args.model, args.replicas or default.replicas, args.kv_tokens or default.kv_tokens)
    curves = engine_model.load(args.parameters)[args.model]
    slo = Slo(args.slo_ttft_s, args.slo_tpot_s)
    knobs = {"gpu_aware": Knobs(seed=args.seed)} | {name: Knobs(policy=name, seed=args.seed) for name in RIVALS}
    knobs |= {f"fixed {k}": Knobs(active_set=k, seed=args.seed) for k in args.fixed}
    jobs = [
        Job((name,), Case(deployment, work, k, seconds, args.warmup_s, args.seed, slo), curves)
        for name, k in knobs.items()
    ]
    results = run_all(jobs, args.processes)
    return {name: results[name,] for name in knobs}


COLUMNS = (
    ("throughput", "tokens/s", 1.0, ".0f"), ("ttft_p50", "TTFT p50 ms", 1e3, ".1f"), ("ttft_p99", "p99 ms", 1e3, ".1f"),
    ("tpot_p50", "TPOT p50 ms", 1e3, ".2f"), ("tpot_p99", "p99 ms", 1e3, ".2f"), ("goodput", "goodput/s", 1.0, ".2f"),
    ("completed", "done", 1, "d"), ("rejected", "rejected", 1, "d"), ("preemptions", "preemptions", 1, "d"),
    ("kv_mean", "KV mean", 1.0, ".2f"), ("kv_max", "max", 1.0, ".2f"), ("active_mean", "active", 1.0, ".2f"),
    ("reversals", "turns", 1, "d"), ("load_ratio_max", "load max", 1.0, ".2f"),
)  # fmt: skip


def comparison_table(results: dict[str, Result]) -> str:
    rows = [["policy", *(title for _, title, _, _ in COLUMNS)]]
    for name, result in results.items():
        rows.append([name, *(format(getattr(result, key) * factor, spec) for key, _, factor, spec in COLUMNS)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.rjust(w) for cell, w in zip(row, widths, strict=True)) for row in rows)


def jsonable(value: Any) -> Any:
    """Numbers that JSON has no word for become null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: jsonable(item) for key, item in value.items()}
    return [jsonable(item) for item in value] if isinstance(value, list | tuple) else value


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(jsonable(value), indent=1) + "\n")


def decision_lines() -> list[Line]:
    """The goal on the time of one decision, measured on this machine now."""
    lines = []
    for what, times in decision_speed.measure(changed=8, decisions=3000).items():
        ok = times["p50_us"] <= DECISION_P50_US and times["p99_us"] <= DECISION_P99_US
        found = f"p50 {times['p50_us']} us, p99 {times['p99_us']} us"
        lines.append(Line("decision p50 <= 50 us, p99 <= 250 us", f"64 replicas, 1,000 waiting: {what}", found, ok))
    rate = route_rate.rate()
    found, ok = f"{rate:.0f}/s of one core's time", rate >= DECISIONS_PER_CORE_S
    lines.append(Line("route service >= 1,500 decisions/s on one core", "64 replicas, over HTTP", found, ok))
    return lines


def run_goals(args: argparse.Namespace) -> list[Line]:
    """Runs, prints and writes the goals table; the verdicts say what was met and what was missed."""
    began = time.perf_counter()
    # First, while nothing else of this program keeps the cores busy.
    decisions = decision_lines()
    goals = Goals(engine_model.load(args.parameters), args.processes, fresh_seed=args.fresh_seed)
    lines = goals.run() + decisions
    print(table(lines))
    missed = sum(not line.ok for line in lines)
    print(f"{len(lines) - missed} of {len(lines)} lines pass; {time.perf_counter() - began:.0f} s")
    write_json(args.out / "goals.json", {"lines": [asdict(line) for line in lines], "runs": runs(goals.results)})
    (args.out / "goals.txt").write_text(table(lines) + "\n")
    _plots(lambda plots: plots.goal_plots(goals.results, args.out))
    return lines


def runs(results: Results) -> list[dict[str, Any]]:
    return [{"case": list(key), **result.summary()} for key, result in sorted(results.items())]


def _plots(draw: Any) -> None:
    try:
        from benchmarks import simulate_plots
    except ModuleNotFoundError as error:
        print(f"no plots: {error}; install the extra `bench`", file=sys.stderr)
        return
    draw(simulate_plots)


def main(arguments: Sequence[str] | None = None) -> None:
    args = parser().parse_args(arguments)
    if args.goals:
        run_goals(args)
        return
    results = compare(args)
    print(comparison_table(results))
    if args.json:
        write_json(args.json, {name: {**r.summary(), "timeline": r.timeline} for name, r in results.items()})
    if args.plot:
        _plots(lambda plots: plots.run_plot(results, args.plot))


if __name__ == "__main__":
    main()
