"""The declared set: names, units, labels, and that it covers what the balancer says."""

from __future__ import annotations

import ast
import importlib.util
import re
from pathlib import Path

import pytest

from balancer import counters
from monitoring import metrics
from monitoring.metrics import DECLARED, Kind

RECORDED = Path(__file__).with_name("recorded")
BALANCER = Path(counters.__file__).parent
# https://prometheus.io/docs/practices/naming/: base units; counts of things are named after the things.
UNITS = ("seconds", "bytes", "ratio", "watts", "celsius", "hertz", "tokens", "requests")
# Gauges without a unit: states, flags, counts of things, and info.
UNITLESS = {
    "splitwiser_build_info", "splitwiser_board_up", "splitwiser_board_torn_slots", "splitwiser_gpu_source",
    "splitwiser_replicas_desired", "splitwiser_replica_info", "splitwiser_replica_state", "splitwiser_replica_active",
    "splitwiser_routers", "splitwiser_mps_wanted", "splitwiser_mps_up", "splitwiser_mps_clients",
}  # fmt: skip


@pytest.mark.parametrize("metric", DECLARED, ids=lambda metric: metric.name)
def test_each_name_has_the_prefix_and_a_base_unit(metric: metrics.Metric) -> None:
    """Counters end in _total, nothing else does; gauges and histograms end in their unit."""
    assert re.fullmatch(r"splitwiser_[a-z]+(_[a-z]+)*", metric.name)
    assert metric.name.endswith("_total") is (metric.kind is Kind.COUNTER)
    if metric.kind is not Kind.COUNTER and metric.name not in UNITLESS:
        assert metric.name.endswith(UNITS)
    assert metric.help
    assert "\n" not in metric.help


def test_names_are_declared_once() -> None:
    """Two families of one name would be refused by Prometheus."""
    names = [metric.name for metric in DECLARED]
    assert len(set(names)) == len(names)


def test_labels_are_few_and_known() -> None:
    """Slot and GPU are bounded by the board, the rest by closed sets; replica and version stand on info metrics."""
    for metric in DECLARED:
        free = set(metric.labels) - {"slot", "gpu"} - set(metrics.LABEL_VALUES)
        assert not free or metric.name.endswith("_info"), metric.name


def reasons_in_the_code(function: str) -> set[str]:
    """String constants given as a reason to `function`, directly or through a variable called `reason`."""
    found: set[str] = set()
    for path in BALANCER.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == function:
                found |= {str(a.value) for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)}
            if function == "assign" and isinstance(node, ast.Assign):
                found |= assigned_reasons(node)
    return found


def assigned_reasons(node: ast.Assign) -> set[str]:
    target, value = node.targets[0], node.value
    names = target.elts if isinstance(target, ast.Tuple) else [target]
    values = value.elts if isinstance(value, ast.Tuple) else [value]
    return {
        str(v.value)
        for n, v in zip(names, values, strict=False)
        if getattr(n, "id", "") == "reason" and isinstance(v, ast.Constant)
    }


def test_every_reason_that_a_policy_gives_is_in_the_closed_sets() -> None:
    """A new reason must be added to balancer/counters.py, or it would count as `other`."""
    choices = {reason for _, reason in counters.CHOICES} - {counters.OTHER}
    assert reasons_in_the_code("assign") == choices
    assert reasons_in_the_code("reject") == set(counters.REJECTIONS) - {counters.OTHER}


def test_every_policy_has_its_reasons() -> None:
    """The registry of policies and the closed set agree."""
    from balancer.policies import POLICIES

    assert {policy for policy, _ in counters.CHOICES} - {counters.OTHER} == set(POLICIES)


def test_foreign_metrics_exist_in_the_releases_in_use() -> None:
    """vLLM's and HAProxy's as recorded from them, Ray's as declared in its source."""
    recorded = "".join(path.read_text() for path in (RECORDED / "vllm.txt", RECORDED / "haproxy.txt"))
    spec = importlib.util.find_spec("ray.serve")
    assert spec is not None
    assert spec.submodule_search_locations
    folder = Path(spec.submodule_search_locations[0]) / "_private"
    source = "".join(path.read_text() for path in folder.glob("*.py"))
    for name in metrics.FOREIGN:
        if name.startswith("ray_"):
            plain = re.sub("^ray_|(_total|_bucket)$", "", name)
            made = plain.replace("_http_", "_{protocol_name}_")  # Ray makes some names for each protocol
            assert f'"{plain}' in source or f'f"{made}"' in source, name
        elif name.startswith(("vllm:", "haproxy_")):
            assert re.search(rf"^{name}[{{ ]", recorded, re.MULTILINE), name
