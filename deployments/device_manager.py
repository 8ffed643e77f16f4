"""One per node: samples the GPU (or the host) onto the board. Ray Serve runs it as a deployment of its own."""

from __future__ import annotations

import logging
import threading
import time
from pathlib import Path

from balancer.board import Board, GpuWriter
from balancer.readings import GpuReading
from deployments.config import MonitoringConfig
from monitoring.sampler import Sampler, open_reader

logger = logging.getLogger("ray.serve")

_STOP_WITHIN_S = 2.0


class DeviceManager:
    """Owns the node's sampler; the board carries what it reads."""

    def __init__(self, board_path: str, monitoring: dict[str, float]) -> None:
        config = MonitoringConfig.model_validate(monitoring)
        self._board = Board.open(Path(board_path))
        self._writers: dict[int, GpuWriter] = {}
        self._reader = open_reader(int(config.memory_reserve_gib * 2**30), logger)
        self._sampler = Sampler(self._reader, self._write, time.monotonic, 1.0 / config.sample_hz)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sampler.run, args=(self._stop,), daemon=True, name="sampler")
        self._thread.start()

    def check_health(self) -> None:
        """Serve restarts the device manager when this raises."""
        if not self._thread.is_alive():
            raise RuntimeError("the sampler has stopped; GPU readings on the board are stale")

    def __del__(self) -> None:
        self._stop.set()
        self._thread.join(_STOP_WITHIN_S)
        self._reader.close()
        for writer in self._writers.values():
            writer.release()
        self._board.leave()

    def _write(self, reading: GpuReading) -> None:
        if reading.index not in self._writers:
            self._writers[reading.index] = self._board.gpu_writer(reading.index)
        self._writers[reading.index].publish(reading)
