"""What the GPU is doing, read through NVML or, on a machine without a GPU, from the host.

`Reader` is the narrow seam: everything else sees only GpuReadings. SM utilization comes from GPM counters where the
GPU has them (Hopper and newer): https://docs.nvidia.com/deploy/nvml-api/group__nvmlGpmFunctions.html
"""

from __future__ import annotations

import logging
import math
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from typing import Any, NamedTuple, Protocol, TypeVar

import psutil
import pynvml  # type: ignore[import-untyped]

from balancer.readings import GpuReading, GpuSource

# GPM's counters and psutil's CPU times are both refreshed too rarely for a shorter window: NVIDIA asks for more than
# 100 ms between two GPM samples, psutil for at least 100 ms between two calls.
UTILIZATION_WINDOW_S = 0.1
# 25 Hz: memory can move within one engine step, so it is read more often than the window above closes. On an H200 the
# memory query took 6-8 us, a GPM sample, due in every third round, 0.14-0.5 ms.
SAMPLE_PERIOD_S = 0.04
_MPS_CLIENTS = "nvmlDeviceGetMPSComputeRunningProcesses"

T = TypeVar("T")


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


class Ratios(NamedTuple):
    sm: float | None = None
    sm_occupancy: float | None = None
    dram_bandwidth: float | None = None


def visible_indices(environ: Mapping[str, str], count: int, uuid_of: Callable[[int], str]) -> tuple[int, ...]:
    """NVML indices of the GPUs that CUDA_VISIBLE_DEVICES leaves, in its order; all `count` where it is not set.

    Entries are indices or (beginnings of) UUIDs; as in CUDA, -1 ends the list. Indices mean the same GPU to CUDA and
    NVML only where all GPUs are alike or CUDA_DEVICE_ORDER is PCI_BUS_ID. Raises ValueError for an unknown entry.
    """
    names = environ.get("CUDA_VISIBLE_DEVICES")
    if names is None:
        return tuple(range(count))
    indices: list[int] = []
    for name in (part.strip() for part in names.split(",") if part.strip()):
        if name == "-1":
            break
        index = _index_of(name, count, uuid_of)
        if index in indices:
            raise ValueError(f"CUDA_VISIBLE_DEVICES names GPU {index} twice: name each GPU once")
        indices.append(index)
    return tuple(indices)


def _index_of(name: str, count: int, uuid_of: Callable[[int], str]) -> int:
    if name.isdecimal():
        found = [int(name)] if int(name) < count else []
    else:
        found = [index for index in range(count) if name.startswith("GPU-") and uuid_of(index).startswith(name)]
    if len(found) != 1:
        raise ValueError(
            f"CUDA_VISIBLE_DEVICES names {name!r}, which is not exactly one of this machine's {count} GPUs: "
            "use an index or a GPU-... UUID from `nvidia-smi -L` (MIG instances are not supported)"
        )
    return found[0]


def _ratio(percent: float) -> float | None:
    return None if math.isnan(percent) else min(1.0, max(0.0, percent / 100))


def _scaled(value: float | None, factor: float) -> float | None:
    return None if value is None else value * factor


class _Gpm:
    """One GPU's GPM counters: two sample buffers that change places, and the ratios between them."""

    def __init__(self, nvml: Any, handle: Any, resources: ExitStack) -> None:
        self._nvml = nvml
        self._handle = handle
        self._older, self._newer = self._buffer(resources), self._buffer(resources)
        self._request = self._new_request()
        self._sampled_at_s: float | None = None
        self._ratios = Ratios()

    def _buffer(self, resources: ExitStack) -> Any:
        sample = self._nvml.nvmlGpmSampleAlloc()
        resources.callback(self._nvml.nvmlGpmSampleFree, sample)
        return sample

    def _new_request(self) -> Any:
        nvml = self._nvml
        ids = (nvml.NVML_GPM_METRIC_SM_UTIL, nvml.NVML_GPM_METRIC_SM_OCCUPANCY, nvml.NVML_GPM_METRIC_DRAM_BW_UTIL)
        request = nvml.c_nvmlGpmMetricsGet_t()
        request.version = nvml.NVML_GPM_METRICS_GET_VERSION
        request.numMetrics = len(ids)
        for metric, metric_id in zip(request.metrics, ids, strict=False):
            metric.metricId = metric_id
        return request

    def read(self, now_s: float) -> Ratios:
        sampled_at_s = self._sampled_at_s
        if sampled_at_s is not None and now_s - sampled_at_s <= UTILIZATION_WINDOW_S:
            return self._ratios
        self._sampled_at_s, self._ratios = None, Ratios()  # after a failure below, nothing older is trusted
        self._nvml.nvmlGpmSampleGet(self._handle, self._newer)
        if sampled_at_s is not None:
            self._ratios = self._between_samples()
        self._older, self._newer = self._newer, self._older
        self._sampled_at_s = now_s
        return self._ratios

    def _between_samples(self) -> Ratios:
        request = self._request
        request.sample1, request.sample2 = self._older, self._newer
        self._nvml.nvmlGpmMetricsGet(request)
        return Ratios(*map(self._metric_ratio, request.metrics[: request.numMetrics]))

    def _metric_ratio(self, metric: Any) -> float | None:
        return _ratio(metric.value) if metric.nvmlReturn == self._nvml.NVML_SUCCESS else None


class _Device:
    """One GPU. A query that it refuses once is not asked again, and its value is None from then on."""

    def __init__(self, nvml: Any, index: int, reserve_bytes: int, resources: ExitStack) -> None:
        self.index = index
        self._nvml = nvml
        self._reserve_bytes = reserve_bytes
        self._refusals = (
            nvml.NVMLError_NotSupported,
            nvml.NVMLError_FunctionNotFound,
            nvml.NVMLError_NoPermission,
            nvml.NVMLLibraryMismatchError,  # pynvml's FunctionNotFound for process lists; not an NVMLError
        )
        self._refused: set[str] = set()
        self._handle = nvml.nvmlDeviceGetHandleByIndex(index)
        support = self._ask("nvmlGpmQueryDeviceSupport")
        has_gpm = support is not None and support.isSupportedDevice
        self._gpm = _Gpm(nvml, self._handle, resources) if has_gpm else None

    @property
    def source(self) -> GpuSource:
        return GpuSource.NVML if self._gpm is None else GpuSource.GPM

    def read(self, now_s: float) -> GpuReading:
        ratios = self._read_ratios(now_s)
        memory = self._nvml.nvmlDeviceGetMemoryInfo(self._handle)
        return GpuReading(
            index=self.index,
            source=self.source,
            sm_ratio=ratios.sm,
            sm_occupancy_ratio=ratios.sm_occupancy,
            dram_bandwidth_ratio=ratios.dram_bandwidth,
            memory_used_bytes=memory.used,
            memory_total_bytes=memory.total,
            memory_reserve_bytes=self._reserve_bytes,
            power_w=_scaled(self._ask("nvmlDeviceGetPowerUsage"), 1e-3),
            temperature_c=_scaled(self._ask("nvmlDeviceGetTemperature", self._nvml.NVML_TEMPERATURE_GPU), 1.0),
            sm_clock_hz=_scaled(self._ask("nvmlDeviceGetClockInfo", self._nvml.NVML_CLOCK_SM), 1e6),
            taken_at_s=now_s,
        )

    def memory_by_pid(self) -> dict[int, int]:
        held: dict[int, int] = {}
        for query in ("nvmlDeviceGetComputeRunningProcesses", _MPS_CLIENTS):
            for process in self._ask(query) or ():
                if process.usedGpuMemory is not None:  # a process in both lists holds its memory once
                    held[process.pid] = max(held.get(process.pid, 0), process.usedGpuMemory)
        return held

    def mps_client_pids(self) -> frozenset[int]:
        return frozenset(process.pid for process in self._ask(_MPS_CLIENTS) or ())

    def _read_ratios(self, now_s: float) -> Ratios:
        if self._gpm is not None:
            try:
                return self._gpm.read(now_s)
            except self._refusals:
                self._gpm = None
        utilization = self._ask("nvmlDeviceGetUtilizationRates")
        return Ratios() if utilization is None else Ratios(sm=_ratio(utilization.gpu))

    def _ask(self, query: str, *arguments: Any) -> Any:
        if query in self._refused:
            return None
        try:
            return getattr(self._nvml, query)(self._handle, *arguments)
        except self._refusals:
            self._refused.add(query)
            return None


class NvmlReader:
    """GPUs through `nvml` (the module pynvml, or a fake of it). `indices` None means all of them.

    `memory_by_pid` names MPS clients one by one. The PIDs are the driver's: inside a container with a PID namespace
    of its own they may be the host's. Raises ReadingError where NVML or a GPU cannot be opened.
    """

    def __init__(self, nvml: Any, indices: Iterable[int] | None, reserve_bytes: int) -> None:
        self._nvml = nvml
        with ExitStack() as resources:
            try:
                nvml.nvmlInit()
                resources.callback(nvml.nvmlShutdown)
                wanted = range(nvml.nvmlDeviceGetCount()) if indices is None else indices
                self._devices = [_Device(nvml, index, reserve_bytes, resources) for index in wanted]
            except nvml.NVMLError as error:
                raise ReadingError(_nvml_sentence("NVML could not be opened", error)) from error
            self._resources = resources.pop_all()

    @property
    def sources(self) -> dict[int, GpuSource]:
        """Who measures `sm_ratio`, by GPU index."""
        return {device.index: device.source for device in self._devices}

    def read(self, now_s: float) -> tuple[GpuReading, ...]:
        readings: list[GpuReading] = []
        failures: dict[int, Exception] = {}
        for device in self._devices:
            try:
                readings.append(device.read(now_s))
            except self._nvml.NVMLError as error:
                failures[device.index] = error
        if failures:
            index, cause = failures.popitem()
            raise ReadingError(_nvml_sentence(f"GPU {index} could not be read", cause), tuple(readings)) from cause
        return tuple(readings)

    def memory_by_pid(self) -> dict[int, int]:
        total: Counter[int] = Counter()
        for held in self._of_each(_Device.memory_by_pid):
            total.update(held)
        return dict(total)

    def mps_client_pids(self) -> frozenset[int]:
        return frozenset().union(*self._of_each(_Device.mps_client_pids))

    def _of_each(self, ask: Callable[[_Device], T]) -> Iterator[T]:
        for device in self._devices:
            try:
                yield ask(device)
            except self._nvml.NVMLError as error:
                raise ReadingError(_nvml_sentence(f"GPU {device.index}'s clients are unknown", error)) from error

    def close(self) -> None:
        self._resources.close()


def _nvml_sentence(what: str, error: Exception) -> str:
    return f"{what} because NVML answers '{error}': mend what `nvidia-smi` and the kernel log show, then restart"


class HostReader:
    """The host in a GPU's place: CPU utilization as `sm_ratio`, the machine's memory, the RSS of each of `pids()`.

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
            ratio = _ratio(self._host.cpu_percent(None))
            self._cpu_ratio = None if read_at_s is None else ratio  # the first call has no interval: always 0.0
            self._cpu_read_at_s = now_s
        return self._cpu_ratio

    def memory_by_pid(self) -> dict[int, int]:
        held: dict[int, int] = {}
        for pid in self._pids():
            try:
                held[pid] = self._host.Process(pid).memory_info().rss
            except self._host.NoSuchProcess:
                continue  # it ended between being named and being asked: it holds nothing
            except self._host.AccessDenied as error:
                raise ReadingError(f"Process {pid} may not be read: run as its owner or as root") from error
        return held

    def mps_client_pids(self) -> frozenset[int]:
        return frozenset()

    def close(self) -> None:
        """Nothing is held."""


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
        raise ReadingError(_nvml_sentence("NVML could not be opened", error)) from error
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
