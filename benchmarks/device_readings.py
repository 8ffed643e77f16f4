"""The GPU, or without one the host, watched while something is measured."""

from __future__ import annotations

import logging
import statistics
import threading
import time
from collections.abc import Sequence
from typing import Any

from balancer.readings import GpuReading
from monitoring.sampler import UTILIZATION_WINDOW_S, Reader, Sampler, open_reader

RATIOS = ("sm_ratio", "sm_occupancy_ratio", "dram_bandwidth_ratio")


class Watch:
    """Samples device 0 in a thread, from `with` to its end. Without a GPU `sm_ratio` is the CPUs' utilization."""

    def __init__(self, reader: Reader | None = None) -> None:
        self._reader = reader or open_reader(0, logging.getLogger(__name__))
        self._readings: list[GpuReading] = []
        self._stop = threading.Event()
        sampler = Sampler(self._reader, self._note, time.monotonic)
        self._thread = threading.Thread(target=sampler.run, args=(self._stop,), daemon=True)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._reader.close()

    def _note(self, reading: GpuReading) -> None:
        if reading.index == 0:
            self._readings.append(reading)

    def means(self, start_s: float, end_s: float) -> dict[str, Any]:
        return means(list(self._readings), start_s, end_s)


def means(readings: Sequence[GpuReading], start_s: float, end_s: float) -> dict[str, Any]:
    """Means of the ratios over [start, end] (monotonic), each None where nothing was read, and the most memory used.

    A reading's ratios cover the window before it, so the first window's readings are left out.
    """
    inside = [r for r in readings if start_s + UTILIZATION_WINDOW_S <= r.taken_at_s <= end_s]
    return {
        "source": inside[0].source.name.lower() if inside else None,
        **{name: _mean([getattr(r, name) for r in inside]) for name in RATIOS},
        "memory_used_bytes": max((r.memory_used_bytes for r in inside), default=None),
        "readings": len(inside),
    }


def _mean(values: Sequence[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return statistics.fmean(known) if known else None
