"""Grafana panels in the few forms that the dashboards use. Needs `grafana-foundation-sdk`, a development dependency."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from grafana_foundation_sdk.builders import common, dashboard, heatmap, prometheus, stat, statetimeline, timeseries
from grafana_foundation_sdk.cog.builder import Builder
from grafana_foundation_sdk.models import common as options
from grafana_foundation_sdk.models import dashboard as models
from grafana_foundation_sdk.models.heatmap import HeatmapColorMode
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

DATASOURCE = models.DataSourceRef(type_val="prometheus", uid="${datasource}")
COLUMNS = 24
_GRAPH_HEIGHT = 8
_TILE_HEIGHT = 4
GREEN, YELLOW, RED, BLUE, GREY = "green", "yellow", "red", "blue", "text"


@dataclass(frozen=True, slots=True)
class Query:
    """An expression and the name of its series. `every` is how often its source changes, where that is seldom."""

    expr: str
    legend: str = ""
    every: str = ""


@dataclass(frozen=True, slots=True)
class Words:
    """What a panel is called and what it tells."""

    title: str
    description: str


Step = tuple[float | None, str]


def tile(
    words: Words,
    unit: str,
    *queries: Query,
    span: int = 3,
    steps: Sequence[Step] = ((None, GREEN),),
    no_value: str = "0",
    decimals: int | None = None,
    name_only: bool = False,
) -> Builder[models.Panel]:
    """A number, coloured by the last of `steps` (from, colour) that it reaches; or only the names of its series."""
    panel = (
        stat.Panel()
        .color_mode(options.BigValueColorMode.VALUE)
        .graph_mode(options.BigValueGraphMode.NONE)
        .reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]))
        .thresholds(_thresholds(steps))
        .no_value(no_value)
    )
    if decimals is not None:
        panel = panel.decimals(decimals)
    if name_only:
        panel = panel.text_mode(options.BigValueTextMode.NAME)
    elif any(query.legend for query in queries):
        panel = panel.text_mode(options.BigValueTextMode.VALUE_AND_NAME)
    for query, name in _lettered(queries):
        panel = panel.with_target(_target(query, name).instant())
    return _framed(panel, words, unit, span, _TILE_HEIGHT)


def graph(
    words: Words,
    unit: str,
    *queries: Query,
    span: int = 8,
    stacked: bool = False,
    ceiling: float | None = None,
) -> Builder[models.Panel]:
    """Lines over time; `stacked` where their sum means something."""
    panel = (
        timeseries.Panel()
        .legend(_legend())
        .tooltip(_tooltip())
        .fill_opacity(30 if stacked else 5)
        .show_points(options.VisibilityMode.NEVER)
        .min(0)
    )
    if stacked:
        panel = panel.stacking(common.StackingConfig().mode(options.StackingMode.NORMAL))
    if ceiling is not None:
        panel = panel.max(ceiling)
    for query, name in _lettered(queries):
        panel = panel.with_target(_target(query, name).range())
    return _framed(panel, words, unit, span, _GRAPH_HEIGHT)


def heat(words: Words, unit: str, query: Query, span: int = 8) -> Builder[models.Panel]:
    """A histogram's buckets over time, as colours."""
    colours = heatmap.HeatmapColorOptions().mode(HeatmapColorMode.SCHEME).scheme("Oranges").steps(32)
    axis = heatmap.YAxisConfig().unit(unit)
    target = _target(query, "A").range().format(PromQueryFormat.HEATMAP)
    panel = heatmap.Panel().color(colours).y_axis(axis).with_target(target)
    return _framed(panel, words, unit, span, _GRAPH_HEIGHT)


def timeline(words: Words, names: Sequence[tuple[str, str]], *queries: Query, span: int = 8) -> Builder[models.Panel]:
    """Which of the numbered states (name, colour) each series was in."""
    results = {
        str(value): models.ValueMappingResult(text=text, color=colour, index=value)
        for value, (text, colour) in enumerate(names)
    }
    panel = (
        statetimeline.Panel()
        .mappings([models.ValueMap(options=results)])
        .legend(common.VizLegendOptions().show_legend(False).display_mode(options.LegendDisplayMode.LIST))
        .show_value(options.VisibilityMode.AUTO)
    )
    for query, name in _lettered(queries):
        panel = panel.with_target(_target(query, name).range())
    return _framed(panel, words, "short", span, _GRAPH_HEIGHT)


def row(title: str) -> dashboard.Row:
    return dashboard.Row(title)


def query_variable(name: str, label: str, query: str) -> dashboard.QueryVariable:
    """A choice of one of the values that `query` yields."""
    return (
        dashboard.QueryVariable(name)
        .label(label)
        .datasource(DATASOURCE)
        .query(query)
        .refresh(models.VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(models.VariableSort.NUMERICAL_ASC)
    )


def datasource_variable() -> dashboard.DatasourceVariable:
    return dashboard.DatasourceVariable("datasource").label("Prometheus").type("prometheus")


def _framed(panel: Builder[models.Panel], words: Words, unit: str, span: int, height: int) -> Builder[models.Panel]:
    framed: Builder[models.Panel] = (
        panel.title(words.title)  # type: ignore[attr-defined]
        .description(words.description)
        .datasource(DATASOURCE)
        .unit(unit)
        .span(span)
        .height(height)
    )
    return framed


def _target(query: Query, name: str) -> prometheus.Dataquery:
    target = prometheus.Dataquery().ref_id(name).datasource(DATASOURCE).expr(query.expr)
    if query.legend:
        target = target.legend_format(query.legend)
    return target.interval(query.every) if query.every else target


def _lettered(queries: Sequence[Query]) -> Iterable[tuple[Query, str]]:
    return ((query, chr(ord("A") + index)) for index, query in enumerate(queries))


def _thresholds(steps: Sequence[Step]) -> dashboard.ThresholdsConfig:
    found = [models.Threshold(value=value, color=colour) for value, colour in steps]
    return dashboard.ThresholdsConfig().mode(models.ThresholdsMode.ABSOLUTE).steps(found)


def _legend() -> common.VizLegendOptions:
    """The SDK's default would hide it."""
    return (
        common.VizLegendOptions()
        .show_legend(True)
        .display_mode(options.LegendDisplayMode.LIST)
        .placement(options.LegendPlacement.BOTTOM)
    )


def _tooltip() -> common.VizTooltipOptions:
    return common.VizTooltipOptions().mode(options.TooltipDisplayMode.MULTI).sort(options.SortOrder.DESCENDING)
