"""What the GPU, or on a machine without one the host, is doing: the fitting reader, asked over and over."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import psutil
import pynvml  # type: ignore[import-untyped]

from balancer.readings import GpuReading, GpuSource
from monitoring.host_reader import HostReader
from monitoring.nvml_reader import NvmlReader, nvml_sentence, visible_indices
from monitoring.reader import UTILIZATION_WINDOW_S, Reader, ReadingError

__all__ = [
    "SAMPLE_PERIOD_S",
    "UTILIZATION_WINDOW_S",
    "HostReader",
    "NvmlReader",
    "Reader",
    "ReadingError",
    "Sampler",
    "open_reader",
    "visible_indices",
]

# 25 Hz: memory can move within one engine step, so it is read more often than the window above closes. On an H200 the
# memory query took 6-8 us, a GPM sample, due in every third round, 0.14-0.5 ms.
SAMPLE_PERIOD_S = 0.04


def open_reader(
    reserve_bytes: int,
    log: logging.Logger,
    *,
    pids: Callable[[], Iterable[int]] = tuple,
    nvml: Any = pynvml,
    host: Any = psutil,
    environ: Mapping[str, str] = os.environ,
) -> Reader:
    """The GPUs that CUDA_VISIBLE_DEVICES leaves, or the host without driver or GPU; one log line says which and why.

    `pids` names the processes whose memory a HostReader reports. A driver that is there but broken is a ReadingError,
    not a reason to read the host; an impossible CUDA_VISIBLE_DEVICES a ValueError.
    """
    try:
        indices = _nvml_indices(nvml, environ)
    except (nvml.NVMLError_LibraryNotFound, nvml.NVMLError_DriverNotLoaded) as error:
        return _host_instead(f"NVML answers '{error}'", reserve_bytes, log, pids, host)
    except nvml.NVMLError as error:
        raise ReadingError(nvml_sentence("NVML could not be opened", error)) from error
    if not indices:
        return _host_instead("no GPU is visible to this process", reserve_bytes, log, pids, host)
    reader = NvmlReader(nvml, indices, reserve_bytes)
    log.info("Reading GPUs through NVML: %s", "; ".join(_source_words(*item) for item in reader.sources.items()))
    return reader


def _nvml_indices(nvml: Any, environ: Mapping[str, str]) -> tuple[int, ...]:
    def uuid_of(index: int) -> str:
        return str(nvml.nvmlDeviceGetUUID(nvml.nvmlDeviceGetHandleByIndex(index)))

    nvml.nvmlInit()
    try:
        return visible_indices(environ, nvml.nvmlDeviceGetCount(), uuid_of)
    finally:
        nvml.nvmlShutdown()


def _host_instead(
    why: str, reserve_bytes: int, log: logging.Logger, pids: Callable[[], Iterable[int]], host: Any
) -> Reader:
    log.info("Reading the host's CPUs and memory in a GPU's place because %s", why)
    return HostReader(host, pids, reserve_bytes)


def _source_words(index: int, source: GpuSource) -> str:
    if source is GpuSource.GPM:
        return f"GPU {index} with SM utilization from GPM"
    return f"GPU {index} without GPM, so with utilization.gpu, which only tells that some kernel was resident"


class Sampler:
    """Reads `reader` every `period_s` and hands each reading to `write`, and to `record` where given.

    A failed reading is counted in `errors_total`, its sentence kept in `last_error` until a round succeeds, and
    nothing is written for that GPU: its last reading grows old, which readers can see. An exception out of `write`
    or `record` ends the loop: it is the caller's own.
    """

    def __init__(
        self,
        reader: Reader,
        write: Callable[[GpuReading], None],
        clock: Callable[[], float] = time.monotonic,
        period_s: float = SAMPLE_PERIOD_S,
        record: Callable[[GpuReading], None] | None = None,
    ) -> None:
        if not period_s > 0:
            raise ValueError(f"period_s is {period_s}: a sampler needs a period above 0 s (0.02 to 0.05 is usual)")
        self._reader = reader
        self._sinks = (write,) if record is None else (write, record)
        self._clock = clock
        self._period_s = period_s
        self.rounds_total = 0
        self.errors_total = 0
        self.last_error: str | None = None

    def run(self, stop: threading.Event) -> None:
        """Samples until `stop` is set; leaves the reader open. A round longer than `period_s` delays the next."""
        while not stop.is_set():
            started_at_s = self._clock()
            self.sample()
            stop.wait(max(0.0, started_at_s + self._period_s - self._clock()))

    def sample(self) -> None:
        """One round, now."""
        self.rounds_total += 1
        for reading in self._read():
            for sink in self._sinks:
                sink(reading)

    def _read(self) -> tuple[GpuReading, ...]:
        try:
            readings = self._reader.read(self._clock())
        except ReadingError as error:
            self.errors_total += 1
            self.last_error = str(error)
            return error.readings
        self.last_error = None
        return readings
