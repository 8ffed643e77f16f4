"""One per node: owns MPS and the memory plan, samples the GPU (or the host) onto the board. A deployment of its own."""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from balancer.board import REPLICA_SLOTS, Board, GpuWriter
from balancer.readings import GpuReading
from deployments import privacy, weights
from deployments.config import ServeArgs, parse_args
from deployments.gpu_setup import EngineSettings, GpuHouse, model_path, why_private
from deployments.mps_watch import MpsWatch
from deployments.processes import WEIGHTS_VARIABLE
from deployments.weight_house import WeightHouse, folder_of, lifeline
from monitoring.exporter import Exporter
from monitoring.exposition import MpsView
from monitoring.sampler import Sampler, open_reader

logger = logging.getLogger("ray.serve")

_STOP_WITHIN_S = 2.0


class DeviceManager:
    """What replicas ask before they start; and the node's sampler, whose readings the board carries."""

    def __init__(self, raw_args: dict[str, Any], device: str, board_path: str, run: str) -> None:
        privacy.keep_grpc_on_loopback()
        args = parse_args(raw_args)
        self._house = GpuHouse(args, run) if device == "gpu" else None
        self._weights = self._weight_house(args, raw_args, run)
        self._board = Board.open(Path(board_path))
        self._writers: dict[int, GpuWriter] = {}
        self._reader = open_reader(int(args.monitoring.memory_reserve_gib * 2**30), logger)
        self._sampler = Sampler(self._reader, self._write, time.monotonic, 1.0 / args.monitoring.sample_hz)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sampler.run, args=(self._stop,), daemon=True, name="sampler")
        self._thread.start()
        self._exporter = self._export(args, Path(board_path))

    def engine_settings(self, visible_devices: str | None = None) -> EngineSettings:
        """What a replica, which sees `visible_devices`, adds to its engine's arguments and environment.

        Where weights are shared their host is started, or started anew if it has ended; the replica waits for it.
        """
        if self._weights and (why := self._weights.refused()):
            self._share_no_more(why)
        settings = self._base_settings()
        if self._weights is None:
            return settings
        visible = {} if visible_devices is None else {"CUDA_VISIBLE_DEVICES": visible_devices}
        self._weights.ensure({**settings.environment, **visible})
        return replace(
            settings,
            engine={**settings.engine, **self._weights.arguments()},
            environment={**settings.environment, WEIGHTS_VARIABLE: "1"},
        )

    def prove_client(self, pid: int) -> None:
        """Raises MpsError unless the engine process `pid`, and the weight host if there is one, are MPS clients."""
        if self._house:
            self._house.prove_client(pid)
            if self._weights and (host := self._weights.status()):
                self._house.prove_client(host.pid)

    def check_health(self) -> None:
        """Serve restarts the device manager when this raises."""
        if self._house:
            self._house.check()
        if not self._thread.is_alive():
            raise RuntimeError("the sampler has stopped; GPU readings on the board are stale")

    def __del__(self) -> None:
        if self._exporter:
            self._exporter.close()
        self._stop.set()
        self._thread.join(_STOP_WITHIN_S)
        self._reader.close()
        while self._writers:
            self._writers.popitem()[1].release()
        self._board.leave()
        if self._weights:
            self._weights.dismiss()
        if self._house:
            self._house.close()

    def _base_settings(self) -> EngineSettings:
        return self._house.settings() if self._house else EngineSettings()

    def _weight_house(self, args: ServeArgs, raw_args: dict[str, Any], run: str) -> WeightHouse | None:
        on = "gpu" if self._house else "cpu"
        if why := why_private(args, on):
            logger.warning("the weights are not shared: %s", why)
            return None
        shared = self._house.weights_shared if self._house else weights.wanted(args.weights, args.replicas, on)
        if not shared:
            return None
        return WeightHouse(folder_of(run), raw_args, model_path(args), self._base_settings().engine, lifeline(run))

    def _share_no_more(self, why: str) -> None:
        logger.warning("the weights are not shared: %s; replicas that start from now on are planned for it", why)
        assert self._weights is not None
        self._weights.dismiss()
        self._weights = None
        if self._house:
            self._house.plan_private_weights()

    def _export(self, args: ServeArgs, board: Path) -> Exporter | None:
        port = args.monitoring.exporter_port
        if port is None:
            return None
        daemon = self._house.daemon if self._house else None
        view = MpsWatch(daemon, self._reader.mps_client_pids).view if daemon else MpsView
        exporter = Exporter(board, args.replicas, slots=min(REPLICA_SLOTS, 2 * args.replicas), mps=view)
        exporter.start(port)
        return exporter

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
