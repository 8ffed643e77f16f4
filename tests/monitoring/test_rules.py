"""The rules: valid, tested by promtool, each alert provoked, each saying what to do."""

from __future__ import annotations

import re
import subprocess

import pytest
import yaml

from monitoring import local_prometheus, metrics
from tests.monitoring import prometheus_checks as checks

RULES = checks.rules()
ALERTS = [rule for rule in RULES if "alert" in rule]
PROMISED = {
    "SplitwiserReplicaDown", "SplitwiserNoTokens", "SplitwiserQueueGrowing", "SplitwiserMemoryReserveBreached",
    "SplitwiserKvPressure", "SplitwiserPreemptionStorm", "SplitwiserImbalance", "SplitwiserMpsFault",
    "SplitwiserThrash", "SplitwiserStaleGpuReading", "SplitwiserScrapeDown",
}  # fmt: skip


def promtool(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [local_prometheus.program("promtool"), *arguments]
    return subprocess.run(command, cwd=checks.PROMETHEUS, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize("arguments", [("check", "config", "prometheus.yml"), ("check", "rules", "rules.yml")])
def test_promtool_finds_nothing_wrong_with_the_configuration(arguments: tuple[str, ...]) -> None:
    """Prometheus would start with it."""
    done = promtool(*arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "SUCCESS" in done.stdout


def test_promtool_confirms_every_rule_test() -> None:
    """Synthetic series set off each alert, and what must not set it off does not."""
    done = promtool("test", "rules", "rules_test.yml")
    assert done.returncode == 0, done.stdout + done.stderr


def test_each_alert_is_set_off_by_a_rule_test() -> None:
    """An alert that was never seen to fire may be unable to."""
    document = yaml.safe_load((checks.PROMETHEUS / "rules_test.yml").read_text())
    provoked = {
        case["alertname"]
        for test in document["tests"]
        for case in test.get("alert_rule_test", ())
        if case.get("exp_alerts")
    }
    assert provoked == {rule["alert"] for rule in ALERTS}


def test_the_promised_alerts_are_there() -> None:
    """Down, no tokens, queue, memory, KV, preemption, imbalance, MPS, thrash, stale, scrape."""
    assert {rule["alert"] for rule in ALERTS} >= PROMISED


@pytest.mark.parametrize("rule", ALERTS, ids=lambda rule: rule["alert"])
def test_each_alert_says_how_bad_it_is_what_happened_and_what_to_do(rule: dict[str, dict[str, str]]) -> None:
    """The one on call needs no other page."""
    assert rule["labels"]["severity"] in ("warning", "critical")
    assert len(rule["annotations"]["summary"]) > 20
    assert rule["annotations"]["mend"].endswith(".")


def test_rules_name_only_known_metrics() -> None:
    """Declared here, known of others, or recorded by an earlier rule."""
    recorded: set[str] = set()
    for rule in RULES:
        names = checks.metric_names(rule["expr"])
        assert names, rule
        assert names <= metrics.names() | metrics.FOREIGN | recorded, rule
        recorded |= {rule["record"]} if "record" in rule else set()


def test_the_configuration_has_the_three_jobs() -> None:
    """This system, Ray and HAProxy."""
    document = yaml.safe_load((checks.PROMETHEUS / "prometheus.yml").read_text())
    assert [job["job_name"] for job in document["scrape_configs"]] == ["splitwiser", "haproxy", "ray"]


def test_the_page_for_the_operator_names_every_alert_and_no_other() -> None:
    """Whoever is called finds what it means and what to do first."""
    page = (checks.ROOT / "docs" / "monitoring.md").read_text()
    assert re.findall(r"^\| (Splitwiser\w+) \|", page, re.MULTILINE) == [rule["alert"] for rule in ALERTS]


def test_the_page_for_the_operator_names_panels_that_exist() -> None:
    """A panel that was renamed is renamed there too."""
    page = (checks.ROOT / "docs" / "monitoring.md").read_text()
    titles = {panel["title"] for document in checks.documents().values() for panel in checks.panels(document)}
    others = {document["title"] for document in checks.documents().values()} | {"vLLM", "Ray Serve"}
    assert set(re.findall(r"(?<!\*)\*([^*\n]+)\*(?!\*)", page.replace("/*.json", ""))) <= titles | others
