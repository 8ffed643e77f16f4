"""One per node: owns MPS and the memory plan, samples the GPU (or the host) onto the board. A deployment of its own."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from balancer.board import REPLICA_SLOTS, Board, GpuWriter, Owner
from balancer.readings import GpuReading
from deployments import cores, mps, notices, privacy, processes, start_order, weights
from deployments.config import ServeArgs, parse_args
from deployments.gpu_house import EngineSettings, GpuHouse
from deployments.gpu_setup import model_path, why_private
from deployments.mps_watch import MpsWatch
from deployments.places import Places, RestartPolicy
from deployments.processes import WEIGHTS_VARIABLE
from deployments.weight_house import WeightHouse, folder_of, lifeline
from monitoring.exporter import Exporter
from monitoring.exposition import MpsView, SharedWeights
from monitoring.sampler import Sampler, open_reader

logger = logging.getLogger("ray.serve")

_STOP_WITHIN_S = 2.0
_ASK_AGAIN_S = 0.5


@dataclass(frozen=True, slots=True)
class Permission:
    """What a replica that asks to start is told: everything it needs, or when to ask again, or why it never may.

    `epoch` is that of the GPU's losses now: once it has grown, an engine started with this permission is lost.
    """

    place: int | None = None
    gpu: int = 0
    epoch: int = 0
    cores: tuple[int, ...] = ()
    settings: EngineSettings = field(default_factory=EngineSettings)
    ask_again_s: float = 0.0
    refusal: str = ""


class DeviceManager:
    """What replicas ask before they start; and the node's sampler, whose readings the board carries.

    Ray calls it from several threads at once, and replicas that start together ask at the same moment: who gets which
    place, and who finds no weight host and starts one, is decided for one after the other.
    """

    def __init__(self, raw_args: dict[str, Any], device: str, board_path: str, run: str) -> None:
        # Serve takes down what a failed start has begun, too.
        self._closing = contextlib.ExitStack()
        privacy.keep_grpc_on_loopback()
        self._args = args = parse_args(raw_args)
        self._path = Path(board_path)
        restarts = args.restarts
        self._turn = threading.Lock()
        policy = RestartPolicy(restarts.deaths, restarts.within_s, restarts.first_wait_s)
        self._places = Places(args.total_replicas, policy)
        self._cores = _core_shares(args)
        self._house = GpuHouse(args, run, self._path, self._engines_of, logger) if device == "gpu" else None
        if self._house:
            self._closing.callback(self._house.close)
        self._weights = self._weight_houses(raw_args, run)
        self._closing.callback(self._dismiss_hosts)
        self._board = Board.open(self._path)
        self._closing.callback(lambda: self._board.leave())  # whichever it is by then
        self._writers: dict[int, GpuWriter] = {}
        self._closing.callback(self._release_writers)
        self._reader = open_reader(int(args.monitoring.memory_reserve_gib * 2**30), logger)
        self._closing.callback(self._reader.close)
        self._sampler = Sampler(self._reader, self._write, time.monotonic, 1.0 / args.monitoring.sample_hz)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sampler.run, args=(self._stop,), daemon=True, name="sampler")
        self._keeper = threading.Thread(target=self._watch_mps, daemon=True, name="mps")
        for thread in (self._thread, self._keeper):
            thread.start()
            self._closing.callback(thread.join, _STOP_WITHIN_S)
        self._closing.callback(self._stop.set)
        if exporter := self._export(args, Path(board_path)):
            self._closing.callback(exporter.close)

    def may_start(self, replica_id: str, pid: int) -> Permission:
        """May this replica, whose process is `pid`, start its engine now? It asks again until it may, or may never."""
        with self._turn:
            return self._may_start(replica_id, pid)

    def _may_start(self, replica_id: str, pid: int) -> Permission:
        leave = self._places.ask(replica_id, Owner.of(pid), time.monotonic())
        if leave.place is None:
            if self._places.all_given_up():
                notices.stop(self._path, f"no replica is left that could be started: {leave.refusal}")
            return Permission(ask_again_s=leave.ask_again_s, refusal=leave.refusal)
        gpu = self._gpu_of(leave.place)
        if self._house:
            before = [i for i in self._places.starting() if i < leave.place and self._gpu_of(i) == gpu]
            if self._house.must_wait(gpu, len(before)):
                return Permission(ask_again_s=_ASK_AGAIN_S)
            if self._house.refusal:
                notices.stop(self._path, self._house.refusal)
                return Permission(refusal=self._house.refusal)
        return self._permission(leave.place, gpu)

    def started(self, replica_id: str, gpu: int, engine_pids: list[int]) -> None:
        """The replica's engine is up. Raises MpsError unless its processes are MPS clients where they have to be."""
        if self._house:
            self._house.started(gpu, [*engine_pids, *self._hosts_of([gpu])])
        with self._turn:
            self._places.ready(replica_id, time.monotonic())

    def ended(self, replica_id: str, planned: bool) -> None:
        """The replica has lost its engine, or gave it up as planned; another may take its place."""
        with self._turn:
            self._places.ended(replica_id, planned, time.monotonic())

    def terminate(self, engine_pids: list[int]) -> str:
        """Before these processes are killed: end their GPU work. A sentence when that failed, else nothing."""
        return self._house.terminate(engine_pids) if self._house else ""

    def check_health(self) -> None:
        """Serve restarts the device manager when this raises."""
        if not self._thread.is_alive():
            raise RuntimeError("the sampler has stopped; GPU readings on the board are stale")
        if self._house and not self._keeper.is_alive():
            raise RuntimeError("nobody looks after MPS any more; a fault would go unseen")

    def __del__(self) -> None:
        self._closing.close()

    def _dismiss_hosts(self) -> None:
        for host in list(self._weights.values()):
            host.dismiss()

    def _release_writers(self) -> None:
        while self._writers:
            self._writers.popitem()[1].release()

    def _weight_houses(self, raw_args: dict[str, Any], run: str) -> dict[int, WeightHouse]:
        """A weight host's keeper for each GPU; none where weights are private."""
        args, on = self._args, "gpu" if self._house else "cpu"
        if why := why_private(args, on):
            logger.warning("the weights are not shared: %s", why)
            return {}
        shared = self._house.weights_shared if self._house else weights.wanted(args.weights, args.replicas, on)
        gpus = self._house.gpus if self._house else (0,)
        return {gpu: self._weight_house(raw_args, run, gpu) for gpu in gpus} if shared else {}

    def _weight_house(self, raw_args: dict[str, Any], run: str, gpu: int) -> WeightHouse:
        engine = self._house.settings(gpu).engine if self._house else {}
        folder = weights.gpu_folder(folder_of(run), gpu)
        folder.mkdir(mode=0o700, exist_ok=True)
        return WeightHouse(folder, raw_args, model_path(self._args), engine, lifeline(run))

    def _share_no_more(self, why: str) -> None:
        logger.warning("the weights are not shared: %s; replicas that start from now on are planned for it", why)
        # First: where that does not fit, nobody may load privately under a plan that counts the weights once.
        if self._house:
            self._house.plan_private_weights()
        for house in self._weights.values():
            house.dismiss()
        self._weights.clear()

    def _watch_mps(self) -> None:
        if self._house:
            self._house.watch(self._stop)

    def _permission(self, place: int, gpu: int) -> Permission:
        cores = self._cores[place] if self._cores else ()
        if self._house is None:
            # Without a plan only a pinned KV cache is not sized by what an engine finds free.
            pinned = "kv_cache_memory_bytes" in self._args.engine
            settings = EngineSettings(together=start_order.together(self._args.start, pinned))
            return Permission(place, 0, 0, cores, self._with_weights(0, settings))
        epoch = self._house.losses.read().epoch(gpu)
        return Permission(place, gpu, epoch, cores, self._with_weights(gpu, self._house.settings(gpu)))

    def _with_weights(self, gpu: int, settings: EngineSettings) -> EngineSettings:
        """Where weights are shared their host is started, or started anew if it has ended; the replica waits for it."""
        house = self._weights.get(gpu)
        if house and (why := house.refused()):
            self._share_no_more(why)
            return self._house.settings(gpu) if self._house else settings
        if house is None:
            return settings
        house.ensure(settings.environment)
        return replace(
            settings,
            engine={**settings.engine, **house.arguments()},
            environment={**settings.environment, WEIGHTS_VARIABLE: "1"},
        )

    def _hosts_of(self, gpus: Sequence[int]) -> list[int]:
        statuses = [house.status() for gpu, house in list(self._weights.items()) if gpu in gpus]
        return [status.pid for status in statuses if status is not None]

    def _gpu_of(self, place: int) -> int:
        return self._house.gpus[place // self._args.replicas] if self._house else 0

    def _engines_of(self, gpus: Sequence[int]) -> list[mps.ProcessIdentity]:
        """What the replicas on these GPUs have started, also those that are starting, and the hosts of weights."""
        parents = [process.pid for i, process in self._places.processes().items() if self._gpu_of(i) in gpus]
        pids = [pid for parent in parents for pid in processes.engines_of(parent)] + self._hosts_of(gpus)
        return [process for process in map(mps.identify, pids) if process is not None]

    def _export(self, args: ServeArgs, board: Path) -> Exporter | None:
        port = args.monitoring.exporter_port
        if port is None:
            return None
        keeper = self._house.keeper if self._house else None
        view = MpsWatch(keeper, self._reader.mps_client_pids).view if keeper else MpsView
        slots = min(REPLICA_SLOTS, 2 * args.total_replicas)
        exporter = Exporter(board, args.total_replicas, slots=slots, mps=view, weights=self._shared_weights)
        exporter.start(port)
        return exporter

    def _shared_weights(self) -> list[SharedWeights]:
        found = [(gpu, house.status()) for gpu, house in list(self._weights.items())]
        return [
            SharedWeights(gpu, status.shared_bytes, frozenset(f.replica_pid for f in status.followers))
            for gpu, status in found
            if status is not None and status.state == "ready"
        ]

    def _write(self, reading: GpuReading) -> None:
        if self._board.replaced():
            self._move()
        if reading.index not in self._writers:
            self._writers[reading.index] = self._board.gpu_writer(reading.index)
        self._writers[reading.index].publish(reading)

    def _move(self) -> None:
        board = Board.open(self._board.path)
        self._writers.clear()
        self._board.close()
        self._board = board


def _core_shares(args: ServeArgs) -> list[tuple[int, ...]]:
    if args.cpu_pinning == "off":
        return []
    return cores.shares(sorted(os.sched_getaffinity(0)), args.total_replicas)
