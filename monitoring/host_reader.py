"""The host, read in a GPU's place on a machine without one."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from balancer.readings import GpuReading, GpuSource
from monitoring.reader import UTILIZATION_WINDOW_S, ReadingError, ratio


class HostReader:
    """The host in a GPU's place: CPU utilization as `sm_ratio`, the machine's memory, what each of `pids()` has alone.

    `host` is the module psutil, or a fake of it. psutil keeps CPU times for each thread apart, so the first window
    of a second thread would read as idle: keep to one.
    """

    def __init__(self, host: Any, pids: Callable[[], Iterable[int]], reserve_bytes: int) -> None:
        self._host = host
        self._pids = pids
        self._reserve_bytes = reserve_bytes
        self._cpu_read_at_s: float | None = None
        self._cpu_ratio: float | None = None

    def read(self, now_s: float) -> tuple[GpuReading, ...]:
        try:
            cpu_ratio = self._read_cpu(now_s)
            memory = self._host.virtual_memory()
        except OSError as error:
            raise ReadingError(f"The host could not be read ({error}): make /proc readable") from error
        reading = GpuReading(
            index=0,
            source=GpuSource.HOST,
            sm_ratio=cpu_ratio,
            sm_occupancy_ratio=None,
            dram_bandwidth_ratio=None,
            memory_used_bytes=memory.total - memory.available,
            memory_total_bytes=memory.total,
            memory_reserve_bytes=self._reserve_bytes,
            power_w=None,
            temperature_c=None,
            sm_clock_hz=None,
            taken_at_s=now_s,
        )
        return (reading,)

    def _read_cpu(self, now_s: float) -> float | None:
        read_at_s = self._cpu_read_at_s
        if read_at_s is None or now_s - read_at_s > UTILIZATION_WINDOW_S:
            now = ratio(self._host.cpu_percent(None))
            self._cpu_ratio = None if read_at_s is None else now  # the first call has no interval: always 0.0
            self._cpu_read_at_s = now_s
        return self._cpu_ratio

    def memory_by_pid(self) -> dict[int, int]:
        held: dict[int, int] = {}
        for pid in self._pids():
            try:
                memory = self._host.Process(pid).memory_info()
                held[pid] = memory.rss - memory.shared  # pages of shared weights are everybody's
            except self._host.NoSuchProcess:
                continue  # it ended between being named and being asked: it holds nothing
            except self._host.AccessDenied as error:
                raise ReadingError(f"Process {pid} may not be read: run as its owner or as root") from error
        return held

    def mps_client_pids(self) -> frozenset[int]:
        return frozenset()

    def close(self) -> None:
        """Nothing is held."""
