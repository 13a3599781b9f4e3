"""Queries and panels of the dashboard: shorthand for Grafana's builders."""

from __future__ import annotations

from typing import Any

from grafana_foundation_sdk.builders import common, dashboard, heatmap, prometheus, stat, timeseries
from grafana_foundation_sdk.models import common as enums
from grafana_foundation_sdk.models.dashboard import (
    DataSourceRef,
    Threshold,
    ThresholdsMode,
    ValueMap,
    ValueMappingResult,
)
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

SOURCE = DataSourceRef("prometheus", "${datasource}")
ON = 'instance=~"$replica"'
"""Verifiers chosen by the variable. Pages of other services are other instances."""
HEIGHT = 7
TOKENS_PER_S = "suffix: tok/s"
Queries = dict[str, str]
"""PromQL by legend."""


def rate(series: str, labels: str = ON) -> str:
    return f"rate({series}{{{labels}}}[$__rate_interval])" if labels else f"rate({series}[$__rate_interval])"


def total(series: str, labels: str = ON, by: str = "") -> str:
    return f"sum by ({by}) ({rate(series, labels)})" if by else f"sum({rate(series, labels)})"


def mean(series: str, by: str = "") -> str:
    """Mean of a histogram."""
    return f"{total(f'{series}_sum', by=by)} / {total(f'{series}_count', by=by)}"


def quantiles(series: str, *percents: int, labels: str = ON) -> Queries:
    buckets = total(f"{series}_bucket", labels, by="le")
    return {f"p{percent}": f"histogram_quantile({percent / 100:g}, {buckets})" for percent in percents}


def lines(
    title: str, unit: str, queries: Queries, text: str = "", width: int = 8, least: float = 0, most: float | None = None
) -> timeseries.Panel:
    panel = _filled(timeseries.Panel(), title, unit, width, queries, text).min(least)
    return panel if most is None else panel.max(most)


def stacked(panel: timeseries.Panel) -> timeseries.Panel:
    return panel.fill_opacity(40).stacking(common.StackingConfig().mode(enums.StackingMode.NORMAL))


def marked(panel: timeseries.Panel, *values: float) -> timeseries.Panel:
    """The same panel with a dashed line at each warning threshold."""
    style = common.GraphThresholdsStyleConfig().mode(enums.GraphThresholdsStyleMode.DASHED)
    return panel.thresholds(_thresholds(("green", "orange", "red"), values)).thresholds_style(style)


def heat(title: str, unit: str, series: str, text: str = "") -> heatmap.Panel:
    """How often each bucket of a histogram was hit, over time."""
    queries = {"{{le}}": total(f"{series}_bucket", by="le")}
    return _filled(heatmap.Panel(), title, unit, 8, queries, text, PromQueryFormat.HEATMAP).calculate(False)


def state(title: str, queries: Queries, words: tuple[str, str], good: int, text: str = "") -> stat.Panel:
    """A series of zeros and ones, in words."""
    options = {str(i): ValueMappingResult(words[i], "green" if i == good else "red") for i in (0, 1)}
    return _last(title, queries, text).mappings([ValueMap(options)])


def needed(title: str, queries: Queries) -> stat.Panel:
    """A number that should not be 0."""
    return _last(title, queries, "").decimals(0).thresholds(_thresholds(("red", "green"), (1,)))


def _last(title: str, queries: Queries, text: str) -> stat.Panel:
    newest = common.ReduceDataOptions().calcs(["lastNotNull"])
    return _filled(stat.Panel(), title, "none", 4, queries, text).reduce_options(newest)


def _thresholds(colours: tuple[str, ...], values: tuple[float, ...]) -> dashboard.ThresholdsConfig:
    """The first colour below the first value, the next one from there on, and so forth."""
    steps = [Threshold(value, colour) for value, colour in zip((None, *values), colours, strict=False)]
    return dashboard.ThresholdsConfig().mode(ThresholdsMode.ABSOLUTE).steps(steps)


def _filled(panel: Any, title: str, unit: str, width: int, queries: Queries, text: str, form: Any = None) -> Any:
    panel.title(title).unit(unit).span(width).height(HEIGHT).datasource(SOURCE)
    if text:
        panel.description(text)
    for ref, (legend, expression) in zip("ABCDEF", queries.items(), strict=False):
        query = prometheus.Dataquery().ref_id(ref).expr(expression).legend_format(legend)
        panel.with_target(query.format(form) if form else query)
    return panel
