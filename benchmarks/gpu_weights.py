"""One copy of the weights for all engines of a GPU: what it saves, what it costs, and that texts stay the same.

    python3 -m benchmarks.gpu_weights --out weights.jsonl --seconds 540
    python3 -m benchmarks.gpu_weights --out weights.jsonl --device cpu --seconds 600

Each model (8 engines of OPT-125m's shape, 4 of Llama-3-8B's; random weights in a checkpoint made on the spot) is run
with private weights and, beside these, with shared ones, all as clients of an MPS daemon of this script's own. A row is
one line of JSON, its `kind` one of

    checkpoint  how the model's files were made
    start       engines started together: seconds to ready of each, what their logs say about loading
    memory      the GPU's memory before and after; each client's, as NVML names it (on a CPU: proportional set sizes)
    saving      what sharing saves, from both memory rows, and what a follower takes beyond a private engine's own
    identity    whether greedy and sampled tokens and their log probabilities are those of the first private engine
    round       one round of load on one of the two sets: tokens a second; rounds alternate
    throughput  medians of the rounds and their ratio
    alone       one engine of each set, the others idle: its tokens a second
    kernels     where an engine's GPU time goes, alone and with all of its set at work: microseconds and calls by kernel
    restart     one engine ended and started anew while the others of its set work; failed requests of the others
    verify      the host's fingerprint after all that
    host_death  the host is killed: how soon its engines have ended, and whether private ones are hurt
    failure     a part that broke, with the reason; the next part still runs
Units are in the names.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import json
import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TextIO

import psutil

from benchmarks.shapes import OPT_125M
from benchmarks.workers import Engine, EngineError, answers_on_stdout
from deployments import mps, weights
from deployments.demo_model import DemoSpec, ensure_demo_model
from deployments.gpu_setup import visible_gpus
from deployments.processes import WEIGHTS_VARIABLE
from deployments.weight_house import WeightHouse

Json = dict[str, Any]
ROOT = Path(__file__).parent.parent
WORKER = (sys.executable, "-P", "-m", "benchmarks.gpu_weights", "--worker")
MAKER = (sys.executable, "-P", "-m", "benchmarks.gpu_weights", "--make")
END_MARGIN_S = 25.0
START_LIMIT_S = 170.0
# On a CPU an engine is a core and a worker beside the process that drives it; one process starts sooner.
_ONE_PROCESS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "OMP_NUM_THREADS": "1"}
SIZES = [1, 2, 4, 8, 16, 24, 32, 48, 64]
MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Shape:
    """One model, and the load of one engine in a round."""

    name: str
    engines: int
    seconds: float
    kv_bytes: int
    sequences: int
    prompt_tokens: int
    output_tokens: int
    llama: Json = field(default_factory=dict)
    opt: DemoSpec | None = None


LLAMA: Json = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16", "hidden_act": "silu",
    "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0, "tie_word_embeddings": False, "bos_token_id": 0, "eos_token_id": 2,
}  # fmt: skip
TINY = {
    "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 2048,
}  # fmt: skip
GPU_SHAPES = {
    "opt": Shape("opt-125m", 8, 0.46, 2 << 30, 48, 128, 256, opt=OPT_125M),
    "llama": Shape("llama-8b", 4, 0.54, 2 << 30, 16, 128, 128, llama=LLAMA),
}
CPU_SHAPES = {
    "opt": Shape("opt-tiny", 2, 0.5, 64 * MIB, 4, 16, 16, opt=DemoSpec(hidden_size=512, layers=4, heads=8)),
    "llama": Shape("llama-tiny", 2, 0.5, 64 * MIB, 4, 16, 16, llama={**LLAMA, **TINY}),
}


def engine_arguments(shape: Shape, device: str) -> Json:
    """What every engine of a shape is given, private or shared."""
    common = {
        "max_model_len": 1024,
        "max_num_seqs": 64,
        "max_num_batched_tokens": 4096,
        "dtype": "bfloat16",
        "enable_prefix_caching": False,
        "kv_cache_memory_bytes": shape.kv_bytes,
    }
    if device == "cpu":
        return {**common, "enforce_eager": True}
    graphs = {"mode": 0, "cudagraph_mode": "FULL", "cudagraph_capture_sizes": SIZES}
    return {**common, "gpu_memory_utilization": 0.05, "compilation_config": graphs}


# ---------------------------------------------------------------- pure arithmetic


def same_as(first: Json, other: Json) -> Json:
    """How far another engine's answers are those of the first: tokens that agree and the largest difference."""
    pairs = list(zip(first["tokens"], other["tokens"], strict=True))
    agree = sum(a == b for one, two in pairs for a, b in zip(one, two, strict=True))
    differences = [
        abs(a - b)
        for one, two in zip(first["logprobs"], other["logprobs"], strict=True)
        for a, b in zip(one, two, strict=True)
    ]
    total = sum(len(one) for one, _ in pairs)
    return {"identical": agree == total, "tokens": total, "agree": agree, "logprob_difference": max(differences)}


def saving(private: Json, shared: Json, shape: Shape) -> Json:
    """What one copy saves in all and as KV cache, and what a follower takes beyond what it would without weights.

    `follower_extra_bytes`: a follower less a private engine without its weights, both as the machine names processes;
    `total_extra_bytes`: the same from the machine's total, host included, spread over the followers.
    """
    weights_bytes, engines = shared["shared_weights_bytes"], shared["engines"]
    saved = private["added_bytes"] - shared["added_bytes"]
    of_private, of_shared = (statistics.fmean(row["of_each_bytes"]) for row in (private, shared))
    bare = private["added_bytes"] - engines * weights_bytes
    return {
        "saved_bytes": saved,
        "saved_ratio": saved / ((engines - 1) * weights_bytes),
        "follower_extra_bytes": of_shared - (of_private - weights_bytes),
        "total_extra_bytes": (shared["added_bytes"] - weights_bytes - bare) / engines,
        "kv_cache_gain_ratio": saved / (engines * shape.kv_bytes),
    }


def compare(rounds: Sequence[tuple[str, float]]) -> Json:
    """Medians of both sets' tokens a second, their ratio, and the spread of each (half the range over the median)."""
    of = {kind: [rate for k, rate in rounds if k == kind] for kind in ("private", "shared")}
    medians = {kind: statistics.median(rates) for kind, rates in of.items()}
    return {
        **{f"{kind}_tokens_per_s": median for kind, median in medians.items()},
        **{f"{k}_spread_ratio": (max(rates) - min(rates)) / 2 / medians[k] for k, rates in of.items()},
        "shared_to_private_ratio": medians["shared"] / medians["private"],
        "rounds_each": min(len(rates) for rates in of.values()),
    }


_LOADED = re.compile(r"Model loading took (?P<gib>[\d.]+) GiB(?: memory)? and (?P<s>[\d.]+) seconds")
_MAPPED = re.compile(
    r"Mapped [\d.]+ GiB of shared weights in (?P<attach>[\d.]+) s"
    r" \((?P<build>[\d.]+) s to build the model, (?P<wait>[\d.]+) s of waiting"
)
_WEIGHTS = re.compile(r"Loading weights took (?P<s>[\d.]+) seconds")


def loading_in(log: str) -> Json:
    """What an engine's log says of loading: whole step, reading the checkpoint, or mapping the host's tensors."""
    loaded, read, attached = _LOADED.search(log), _WEIGHTS.search(log), _MAPPED.search(log)
    return {
        "model_load_s": float(loaded["s"]) if loaded else None,
        "model_load_gib": float(loaded["gib"]) if loaded else None,
        "read_checkpoint_s": float(read["s"]) if read else None,
        "attach_s": float(attached["attach"]) if attached else None,
        "build_s": float(attached["build"]) if attached else None,
        "waited_for_host_s": float(attached["wait"]) if attached else None,
        "private_because": next((line for line in log.splitlines() if "loaded privately" in line), None),
    }


# ---------------------------------------------------------------- what is read from the machine


class Nvml:
    """Memory of the (first visible) GPU and of each process on it."""

    def __init__(self) -> None:
        import pynvml

        self._nvml = pynvml
        pynvml.nvmlInit()
        self._gpu = pynvml.nvmlDeviceGetHandleByIndex(visible_gpus()[0])

    def used_bytes(self, pids: Sequence[int]) -> int:
        return int(self._nvml.nvmlDeviceGetMemoryInfo(self._gpu).used)

    def of_each(self, pids: Sequence[int]) -> dict[int, int]:
        found = [*self._nvml.nvmlDeviceGetMPSComputeRunningProcesses(self._gpu)]
        found += self._nvml.nvmlDeviceGetComputeRunningProcesses(self._gpu)
        return {p.pid: int(p.usedGpuMemory or 0) for p in found}

    def facts(self) -> Json:
        driver = self._nvml.nvmlSystemGetDriverVersion()
        return {"gpu_name": self._nvml.nvmlDeviceGetName(self._gpu), "driver": driver}


class Host:
    """On a CPU: proportional set sizes, in which a shared page counts once over all that map it."""

    def used_bytes(self, pids: Sequence[int]) -> int:
        return sum(self.of_each(pids).values())

    def of_each(self, pids: Sequence[int]) -> dict[int, int]:
        return {pid: _pss_bytes(pid) for pid in pids}

    def facts(self) -> Json:
        return {"gpu_name": None, "driver": None}


def _pss_bytes(pid: int) -> int:
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("Pss:")).split()[1]) * 1024


# ---------------------------------------------------------------- engines


@dataclass
class Member:
    """One engine: its worker process, and what it said when it was ready."""

    engine: Engine
    log: Path
    started_s: float
    hello: Json = field(default_factory=dict)
    ready_s: float = 0.0

    @property
    def core_pids(self) -> list[int]:
        return list(self.hello["core_pids"])

    def wait(self, deadline_s: float) -> None:
        self.hello = self.engine.receive(deadline_s)
        self.ready_s = time.monotonic() - self.started_s

    def ask(self, order: Json, deadline_s: float) -> Json:
        self.engine.send(order)
        return self.engine.receive(deadline_s)

    def row(self) -> Json:
        return {"ready_s": self.ready_s, **loading_in(self.log.read_text(errors="replace"))}


class Fleet:
    """Engines of one kind, private or shared."""

    def __init__(self, kind: str, model: str, arguments: Json, env: dict[str, str], folder: Path) -> None:
        self.kind = kind
        # Those that are ready; one that is not takes no orders.
        self.members: list[Member] = []
        self._model, self._arguments, self._env, self._folder = model, arguments, env, folder
        self._all_started: list[Member] = []
        self._count = 0

    def start(self) -> Member:
        log = self._folder / f"{self.kind}-{self._count}.log"
        self._count += 1
        member = Member(Engine(WORKER, self._env, log), log, time.monotonic())
        member.engine.send({"model": self._model, "engine": self._arguments})
        self._all_started.append(member)
        return member

    def answers(self, deadline_s: float) -> list[Json]:
        """Each engine's tokens for the same prompts, one at a time."""
        return self._all({"order": "answers"}, deadline_s)

    def round(self, shape: Shape, seed: int, deadline_s: float) -> list[Json]:
        return self._all(self.load(shape, seed), deadline_s)

    @staticmethod
    def load(shape: Shape, seed: int) -> Json:
        """One engine's share of a round, as an order."""
        return {
            "order": "load", "sequences": shape.sequences, "prompt_tokens": shape.prompt_tokens,
            "output_tokens": shape.output_tokens, "seed": seed,
        }  # fmt: skip

    def _all(self, order: Json, deadline_s: float) -> list[Json]:
        for member in self.members:
            member.engine.send(order)
        return [member.engine.receive(deadline_s) for member in self.members]

    def pids(self) -> list[int]:
        return [pid for member in self.members for pid in member.core_pids]

    def retire(self, member: Member) -> None:
        """Ends one engine at once."""
        self._all_started.remove(member)
        member.engine.close()
        member.engine.end(time.monotonic())

    def end(self) -> None:
        for member in self._all_started:
            member.engine.close()
        deadline_s = time.monotonic() + 8.0
        for member in self._all_started:
            member.engine.end(deadline_s)


# ---------------------------------------------------------------- one model's proof


class Proof:
    """Runs the parts for one model; `write` takes rows."""

    def __init__(
        self, shape: Shape, device: str, write: Callable[[str, Json], None], meter: Nvml | Host, deadline_s: float
    ) -> None:
        self._shape, self._device, self._write, self._meter, self._deadline_s = shape, device, write, meter, deadline_s
        self._arguments = engine_arguments(shape, device)
        self._stack = contextlib.ExitStack()
        self._daemon: mps.MpsDaemon | None = None

    def run(self, model: str) -> None:
        with tempfile.TemporaryDirectory(prefix="weights-", ignore_cleanup_errors=True) as folder, self._stack:
            self._prepare(model, Path(folder))
            self._parts()

    def _prepare(self, model: str, folder: Path) -> None:
        environment = {**os.environ, "PYTHONPATH": _python_path(), "VLLM_LOGGING_LEVEL": "INFO"}
        environment |= self._mps(folder) if self._device == "gpu" else _ONE_PROCESS
        self._house = WeightHouse(folder, {"model": model, "engine": self._arguments}, model, {})
        self._stack.callback(self._house.stop, 10.0)
        self._environment = environment
        self._private = self._fleet("private", model, self._arguments, environment, folder)
        shared_env = {**environment, WEIGHTS_VARIABLE: "1"}
        self._shared = self._fleet("shared", model, {**self._arguments, **self._house.arguments()}, shared_env, folder)

    def _fleet(self, kind: str, model: str, arguments: Json, env: dict[str, str], folder: Path) -> Fleet:
        fleet = Fleet(kind, model, arguments, env, folder)
        self._stack.callback(fleet.end)
        return fleet

    def _mps(self, folder: Path) -> dict[str, str]:
        self._daemon = mps.MpsDaemon(mps.ControlProgram(), mps.private_paths(os.getuid(), root=folder))
        self._daemon.start()
        self._stack.callback(self._daemon.stop)
        return mps.client_environment(self._daemon.paths)

    def _parts(self) -> None:
        before = self._settled_bytes()
        self._part("private start", lambda: self._start(self._private))
        private = self._part("private memory", lambda: self._memory(self._private, before))
        self._part("shared start", self._start_shared)
        between = private["used_bytes"] if private else self._meter.used_bytes(self._private.pids())
        shared = self._part("shared memory", lambda: self._memory(self._shared, between, host=True))
        self._part("saving", lambda: self._write("saving", saving(private, shared, self._shape)))
        self._part("identity", self._identity)
        self._part("throughput", lambda: self._throughput("as started"))
        self._part("alone", self._alone)
        self._part("kernels", self._kernels)
        self._part("restart shared", lambda: self._restart(self._shared))
        self._part("throughput again", lambda: self._throughput("one shared engine restarted"))
        self._part("verify", self._verify)
        self._part("restart private", lambda: self._restart(self._private))
        self._part("host death", self._host_death)

    def _settled_bytes(self) -> int:
        """The memory in use once what ran before has given its own back."""
        used, before = self._meter.used_bytes([]), -1
        until_s = time.monotonic() + 8.0
        while used != before and time.monotonic() < until_s:
            time.sleep(0.7)
            used, before = self._meter.used_bytes([]), used
        return used

    def _part(self, name: str, do: Callable[[], Any]) -> Any:
        """What breaks one part is written down, and the next still runs."""
        if time.monotonic() > self._deadline_s:
            self._write("failure", {"part": name, "error": "no time was left"})
            return None
        try:
            return do()
        except Exception as error:  # whatever it was, the machine is lent: it is a row
            self._write("failure", {"part": name, "error": f"{type(error).__name__}: {error}"[-3000:]})
            return None

    def _limit_s(self, wish_s: float) -> float:
        return min(self._deadline_s + 10.0, time.monotonic() + wish_s)

    def _start(self, fleet: Fleet) -> None:
        started = [fleet.start() for _ in range(self._shape.engines)]
        limit_s = self._limit_s(START_LIMIT_S)
        for member in started:
            member.wait(limit_s)
        fleet.members += started
        fleet.round(self._shape, 0, self._limit_s(60))
        self._write("start", {"weights": fleet.kind, "engines": [member.row() for member in fleet.members]})

    def _start_shared(self) -> None:
        self._house.ensure(self._environment)
        self._start(self._shared)
        status = self._house.status()
        self._write("host", {"load_s": status.load_s if status else None, "status": str(status)[:2000]})

    def _memory(self, fleet: Fleet, before: int, host: bool = False) -> Json:
        status = self._house.status() if host else None
        pids = fleet.pids() + ([status.pid] if status else [])
        everyone = self._private.pids() + self._shared.pids() + ([status.pid] if status else [])
        each = self._meter.of_each(everyone)
        used = self._meter.used_bytes(everyone)
        row = {
            "weights": fleet.kind,
            "engines": len(fleet.members),
            "used_bytes": used,
            "added_bytes": used - before,
            "of_each_bytes": [each.get(pid) for pid in fleet.pids()],
            "host_bytes": each.get(status.pid) if status else None,
            "shared_weights_bytes": status.shared_bytes if status else None,
            "kv_cache_bytes_per_engine": self._shape.kv_bytes,
            "all_named": all(pid in each for pid in pids),
        }
        self._write("memory", row)
        return row

    def _identity(self) -> None:
        private, shared = self._private.answers(self._limit_s(60)), self._shared.answers(self._limit_s(60))
        for kind, answers in (("private", private[1:]), ("shared", shared)):
            found = [same_as(private[0], answer) for answer in answers]
            differing = [f for f in found if not f["identical"]]
            self._write(
                "identity",
                {
                    "weights": kind,
                    "engines": len(found),
                    "identical": not differing,
                    "tokens_each": found[0]["tokens"] if found else 0,
                    "distinct_tokens": len({t for answer in private[0]["tokens"] for t in answer}),
                    "largest_logprob_difference": max((f["logprob_difference"] for f in found), default=None),
                    "differing": differing[:3],
                },
            )

    def _throughput(self, when: str, most: int = 6) -> None:
        rounds: list[tuple[str, float]] = []
        share_s = (self._deadline_s - time.monotonic()) * 0.2
        until_s = time.monotonic() + share_s
        for number in range(most):
            for fleet in (self._private, self._shared) if number % 2 == 0 else (self._shared, self._private):
                began_s = time.monotonic()
                reports = fleet.round(self._shape, number, self._limit_s(60))
                wall_s = time.monotonic() - began_s
                rate = sum(report["tokens"] for report in reports) / wall_s
                rounds.append((fleet.kind, rate))
                row = {"weights": fleet.kind, "number": number, "tokens_per_s": rate, "wall_s": wall_s}
                self._write("round", {**row, "engine_s": [report["seconds"] for report in reports]})
            if number >= 2 and time.monotonic() > until_s:
                break
        self._write("throughput", {"when": when, **compare(rounds)})

    def _alone(self) -> None:
        for fleet in (self._private, self._shared, self._shared, self._private):
            report = fleet.members[0].ask(fleet.load(self._shape, 3), self._limit_s(60))
            row = {"weights": fleet.kind, "tokens_per_s": report["tokens"] / report["seconds"]}
            self._write("alone", row)

    def _kernels(self) -> None:
        if self._device != "gpu":
            return
        for fleet in (self._private, self._shared):
            order = {**fleet.load(self._shape, 5), "order": "kernels", "output_tokens": 32}
            for at_work in (fleet.members[:1], fleet.members):
                for other in at_work[1:]:
                    other.engine.send(fleet.load(self._shape, 6))
                found = at_work[0].ask(order, self._limit_s(60))
                for other in at_work[1:]:
                    other.engine.receive(self._limit_s(60))
                self._write("kernels", {"weights": fleet.kind, "at_work": len(at_work), **found})

    def _restart(self, fleet: Fleet) -> None:
        """The last engine is ended as a planned stop is, and started anew, while the others work without a break."""
        victim = fleet.members.pop()
        tally = {"requests": 0, "tokens": 0}
        stop = threading.Event()
        errors: list[str] = []
        loads = [threading.Thread(target=self._keep_busy, args=(m, stop, tally, errors)) for m in fleet.members]
        for load in loads:
            load.start()
        try:
            for pid in victim.core_pids if self._daemon else []:
                assert self._daemon is not None
                self._daemon.terminate_client(pid)
            fleet.retire(victim)
            fresh = fleet.start()
            fresh.wait(self._limit_s(START_LIMIT_S))
            fleet.members.append(fresh)
        finally:
            stop.set()
            for load in loads:
                load.join(90)
        row = {"weights": fleet.kind, **fresh.row(), "others": len(loads), "others_requests": tally["requests"]}
        self._write(
            "restart", {**row, "others_tokens": tally["tokens"], "others_failed": len(errors), "errors": errors}
        )

    def _keep_busy(self, member: Member, stop: threading.Event, tally: Json, errors: list[str]) -> None:
        shape, seed = self._shape, 1000
        while not stop.is_set() and not errors:
            order = {**Fleet.load(shape, seed), "sequences": max(1, shape.sequences // 4)}
            seed += 1
            try:
                member.engine.send(order)
                report = member.engine.receive(time.monotonic() + 80)
            except EngineError as error:
                errors.append(str(error)[-500:])
                return
            wished = order["sequences"] * shape.output_tokens
            if report["tokens"] != wished:
                errors.append(f"{report['tokens']} tokens instead of {wished}")
            tally["requests"] += order["sequences"]
            tally["tokens"] += report["tokens"]

    def _verify(self) -> None:
        """The host counts its bytes again: after all these rounds no engine has written one."""
        with weights.connect(self._house.socket, 5.0) as host:
            host.settimeout(60)
            weights.send(host, {"ask": "verify"})
            answer, _ = weights.receive(host)
        self._write("verify", answer)

    def _host_death(self) -> None:
        status = self._house.status()
        if status is None:
            raise RuntimeError("there is no host")
        cores = [psutil.Process(pid) for pid in self._shared.pids()]
        began_s = time.monotonic()
        os.kill(status.pid, signal.SIGKILL)
        _, alive = psutil.wait_procs(cores, timeout=15)
        ended_s = time.monotonic() - began_s
        said = [
            member.log.read_text(errors="replace").count("the weight host has ended") for member in self._shared.members
        ]
        row = {"followers": len(cores), "alive": len(alive), "ended_s": ended_s, "said_why": sum(said)}
        try:
            reports = self._private.round(self._shape, 77, self._limit_s(60))
            row["private_tokens_after"] = sum(report["tokens"] for report in reports)
        except EngineError as error:
            row["private_after"] = str(error)[-500:]
        self._write("host_death", row)


def _python_path() -> str:
    return os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])


# ---------------------------------------------------------------- checkpoints


@contextlib.contextmanager
def checkpoint(shape: Shape, write: Callable[[str, Json], None]) -> Iterator[Callable[[], str]]:
    """Makes a shape's checkpoint in the background; the block gets a function that waits for its folder."""
    with tempfile.TemporaryDirectory(prefix="weights-model-", dir=_roomy(), ignore_cleanup_errors=True) as folder:
        began_s = time.monotonic()
        maker = subprocess.Popen(
            [*MAKER, shape.name, folder], env={**os.environ, "PYTHONPATH": _python_path()},
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

        def finished() -> str:
            _, complaint = maker.communicate(timeout=200)
            if maker.returncode:
                raise RuntimeError(f"the checkpoint was not made: {complaint[-1500:]}")
            found = Path(next(file for file in Path(folder).rglob("config.json"))).parent
            size = sum(file.stat().st_size for file in found.iterdir())
            write("checkpoint", {"folder": str(found), "bytes": size, "since_begun_s": time.monotonic() - began_s})
            return str(found)

        try:
            yield finished
        finally:
            maker.kill()
            maker.wait()


def _roomy() -> Path:
    """Memory where it has room for the largest checkpoint, else disk."""
    memory = Path("/dev/shm")
    return memory if memory.is_dir() and shutil.disk_usage(memory).free > 40 << 30 else Path(tempfile.gettempdir())


def make(name: str, folder: Path) -> None:
    """Writes the checkpoint of the shape called `name` into a folder."""
    shape = next(s for s in (*GPU_SHAPES.values(), *CPU_SHAPES.values()) if s.name == name)
    if shape.opt is not None:
        ensure_demo_model(folder, shape.opt)
    else:
        write_llama(folder, shape.llama)


def write_llama(folder: Path, config: Json) -> None:
    """A Llama checkpoint with random weights, one file a layer.

    Drawing eight billion numbers would take minutes: they are taken from one pool, at another place for each matrix.
    The pool's length is odd, so that no two rows of a matrix are the same.
    """
    import torch
    from safetensors.torch import save_file

    (folder / "config.json").write_text(json.dumps(config))
    pool = torch.empty((1 << 25) + 1, dtype=torch.bfloat16).normal_(0.0, 0.02, generator=torch.manual_seed(20))
    places = random.Random(20)

    def random_matrix(*shape: int) -> Any:
        start = places.randrange(len(pool))
        size = shape[0] * shape[1]
        return torch.cat([pool[start:], pool.repeat(size // len(pool) + 1)])[:size].reshape(shape)

    for number, names in enumerate(llama_files(config)):
        tensors = {
            name: torch.ones(shape, dtype=torch.bfloat16) if len(shape) == 1 else random_matrix(*shape)
            for name, shape in names.items()
        }
        save_file(tensors, folder / f"model-{number:05}.safetensors")


def llama_files(config: Json) -> list[dict[str, tuple[int, ...]]]:
    """Names and shapes of a Llama checkpoint's tensors, split into files: each layer, then the rest."""
    hidden, ffn, vocabulary = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    keys = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    layer = {
        "self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (keys, hidden), "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, hidden), "mlp.gate_proj": (ffn, hidden), "mlp.up_proj": (ffn, hidden),
        "mlp.down_proj": (hidden, ffn), "input_layernorm": (hidden,), "post_attention_layernorm": (hidden,),
    }  # fmt: skip
    layers = [
        {f"model.layers.{n}.{name}.weight": shape for name, shape in layer.items()}
        for n in range(config["num_hidden_layers"])
    ]
    ends = {"model.embed_tokens.weight": (vocabulary, hidden), "lm_head.weight": (vocabulary, hidden)}
    return [*layers, {**ends, "model.norm.weight": (hidden,)}]


# ---------------------------------------------------------------- an engine, seen from inside


def work() -> None:
    """A worker's life: a model in, a greeting out, then orders until the input closes."""
    answer = answers_on_stdout()
    spec = json.loads(sys.stdin.readline())
    from vllm import LLM

    with tempfile.TemporaryDirectory(prefix="traces-", ignore_cleanup_errors=True) as traces:
        profiler = {"profiler": "torch", "torch_profiler_dir": traces, "torch_profiler_with_stack": False}
        llm = LLM(model=spec["model"], skip_tokenizer_init=True, profiler_config=profiler, **spec["engine"])
        _load(llm, {"sequences": 1, "prompt_tokens": 4, "output_tokens": 2, "seed": 0})
        answer({"core_pids": _core_pids(llm)})
        orders = {"answers": _answers, "load": _load, "kernels": _kernels}
        while line := sys.stdin.readline():
            order = json.loads(line)
            answer(orders[order["order"]](llm, order))


def _core_pids(llm: Any) -> list[int]:
    """The processes that hold the weights: of the engine's core, or, without one, this one."""
    resources = getattr(llm.llm_engine.engine_core, "resources", None)
    return [p.pid for p in resources.engine_manager.processes] if resources else [os.getpid()]


def _prompts(llm: Any, order: Json) -> list[Any]:
    from vllm.inputs import TokensPrompt

    rng = random.Random(order["seed"])
    vocabulary = range(10, llm.llm_engine.vllm_config.model_config.get_vocab_size())
    prompts = [rng.choices(vocabulary, k=order["prompt_tokens"]) for _ in range(order["sequences"])]
    return [TokensPrompt(prompt_token_ids=prompt) for prompt in prompts]


def _load(llm: Any, order: Json) -> Json:
    from vllm import SamplingParams

    wish = SamplingParams(temperature=1.0, max_tokens=order["output_tokens"], ignore_eos=True, detokenize=False)
    prompts, began_s = _prompts(llm, order), time.monotonic()
    outputs = llm.generate(prompts, wish, use_tqdm=False)
    seconds = round(time.monotonic() - began_s, 4)
    return {"tokens": sum(len(o.outputs[0].token_ids) for o in outputs), "seconds": seconds}


def _kernels(llm: Any, order: Json) -> Json:
    """The longest kernels of a load, by the profiler's trace of the process that runs the model."""
    llm.start_profile()
    report = _load(llm, order)
    llm.stop_profile()
    (trace,) = Path(llm.llm_engine.vllm_config.profiler_config.torch_profiler_dir).glob("*.json.gz")
    with gzip.open(trace, "rt") as file:
        events = [e for e in json.load(file)["traceEvents"] if e.get("cat") == "kernel"]
    trace.unlink()
    spent: Counter[str] = Counter()
    for event in events:
        spent[event["name"][:100]] += event["dur"]
    calls = Counter(event["name"][:100] for event in events)
    longest = [[kernel, round(us), calls[kernel]] for kernel, us in spent.most_common(12)]
    return {**report, "kernels_us": round(spent.total()), "longest": longest}


def _answers(llm: Any, order: Json) -> Json:
    """One prompt at a time: in a batch, who shares a step with whom changes the last bit of a sum."""
    from vllm import SamplingParams

    tokens, logprobs = [], []
    for prompt in _prompts(llm, {"sequences": 4, "prompt_tokens": 48, "seed": 5}):
        for temperature in (0.0, 1.0):
            wish = SamplingParams(
                temperature=temperature, seed=11, max_tokens=32, ignore_eos=True, detokenize=False, logprobs=1
            )
            made = llm.generate([prompt], wish, use_tqdm=False)[0].outputs[0]
            tokens.append(list(made.token_ids))
            logprobs.append([step[token].logprob for step, token in zip(made.logprobs, made.token_ids, strict=True)])
    return {"tokens": tokens, "logprobs": logprobs}


# ---------------------------------------------------------------- the command line


def _rounded(value: Any) -> Any:
    match value:
        case float():
            return float(f"{value:.6g}")
        case dict():
            return {key: _rounded(item) for key, item in value.items()}
        case list():
            return [_rounded(item) for item in value]
        case _:
            return value


def _writer(out: TextIO, shape: Shape, facts: Json) -> Callable[[str, Json], None]:
    def write(kind: str, row: Json) -> None:
        date = datetime.now(UTC).isoformat(timespec="seconds")
        line = json.dumps(_rounded({"kind": kind, "model": shape.name, **row, **facts, "date": date}))
        out.write(line + "\n")
        out.flush()
        print(line[:600], flush=True)

    return write


def run(options: argparse.Namespace, out: TextIO) -> None:
    """All models within `options.seconds`; each has its share, and what one leaves unused the next may use."""
    start_s = time.monotonic()
    usable_s = options.seconds - END_MARGIN_S * len(options.parts)
    meter = Nvml() if options.device == "gpu" else Host()
    known = GPU_SHAPES if options.device == "gpu" else CPU_SHAPES
    shapes = [known[part] for part in options.parts]
    facts = {**meter.facts(), "command": " ".join(sys.argv[1:])}
    with contextlib.ExitStack() as stack:
        making = [stack.enter_context(checkpoint(s, _writer(out, s, facts))) for s in shapes]
        spent = 0.0
        for shape, made in zip(shapes, making, strict=True):
            spent += shape.seconds / sum(s.seconds for s in shapes)
            write = _writer(out, shape, facts)
            try:
                Proof(shape, options.device, write, meter, start_s + usable_s * spent).run(made())
            except Exception as error:  # the next model still runs
                write("failure", {"part": "all", "error": f"{type(error).__name__}: {error}"[-3000:]})


def _leave(signum: int, frame: object) -> None:
    raise SystemExit(128 + signum)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Prove what shared weights save and cost; rows as JSON lines.")
    parser.add_argument("--out", type=Path, required=True, help="JSON lines are appended here")
    parser.add_argument("--seconds", type=float, default=540.0, help="everything, cleaning up included, ends by then")
    parser.add_argument("--device", choices=("gpu", "cpu"), default="gpu")
    parser.add_argument("--parts", nargs="+", choices=tuple(GPU_SHAPES), default=list(GPU_SHAPES))
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, _leave)
    with options.out.open("a") as out:
        run(options, out)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        work()
    elif sys.argv[1:2] == ["--make"]:
        make(sys.argv[2], Path(sys.argv[3]))
    else:
        main()
