"""GPUs through NVML. SM utilization comes from GPM counters where the GPU has them (Hopper and newer):
https://docs.nvidia.com/deploy/nvml-api/group__nvmlGpmFunctions.html
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from typing import Any, NamedTuple, TypeVar

from balancer.readings import GpuReading, GpuSource
from monitoring.reader import UTILIZATION_WINDOW_S, ReadingError, ratio

_MPS_CLIENTS = "nvmlDeviceGetMPSComputeRunningProcesses"

T = TypeVar("T")


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
        return ratio(metric.value) if metric.nvmlReturn == self._nvml.NVML_SUCCESS else None


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
        return Ratios() if utilization is None else Ratios(sm=ratio(utilization.gpu))

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
                raise ReadingError(nvml_sentence("NVML could not be opened", error)) from error
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
            raise ReadingError(nvml_sentence(f"GPU {index} could not be read", cause), tuple(readings)) from cause
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
                raise ReadingError(nvml_sentence(f"GPU {device.index}'s clients are unknown", error)) from error

    def close(self) -> None:
        self._resources.close()


def nvml_sentence(what: str, error: Exception) -> str:
    return f"{what} because NVML answers '{error}': mend what `nvidia-smi` and the kernel log show, then restart"
