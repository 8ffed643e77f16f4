"""The dashboards: their JSON, their style, and every one of their queries through a real Prometheus."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from itertools import combinations

import promql_parser
import pytest
import yaml
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models.dashboard import Dashboard

from balancer.counters import REJECTIONS
from monitoring import dashboards, discovery, metrics
from monitoring.discovery import ReplicaTarget
from tests.monitoring import prometheus_checks as checks
from tests.monitoring.stand_in_node import TAGS, node, replica_id, served

DOCUMENTS = checks.documents()
NAMES = sorted(DOCUMENTS)
# Of Grafana's unit formats (packages/grafana-data/src/valueFormats), those in use; `suffix:` makes one's own.
UNITS = {"short", "s", "ms", "percentunit", "reqps", "ops", "bytes", "watt", "celsius", "hertz"}
ROWS = ["At a glance", "Balance", "Latency", "Throughput", "GPU and MPS", "Saturation", "Life cycle", "Ingress"]
SCRAPE_S = 0.4
SETTLE_LIMIT_S = 30.0

register_default_plugins()


@pytest.mark.parametrize("name", dashboards.DASHBOARDS)
def test_the_committed_json_is_what_the_code_makes(name: str) -> None:
    """A stale file is written anew by `python -m monitoring.dashboards`."""
    assert (dashboards.FOLDER / name).read_text() == dashboards.as_json(dashboards.DASHBOARDS[name]())


def test_no_json_lies_there_that_the_code_does_not_make() -> None:
    """What Grafana loads is exactly what is tested."""
    assert {f"{name}.json" for name in NAMES} == set(dashboards.DASHBOARDS)


@pytest.mark.parametrize("name", NAMES)
def test_the_json_survives_grafanas_own_types(name: str) -> None:
    """Read into the SDK's typed models and written again, nothing is lost or added."""
    typed = Dashboard.from_json(DOCUMENTS[name])
    assert json.loads(json.dumps(typed, cls=JSONEncoder)) == DOCUMENTS[name]


def test_the_overview_has_the_promised_rows_in_their_order() -> None:
    """Tiles first, then balance, and so on down to the ingress."""
    assert [panel["title"] for panel in DOCUMENTS["overview"]["panels"] if panel["type"] == "row"] == ROWS


def test_the_first_tiles_answer_what_the_operator_asks_first() -> None:
    """How many work, which is slowest, what was refused and why, how far the GPU is from its limit."""
    first = [panel["title"] for panel in checks.panels(DOCUMENTS["overview"])][:4]
    assert first == ["Replicas", "Slowest replica", "Refused in the last 5 minutes", "GPU: nearest limit"]


@pytest.mark.parametrize("name", NAMES)
def test_every_panel_is_titled_described_and_has_a_known_unit(name: str) -> None:
    """Nobody has to guess what a line means."""
    for panel in checks.panels(DOCUMENTS[name]):
        unit = panel["fieldConfig"]["defaults"]["unit"]
        assert panel["title"], panel["id"]
        assert len(panel["description"]) > 20, panel["title"]
        assert panel["description"].endswith("."), panel["title"]
        assert unit in UNITS or unit.startswith("suffix:"), (panel["title"], unit)


@pytest.mark.parametrize("name", NAMES)
def test_every_panel_and_query_uses_the_chosen_datasource(name: str) -> None:
    """The dashboard works with whatever the Prometheus is called."""
    for panel in checks.panels(DOCUMENTS[name]):
        sources = [panel["datasource"], *(target["datasource"] for target in panel["targets"])]
        assert all(source == {"type": "prometheus", "uid": "${datasource}"} for source in sources), panel["title"]


@pytest.mark.parametrize("name", NAMES)
def test_ids_and_letters_are_unique_and_titles_within_a_dashboard_tell_panels_apart(name: str) -> None:
    """Links lead to one panel, and the list of queries that may be empty names one query each."""
    found = DOCUMENTS[name]["panels"]
    assert len({panel["id"] for panel in found}) == len(found)
    wheres = [query.where for query in checks.panel_queries(name, DOCUMENTS[name])]
    assert len(set(wheres)) == len(wheres)


@pytest.mark.parametrize("name", NAMES)
def test_panels_do_not_overlap_and_stay_within_the_grid(name: str) -> None:
    """Grafana's grid has 24 columns."""
    places = [panel["gridPos"] for panel in DOCUMENTS[name]["panels"]]
    assert all(place["x"] + place["w"] <= 24 for place in places)
    for one, other in combinations(places, 2):
        apart = (
            one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
            or one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
        )  # fmt: skip
        assert apart, (one, other)


@pytest.mark.parametrize("name", NAMES)
def test_legends_are_shown_and_several_queries_are_told_apart(name: str) -> None:
    """The SDK hides legends unless told otherwise."""
    for panel in checks.panels(DOCUMENTS[name]):
        if panel["type"] == "timeseries":
            assert panel["options"]["legend"]["showLegend"], panel["title"]
        if len(panel["targets"]) > 1:
            legends = [target.get("legendFormat") for target in panel["targets"]]
            assert all(legends), panel["title"]
            assert len(set(legends)) == len(legends), panel["title"]


@pytest.mark.parametrize("name", NAMES)
def test_variables_links_and_refresh_are_what_an_operator_expects(name: str) -> None:
    """Stable uid, a datasource, job and node to choose, links to the other dashboards, a refresh every 10 s."""
    document = DOCUMENTS[name]
    variables = [variable["name"] for variable in document["templating"]["list"]]
    assert variables[:3] == ["datasource", "job", "node"]
    assert document["uid"] == f"splitwiser-{name}"
    assert document["refresh"] == "10s"
    assert {link["title"] for link in document["links"]} == {"splitwiser", "vLLM", "Ray Serve"}
    used = set(re.findall(r"\$([a-z_]\w*)", json.dumps(document["panels"]))) - {"__rate_interval"}
    assert used <= set(variables)


EXPRESSIONS = [
    (f"{name} / {panel['title']}", target["expr"])
    for name, document in DOCUMENTS.items()
    for panel in checks.panels(document)
    for target in panel["targets"]
]


def test_every_expression_is_promql_and_names_only_known_metrics() -> None:
    """A misspelt metric would be an empty panel."""
    recorded = {rule["record"] for rule in checks.rules() if "record" in rule}
    known = metrics.names() | metrics.FOREIGN | recorded
    for where, expr in EXPRESSIONS:
        names = checks.metric_names(checks.concrete(expr))
        assert names, where
        assert names <= known, where


def test_no_foreign_metric_is_listed_that_nothing_asks_for() -> None:
    """The list stays what it says: what dashboards and rules use of others."""
    used = {name for query in checks.every_query() for name in checks.metric_names(query.expr)}
    assert used >= metrics.FOREIGN


def test_our_series_are_always_asked_for_by_job_and_node() -> None:
    """Two systems on one Prometheus do not run together in a panel."""
    found = [
        (where, selector)
        for where, expr in EXPRESSIONS
        for selector in checks.selectors(expr.replace("$__rate_interval", "1m"))
    ]
    for where, selector in found:
        if selector.startswith(("splitwiser", "vllm:")):
            assert 'job=~"$job"' in selector, (where, selector)
            assert 'node=~"$node"' in selector, (where, selector)
        elif selector.startswith("haproxy"):
            assert 'node=~"$node"' in selector, (where, selector)


def test_counters_are_shown_as_rates_and_never_after_summing() -> None:
    """Rate first, then sum: a restart of one replica must not look like a fall of all."""
    for where, expr in EXPRESSIONS:
        nodes = list(checks.tree(checks.concrete(expr)))
        ranges = {str(found.vector_selector.name) for found in nodes if isinstance(found, promql_parser.MatrixSelector)}
        rates = [
            found
            for found in nodes
            if isinstance(found, promql_parser.Call) and found.func.name in ("rate", "increase")
        ]
        assert all(isinstance(rate.args[0], promql_parser.MatrixSelector) for rate in rates), where
        plain = checks.metric_names(checks.concrete(expr)) - ranges
        counters = {name for name in plain if re.search(r"(_total|_bucket|_sum|_count)$", name)}
        assert counters <= {"splitwiser_replica_starts_total"}, where


def test_no_mean_is_taken_from_a_histogram_of_rays() -> None:
    """Ray makes a histogram's sum up from bucket midpoints."""
    found = [(where, name) for where, expr in EXPRESSIONS for name in checks.metric_names(checks.concrete(expr))]
    for where, name in found:
        assert not (name.startswith("ray_") and name.endswith(("_sum", "_count"))), where


def test_rays_failure_counters_read_zero_before_the_first_failure() -> None:
    """Ray exports no series for a counter that never moved."""
    failures = [expr for _, expr in EXPRESSIONS if re.search(r'ray_\w*failures|ray_.*status_code=~"5', expr)]
    assert len(failures) == 3
    assert all(re.search(r"or (on \(\) )?vector\(0\)", expr) for expr in failures)


def test_provisioning_names_the_folders_that_compose_mounts_and_pins_its_images() -> None:
    """Prometheus and Grafana come up with everything loaded."""
    compose = yaml.safe_load((checks.ROOT / "docker-compose.yml").read_text())
    grafana = checks.ROOT / "monitoring" / "grafana" / "provisioning"
    providers = yaml.safe_load((grafana / "dashboards" / "splitwiser.yml").read_text())["providers"]
    source = yaml.safe_load((grafana / "datasources" / "prometheus.yml").read_text())["datasources"][0]
    mounts = compose["services"]["grafana"]["volumes"]
    assert f"./monitoring/grafana/dashboards:{providers[0]['options']['path']}:ro" in mounts
    assert "./monitoring/prometheus:/etc/prometheus:ro" in compose["services"]["prometheus"]["volumes"]
    assert source["name"] == "Prometheus"
    for service in compose["services"].values():
        assert re.fullmatch(r"[\w./-]+:v?\d+\.\d+\.\d+", service["image"])
        assert service["network_mode"] == "host"


@pytest.fixture(scope="module")
def prometheus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Prometheus with the committed configuration, only faster, scraping a stand-in of every endpoint."""
    folder = tmp_path_factory.mktemp("prometheus")
    with node(folder / "board") as made, served(made) as at:
        replicas = [
            ReplicaTarget(address, slot, replica_id(tag))
            for slot, (address, tag) in enumerate(zip(at.replicas, TAGS, strict=True))
        ]
        discovery.write(folder / "sd" / "run.json", discovery.groups("a", at.exporter, replicas, at.haproxy))
        (folder / "ray.json").write_text(json.dumps([{"targets": [at.ray], "labels": {"job": "ray"}}]))
        configuration = checks.configuration(folder / "sd" / "*.json", folder / "ray.json", SCRAPE_S)
        with checks.running_prometheus(folder, configuration) as url:
            settle(url)
            yield url


def settle(url: str) -> None:
    """Until every target was scraped a few times and the rules were evaluated on that."""
    deadline_s = time.monotonic() + SETTLE_LIMIT_S
    while time.monotonic() < deadline_s:
        seen = checks.ask(url, "count(min by (job, instance) (count_over_time(up[5m])) > 4)")
        if seen == [5.0] and checks.ask(url, "min(count_over_time(splitwiser:imbalance:ratio[5m])) > 4"):
            return
        time.sleep(SCRAPE_S)
    pytest.fail("Prometheus did not get to scrape the stand-ins")


def test_prometheus_finds_every_target_by_the_discovery_file(prometheus: str) -> None:
    """One exporter and two replicas in our job, HAProxy and Ray in theirs, all reached."""
    for selector, count in (
        ('up{job="splitwiser",role="exporter",node="a"}', 1),
        ('up{job="splitwiser",role="replica",node="a",slot=~"0|1"}', 2),
        ('up{job="haproxy",node="a"}', 1),
        ('up{job="ray"}', 1),
        ("up", 5),
    ):
        # Over minutes, because one scrape may come too late on a busy machine.
        assert checks.ask(prometheus, f"max_over_time({selector}[5m])") == [1.0] * count, selector


def test_every_query_of_dashboards_and_rules_runs_and_shows_something(prometheus: str) -> None:
    """No error, and nothing empty: on this node everything is measured, so that nothing may be missing either."""
    measured_here = {where: why for where, why in checks.ALLOWED_EMPTY.items() if "load time" in why}
    assert checks.check_every_query(prometheus, checks.every_query(), measured_here, {}) == []


def test_a_query_that_fails_or_shows_nothing_is_reported(prometheus: str) -> None:
    """The check itself can fail: on a syntax error, an unknown series, NaN alone, and an alert on nothing."""
    bad = [
        checks.Query("syntax", "sum(rate(up[1m])"),
        checks.Query("unknown", "splitwiser_nonsense"),
        checks.Query("nan", "vector(0) / vector(0)"),
        checks.Query("alert", "splitwiser_nonsense > 1", alert=True),
        checks.Query("fine", "up"),
    ]
    problems = checks.check_every_query(prometheus, bad)
    assert [problem.partition(":")[0] for problem in problems] == ["syntax", "unknown", "nan", "alert"]


def test_what_may_be_empty_is_named_after_queries_that_exist() -> None:
    """The list does not outlive its panels."""
    queries = checks.every_query()
    assert set(checks.ALLOWED_EMPTY) <= {query.where for query in queries}
    assert set(checks.ALLOWED_ABSENT) <= {
        one for query in queries if query.alert for one in checks.selectors(query.expr)
    }


def test_the_tiles_show_what_is_on_the_board(prometheus: str) -> None:
    """Two of two ready, both active, replica 1 slowest, SMs the nearest limit, requests refused for one reason."""
    found = {query.where: query.expr for query in checks.every_query()}
    assert [checks.ask(prometheus, found[f"overview / Replicas / {letter}"]) for letter in "ABC"] == [[2.0]] * 3
    assert checks.ask(prometheus, found["overview / Slowest replica / A"]) == [pytest.approx(0.0135)]
    assert checks.ask(prometheus, found["overview / GPU: nearest limit / A"]) == [pytest.approx(0.75)]
    refused = checks.ask(prometheus, found["overview / Refused in the last 5 minutes / A"])
    assert len(refused) == len(REJECTIONS)
    assert sum(value > 0 for value in refused) == 1


def test_a_gpu_that_was_never_read_raises_the_alert(prometheus: str) -> None:
    """Its age is NaN, which no comparison with a number finds."""
    stale = next(rule["expr"] for rule in checks.rules() if rule.get("alert") == "SplitwiserStaleGpuReading")
    never = "(vector(0) / vector(0))"
    assert len(checks.ask(prometheus, stale.replace("splitwiser_gpu_reading_age_seconds", never))) == 1
    assert checks.ask(prometheus, stale) == []
