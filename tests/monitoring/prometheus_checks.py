"""Runs Prometheus itself, and every query of the dashboards and rules through it."""

from __future__ import annotations

import json
import math
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import promql_parser
import yaml

from monitoring import local_prometheus

ROOT = Path(__file__).parents[2]
DASHBOARDS = ROOT / "monitoring" / "grafana" / "dashboards"
PROMETHEUS = ROOT / "monitoring" / "prometheus"
# What Grafana puts in the place of its variables.
VARIABLES = {"$__rate_interval": "1m", "$job": ".*", "$node": ".*", "$slot": ".*"}

_NO_GPU = "a machine without a GPU has no such reading, and the exporter says NaN"
# Panels ("dashboard / panel / letter of the query") that may be empty or without a number, and why.
ALLOWED_EMPTY = {
    "overview / Slowest replica / A": "idle engines have no slowest one",
    "overview / Wait in the router / A": "only requests that had to wait are observed",
    "overview / Wait in the router / B": "only requests that had to wait are observed",
    "overview / Wait in the router / C": "only requests that had to wait are observed",
    "overview / GPU in use / B": _NO_GPU,
    "overview / GPU in use / C": _NO_GPU,
    "overview / Power / A": _NO_GPU,
    "overview / Temperature / A": _NO_GPU,
    "overview / SM clock / A": _NO_GPU,
    "overview / Time to load / A": "a replica that was ready before the exporter began has no load time",
    'splitwiser:gpu_use:ratio{limit="dram"}': _NO_GPU,
    'splitwiser:gpu_use:ratio{limit="sm"}': "not where only the driver's utilization.gpu can be read",
    "replica / Starts and time to load / B": "a replica that was ready before the exporter began has no load time",
}
# Series that an alert may ask for in vain, and why.
ALLOWED_ABSENT = {
    'splitwiser:gpu_use:ratio{limit="sm"}': "not where only the driver's utilization.gpu can be read",
}


@dataclass(frozen=True)
class Query:
    """An expression as Prometheus gets it, and where it stands. Alerts are empty as long as all is well."""

    where: str
    expr: str
    alert: bool = False


def concrete(expr: str, variables: Mapping[str, str] = VARIABLES) -> str:
    """The expression as Grafana would send it."""
    for name, value in variables.items():
        expr = expr.replace(name, value)
    return expr


def documents() -> dict[str, dict[str, Any]]:
    """The committed dashboards by name."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(DASHBOARDS.glob("*.json"))}


def panels(document: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Every panel but rows, those inside of rows too."""
    for panel in document["panels"]:
        if panel["type"] == "row":
            yield from panel.get("panels") or ()
        else:
            yield panel


def panel_queries(name: str, document: Mapping[str, Any]) -> list[Query]:
    return [
        Query(f"{name} / {panel['title']} / {target['refId']}", concrete(target["expr"]))
        for panel in panels(document)
        for target in panel["targets"]
    ]


def rules() -> list[dict[str, Any]]:
    """The committed rules, recording and alerting."""
    document = yaml.safe_load((PROMETHEUS / "rules.yml").read_text())
    return [rule for group in document["groups"] for rule in group["rules"]]


def rule_queries() -> list[Query]:
    return [Query(rule_name(rule), rule["expr"], "alert" in rule) for rule in rules()]


def rule_name(rule: Mapping[str, Any]) -> str:
    """An alert's name, or a recorded series as PromQL names it."""
    if "alert" in rule:
        return str(rule["alert"])
    labels = ",".join(f'{name}="{value}"' for name, value in rule.get("labels", {}).items())
    return f"{rule['record']}{{{labels}}}" if labels else str(rule["record"])


def every_query() -> list[Query]:
    """All that the project ever asks of Prometheus."""
    found = [query for name, document in documents().items() for query in panel_queries(name, document)]
    return found + rule_queries()


def check_every_query(
    prometheus_url: str,
    queries: Iterable[Query],
    allowed_empty: Mapping[str, str] = ALLOWED_EMPTY,
    allowed_absent: Mapping[str, str] = ALLOWED_ABSENT,
) -> list[str]:
    """Run each query through Prometheus' HTTP API; a sentence for each that fails or shows nothing. Empty: all is well.

    Of alerts, which rightly yield nothing, every series that they ask for has to be there.
    """
    return [
        problem
        for query in queries
        for problem in (
            _alert_problems(prometheus_url, query, allowed_absent)
            if query.alert
            else _panel_problems(prometheus_url, query, allowed_empty)
        )
    ]


def _panel_problems(url: str, query: Query, allowed_empty: Mapping[str, str]) -> Iterator[str]:
    try:
        values = ask(url, query.expr)
    except QueryError as error:
        yield f"{query.where}: {error}"
        return
    if query.where not in allowed_empty and not any(map(math.isfinite, values)):
        yield f"{query.where}: {'only NaN' if values else 'no series'} for {query.expr}"


def _alert_problems(url: str, query: Query, allowed_absent: Mapping[str, str]) -> Iterator[str]:
    try:
        ask(url, query.expr)
    except QueryError as error:
        yield f"{query.where}: {error}"
    for selector in selectors(query.expr):
        if selector not in allowed_absent and not ask(url, selector):
            yield f"{query.where}: nothing is known of {selector}"


class QueryError(Exception):
    """Prometheus refused a query."""


def ask(url: str, expr: str) -> list[float]:
    """The values of an instant query. Raises QueryError."""
    body = urllib.parse.urlencode({"query": expr}).encode()
    try:
        with urllib.request.urlopen(f"{url}/api/v1/query", data=body, timeout=10) as answer:
            result = json.load(answer)["data"]["result"]
    except urllib.error.HTTPError as error:
        raise QueryError(json.load(error)["error"] + f" in {expr}") from error
    return [float(sample["value"][1]) for sample in result]


def tree(expr: str) -> Iterator[Any]:
    """Every node of the parsed expression. Raises ValueError where it is no PromQL."""
    stack = [promql_parser.parse(expr)]
    while stack:
        node = stack.pop()
        yield node
        parts = (getattr(node, name, None) for name in ("expr", "lhs", "rhs", "param", "vector_selector", "args"))
        for part in parts:
            stack.extend(part if isinstance(part, list) else [part] if isinstance(part, promql_parser.Expr) else [])


def selectors(expr: str) -> set[str]:
    """Each vector selector in the expression, as PromQL of its own."""
    return {_selector(node) for node in tree(expr) if isinstance(node, promql_parser.VectorSelector)}


def _selector(node: Any) -> str:
    operators = {"Equal": "=", "NotEqual": "!=", "Re": "=~", "NotRe": "!~"}
    matchers = ",".join(f'{m.name}{operators[str(m.op).rpartition(".")[2]]}"{m.value}"' for m in node.matchers.matchers)
    return f"{node.name}{{{matchers}}}" if matchers else str(node.name)


def metric_names(expr: str) -> set[str]:
    return {str(node.name) for node in tree(expr) if isinstance(node, promql_parser.VectorSelector)}


def configuration(targets: Path, ray_targets: Path, interval_s: float) -> dict[str, Any]:
    """The committed prometheus.yml with its rules, but other service-discovery files and an interval of one's own."""
    document = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text())
    interval = f"{interval_s * 1e3:.0f}ms"
    document["global"] = {"scrape_interval": interval, "evaluation_interval": interval}
    document["rule_files"] = [str(PROMETHEUS / "rules.yml")]
    for job in document["scrape_configs"]:
        job.pop("scrape_interval", None)
        job["file_sd_configs"] = [{"files": [str(ray_targets if job["job_name"] == "ray" else targets)]}]
    return dict(document)


@contextmanager
def running_prometheus(folder: Path, configuration: Mapping[str, Any]) -> Iterator[str]:
    """A Prometheus of its own on a free loopback port, its data in `folder`; yields its URL."""
    path = folder / "prometheus.yml"
    path.write_text(yaml.safe_dump(dict(configuration)))
    with local_prometheus.running(path, folder, local_prometheus.free_port()) as server:
        yield server.url
