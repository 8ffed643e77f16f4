"""A fatal fault and the daemon's death are seen and healed, against the stand-in for the control program."""

from __future__ import annotations

import json
import logging
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from deployments import mps, mps_keeper
from deployments.mps import ControlProgram, MpsDaemon, ProcessIdentity, identify, private_paths, running_daemon
from deployments.mps_keeper import MpsKeeper
from deployments.notices import LossFile

STAND_IN = Path(__file__).with_name("mps_stand_in.py")
FAULT = """\
[2026-11-22 10:00:00.000 Server   427] Client {PID: 482, Context: 1} encountered a fatal GPU error.
[2026-11-22 10:00:00.000 Server   427] Server is handling a fatal GPU error.
[2026-11-22 10:00:00.001 Server   427] The following devices will be reset:
[2026-11-22 10:00:00.001 Server   427] {device}
"""
CLEARED = "[2026-11-22 10:00:09.000 Server   427] Destroy server context on device {device} (NVIDIA H200)\n"


class Node:
    """A daemon of the stand-in, two GPUs, and engines that can be started on them."""

    def __init__(self, folder: Path) -> None:
        self.board = folder / "board"
        self.state = folder / "state.json"
        self.paths = private_paths(os.getuid(), folder)
        binary = folder / "nvidia-cuda-mps-control"
        words = [sys.executable, "-S", "-E", str(STAND_IN), str(self.state), str(binary)]
        binary.write_text(f'#!/bin/sh\nexec {shlex.join(words)} "$@"\n')
        binary.chmod(0o700)
        self.program = ControlProgram(str(binary))
        self.processes: dict[int, list[subprocess.Popen[bytes]]] = {0: [], 1: []}
        self.set()
        self.keeper = MpsKeeper(self.daemon, LossFile(self.board), (0, 1), self.engines, logging.getLogger("test"))
        self.losses = LossFile(self.board)

    def daemon(self) -> MpsDaemon:
        return MpsDaemon(self.program, self.paths, fresh_for_s=0.0)

    def set(self, **state: Any) -> None:
        self.state.write_text(json.dumps(state))

    def start_engine(self, gpu: int) -> int:
        command = [sys.executable, "-S", "-E", "-c", "import time; time.sleep(60)"]
        self.processes[gpu].append(subprocess.Popen(command))
        return self.processes[gpu][-1].pid

    def engines(self, gpus: Sequence[int]) -> list[ProcessIdentity]:
        found = (identify(process.pid) for gpu in gpus for process in self.processes[gpu])
        return [process for process in found if process is not None]

    def log(self, text: str, device: int = 0) -> None:
        with (self.paths.log / "server.log").open("a") as log:
            log.write(text.replace("{device}", str(device)))

    def lost(self) -> list[int]:
        return [self.losses.read().epoch(gpu) for gpu in (0, 1)]

    def end(self) -> None:
        self.keeper.close()
        self.state.unlink()
        for process in [*self.processes[0], *self.processes[1]]:
            process.kill()
            process.wait()


@pytest.fixture
def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Node]:
    """Short waits; afterwards no daemon and none of its folders is left."""
    monkeypatch.setattr(mps_keeper, "_EXIT_GRACE_S", 0.2)
    monkeypatch.setattr(mps_keeper, "_CLEAN_LIMIT_S", 1.0)
    node = Node(tmp_path)
    yield node
    node.end()
    assert running_daemon(node.paths.pipe) is None
    assert not node.paths.pipe.exists()


def in_background(work: Callable[[], None]) -> threading.Thread:
    thread = threading.Thread(target=work)
    thread.start()
    return thread


def test_while_all_is_well_the_daemon_is_asked_nothing(node: Node) -> None:
    """Control pipes that are polled hard fail, so that a look only reads files."""
    commands = node.state.with_suffix(".commands")
    before = commands.read_text()
    for _ in range(20):
        node.keeper.look()
    assert commands.read_text() == before
    assert node.lost() == [0, 0]


def test_a_fault_loses_the_engines_of_its_gpu_only(node: Node) -> None:
    """Those of the GPU that the log names are lost, with the reason; the other GPU's go on; it is answered once."""
    others = node.start_engine(1)
    node.log(FAULT, device=0)
    node.keeper.look()
    assert node.lost() == [1, 0]
    assert "a fatal GPU error in process 482" in node.losses.read().why
    assert identify(others) is not None
    assert not node.keeper.healing
    node.log(CLEARED)
    node.keeper.look()
    assert (node.lost(), node.keeper.faults) == ([1, 0], 1)


def test_engines_that_do_not_end_by_themselves_are_ended(node: Node) -> None:
    """A replica that is starting hears nothing; its engine would keep the server from becoming clean."""
    engine = node.start_engine(0)
    node.log(FAULT)
    node.keeper.look()
    assert identify(engine) is None


def test_nobody_starts_before_the_server_is_clean(node: Node) -> None:
    """Replicas that ask meanwhile see that MPS is being healed; then the same daemon goes on."""
    daemon = node.keeper.daemon.identity
    node.set(servers={"427": {"status": "FAULT"}})
    node.log(FAULT)
    looking = in_background(node.keeper.look)
    deadline = time.monotonic() + 20
    while node.lost() == [0, 0]:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    assert node.keeper.healing
    node.set(servers={"427": {"status": "ACTIVE"}})
    looking.join(20)
    assert not node.keeper.healing
    assert node.keeper.daemon.identity == daemon


def test_a_server_that_never_becomes_clean_gets_another_daemon(node: Node) -> None:
    """Ours is ended and started anew rather than waited for without end."""
    daemon = node.keeper.daemon.identity
    node.set(servers={"427": {"status": "FAULT"}})
    node.log(FAULT)
    node.keeper.look()
    assert node.keeper.given_up == ""
    assert node.keeper.daemon.alive()
    assert node.keeper.daemon.identity != daemon


def test_the_daemons_death_loses_all_engines_and_another_is_started(node: Node) -> None:
    """Its orphaned server, which would hold the GPU's memory, is ended with it."""
    server, client = node.start_engine(0), os.getpid()
    node.set(servers={str(server): {"clients": [client]}})
    node.keeper.prove_client(client, 5.0)
    node.processes[1], node.processes[0] = node.processes[0], []
    daemon = node.keeper.daemon.identity
    assert daemon is not None
    node.set()
    os.kill(daemon.pid, signal.SIGKILL)
    while node.keeper.daemon.alive():
        time.sleep(0.005)
    node.keeper.look()
    assert node.lost() == [1, 1]
    assert (node.losses.read().why, node.keeper.faults) == ("the MPS control daemon has died", 0)
    assert node.keeper.daemon.alive()
    assert node.keeper.daemon.identity != daemon
    assert identify(server) is None


def test_what_cannot_be_healed_is_given_up_with_its_reason(node: Node) -> None:
    """After three attempts; a later look changes nothing any more."""
    daemon = node.keeper.daemon.identity
    assert daemon is not None
    node.set(start="refuses")
    os.kill(daemon.pid, signal.SIGKILL)
    while node.keeper.daemon.alive():
        time.sleep(0.005)
    node.keeper.look()
    assert "the MPS control daemon did not start" in node.keeper.given_up
    node.keeper.look()
    assert node.lost() == [1, 1]


def test_it_looks_until_it_is_stopped(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread sees a fault by itself and ends when told."""
    monkeypatch.setattr(mps_keeper, "LOOK_EVERY_S", 0.01)
    stop = threading.Event()
    looking = in_background(lambda: node.keeper.run(stop))
    node.log(FAULT)
    deadline = time.monotonic() + 20
    while node.lost() == [0, 0] or node.keeper.healing:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    stop.set()
    looking.join(20)
    assert not looking.is_alive()
    assert mps.running_daemon(node.paths.pipe) is not None
