"""Real engines and stand-ins under Ray, while something of the system is killed, stopped or told to stop."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import streams
from conftest import ROOT, STOP_LIMIT_S, System, belongings, free_port, orphans, running, start, stop, write_config

from balancer import ledger
from balancer.board import Board, Owner, board_path
from balancer.readings import ReplicaReading
from deployments import processes
from deployments.launch import runs_folder
from deployments.restart_command import restart

pytestmark = [pytest.mark.system, pytest.mark.timeout(900)]

LONG = {"max_tokens": 900, "ignore_eos": True}


def readings(system: System) -> list[ReplicaReading]:
    board = Board.open(board_path(system.run_id))
    found = list(board.snapshot(time.monotonic()).replicas)
    board.close()
    return found


def until(what: Callable[[], bool], within_s: float) -> float:
    """How long it took to become true."""
    began_s = time.monotonic()
    while not what():
        assert time.monotonic() - began_s < within_s, f"not within {within_s} s"
        time.sleep(0.05)
    return time.monotonic() - began_s


def ends(system: System) -> ledger.Totals:
    """The ledger once nothing is in flight."""
    until(lambda: all(r.assigned_requests == 0 for r in readings(system)), within_s=30.0)
    return ledger.settled(ledger.read(board_path(system.run_id)))


def grown(after: ledger.Totals, before: ledger.Totals) -> tuple[int, ...]:
    """Entered, completed, cancelled, rejected, failed."""
    pairs = zip((after.entered, *after.ends), (before.entered, *before.ends), strict=True)
    return tuple(a - b for a, b in pairs)


def begin_and_leave(system: System, count: int) -> None:
    """So many streams, one after the other, each left at its first token: a fast engine ends none before."""
    for _ in range(count):
        (stream,) = streams.start(system.url, **LONG)
        stream.hang_up()


def tokens_made(system: System) -> int:
    return sum(r.output_tokens_total for r in readings(system))


def processes_named(system: System, part: str) -> list[psutil.Process]:
    found = []
    for process in belongings(system, system.run_id):
        try:
            if part in " ".join(process.cmdline()):
                found.append(process)
        except psutil.Error:
            continue
    return found


def engine_pids(system: System, slot: int) -> list[int]:
    """The engine processes of the replica in a slot."""
    board = Board.open(board_path(system.run_id))
    owner = board.owner(slot)
    board.close()
    assert owner is not None
    return [p.pid for p in psutil.Process(owner.pid).children(recursive=True)]


# --- the system as shipped, which is healthy afterwards ---


def test_the_ledger_agrees_with_the_client_on_every_way_out(system: System) -> None:
    """Completed, cancelled, rejected and failed are what the client counts, each once."""
    before = ends(system)
    assert {system.complete(max_tokens=4).status for _ in range(5)} == {200}
    assert [system.complete(max_tokens=-1).status for _ in range(3)] == [400] * 3
    begin_and_leave(system, 2)
    after = ends(system)
    assert after.open == 0
    assert grown(after, before) == (10, 5, 2, 3, 0)


def test_a_hang_up_frees_the_engine(system: System) -> None:
    """Running requests are aborted in the engine, beside a neighbour that goes on untouched."""
    before, made_before = ends(system), tokens_made(system)
    neighbours = streams.start(system.url, 2, **LONG)
    begin_and_leave(system, 6)
    for stream in neighbours:
        assert stream.ended.wait(120)
        assert stream.done
        assert stream.tokens >= 900 * 0.9
    assert grown(ends(system), before) == (8, 2, 6, 0, 0)
    until(lambda: all(r.kv_blocks_used == 0 for r in readings(system)), within_s=5.0)
    assert tokens_made(system) - made_before < (2 + 6 / 2) * 900


def test_a_stopped_engine_leaves_the_rotation_and_returns_when_it_runs_again(system: System) -> None:
    """SIGSTOP: out within 10 s of its first waiting request, everybody else is served, and back after SIGCONT."""
    everyone = {r.replica_id.rpartition("#")[2] for r in readings(system)}
    engine = processes_named(system, "EngineCore")[0]
    workers = [engine, *engine.children(recursive=True)]
    for process in workers:
        process.suspend()
    try:
        waiting = [streams.Stream(system.url, {"max_tokens": 4}).start() for _ in range(8)]
        time.sleep(10.0)
        answers = [system.complete(max_tokens=1) for _ in range(12)]
        assert {a.status for a in answers} == {200}
        assert len({a.replica for a in answers}) == 1
    finally:
        for process in reversed(workers):
            process.resume()
    assert all(stream.ended.wait(120) and stream.done for stream in waiting)
    until(lambda: {system.complete(max_tokens=1).replica for _ in range(6)} == everyone, within_s=60.0)


@pytest.mark.parametrize("header", ["x" * 4000, "one two", "a,b", "ümlaut"])
def test_a_request_id_that_is_none_is_replaced(system: System, header: str) -> None:
    """And the new one comes back with the answer; the engine names its answer by it."""
    wish = {"model": "demo", "prompt": "x", "max_tokens": 1}
    answer = system.post("/v1/completions", wish, {"x-request-id": header})
    given = answer.headers["x-request-id"]
    assert answer.status == 200
    assert given != header
    assert 16 <= len(given) <= 64
    assert given in answer.json["id"]


def test_a_clients_own_time_is_honoured(system: System) -> None:
    """A stream that takes longer ends with an error event of its own, and the engine is free again."""
    (stream,) = streams.start(system.url, headers={"x-request-timeout-s": "1"}, **LONG)
    assert stream.ended.wait(10)
    assert stream.error["code"] == "client_timeout"
    assert not stream.done
    until(lambda: all(r.running_requests == 0 for r in readings(system)), within_s=5.0)


# --- a system of its own, whose engines are killed ---


@pytest.mark.long
def test_a_killed_engine_fails_explicitly_and_is_replaced(tmp_path: Path) -> None:
    """kill -9 of an engine: its streams end with an error event and no `[DONE]`, its neighbour's go on, and so does the
    service; Serve brings the replica back. Afterwards Ctrl-C with streams running: they are finished first."""
    with running(tmp_path) as system:
        before = ends(system)
        running_streams = streams.start(system.url, 8, **LONG)
        engines = processes_named(system, "EngineCore")
        victim = engines[0]
        victims_before = {r.slot: r.running_requests for r in readings(system)}
        assert min(victims_before.values()) > 0
        victim.kill()
        for stream in running_streams:
            assert stream.ended.wait(120)
        broken = [s for s in running_streams if not s.done]
        assert broken
        assert len({s.replica for s in broken}) == 1
        assert all(s.error.get("code") for s in broken), [s.text[-200:] for s in broken]
        assert not any(b"[DONE]" in s.text for s in broken)
        answers = [system.complete(max_tokens=2) for _ in range(10)]
        assert {a.status for a in answers} == {200}
        after = ends(system)
        assert grown(after, before) == (18, 18 - len(broken), 0, 0, len(broken))
        until(lambda: sum(r.state.name == "READY" for r in readings(system)) == 2, within_s=300.0)
        # Ready for the board is not yet known to HAProxy; only what answers can stand in for the next one.
        until(lambda: len({system.complete(max_tokens=2).replica for _ in range(6)}) == 2, within_s=60.0)
        # Found before the stream begins, which may be over by the time that a slow machine has looked at all processes.
        workers = {
            r.replica_id: next(p for p in processes_named(system, "Worker") if p.ppid() in engine_pids(system, r.slot))
            for r in readings(system)
        }
        (stream,) = streams.start(system.url, **LONG)
        next(p for name, p in workers.items() if name.endswith(stream.replica)).kill()  # its engine dies of it
        assert stream.ended.wait(60)
        assert stream.error.get("code"), stream.text[-200:]
        # The replica looks at its engine ten times a second; until then it may still be given a request.
        until(lambda: sum(r.state.name == "READY" for r in readings(system)) == 1, within_s=5.0)
        assert system.complete(max_tokens=2).status == 200
        short = streams.start(system.url, 2, max_tokens=200, ignore_eos=True)
        board = board_path(system.run_id)
        system.process.send_signal(signal.SIGINT)
        until(lambda: board.with_name(board.name + ".stopping").exists(), within_s=5.0)
        time.sleep(0.2)
        late = system.complete(max_tokens=1)
        assert (late.status, late.json["error"]["code"]) == (503, "stopping")
        assert "retry-after" in late.headers
        for stream in short:
            assert stream.ended.wait(30)
            assert stream.done


@pytest.mark.long
def test_a_replica_that_fails_while_another_starts_is_replaced_as_well(tmp_path: Path) -> None:
    """With none left, requests are told so; then both are back with the KV caches that they had."""
    with running(tmp_path) as system:
        before = readings(system)
        engines = processes_named(system, "EngineCore")
        engines[0].kill()
        until(lambda: bool(set(processes_named(system, "EngineCore")) - set(engines)), within_s=120.0)
        assert system.complete(max_tokens=2).status == 200
        engines[1].kill()
        statuses = ask_until(system, lambda: all_new(system, before))
        assert set(statuses) <= {200, 500, 503}
        until(lambda: len({system.complete(max_tokens=2).replica for _ in range(6)}) == 2, within_s=60.0)
        assert {r.kv_blocks_total for r in readings(system)} == {r.kv_blocks_total for r in before}


def all_new(system: System, before: list[ReplicaReading]) -> bool:
    """Whether as many replicas as before are ready, all of them others."""
    ready = {r.replica_id for r in readings(system) if r.state.name == "READY"}
    return len(ready) == len(before) and not ready & {r.replica_id for r in before}


@pytest.mark.long
def test_a_planned_restart_under_load_loses_no_request(tmp_path: Path) -> None:
    """`splitwiser restart` of one replica after the other, while streams run and requests come: all are answered."""
    with running(tmp_path) as system:
        before = ends(system)
        over = threading.Event()
        with ThreadPoolExecutor() as pool:
            asking = pool.submit(ask_until, system, over.is_set)
            try:
                for old in sorted(readings(system), key=lambda r: r.slot):
                    running_streams = streams.start(system.url, 4, **{**LONG, "max_tokens": 200})
                    assert restart(board_path(system.run_id), old.slot) == 0
                    assert all(s.ended.wait(60) and s.done for s in running_streams)
                    until(lambda old=old: renewed(system, old), within_s=300.0)  # type: ignore[misc]
                    until(lambda: len({system.complete(max_tokens=2).replica for _ in range(6)}) == 2, within_s=60.0)
            finally:
                over.set()
        statuses = asking.result()
        assert set(statuses) == {200}
        after = ends(system)
        assert (after.failed - before.failed, after.rejected - before.rejected) == (0, 0)
        assert after.completed - before.completed >= len(statuses) + 8


def renewed(system: System, old: ReplicaReading) -> bool:
    """Whether two replicas are ready, the old one not among them."""
    ready = {r.replica_id for r in readings(system) if r.state.name == "READY"}
    return len(ready) == 2 and old.replica_id not in ready


def ask_until(system: System, over: Callable[[], bool]) -> list[int]:
    """The statuses of one request after the other, each sent once; 0 where the connection broke."""
    once, found = replace(system, again=False), []
    while not over():
        try:
            found.append(once.complete(max_tokens=2).status)
        except OSError:
            found.append(0)
        time.sleep(0.02)
    return found


@pytest.mark.long
def test_stopping_while_engines_start_leaves_nothing(tmp_path: Path) -> None:
    """Ctrl-C before the system is ready: bounded, and no shared memory of half-started engines is left."""
    log, before = tmp_path / "log", orphans()
    config = write_config(tmp_path, free_port())
    own = {name: str(free_port()) for name in ("RAY_SERVE_HAPROXY_METRICS_PORT", "RAY_SERVE_HAPROXY_STATS_PORT")}
    command = [sys.executable, "-m", "deployments.cli", "serve", str(config)]
    variables = {**os.environ, **own, "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(free_port())}
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=variables, cwd=ROOT)
    until(lambda: "loading weights" in log.read_text(), within_s=300.0)
    run_id = next(f.name for f in runs_folder().glob(f"{process.pid}-*"))
    pid, ticks = (runs_folder() / run_id / "session").read_text().split()
    until(lambda: any("EngineCore" in p.name() for p in psutil.process_iter() if p.pid > process.pid), within_s=120.0)
    time.sleep(1.0)
    process.send_signal(signal.SIGINT)
    assert process.wait(STOP_LIMIT_S) == 0, log.read_text()[-4000:]
    assert not [p for p in processes.of_run(run_id, Owner(int(pid), int(ticks))) if p.pid != process.pid]
    assert not orphans() - before


# --- stand-ins under Ray: what is killed is Ray's ---


def stand_ins(document: dict[str, Any]) -> None:
    application = document["applications"][0]
    application["import_path"] = "benchmarks.stand_in_app:build"
    application["args"] = {"replicas": 2, "device": "cpu", "drain_s": 3, "balancer": {"active_set": 2}}


@pytest.fixture(scope="module")
def stood_in(tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    """Two stand-in replicas behind Ray Serve, HAProxy and the router."""
    with running(tmp_path_factory.mktemp("stand-ins"), change=stand_ins) as found:
        yield found


def steady(system: System, seconds: float) -> list[int]:
    end_s = time.monotonic() + seconds
    return ask_until(system, lambda: time.monotonic() >= end_s)


def test_a_killed_controller_costs_no_request(stood_in: System) -> None:
    """kill -9 of Serve's controller: streams and new requests go on as if nothing were, and Serve has one again."""
    running_streams = streams.start(stood_in.url, 4, max_tokens=400)
    controller = processes_named(stood_in, "ServeController")[0]
    controller.kill()
    assert set(steady(stood_in, 5.0)) == {200}
    assert all(s.ended.wait(60) and s.done for s in running_streams)
    until(lambda: bool(processes_named(stood_in, "ServeController")), within_s=60.0)


def test_a_killed_router_costs_no_running_stream(stood_in: System) -> None:
    """kill -9 of the route service: what runs ends well; new requests get a 503 in JSON until Serve has replaced it."""
    running_streams = streams.start(stood_in.url, 4, max_tokens=400)
    processes_named(stood_in, ":Router")[0].kill()
    while (answer := stood_in.complete(max_tokens=2)).status == 200:
        continue  # the signal is on its way
    assert answer.status == 503
    assert answer.json["error"]["code"] in ("router_unreachable", "starting")
    assert answer.headers["retry-after"] == "1"
    assert all(s.ended.wait(60) and s.done for s in running_streams)
    until(lambda: stood_in.complete(max_tokens=2).status == 200, within_s=60.0)


def test_a_killed_haproxy_cuts_streams_visibly_and_is_replaced(stood_in: System) -> None:
    """kill -9 of HAProxy: no stream ends as if it were whole, their engines are freed, and the address comes back."""
    running_streams = streams.start(stood_in.url, 4, max_tokens=4000)
    for process in processes_named(stood_in, "haproxy.cfg"):
        process.kill()
    assert all(s.ended.wait(10) and s.cut and not s.done for s in running_streams)
    until(lambda: all(r.assigned_requests == 0 for r in readings(stood_in)), within_s=10.0)
    until(lambda: set(steady(stood_in, 0.2)) == {200}, within_s=90.0)


def test_a_killed_replica_fails_its_own_requests_and_no_other(stood_in: System) -> None:
    """kill -9 of a replica: its streams are cut, the other's end well, new requests are served, and it comes back.

    The one request that may reach it while the signal is on its way fails with the rest.
    """
    before = ends(stood_in)
    running_streams = streams.start(stood_in.url, 8, max_tokens=600)
    assert len({s.replica for s in running_streams}) == 2
    processes_named(stood_in, "default:Replica")[0].kill()
    statuses = steady(stood_in, 3.0)
    failed = [status for status in statuses if status != 200]
    assert failed in ([], [502])
    assert all(s.ended.wait(60) for s in running_streams)
    cut = [s for s in running_streams if not s.done]
    assert len({s.replica for s in cut}) == 1
    assert all(s.cut for s in cut), "a broken stream must not look whole"
    after = ends(stood_in)
    entered, lost = 8 + len(statuses), len(cut) + len(failed)
    assert grown(after, before) == (entered, entered - lost, 0, 0, lost)
    until(lambda: sum(r.state.name == "READY" for r in readings(stood_in)) == 2, within_s=60.0)


@pytest.mark.long
def test_what_outlives_the_grace_period_is_ended_with_an_error_event(tmp_path: Path) -> None:
    """Ctrl-C with streams that take too long: an error event at the end of `drain_s`, and all is over in time."""
    port = free_port()
    system = start(write_config(tmp_path, port, stand_ins), port, tmp_path / "log")
    endless = streams.start(system.url, 2, max_tokens=100_000)
    began_s = time.monotonic()
    stop(system)
    assert time.monotonic() - began_s < 3.0 + 15.0
    assert all(s.ended.wait(1) for s in endless)
    assert {s.error.get("code") for s in endless} == {"stopping"}
    assert not any(s.done for s in endless)
