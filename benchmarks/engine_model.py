"""What a step of one of N engines on one GPU costs, and the fit of that to measured rounds.

    python -m benchmarks.engine_model --facts FILE... [--held-out FILE...] --out benchmarks/engine_model.json

A step is host time, which other engines do not see, then GPU time, which they share:

    host    = (step + sequence * batch + quadratic * batch^2 + [prompts > 0] * eager + prompt * prompts)
              * (1 + crowd * (busy - 1))
    latency = launches and dependent small kernels; uses only `LATENCY_SHARE` of the device
    work    = weights + sequence * batch + kv * context + prompt * prompts; uses all of it
    gpu     = (latency + work) * slowdown(demand of the others)

The device is shared as MPS does it, every client progressing at an equal rate: with a demand D of all engines that
are on the GPU at a random moment (a mean-field approximation), a step is slowed by (1 + D^p)^(1/p), and by
`interference` for each other engine on the device (caches, launch queues). Times in seconds, bandwidth in bytes/s.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

Json = dict[str, Any]
PARAMETERS = Path(__file__).with_suffix(".json")

# Small kernels of one decode step occupy about a third of the SMs of an H200 (GPM SM over graphics-engine activity,
# extrapolated to batch 1 in the measured rows).
LATENCY_SHARE = 0.3
# How sharply sharing sets in; 4 keeps D = 0.5 within 2 % of no slowdown and D = 2 within 2 % of twice.
SHARPNESS = 4.0
HBM_BYTES_PER_S = 4.3e12
HBM_PEAK_BYTES_PER_S = 4.8e12
# vLLM's max_num_batched_tokens for offline engines on such a card, where a file does not say otherwise.
PREFILL_BUDGET_TOKENS = 16384
# From the word to go until an idle offline engine begins its first step: the rest of the time to the first token of
# the measured rounds, over all models. A part of a round, not of a step, so the simulator knows nothing of it.
ROUND_START_S = 0.03


@dataclass(frozen=True, slots=True)
class Shape:
    """What is known of a model without measuring it."""

    weight_bytes: float
    kv_bytes_per_token: float


SHAPES = {
    "opt": Shape(0.25e9, 36864.0),
    "qwen05": Shape(0.99e9, 12288.0),
    "llama8b": Shape(16.1e9, 131072.0),
}
# Names under which measured files know the same shapes.
ALIASES = {"opt125m": "opt", "opt-125m": "opt", "qwen": "qwen05", "qwen2.5-0.5b": "qwen05", "llama-3-8b": "llama8b"}


@dataclass(frozen=True, slots=True)
class Curves:
    """The fitted numbers of one model; see the module. `interference` and `crowd` are ratios, the rest seconds."""

    host_step_s: float
    host_sequence_s: float
    host_quadratic_s: float
    host_prompt_s: float
    host_eager_s: float  # a step with prompts is launched kernel by kernel, not replayed as a CUDA graph
    latency_s: float
    weights_s: float
    sequence_s: float
    kv_token_s: float
    prompt_s: float
    interference: float
    crowd: float

    def host_s(self, batch: float, prompts: float, busy: float) -> float:
        own = self.host_step_s + (self.host_sequence_s + self.host_quadratic_s * batch) * batch
        prefill = self.host_eager_s + self.host_prompt_s * prompts if prompts else 0.0
        return (own + prefill) * (1.0 + self.crowd * max(0.0, busy - 1.0))

    def work_s(self, batch: float, context: float, prompts: float) -> float:
        return self.weights_s + self.sequence_s * batch + self.kv_token_s * context + self.prompt_s * prompts


def slowdown(demand: float, others: float, interference: float) -> float:
    """How much longer GPU time takes: `demand` of all in whole devices, `others` engines on it beside this one."""
    shared: float = (1.0 + demand**SHARPNESS) ** (1.0 / SHARPNESS)
    return shared * (1.0 + interference * others)


def equal_step(
    curves: Curves, engines: int, batch: float, context: float, prompts: float
) -> tuple[float, float, float]:
    """(step seconds, SM ratio, DRAM ratio) when `engines` engines do the same; the fixed point of their sharing."""
    host_s = curves.host_s(batch, prompts, engines)
    work_s = curves.work_s(batch, context, prompts)
    alone_s = curves.latency_s + work_s
    use = (curves.latency_s * LATENCY_SHARE + work_s) / alone_s
    on_gpu = alone_s / (host_s + alone_s)
    step_s = host_s + alone_s
    for _ in range(15):
        others = (engines - 1) * on_gpu
        step_s = host_s + alone_s * slowdown(use * (1.0 + others), others, curves.interference)
        on_gpu = 0.5 * (on_gpu + 1.0 - host_s / step_s)
    sm = 1.0 - (1.0 - min(1.0, use * on_gpu)) ** engines
    streamed_s = curves.weights_s + curves.kv_token_s * context
    dram = min(1.0, engines * streamed_s / step_s * HBM_BYTES_PER_S / HBM_PEAK_BYTES_PER_S)
    return step_s, sm, dram


# ---------------------------------------------------------------- measured rounds


@dataclass(frozen=True, slots=True)
class Round:
    """One measured round: `batch` requests in all, shared out among `engines`. What was not measured is None."""

    model: str
    engines: int
    mps: bool
    batch: int
    prompt_tokens: int
    output_tokens: int
    wall_s: float
    prefill_s: float | None = None
    decode_step_s: float | None = None
    sm_ratio: float | None = None  # while decoding, where that was measured apart
    dram_ratio: float | None = None
    budget_tokens: int = PREFILL_BUDGET_TOKENS


def read_rounds(paths: Sequence[Path]) -> list[Round]:
    """All rounds of JSON-lines files, written by `benchmarks.gpu_engines` or by the earlier `engines.py`."""
    rows = [json.loads(line) for path in paths for line in path.read_text().splitlines() if line.strip()]
    rounds, budget = [], PREFILL_BUDGET_TOKENS
    for row in rows:
        if row.get("kind") == "start":
            budget = row.get("engine_arguments", {}).get("max_num_batched_tokens", PREFILL_BUDGET_TOKENS)
        elif row.get("kind", "round") == "round":
            rounds.append(_round(row, budget))
    return rounds


def _round(row: Json, budget: int) -> Round:
    if "n" in row:
        return Round(
            _model(row["name"]), row["n"], row["mps"], row["batch"], row["in"], row["out"], row["wall"],
            sm_ratio=row["sm"] / 100.0, dram_ratio=row["dram"] / 100.0,
        )  # fmt: skip
    gpu = row.get("gpu_decode") or row.get("gpu") or {}
    return Round(
        _model(row["model"]), row["engines"], row["mps"], row["batch"], row["prompt_tokens"],
        row["output_tokens_each"], row["wall_s"], row["prefill_s"], row["decode_step_s_p50"],
        gpu.get("sm_ratio"), gpu.get("dram_bandwidth_ratio"), budget,
    )  # fmt: skip


def _model(name: str) -> str:
    name = ALIASES.get(name.lower(), name.lower())
    if name not in SHAPES:
        raise ValueError(f"the rows name the model {name!r}, whose shape is unknown; add it to SHAPES or ALIASES")
    return name


@dataclass(frozen=True, slots=True)
class Prediction:
    wall_s: float
    prefill_s: float
    decode_step_s: float
    sm_ratio: float
    dram_ratio: float


def predict(curves: Curves, r: Round) -> Prediction:
    """The same round by the curves: prefill in chunks while the first decode, then decode at the mean context."""
    share = math.ceil(r.batch / r.engines)
    prompts = share * r.prompt_tokens
    chunks = math.ceil(prompts / r.budget_tokens)
    decoding = (chunks - 1) / 2 * share / chunks if r.output_tokens > 1 else 0.0
    chunk_s, sm, dram = equal_step(curves, r.engines, decoding, decoding * r.prompt_tokens, prompts / chunks)
    prefill_s = ROUND_START_S + chunks * chunk_s
    if r.output_tokens == 1:
        return Prediction(prefill_s, prefill_s, math.nan, sm, dram)
    context = share * (r.prompt_tokens + r.output_tokens / 2)
    step_s, sm, dram = equal_step(curves, r.engines, share, context, 0.0)
    return Prediction(prefill_s + step_s * (r.output_tokens - 1), prefill_s, step_s, sm, dram)


# ---------------------------------------------------------------- the fit

# How far, in natural logarithms, a row may miss for one unit of error: rounds that were measured twice differ by 10 to
# 26 % for a model bound by the CPU, GPM ratios count a device busy that only holds a kernel.
TIME_TOLERANCE = 0.08
SM_TOLERANCE = 0.25
# How far a parameter may lie from the guess below for one unit of error; weights and KV reads are arithmetic.
LOOSE, TIGHT = 1.0, 0.25


def first_guess(shape: Shape) -> dict[str, tuple[float, float]]:
    """(guess, tolerance) for each parameter: physics where there is any, else the order of magnitude of vLLM 0.29."""
    parameters = shape.weight_bytes / 2
    return {
        "host_step_s": (1.2e-3, LOOSE),
        "host_sequence_s": (1.2e-5, LOOSE),
        "host_quadratic_s": (1.5e-8, LOOSE),
        "host_prompt_s": (2e-7, LOOSE),
        "host_eager_s": (2e-3, LOOSE),
        "latency_s": (6e-4, LOOSE),
        "weights_s": (shape.weight_bytes / HBM_BYTES_PER_S, TIGHT),
        "sequence_s": (2e-6 + 2 * parameters / 400e12, LOOSE),
        "kv_token_s": (shape.kv_bytes_per_token / HBM_BYTES_PER_S, TIGHT),
        "prompt_s": (2 * parameters / 600e12 + 2e-7, LOOSE),
        "interference": (0.1, LOOSE),
        "crowd": (0.03, LOOSE),
    }


def error(curves: Curves, rounds: Sequence[Round], guess: dict[str, tuple[float, float]]) -> float:
    """Misses in units of tolerance, of the rows and of the parameters against their guess; see `loss`."""
    total = sum((math.log(getattr(curves, name) / value) / wide) ** 2 for name, (value, wide) in guess.items())
    for r in rounds:
        p = predict(curves, r)
        pairs = [(p.wall_s, r.wall_s, TIME_TOLERANCE), (p.prefill_s, r.prefill_s, 2 * TIME_TOLERANCE)]
        pairs += [(p.decode_step_s, r.decode_step_s, TIME_TOLERANCE), (p.sm_ratio, r.sm_ratio, SM_TOLERANCE)]
        total += sum(loss(math.log(got / seen) / wide) for got, seen, wide in pairs if seen)
    return total


def loss(miss: float) -> float:
    """Squared near zero, linear beyond one tolerance (pseudo-Huber): a round disturbed on its host bends little."""
    return 2.0 * (math.sqrt(1.0 + miss * miss) - 1.0)


def fit(model: str, rounds: Sequence[Round], steps: int = 1500) -> Curves:
    """The curves of `model` that explain its rounds best (Nelder and Mead on logarithms)."""
    mine = [r for r in rounds if r.model == model]
    if not mine:
        raise ValueError(f"no measured rounds of {model!r} in the files given")
    guess = first_guess(SHAPES[model])
    names = [f.name for f in fields(Curves)]

    def curves(x: Sequence[float]) -> Curves:
        return Curves(*(math.exp(min(v, 5.0)) for v in x))

    start = [math.log(guess[name][0]) for name in names]
    best = start
    for _ in range(4):  # restarts free a simplex that has collapsed
        best = nelder_mead(lambda x: error(curves(x), mine, guess), best, steps=steps)
    return curves(best)


def nelder_mead(f: Callable[[Sequence[float]], float], start: Sequence[float], steps: int) -> list[float]:
    """The simplex method of Nelder and Mead (1965), with the dimension-adapted factors of Gao and Han (2012)."""
    n = len(start)
    expand, contract, shrink = 1 + 2 / n, 0.75 - 1 / (2 * n), 1 - 1 / n
    points = [list(start), *([*start[:i], start[i] + 0.3, *start[i + 1 :]] for i in range(n))]
    simplex = sorted((f(p), p) for p in points)
    for _ in range(steps):
        centre = [sum(p[i] for _, p in simplex[:-1]) / n for i in range(n)]
        worst = simplex[-1][1]

        def along(t: float, centre: list[float] = centre, worst: list[float] = worst) -> tuple[float, list[float]]:
            p = [c + t * (c - w) for c, w in zip(centre, worst, strict=True)]
            return f(p), p

        new = along(1.0)
        if new[0] < simplex[0][0]:
            new = min(new, along(expand))
        elif new[0] >= simplex[-2][0]:
            new = min(new, along(contract if new[0] < simplex[-1][0] else -contract))
        if new[0] < simplex[-1][0]:
            simplex[-1] = new
        else:
            low = simplex[0][1]
            moved = [[b + shrink * (v - b) for b, v in zip(low, p, strict=True)] for _, p in simplex[1:]]
            simplex[1:] = [(f(p), p) for p in moved]
        simplex.sort()
    return simplex[0][1]


# ---------------------------------------------------------------- files


def load(path: Path = PARAMETERS) -> dict[str, Curves]:
    """Curves by model, as `main` wrote them."""
    return {name: Curves(**entry["curves"]) for name, entry in json.loads(path.read_text())["models"].items()}


def report(curves: Curves, rounds: Sequence[Round]) -> list[Json]:
    rows = []
    for r in rounds:
        p = predict(curves, r)
        rows.append(
            {
                "engines": r.engines, "batch": r.batch, "in": r.prompt_tokens, "out": r.output_tokens,
                "budget": r.budget_tokens,
                "measured_tokens_per_s": round(r.batch * r.output_tokens / r.wall_s),
                "modelled_tokens_per_s": round(r.batch * r.output_tokens / p.wall_s),
                "measured_sm": r.sm_ratio, "modelled_sm": round(p.sm_ratio, 3),
            }
        )  # fmt: skip
    return rows


def errors(rows: Sequence[Json]) -> Json:
    """How far the modelled tokens/s of rows are from the measured ones, as ratios."""
    misses = [row["modelled_tokens_per_s"] / row["measured_tokens_per_s"] - 1.0 for row in rows]
    worst: float = max(misses, key=abs)
    return {
        "rounds": len(misses), "median": round(median(map(abs, misses)), 3),
        "worst": round(worst, 3), "bias": round(median(misses), 3),
    }  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Fit the engine model to measured rounds.")
    parser.add_argument("--facts", type=Path, nargs="+", required=True, help="JSON lines of measured rounds")
    parser.add_argument("--held-out", type=Path, nargs="*", default=[], help="rounds to judge the fit by, not fitted")
    parser.add_argument("--out", type=Path, default=PARAMETERS)
    args = parser.parse_args(arguments)
    rounds, held_out = usable(read_rounds(args.facts)), usable(read_rounds(args.held_out))
    models: Json = {}
    relative_errors: Json = {}
    for model in sorted({r.model for r in rounds}):
        curves = fit(model, rounds)
        rounded = replace(curves, **{name: float(f"{value:.4g}") for name, value in asdict(curves).items()})
        entry: Json = {"curves": asdict(rounded), "rounds": report(rounded, [r for r in rounds if r.model == model])}
        relative_errors[model] = {"fitted": errors(entry["rounds"])}
        _print(model, entry["rounds"])
        if others := [r for r in held_out if r.model == model]:
            entry["held_out"] = report(rounded, others)
            relative_errors[model]["held_out"] = errors(entry["held_out"])
            _print(f"{model} (held out)", entry["held_out"])
        models[model] = entry
    provenance = {
        "made_by": "python -m benchmarks.engine_model", "facts": [p.name for p in args.facts],
        "held_out": [p.name for p in args.held_out], "relative_error_of_tokens_per_s": relative_errors,
        "date": datetime.now(UTC).date().isoformat(), "device": "NVIDIA H200, vLLM 0.29.0",
    }  # fmt: skip
    print(json.dumps(relative_errors, indent=1))
    args.out.write_text(json.dumps({"provenance": provenance, "models": models}, indent=1) + "\n")


def usable(rounds: Sequence[Round]) -> list[Round]:
    """The rounds that the model describes: one engine alone, or several that share the device through MPS."""
    return [r for r in rounds if r.mps or r.engines == 1]


def _print(model: str, rows: Sequence[Json]) -> None:
    for row in rows:
        miss = row["modelled_tokens_per_s"] / row["measured_tokens_per_s"] - 1.0
        print(
            f"{model:8} engines {row['engines']} batch {row['batch']:4}: measured {row['measured_tokens_per_s']:6} "
            f"tokens/s, modelled {row['modelled_tokens_per_s']:6} ({miss:+.1%}); SM {row['measured_sm']} "
            f"modelled {row['modelled_sm']}"
        )


if __name__ == "__main__":
    main()
