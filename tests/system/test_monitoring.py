"""What the operator sees of the running system: the exporter's counters, and every query through a real Prometheus."""

from __future__ import annotations

import json
import re
import time
import urllib.request
from pathlib import Path

import pytest
from conftest import System

from monitoring import discovery
from tests.monitoring import prometheus_checks as checks

pytestmark = [pytest.mark.system, pytest.mark.timeout(900)]

RAY_TARGETS = Path("/tmp/ray/prom_metrics_service_discovery.json")


def exporter(system: System) -> str:
    """The exporter's text, found as Prometheus finds it."""
    groups = json.loads(discovery.targets_file(system.run_id).read_text())
    address = next(g["targets"][0] for g in groups if g["labels"]["role"] == "exporter")
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=10) as answer:
        return str(answer.read().decode())


def total(text: str, metric: str) -> float:
    values = re.findall(rf"^{metric}(?:{{[^}}]*}})? (\S+)$", text, re.MULTILINE)
    assert values, f"{metric} is not exported"
    return sum(map(float, values))


def wait_idle(system: System) -> None:
    """Until the engines rest: what another test gave up may still be under way."""
    made, deadline_s = -1.0, time.monotonic() + 120
    while made != (made := total(exporter(system), "splitwiser_replica_output_tokens_total")):
        assert time.monotonic() < deadline_s, "the engines never rest"
        time.sleep(2.0)


def test_counters_equal_the_clients_own_ledger(system: System) -> None:
    wait_idle(system)
    before = exporter(system)
    ledger = [system.complete(max_tokens=4).status for _ in range(12)]
    ledger += [system.post("/v1/completions", {"model": "nobody", "prompt": "x"}).status for _ in range(3)]
    assert sorted(ledger) == [200] * 12 + [404] * 3
    wait_idle(system)  # an answer is counted when it is over, a moment after its last byte
    after = exporter(system)

    def grown(metric: str) -> float:
        return total(after, metric) - total(before, metric)

    assert grown("splitwiser_router_decisions_total") == len(ledger)
    assert grown("splitwiser_replica_received_requests_total") == len(ledger)
    assert grown("splitwiser_replica_finished_requests_total") == len(ledger)
    assert grown("splitwiser_replica_output_tokens_total") == 12 * 4
    assert grown("splitwiser_replica_answered_tokens_total") == 12 * 4
    assert 0 < grown("splitwiser_replica_predicted_tokens_total") <= 12 * 4
    assert grown("splitwiser_router_rejections_total") == 0


def test_the_public_port_does_not_leak_metrics(system: System) -> None:
    assert system.get("/metrics").status == 404


def test_every_panel_and_rule_finds_its_numbers_in_a_real_prometheus(system: System, tmp_path: Path) -> None:
    configuration = checks.configuration(discovery.targets_file(system.run_id), RAY_TARGETS, 2.0)
    with checks.running_prometheus(tmp_path, configuration) as url:
        end_s = time.monotonic() + 25  # Ray reports every 10 s, and a rate needs two reports
        while time.monotonic() < end_s:
            assert system.complete(max_tokens=16).status == 200
        assert checks.check_every_query(url, checks.every_query()) == []
