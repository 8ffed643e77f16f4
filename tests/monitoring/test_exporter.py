"""The exporter: what it shows of a board, that its series are constant, and its HTTP side."""

from __future__ import annotations

import math
import os
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, Gauge
from prometheus_client.parser import text_string_to_metric_families

from balancer import board as board_module
from balancer.board import Board
from balancer.counters import CHOICES, RouterCounters, counters_path
from balancer.ledger import ENDS, End, Page
from balancer.readings import GpuSource, ReplicaReading, ReplicaState, Snapshot
from monitoring import metrics
from monitoring.exporter import Exporter
from monitoring.exposition import MpsView, SharedWeights
from monitoring.lives import LifeWatch
from tests.monitoring.stand_in_node import GIB, TAGS, gpu_reading, node, replica_id

Series = dict[tuple[str, frozenset[tuple[str, str]]], float]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "board"


@pytest.fixture
def exporter(path: Path) -> Iterator[Exporter]:
    made = Exporter(path, desired=2, slots=4)
    yield made
    made.close()


def series(text: bytes) -> Series:
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text.decode())
        for sample in family.samples
    }


def value(found: Series, name: str, **labels: str) -> float:
    return found[f"splitwiser_{name}", frozenset(labels.items())]


def keys(found: Series) -> set[tuple[str, frozenset[tuple[str, str]]]]:
    """Without the info metrics, whose labels tell which replica is there."""
    return {(name, labels) for name, labels in found if not name.endswith("_info")}


def test_it_exports_the_declared_set_and_nothing_else(path: Path, exporter: Exporter) -> None:
    """Names, types, help and label names are those of monitoring.metrics."""
    with node(path):
        families = {f.name: f for f in text_string_to_metric_families(exporter.scrape().decode())}
    declared = {
        m.name.removesuffix("_total") if m.kind is metrics.Kind.COUNTER else m.name: m for m in metrics.DECLARED
    }
    assert set(families) == set(declared)
    for name, family in families.items():
        assert (family.type, family.documentation) == (declared[name].kind, declared[name].help), name
        labels = {label for sample in family.samples for label in sample.labels} - {"le"}
        assert labels == set(declared[name].labels), name


def test_label_values_come_from_the_closed_sets(path: Path, exporter: Exporter) -> None:
    """Whatever happens, a label takes no other value."""
    with node(path):
        found = series(exporter.scrape())
    for _, labels in found:
        for label, text in labels:
            assert label not in metrics.LABEL_VALUES or text in metrics.LABEL_VALUES[label]


def test_the_series_are_the_same_with_no_board_an_empty_one_and_a_busy_one(path: Path, exporter: Exporter) -> None:
    """Every combination is there from the first scrape on, so that rates see the first event."""
    without = series(exporter.scrape())
    board = Board.open(path)
    empty = series(exporter.scrape())
    with node(path):
        busy = series(exporter.scrape())
    board.close()
    assert keys(without) == keys(empty) == keys(busy)
    assert len(without) == len(empty) == len(busy)
    assert value(without, "board_up") == 0
    assert value(busy, "board_up") == 1


def test_looking_makes_no_board(path: Path, exporter: Exporter) -> None:
    """An exporter that comes first must not be taken for the system."""
    exporter.scrape()
    assert not path.exists()
    assert not counters_path(path).exists()


def test_a_replicas_slot_is_shown_in_base_units(path: Path, exporter: Exporter) -> None:
    """Blocks become tokens; the state is one of five flags; the id is the short one that Ray and vLLM use."""
    with node(path):
        found = series(exporter.scrape())
    assert value(found, "replica_info", slot="1", replica=TAGS[1], gpu="0") == 1
    assert value(found, "replica_state", slot="1", state="ready") == 1
    assert value(found, "replica_state", slot="1", state="starting") == 0
    assert value(found, "replica_kv_used_tokens", slot="1") == 250 * 16
    assert value(found, "replica_kv_size_tokens", slot="1") == 1000 * 16
    assert value(found, "replica_step_seconds", slot="1") == pytest.approx(0.0135)
    assert value(found, "replica_gpu_memory_bytes", slot="1") == 20 * GIB
    assert value(found, "replica_in_flight_requests", slot="0") == 6
    assert value(found, "replica_output_tokens_total", slot="0") == 1000
    assert value(found, "replica_active", slot="0") == 1
    assert 0 <= value(found, "replica_reading_age_seconds", slot="0") < 60


def test_an_empty_slot_holds_nothing_and_has_no_age(path: Path, exporter: Exporter) -> None:
    """Zeros add nothing to a sum; an age of 0 would be a lie."""
    with node(path):
        found = series(exporter.scrape())
    assert value(found, "replica_state", slot="3", state="empty") == 1
    assert value(found, "replica_info", slot="3", replica="", gpu="") == 1
    assert value(found, "replica_running_requests", slot="3") == 0
    assert math.isnan(value(found, "replica_reading_age_seconds", slot="3"))


def test_what_a_gpu_cannot_tell_is_nan_and_its_source_is_named(path: Path, exporter: Exporter) -> None:
    """A host in a GPU's place has no power draw; 0 W would look like a measurement."""
    board = Board.open(path)
    board.gpu_writer(0).publish(gpu_reading(source=GpuSource.HOST, power_w=None, sm_occupancy_ratio=None))
    found = series(exporter.scrape())
    board.close()
    assert value(found, "gpu_source", gpu="0", source="host") == 1
    assert value(found, "gpu_source", gpu="0", source="gpm") == 0
    assert value(found, "gpu_sm_ratio", gpu="0") == 0.75
    assert math.isnan(value(found, "gpu_power_watts", gpu="0"))
    assert math.isnan(value(found, "gpu_sm_occupancy_ratio", gpu="0"))


def test_a_slot_beyond_those_configured_is_shown_when_it_is_used(path: Path) -> None:
    """A replica that replaces another while that one drains takes a further slot."""
    exporter = Exporter(path, desired=1, slots=1)
    with node(path):
        found = series(exporter.scrape())
    exporter.close()
    assert value(found, "replica_state", slot="1", state="ready") == 1
    assert value(found, "replicas_desired") == 1


def test_counters_equal_the_routers_ledger_to_the_unit(path: Path, exporter: Exporter) -> None:
    """What two routers counted, over slots, policies and reasons, is what is exported."""
    board = Board.open(path)
    routers = [RouterCounters.open(path, board.claim_row().index) for _ in range(2)]
    ledger = {(slot, choice): 3 * slot + n for slot in range(4) for n, choice in enumerate(CHOICES)}
    for (slot, choice), count in ledger.items():
        for number in range(count):
            routers[number % 2].count_decision(slot, *choice, 30e-6)
    for router in routers:
        router.count_rejection("queue_deadline")
        router.count_ejection("stale")
        router.count_lost(2)
        router.count_cancelled()
        router.set_queue(3)
        router.publish(1.0)
    found = series(exporter.scrape())
    for (slot, (policy, reason)), count in ledger.items():
        assert value(found, "router_decisions_total", slot=str(slot), policy=policy, reason=reason) == count
    assert value(found, "router_decision_seconds_count") == sum(ledger.values())
    assert value(found, "router_decision_seconds_sum") == pytest.approx(30e-6 * sum(ledger.values()))
    assert value(found, "router_rejections_total", reason="queue_deadline") == 2
    assert value(found, "router_rejections_total", reason="queue_full") == 0
    assert value(found, "router_ejections_total", reason="stale") == 2
    assert value(found, "router_lost_total") == 4
    assert value(found, "router_cancelled_total") == 2
    assert value(found, "router_queue_requests") == 6
    assert value(found, "routers") == 2
    for router in routers:
        router.leave()
    board.close()


def test_buckets_are_cumulative_and_end_with_all(path: Path, exporter: Exporter) -> None:
    """Prometheus' histogram: each bucket holds all that is not longer than its bound."""
    counters = RouterCounters.open(path, 0)
    for seconds in (0.0005, 0.02, 0.02, 100.0):
        counters.observe_wait(seconds)
    counters.publish(1.0)
    found = series(exporter.scrape())
    counters.leave()
    bounds = ("0.001", "0.01", "0.05", "60.0", "+Inf")
    assert [value(found, "router_wait_seconds_bucket", le=bound) for bound in bounds] == [1, 1, 3, 3, 4]


def test_a_torn_slot_keeps_its_last_whole_reading(path: Path, exporter: Exporter) -> None:
    """A counter that fell to 0 and came back would be counted twice by Prometheus; its age tells that it is old."""
    with node(path) as made:
        exporter.scrape()
        at = board_module._SLOT_AT // 8
        made.board._words[at] += 1
        found = series(exporter.scrape())
        assert value(found, "board_torn_slots") == 1
        assert value(found, "replica_output_tokens_total", slot="0") == 1000
        assert value(found, "replica_state", slot="0", state="ready") == 1
        made.board._words[at] += 1
        assert value(series(exporter.scrape()), "board_torn_slots") == 0


def test_a_new_board_in_the_old_ones_place_is_followed(path: Path, exporter: Exporter) -> None:
    """After the system was restarted, the exporter of a node shows the new one."""
    with node(path):
        assert value(series(exporter.scrape()), "replica_state", slot="0", state="ready") == 1
    assert value(series(exporter.scrape()), "replica_state", slot="0", state="empty") == 1
    with node(path):
        assert value(series(exporter.scrape()), "replica_state", slot="0", state="ready") == 1


def test_mps_is_shown_as_the_device_manager_sees_it(path: Path) -> None:
    """The view is asked for at every scrape."""
    views = iter([MpsView(), MpsView(wanted=True, up=True, clients=4, faults=2)])
    exporter = Exporter(path, desired=1, slots=1, mps=lambda: next(views))
    before, after = series(exporter.scrape()), series(exporter.scrape())
    exporter.close()
    names = ("mps_wanted", "mps_up", "mps_clients", "mps_faults_total")
    assert [value(before, name) for name in names] == [0, 0, 0, 0]
    assert [value(after, name) for name in names] == [1, 1, 4, 2]


def test_shared_weights_are_shown_once_for_the_gpu_and_for_each_replica_that_maps_them(path: Path) -> None:
    """A replica with weights of its own maps none."""
    copies: list[SharedWeights] = []
    with node(path):
        exporter = Exporter(path, desired=2, slots=4, weights=lambda: copies)
        before = series(exporter.scrape())
        copies.append(SharedWeights(0, 16 * GIB, frozenset({os.getpid()})))
        after = series(exporter.scrape())
        copies[0] = SharedWeights(0, 16 * GIB, frozenset({1}))
        alone = series(exporter.scrape())
        exporter.close()
    name = "replica_shared_weights_bytes"
    assert [value(f, "gpu_shared_weights_bytes", gpu="0") for f in (before, after, alone)] == [0, 16 * GIB, 16 * GIB]
    assert [value(after, name, slot=str(slot)) for slot in range(4)] == [16 * GIB, 16 * GIB, 0, 0]
    assert [value(f, name, slot="0") for f in (before, alone)] == [0, 0]


def test_what_others_register_is_served_along(path: Path) -> None:
    """One endpoint per node: the device manager may add metrics of its own."""
    registry = CollectorRegistry()
    Gauge("device_manager_extra", "Anything", registry=registry).set(5)
    exporter = Exporter(path, desired=1, slots=1, registry=registry)
    found = series(exporter.scrape())
    exporter.close()
    assert found["device_manager_extra", frozenset()] == 5


def test_metrics_are_served_over_http_on_loopback_and_nothing_else_is(path: Path, exporter: Exporter) -> None:
    """GET /metrics answers in Prometheus' text format; other paths are 404; several may ask at once."""
    with node(path):
        url = f"http://127.0.0.1:{exporter.start(port=0)}"
        with ThreadPoolExecutor(4) as pool:
            answers = list(pool.map(lambda _: urllib.request.urlopen(f"{url}/metrics").read(), range(12)))
        with urllib.request.urlopen(f"{url}/metrics") as answer:
            assert answer.headers["Content-Type"].startswith("text/plain; version=0.0.4")
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(f"{url}/board")
    assert all(keys(series(answer)) == keys(series(answers[0])) for answer in answers)


def test_closing_gives_the_port_back(path: Path) -> None:
    """A device manager that restarts binds the same port again."""
    first = Exporter(path, desired=1)
    port = first.start(port=0)
    first.close()
    first.close()
    second = Exporter(path, desired=1)
    assert second.start(port=port) == port
    second.close()


def reading(replica: str, state: ReplicaState) -> ReplicaReading:
    return ReplicaReading(0, replica_id(replica), 0, state, 0.0, *[0] * 10, 0.0, *[0] * 5)


def look(watch: LifeWatch, now_s: float, replica: str, state: ReplicaState) -> tuple[int, float]:
    life = watch.look(Snapshot(now_s, (reading(replica, state),)))[0]
    return life.starts, life.load_s


def test_a_replica_that_takes_a_slot_anew_is_a_start_and_its_load_time_is_from_slot_to_ready() -> None:
    """Restarts are starts after the first; heartbeats and ready replicas change nothing."""
    watch = LifeWatch()
    assert look(watch, 10.0, "one", ReplicaState.STARTING)[0] == 1
    assert look(watch, 25.0, "one", ReplicaState.READY) == (1, 15.0)
    assert look(watch, 99.0, "one", ReplicaState.READY) == (1, 15.0)
    starts, load_s = look(watch, 100.0, "two", ReplicaState.STARTING)
    assert starts == 2
    assert math.isnan(load_s)
    assert look(watch, 107.0, "two", ReplicaState.READY) == (2, 7.0)


def test_a_replica_that_was_ready_when_first_seen_has_no_load_time() -> None:
    """The exporter came later than the replica: it does not guess."""
    watch = LifeWatch()
    assert math.isnan(look(watch, 10.0, "one", ReplicaState.READY)[1])
    assert math.isnan(look(watch, 20.0, "one", ReplicaState.READY)[1])


def test_how_requests_ended_is_exported(path: Path, exporter: Exporter) -> None:
    """Every end from the first scrape on, and a request that another replica took counts as a retry."""
    assert value(series(exporter.scrape()), "requests_entered_total") == 0
    page = Page.of_replica(path)
    for end in (End.COMPLETED, End.COMPLETED, End.CANCELLED, End.FAILED):
        page.enter(direct=True)
        page.end(end)
    page.redirected()
    found = series(exporter.scrape())
    assert value(found, "requests_entered_total") == 4
    counts = [value(found, "requests_ended_total", end=end) for end in ENDS]
    assert counts == [2, 1, 0, 1]
    assert value(found, "router_retries_total") == 1
    page.leave()
