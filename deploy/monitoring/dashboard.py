"""The Grafana dashboard: rows, variables, annotations."""

from __future__ import annotations

import json
from typing import Any

from grafana_foundation_sdk.builders.dashboard import Dashboard, DatasourceVariable, QueryVariable, Row
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.dashboard import DashboardCursorSync, VariableOption, VariableRefresh

from deploy.monitoring.panels import SOURCE
from deploy.monitoring.rows import rows

CHANGE = "30s"
"""A replica that was absent this long ago has started."""
ANNOTATIONS = {
    "Replica started": (
        "green",
        f'up{{job="treeline"}} == 1 unless up{{job="treeline"}} offset {CHANGE} == 1',
        "{{service}} {{instance}}",
    ),
    "Replica gone": (
        "orange",
        f'up{{job="treeline"}} offset {CHANGE} == 1 unless up{{job="treeline"}} == 1',
        "{{service}} {{instance}}",
    ),
    "Built-in plan": ("purple", "treeline_plan_version == 0", "{{instance}} has no plan of a planner"),
    "Alert": ("red", 'ALERTS{alertname=~"Treeline.*", alertstate="firing"}', "{{alertname}} {{instance}}"),
}
"""Colour, query and text of each. Plans are made several times a second: only their absence is marked."""


def dashboard() -> str:
    """The dashboard as Grafana reads it, in JSON."""
    replica = QueryVariable("replica").label("Verifier").datasource(SOURCE).multi(True).include_all(True)
    replica.query("label_values(treeline_num_requests_running, instance)").refresh(
        VariableRefresh.ON_TIME_RANGE_CHANGED
    )
    replica.all_value(".*").current(VariableOption(text="All", value="$__all"))
    source = DatasourceVariable("datasource").label("Data source").type("prometheus")
    source.current(VariableOption(text="Prometheus", value="prometheus"))
    board = Dashboard("Treeline").uid("treeline").tags(["treeline"]).refresh("5s").time("now-15m", "now")
    board.description("Traffic, objectives, speculation, step time and planning of all replicas.")
    board.tooltip(DashboardCursorSync.CROSSHAIR).editable().with_variable(source).with_variable(replica)
    for title, panels in rows().items():
        board.with_row(Row(title))
        for panel in panels:
            board.with_panel(panel)
    data = json.loads(JSONEncoder().encode(board.build()))
    data["annotations"] = {"list": [_annotation(name) for name in ANNOTATIONS]}
    return json.dumps(data, indent=1) + "\n"


def _annotation(name: str) -> dict[str, Any]:
    """The builders lack the fields of Prometheus' annotations."""
    colour, expression, text = ANNOTATIONS[name]
    source = {"type": SOURCE.type_val, "uid": SOURCE.uid}
    query = {"expr": expression, "titleFormat": name, "textFormat": text, "step": CHANGE}
    return {"name": name, "enable": True, "iconColor": colour, "datasource": source, **query}
