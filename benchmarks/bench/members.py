"""The processes of a stage: engines without HTTP, started together, each round on some of them."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.bench.phases import Served
from benchmarks.bench.plan import Cell, Round
from benchmarks.client import Wish, share
from benchmarks.workers import Engine, EngineError
from deployments.mps import ENVIRONMENT_OUTSIDE_MPS, ControlProgram, MpsDaemon, client_environment, private_paths

Json = dict[str, Any]
GRACE_S = 10.0
VLLM = (sys.executable, "-m", "benchmarks.bench.vllm_worker")
HF = (sys.executable, "-m", "benchmarks.bench.hf_worker")


@dataclass(frozen=True, slots=True)
class Report:
    """What a round's processes saw of it, in monotonic seconds."""

    go_s: float
    requests: list[Served]
    made: list[tuple[float, int]]


@dataclass(slots=True)
class Members:
    """A group of alike processes of a stage: `vllm`, `unmixed` or `hf`. `broken` says why it is of no more use."""

    name: str
    engines: list[Engine]
    clients: int
    hello: Json = field(default_factory=dict)
    broken: str | None = None


@dataclass(frozen=True, slots=True)
class Recruits:
    """How to start one group: the command, and one spec for each process. `clients`: processes that use the GPU."""

    name: str
    command: Sequence[str]
    specs: Sequence[Json]
    clients: int


@contextlib.contextmanager
def started(recruits: Sequence[Recruits], env: Mapping[str, str], folder: Path) -> Iterator[dict[str, Members]]:
    """All groups' processes, started together and told their specs; none is left when the block ends."""
    groups: dict[str, Members] = {}
    try:
        for group in recruits:
            members = groups.setdefault(group.name, Members(group.name, [], group.clients))
            for rank, spec in enumerate(group.specs):
                members.engines.append(Engine(group.command, env, folder / f"{group.name}-{rank}.log"))
                members.engines[-1].send(spec)
        yield groups
    finally:
        engines = [engine for members in groups.values() for engine in members.engines]
        for engine in engines:
            engine.close()
        deadline_s = time.monotonic() + GRACE_S
        for engine in engines:
            engine.end(deadline_s)


@contextlib.contextmanager
def mps_environment(wanted: bool) -> Iterator[tuple[dict[str, str], MpsDaemon | None]]:
    """The environment of MPS clients of a daemon of the bench's own, or of processes that surely join none.

    Raises MpsError where the daemon does not start.
    """
    if not wanted:
        yield dict(ENVIRONMENT_OUTSIDE_MPS), None
        return
    paths = private_paths(os.getuid(), name="bench")
    daemon = MpsDaemon(ControlProgram(), paths)
    daemon.start()
    try:
        yield client_environment(paths), daemon
    finally:
        daemon.stop()


def play(members: Members, r: Round, wishes: Sequence[Wish], hf_batch: int, deadline_s: float) -> Report:
    """Run one round on the first processes of a group. Raises EngineError."""
    orders = hf_orders(r.cell, wishes, hf_batch) if r.cell.is_hf else vllm_orders(r.cell, wishes)
    active = members.engines[: len(orders)]
    for engine, order in zip(active, orders, strict=True):
        engine.send(order)
    for engine in active:
        engine.receive(deadline_s)
    go_s = time.monotonic()
    for engine in active:
        engine.send({"go": True})
    reports = [engine.receive(deadline_s) for engine in active]
    return merge(go_s, reports)


def merge(go_s: float, reports: Sequence[Json]) -> Report:
    requests = [Served(*request) for report in reports for request in report["requests"]]
    return Report(go_s, requests, [(at_s, count) for report in reports for at_s, count in report["made"]])


def vllm_orders(cell: Cell, wishes: Sequence[Wish]) -> list[Json]:
    """Each engine's requests, dealt one by one, as if by a round robin."""
    n = cell.processes
    return [{**_order(wishes[rank::n]), "limit": share(cell.workload.limit, n, rank)} for rank in range(n)]


def hf_orders(cell: Cell, wishes: Sequence[Wish], batch: int) -> list[Json]:
    """One order: the Hugging Face worker hands its parts out itself."""
    mode = "sequential" if cell.system == "hf-sequential" else "split"
    return [{**_order(wishes), "limit": None, "mode": mode, "processes": cell.processes, "batch": batch}]


def _order(wishes: Sequence[Wish]) -> Json:
    return {
        "prompts": [wish.prompt for wish in wishes],
        "output_tokens": [wish.output_tokens for wish in wishes],
        "at_s": [wish.at_s for wish in wishes],
    }


def greet(members: Members, deadline_s: float) -> None:
    """Wait until all are ready; a group of which one is not is broken."""
    try:
        for engine in members.engines:
            members.hello = engine.receive(deadline_s)
    except EngineError as error:
        members.broken = str(error)
