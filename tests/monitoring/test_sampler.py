"""The readers and the sampling loop, against an NVML that fails in the ways the real one does."""

from __future__ import annotations

import ctypes
import itertools
import logging
import threading
from collections import Counter
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import psutil
import pynvml  # type: ignore[import-untyped]
import pytest

from balancer.readings import GpuReading, GpuSource
from monitoring.sampler import HostReader, NvmlReader, ReadingError, Sampler, open_reader, visible_indices

GIB = 1 << 30
LOG = logging.getLogger("test_sampler")
UUIDS = ("GPU-aaaa-1", "GPU-aabb-2", "GPU-cccc-3")


class FakeNvml:
    """pynvml without a driver: its own structs and errors, made-up answers, and per function an error to raise."""

    def __init__(self, gpus: int = 1, gpm: bool = True) -> None:
        self.fails: dict[str, type[Exception]] = {}
        self.calls: Counter[str] = Counter()
        self.samples: dict[int, int] = {}  # address of each live buffer -> when it was filled (0: never)
        self.tick = itertools.count(1)
        self.percent = {2: 14.0, 3: 7.0, 10: 50.0}
        self.answers: dict[str, Callable[..., Any]] = {
            "nvmlInit": lambda: None,
            "nvmlShutdown": lambda: None,
            "nvmlDeviceGetCount": lambda: gpus,
            "nvmlDeviceGetHandleByIndex": lambda index: index,
            "nvmlDeviceGetUUID": lambda gpu: UUIDS[gpu],
            "nvmlDeviceGetMemoryInfo": lambda gpu: SimpleNamespace(used=20 * GIB, total=140 * GIB),
            "nvmlDeviceGetUtilizationRates": lambda gpu: SimpleNamespace(gpu=99, memory=3),
            "nvmlDeviceGetPowerUsage": lambda gpu: 350_500,
            "nvmlDeviceGetTemperature": lambda gpu, sensor: 41,
            "nvmlDeviceGetClockInfo": lambda gpu, clock: 1980,
            "nvmlDeviceGetComputeRunningProcesses": lambda gpu: [],
            "nvmlDeviceGetMPSComputeRunningProcesses": lambda gpu: [],
            "nvmlGpmQueryDeviceSupport": lambda gpu: SimpleNamespace(isSupportedDevice=int(gpm)),
            "nvmlGpmSampleAlloc": self.alloc,
            "nvmlGpmSampleFree": lambda sample: self.samples.pop(address(sample)),
            "nvmlGpmSampleGet": lambda gpu, sample: self.samples.update({address(sample): next(self.tick)}),
            "nvmlGpmMetricsGet": self.metrics,
        }

    def __getattr__(self, name: str) -> Any:
        return partial(self.call, name) if name.startswith("nvml") else getattr(pynvml, name)

    def call(self, name: str, *arguments: Any) -> Any:
        self.calls[name] += 1
        if name in self.fails:
            raise self.fails[name]
        return self.answers[name](*arguments)

    def alloc(self) -> Any:
        sample = pynvml.c_nvmlGpmSample_t(pynvml.struct_c_nvmlGpmSample_t())
        self.samples[address(sample)] = 0
        return sample

    def metrics(self, request: Any) -> None:
        older, newer = self.samples[address(request.sample1)], self.samples[address(request.sample2)]
        if request.version != 1 or not 0 < older < newer:
            raise pynvml.NVMLError_InvalidArgument
        for metric in request.metrics[: request.numMetrics]:
            metric.value, metric.nvmlReturn = self.percent[metric.metricId], 0


def lose(nvml: FakeNvml, is_lost: Callable[[int], bool]) -> None:
    """From now on the GPUs for which `is_lost(index)` fail as lost ones do."""
    memory_of = nvml.answers["nvmlDeviceGetMemoryInfo"]

    def memory(gpu: int) -> Any:
        if is_lost(gpu):
            raise pynvml.NVMLError_GpuIsLost
        return memory_of(gpu)

    nvml.answers["nvmlDeviceGetMemoryInfo"] = memory


def sessions(nvml: FakeNvml) -> int:
    return nvml.calls["nvmlInit"] - nvml.calls["nvmlShutdown"]


def address(sample: Any) -> int:
    return ctypes.addressof(sample.contents)


def process(pid: int, used_bytes: int | None) -> Any:
    return SimpleNamespace(pid=pid, usedGpuMemory=used_bytes)


def reader_of(nvml: FakeNvml) -> NvmlReader:
    return NvmlReader(nvml, None, 2 * GIB)


def ratios(reading: GpuReading) -> tuple[float | None, float | None, float | None]:
    return reading.sm_ratio, reading.sm_occupancy_ratio, reading.dram_bandwidth_ratio


def test_a_gpm_reading_carries_every_value_in_the_units_of_its_name() -> None:
    reader = reader_of(FakeNvml())
    reader.read(10.0)
    assert reader.read(10.2) == (
        GpuReading(
            index=0,
            source=GpuSource.GPM,
            sm_ratio=0.14,
            sm_occupancy_ratio=0.07,
            dram_bandwidth_ratio=0.5,
            memory_used_bytes=20 * GIB,
            memory_total_bytes=140 * GIB,
            memory_reserve_bytes=2 * GIB,
            power_w=350.5,
            temperature_c=41.0,
            sm_clock_hz=1.98e9,
            taken_at_s=10.2,
        ),
    )


def test_the_first_gpm_reading_has_memory_but_no_ratios_because_a_pair_needs_two_samples() -> None:
    (reading,) = reader_of(FakeNvml()).read(0.0)
    assert ratios(reading) == (None, None, None)
    assert (reading.source, reading.memory_used_bytes) == (GpuSource.GPM, 20 * GIB)


def test_gpm_is_sampled_only_once_its_counters_have_refreshed_and_each_pair_starts_where_the_last_ended() -> None:
    nvml = FakeNvml()
    reader = reader_of(nvml)
    for step in range(13):  # 0.48 s at 25 Hz: samples at 0, 0.12, 0.24, 0.36 and 0.48 s
        reader.read(step * 0.04)
    assert (nvml.calls["nvmlGpmSampleGet"], nvml.calls["nvmlGpmMetricsGet"]) == (5, 4)
    assert sorted(nvml.samples.values()) == [4, 5]
    assert nvml.calls["nvmlDeviceGetMemoryInfo"] == 13


def test_between_two_gpm_samples_the_ratios_of_the_last_pair_stand() -> None:
    nvml = FakeNvml()
    reader = reader_of(nvml)
    reader.read(0.0)
    (measured,) = reader.read(0.15)
    nvml.percent = {2: 90.0, 3: 90.0, 10: 90.0}
    (held,) = reader.read(0.19)
    (renewed,) = reader.read(0.3)
    assert ratios(held) == ratios(measured)
    assert renewed.sm_ratio == 0.9


@pytest.mark.parametrize(("percent", "ratio"), [(100.4, 1.0), (-0.1, 0.0), (float("nan"), None)])
def test_a_counter_slightly_out_of_range_is_brought_back_and_an_undefined_one_is_none(
    percent: float, ratio: float | None
) -> None:
    nvml = FakeNvml()
    nvml.percent[2] = percent
    reader = reader_of(nvml)
    reader.read(0.0)
    assert reader.read(1.0)[0].sm_ratio == ratio


def test_one_metric_that_gpm_cannot_give_is_none_and_leaves_the_others() -> None:
    nvml = FakeNvml()

    def only_sm(request: Any) -> None:
        nvml.metrics(request)
        request.metrics[2].nvmlReturn = pynvml.NVML_ERROR_NOT_SUPPORTED

    nvml.answers["nvmlGpmMetricsGet"] = only_sm
    reader = reader_of(nvml)
    reader.read(0.0)
    assert ratios(reader.read(1.0)[0]) == (0.14, 0.07, None)


@pytest.mark.parametrize("error", [None, pynvml.NVMLError_NotSupported, pynvml.NVMLError_FunctionNotFound])
def test_without_gpm_the_weaker_utilization_is_read_and_named_as_such(error: type[Exception] | None) -> None:
    nvml = FakeNvml(gpm=False)
    if error is not None:
        nvml.fails["nvmlGpmQueryDeviceSupport"] = error
    reader = reader_of(nvml)
    (reading,) = reader.read(0.0)
    assert reader.sources == {0: GpuSource.NVML}
    assert (reading.source, *ratios(reading)) == (GpuSource.NVML, 0.99, None, None)
    assert nvml.samples == {}


def test_a_gpu_that_claims_gpm_and_then_refuses_a_sample_falls_back_for_good() -> None:
    nvml = FakeNvml()
    nvml.fails["nvmlGpmSampleGet"] = pynvml.NVMLError_NotSupported
    reader = reader_of(nvml)
    found = [reader.read(now_s)[0] for now_s in (0.0, 1.0)]
    assert [(reading.source, reading.sm_ratio) for reading in found] == [(GpuSource.NVML, 0.99)] * 2
    assert nvml.calls["nvmlGpmSampleGet"] == 1
    reader.close()
    assert nvml.samples == {}


@pytest.mark.parametrize(
    ("query", "value"),
    [
        ("nvmlDeviceGetPowerUsage", "power_w"),
        ("nvmlDeviceGetTemperature", "temperature_c"),
        ("nvmlDeviceGetClockInfo", "sm_clock_hz"),
        ("nvmlDeviceGetUtilizationRates", "sm_ratio"),
    ],
)
@pytest.mark.parametrize("error", [pynvml.NVMLError_NotSupported, pynvml.NVMLError_NoPermission])
def test_a_refused_query_gives_none_for_its_value_alone_and_is_not_asked_again(
    query: str, value: str, error: type[Exception]
) -> None:
    nvml = FakeNvml(gpm=False)
    nvml.fails[query] = error
    reader = reader_of(nvml)
    reader.read(0.0)
    (reading,) = reader.read(1.0)
    optional = ("power_w", "temperature_c", "sm_clock_hz", "sm_ratio")
    assert [name for name in optional if getattr(reading, name) is None] == [value]
    assert nvml.calls[query] == 1


def test_a_lost_gpu_is_one_sentence_and_does_not_hide_the_other_gpus_reading() -> None:
    nvml = FakeNvml(gpus=2)
    reader = reader_of(nvml)
    lose(nvml, lambda gpu: gpu == 0)
    with pytest.raises(ReadingError, match="GPU 0 could not be read because NVML answers 'GPU is lost'") as caught:
        reader.read(0.0)
    assert [reading.index for reading in caught.value.readings] == [1]
    assert "\n" not in str(caught.value)


def test_after_a_failed_gpm_sample_no_ratio_spans_the_gap() -> None:
    nvml = FakeNvml()
    reader = reader_of(nvml)
    reader.read(0.0)
    reader.read(1.0)
    nvml.fails["nvmlGpmSampleGet"] = pynvml.NVMLError_Timeout
    with pytest.raises(ReadingError, match="Timeout"):
        reader.read(2.0)
    nvml.fails.clear()
    assert ratios(reader.read(3.0)[0]) == (None, None, None)
    assert reader.read(4.0)[0].sm_ratio == 0.14


def test_memory_by_pid_names_mps_clients_and_others_once_each_and_leaves_out_the_unknown() -> None:
    nvml = FakeNvml()
    nvml.answers["nvmlDeviceGetComputeRunningProcesses"] = lambda gpu: [
        process(1, 30),
        process(2, 500),
        process(3, None),
    ]
    nvml.answers["nvmlDeviceGetMPSComputeRunningProcesses"] = lambda gpu: [process(2, 500), process(4, 700)]
    assert reader_of(nvml).memory_by_pid() == {1: 30, 2: 500, 4: 700}


def test_a_process_on_two_gpus_holds_the_sum() -> None:
    nvml = FakeNvml(gpus=2)
    nvml.answers["nvmlDeviceGetMPSComputeRunningProcesses"] = lambda gpu: [process(7, 100)]
    assert reader_of(nvml).memory_by_pid() == {7: 200}


def test_empty_process_lists_are_no_clients() -> None:
    assert reader_of(FakeNvml()).memory_by_pid() == {}
    assert reader_of(FakeNvml()).mps_client_pids() == frozenset()


def test_a_client_of_two_gpus_is_one_client_and_a_process_outside_mps_none() -> None:
    nvml = FakeNvml(gpus=2)
    nvml.answers["nvmlDeviceGetComputeRunningProcesses"] = lambda gpu: [process(1, 30)]
    nvml.answers["nvmlDeviceGetMPSComputeRunningProcesses"] = lambda gpu: [process(7, 100), process(8 + gpu, None)]
    assert reader_of(nvml).mps_client_pids() == {7, 8, 9}


def test_a_list_of_mps_clients_that_fails_is_an_error_and_not_an_empty_list() -> None:
    nvml = FakeNvml()
    nvml.fails["nvmlDeviceGetMPSComputeRunningProcesses"] = pynvml.NVMLError_GpuIsLost
    with pytest.raises(ReadingError, match="GPU 0's clients are unknown"):
        reader_of(nvml).mps_client_pids()


def test_a_driver_too_old_for_one_process_list_still_gives_the_other() -> None:
    nvml = FakeNvml()
    nvml.answers["nvmlDeviceGetComputeRunningProcesses"] = lambda gpu: [process(1, 30)]
    nvml.fails["nvmlDeviceGetMPSComputeRunningProcesses"] = pynvml.NVMLLibraryMismatchError
    assert reader_of(nvml).memory_by_pid() == {1: 30}


def test_a_process_list_that_fails_is_an_error_and_not_an_empty_list() -> None:
    nvml = FakeNvml()
    nvml.fails["nvmlDeviceGetComputeRunningProcesses"] = pynvml.NVMLError_GpuIsLost
    with pytest.raises(ReadingError, match="GPU 0's clients are unknown"):
        reader_of(nvml).memory_by_pid()


def test_close_frees_both_buffers_of_each_gpu_and_the_session_and_may_be_repeated() -> None:
    nvml = FakeNvml(gpus=2)
    reader = reader_of(nvml)
    assert (len(nvml.samples), sessions(nvml)) == (4, 1)
    reader.close()
    reader.close()
    assert (nvml.samples, sessions(nvml)) == ({}, 0)


def test_a_reader_that_cannot_be_opened_leaves_nothing_held() -> None:
    nvml = FakeNvml(gpus=2)
    nvml.fails["nvmlGpmQueryDeviceSupport"] = pynvml.NVMLError_Unknown
    with pytest.raises(ReadingError, match="NVML could not be opened"):
        reader_of(nvml)
    assert (nvml.samples, sessions(nvml)) == ({}, 0)


@pytest.mark.parametrize(
    ("names", "indices"),
    [
        (None, (0, 1, 2)),
        ("", ()),
        ("2, 0", (2, 0)),
        ("1,-1,0", (1,)),
        ("-1", ()),
        ("GPU-cccc-3,GPU-aaaa", (2, 0)),
        ("GPU-c,1", (2, 1)),
    ],
)
def test_visible_gpus_are_those_cuda_shows_in_its_order(names: str | None, indices: tuple[int, ...]) -> None:
    environ = {} if names is None else {"CUDA_VISIBLE_DEVICES": names}
    assert visible_indices(environ, 3, UUIDS.__getitem__) == indices


@pytest.mark.parametrize("names", ["3", "GPU-aa", "GPU-dddd", "MIG-aaaa", "first", "0,GPU-aaaa-1", "1,1"])
def test_an_entry_that_names_no_gpu_two_gpus_or_one_twice_is_refused_with_the_mend(names: str) -> None:
    with pytest.raises(ValueError, match=r"CUDA_VISIBLE_DEVICES names .*: (use an index|name each GPU once)"):
        visible_indices({"CUDA_VISIBLE_DEVICES": names}, 3, UUIDS.__getitem__)


class FakeHost:
    """psutil with set answers; the first cpu_percent is 0.0, as the real one's."""

    NoSuchProcess, AccessDenied = psutil.NoSuchProcess, psutil.AccessDenied

    def __init__(self) -> None:
        self.cpu = itertools.chain([0.0], itertools.count(25.0))
        self.rss: dict[int, int | Exception] = {}

    def cpu_percent(self, interval: None) -> float:
        return next(self.cpu)

    def virtual_memory(self) -> Any:
        return SimpleNamespace(total=16 * GIB, available=12 * GIB, used=3 * GIB)

    def Process(self, pid: int) -> Any:  # noqa: N802  psutil's name
        rss = self.rss[pid]
        if isinstance(rss, Exception):
            raise rss
        return SimpleNamespace(memory_info=lambda: SimpleNamespace(rss=rss + 50, shared=50))


def test_the_host_stands_in_with_cpu_utilization_that_is_unknown_until_its_first_window_closes() -> None:
    reader = HostReader(FakeHost(), tuple, GIB)
    found = [reader.read(now_s)[0] for now_s in (0.0, 0.04, 0.12, 0.16, 0.24)]
    assert [reading.sm_ratio for reading in found] == [None, None, 0.25, 0.25, 0.26]
    assert {reading.source for reading in found} == {GpuSource.HOST}
    assert (found[0].memory_used_bytes, found[0].memory_total_bytes) == (4 * GIB, 16 * GIB)
    assert (found[0].sm_occupancy_ratio, found[0].dram_bandwidth_ratio, found[0].power_w) == (None, None, None)


def test_the_hosts_clients_are_the_named_processes_that_still_live_each_with_what_nobody_shares() -> None:
    host = FakeHost()
    host.rss = {11: 300, 12: psutil.NoSuchProcess(12)}
    assert HostReader(host, lambda: (11, 12), 0).memory_by_pid() == {11: 300}


def test_a_process_that_may_not_be_read_is_an_error_and_not_zero_bytes() -> None:
    host = FakeHost()
    host.rss = {11: psutil.AccessDenied(11)}
    with pytest.raises(ReadingError, match="Process 11 may not be read"):
        HostReader(host, lambda: (11,), 0).memory_by_pid()


def test_the_real_psutil_answers_in_the_shape_the_host_reader_expects() -> None:
    me = psutil.Process().pid
    reader = HostReader(psutil, lambda: (me,), 0)
    (reading,) = reader.read(0.0)
    (later,) = reader.read(1.0)
    assert 0 < reading.memory_used_bytes < reading.memory_total_bytes
    assert later.sm_ratio is not None
    assert 0.0 <= later.sm_ratio <= 1.0
    assert reader.memory_by_pid()[me] > 1 << 20


def opened(nvml: FakeNvml, environ: dict[str, str] | None = None) -> Any:
    return open_reader(GIB, LOG, nvml=nvml, host=FakeHost(), environ=environ or {})


@pytest.mark.parametrize("error", [pynvml.NVMLError_LibraryNotFound, pynvml.NVMLError_DriverNotLoaded])
def test_without_a_driver_the_host_is_read_and_one_log_line_says_why(
    error: type[Exception], caplog: pytest.LogCaptureFixture
) -> None:
    nvml = FakeNvml()
    nvml.fails["nvmlInit"] = error
    with caplog.at_level(logging.INFO):
        reader = opened(nvml)
    assert reader.read(0.0)[0].source is GpuSource.HOST
    assert [record.getMessage() for record in caplog.records] == [
        f"Reading the host's CPUs and memory in a GPU's place because NVML answers '{error()}'"
    ]


def test_hidden_gpus_mean_the_host(caplog: pytest.LogCaptureFixture) -> None:
    nvml = FakeNvml()
    with caplog.at_level(logging.INFO):
        reader = opened(nvml, {"CUDA_VISIBLE_DEVICES": ""})
    assert reader.read(0.0)[0].source is GpuSource.HOST
    assert "no GPU is visible" in caplog.text
    assert sessions(nvml) == 0


@pytest.mark.parametrize(("gpm", "words"), [(True, "SM utilization from GPM"), (False, "without GPM")])
def test_with_a_driver_the_visible_gpus_are_read_and_one_log_line_names_the_source(
    gpm: bool, words: str, caplog: pytest.LogCaptureFixture
) -> None:
    nvml = FakeNvml(gpus=3, gpm=gpm)
    with caplog.at_level(logging.INFO):
        reader = opened(nvml, {"CUDA_VISIBLE_DEVICES": "GPU-cccc-3"})
    assert [reading.index for reading in reader.read(0.0)] == [2]
    assert len(caplog.records) == 1
    assert words in caplog.text
    reader.close()
    assert sessions(nvml) == 0


def test_a_broken_driver_is_an_error_and_not_a_reason_to_read_the_host() -> None:
    nvml = FakeNvml()
    nvml.fails["nvmlInit"] = pynvml.NVMLError_LibRmVersionMismatch
    with pytest.raises(ReadingError, match="NVML could not be opened because NVML answers 'RM has detected"):
        opened(nvml)


class Rounds(threading.Event):
    """A stop event whose waits move a clock on, each listed, and which sets itself after `count` of them."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count, self.now_s = count, 0.0
        self.waits: list[float] = []

    def wait(self, timeout: float | None = None) -> bool:
        self.waits.append(timeout or 0.0)
        self.now_s += timeout or 0.0
        if len(self.waits) == self.count:
            self.set()
        return self.is_set()


def never(reading: GpuReading) -> None:
    pytest.fail("nothing was to be written")


def test_the_loop_writes_and_records_each_reading_at_its_period() -> None:
    stop = Rounds(4)
    written: list[GpuReading] = []
    recorded: list[GpuReading] = []
    reader = reader_of(FakeNvml())
    Sampler(reader, written.append, lambda: stop.now_s, 0.04, recorded.append).run(stop)
    assert [reading.taken_at_s for reading in written] == pytest.approx([0.0, 0.04, 0.08, 0.12])
    assert recorded == written


def test_the_time_a_round_took_is_taken_off_the_wait_and_never_waits_below_zero() -> None:
    stop = Rounds(3)
    took_s = iter([0.01, 0.03, 0.5])

    def slow_write(reading: GpuReading) -> None:
        stop.now_s += next(took_s)

    Sampler(reader_of(FakeNvml()), slow_write, lambda: stop.now_s, 0.04).run(stop)
    assert stop.waits == pytest.approx([0.03, 0.01, 0.0])


def test_a_gpu_lost_mid_way_is_counted_nothing_is_written_for_it_and_the_loop_goes_on() -> None:
    stop = Rounds(5)
    nvml = FakeNvml(gpus=2)
    written: list[tuple[int, float]] = []
    sampler = Sampler(
        reader_of(nvml), lambda reading: written.append((reading.index, reading.taken_at_s)), lambda: stop.now_s, 1.0
    )
    losses = {0.0: set[int](), 1.0: {0}, 2.0: {0, 1}, 3.0: {0}, 4.0: set[int]()}
    lose(nvml, lambda gpu: gpu in losses[stop.now_s])
    sampler.run(stop)
    assert written == [(0, 0.0), (1, 0.0), (1, 1.0), (1, 3.0), (0, 4.0), (1, 4.0)]
    assert (sampler.rounds_total, sampler.errors_total, sampler.last_error) == (5, 3, None)


def test_the_last_error_is_kept_in_words_while_it_lasts() -> None:
    nvml = FakeNvml()
    sampler = Sampler(reader_of(nvml), never, lambda: 0.0)
    lose(nvml, lambda gpu: gpu == 0)
    sampler.sample()
    assert "GPU is lost" in (sampler.last_error or "")


def test_an_error_of_the_writer_is_not_taken_for_a_failed_reading() -> None:
    def full(reading: GpuReading) -> None:
        raise OSError("board is gone")

    sampler = Sampler(reader_of(FakeNvml()), full)
    with pytest.raises(OSError, match="board is gone"):
        sampler.run(threading.Event())
    assert sampler.errors_total == 0


def test_a_sampler_in_a_thread_ends_when_told_to() -> None:
    stop, wrote = threading.Event(), threading.Event()
    sampler = Sampler(reader_of(FakeNvml()), lambda reading: wrote.set(), period_s=30.0)
    thread = threading.Thread(target=sampler.run, args=(stop,))
    thread.start()
    try:
        assert wrote.wait(10)
    finally:
        stop.set()
        thread.join(10)
    assert not thread.is_alive()
    assert sampler.rounds_total == 1


@pytest.mark.parametrize("period_s", [0.0, -0.04, float("nan")])
def test_a_period_that_is_no_period_is_refused(period_s: float) -> None:
    with pytest.raises(ValueError, match="needs a period above 0 s"):
        Sampler(reader_of(FakeNvml()), never, period_s=period_s)
