"""The Grafana dashboards as code: `python -m monitoring.dashboards` writes their JSON into grafana/dashboards.

Needs `grafana-foundation-sdk`, a development dependency; the JSON is committed.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from grafana_foundation_sdk.builders import dashboard
from grafana_foundation_sdk.cog.builder import Builder
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import dashboard as models

from monitoring import drilldown, rows_machine, rows_requests
from monitoring.panels import datasource_variable, query_variable, row
from monitoring.promql import OURS

FOLDER = Path(__file__).parent / "grafana" / "dashboards"
# Grafana migrates older documents when it loads them: 39 is what 10.4 writes, so that it and all later ones can.
_SCHEMA = 39

Section = tuple[str, list[Builder[models.Panel]]]


def overview() -> models.Dashboard:
    """The one to open first: its two rows of tiles answer who works, who is slow, what was refused, what is left."""
    sections: list[Section] = [
        ("At a glance", rows_requests.headline()),
        ("Balance", rows_requests.balance()),
        ("Latency", rows_requests.latency()),
        ("Throughput", rows_requests.throughput()),
        ("GPU and MPS", rows_machine.gpu_and_mps()),
        ("Saturation", rows_machine.saturation()),
        ("Life cycle", rows_machine.life_cycle()),
        ("Ingress", rows_machine.ingress()),
    ]
    return _dashboard("splitwiser-overview", "splitwiser: overview", sections, [])


def replica() -> models.Dashboard:
    """Everything about one replica, chosen by its slot."""
    slot = query_variable("slot", "Replica", f'label_values(splitwiser_replica_info{{{OURS},replica!=""}}, slot)')
    return _dashboard("splitwiser-replica", "splitwiser: one replica", drilldown.sections(), [slot])


def _dashboard(
    uid: str, title: str, sections: Iterable[Section], more: Iterable[dashboard.QueryVariable]
) -> models.Dashboard:
    board = dashboard.Dashboard(title).uid(uid).tags(["splitwiser"]).refresh("10s").time("now-30m", "now")
    board = board.tooltip(models.DashboardCursorSync.CROSSHAIR).editable().links(_links())
    board = board.with_variable(datasource_variable())
    board = board.with_variable(query_variable("job", "Job", "label_values(splitwiser_board_up, job)"))
    board = board.with_variable(query_variable("node", "Node", 'label_values(splitwiser_board_up{job=~"$job"}, node)'))
    for variable in more:
        board = board.with_variable(variable)
    for name, panels in sections:
        board = board.with_row(row(name))
        for panel in panels:
            board = board.with_panel(panel)
    return _numbered(board.build())


def _numbered(board: models.Dashboard) -> models.Dashboard:
    """What the builders leave out: panels get no ids, which links to a panel need."""
    board.schema_version = _SCHEMA
    for number, panel in enumerate(board.panels or (), start=1):
        panel.id_val = number
    return board


def _links() -> list[Builder[models.DashboardLink]]:
    ours = dashboard.DashboardLink("splitwiser").type(models.DashboardLinkType.DASHBOARDS).tags(["splitwiser"])
    vllm = dashboard.DashboardLink("vLLM").type(models.DashboardLinkType.DASHBOARDS).tags(["vllm"]).as_dropdown(True)
    ray = dashboard.DashboardLink("Ray Serve").type(models.DashboardLinkType.LINK).url("/d/rayServeDashboard")
    return [link.keep_time(True).include_vars(True) for link in (ours, vllm, ray)]


DASHBOARDS = {"overview.json": overview, "replica.json": replica}


def as_json(board: models.Dashboard) -> str:
    return json.dumps(board, cls=JSONEncoder, indent=2, sort_keys=True) + "\n"


def main() -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, build in DASHBOARDS.items():
        (FOLDER / name).write_text(as_json(build()))


if __name__ == "__main__":
    main()
