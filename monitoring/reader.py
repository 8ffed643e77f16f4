"""The narrow seam to what is measured: everything else sees only GpuReadings."""

from __future__ import annotations

import math
from typing import Protocol

from balancer.readings import GpuReading

# GPM's counters and psutil's CPU times are both refreshed too rarely for a shorter window: NVIDIA asks for more than
# 100 ms between two GPM samples, psutil for at least 100 ms between two calls.
UTILIZATION_WINDOW_S = 0.1


class ReadingError(RuntimeError):
    """A GPU could not be read. `readings` holds what the other GPUs gave in the same round."""

    def __init__(self, message: str, readings: tuple[GpuReading, ...] = ()) -> None:
        super().__init__(message)
        self.readings = readings


class Reader(Protocol):
    """Reads every GPU that this process may use. Utilization is a difference, so `read` belongs to one thread."""

    def read(self, now_s: float) -> tuple[GpuReading, ...]:
        """One reading for each GPU, stamped `now_s` (monotonic). Ratios are means over the last closed window of
        at least UTILIZATION_WINDOW_S, None until one has closed. Raises ReadingError."""

    def memory_by_pid(self) -> dict[int, int]:
        """Bytes held by each client process, summed over the GPUs. Raises ReadingError."""

    def mps_client_pids(self) -> frozenset[int]:
        """The processes that are MPS clients on one of the GPUs. Raises ReadingError."""

    def close(self) -> None:
        """Gives everything back; call it after the last `read` has returned. Closing twice does nothing."""


def ratio(percent: float) -> float | None:
    """Within 0 and 1; None for NaN."""
    return None if math.isnan(percent) else min(1.0, max(0.0, percent / 100))
