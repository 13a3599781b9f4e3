"""The dashboard and the alerts ask for what the services show, in queries that Prometheus answers."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import promql_parser
import pytest
import yaml
from prometheus_client import CollectorRegistry

from deploy.local_prometheus import LocalPrometheus
from deploy.monitoring import __main__ as generated
from planner.service import latency
from tests.deploy.services import Services
from treeline.config import Config, MetricsConfig
from treeline.metrics import VerifierMetrics
from treeline.telemetry.page import serve_metrics

DEPLOY = Path(__file__).parents[2] / "deploy"
DASHBOARD = json.loads((DEPLOY / "grafana/dashboards/treeline.json").read_text())
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
RULES, RECORDING_RULES = (
    group["rules"] for group in yaml.safe_load((DEPLOY / "prometheus/rules.yml").read_text())["groups"]
)
QUERIES = {f"{panel['title']} {target['refId']}": target["expr"] for panel in PANELS for target in panel["targets"]}
ANNOTATIONS = {annotation["name"]: annotation["expr"] for annotation in DASHBOARD["annotations"]["list"]}
ALERTS = {rule["alert"]: rule["expr"] for rule in RULES}
RECORDS = {rule["record"]: rule["expr"] for rule in RECORDING_RULES}
TARGET_LABELS = {"instance", "job", "service"}
"""What Prometheus and the targets file put on every series."""
RATE_INTERVAL = "10s"


def substituted(query: str) -> str:
    query = query.replace("$__rate_interval", RATE_INTERVAL).replace("$replica", ".*")
    assert "$" not in query
    return query


@pytest.fixture(scope="module")
def shown() -> dict[str, dict[str, set[str]]]:
    """Series names of all pages, with the values of each of their labels."""
    services = Services(CollectorRegistry())
    services.work()
    series: dict[str, dict[str, set[str]]] = {}
    for family in services.registry.collect():
        for sample in family.samples:
            labels = series.setdefault(sample.name, {})
            for label, value in sample.labels.items():
                labels.setdefault(label, set()).add(value)
    return series


def parts(expression: Any) -> Iterator[Any]:
    """An expression and all within it."""
    yield expression
    for name in ("expr", "lhs", "rhs", "param", "vector_selector"):
        if (child := getattr(expression, name, None)) is not None and not isinstance(child, str):
            yield from parts(child)
    for child in getattr(expression, "args", ()):
        yield from parts(child)


def unknown(query: str, shown: dict[str, dict[str, set[str]]]) -> list[str]:
    """Names, labels and label values in a query that no page shows."""
    tree = list(parts(promql_parser.parse(substituted(query))))
    selectors = [part for part in tree if isinstance(part, promql_parser.VectorSelector)]
    assert selectors, f"no series in {query}"
    wrong = []
    labels: set[str] = set(TARGET_LABELS)
    for selector in selectors:
        if selector.name not in {*shown, "up"}:
            wrong.append(selector.name)
        has = shown.get(selector.name, {})
        labels |= set(has)
        for matcher in selector.matchers.matchers:
            known = has.get(matcher.name, set())
            if matcher.name not in TARGET_LABELS and known.isdisjoint(matcher.value.split("|")):
                wrong.append(f"{selector.name}{{{matcher.name}={matcher.value}}}")
    for part in tree:
        if isinstance(part, promql_parser.AggregateExpr) and part.modifier:
            wrong += set(part.modifier.labels) - labels
    return wrong


def test_the_planner_asks_for_what_is_recorded_or_shown(shown):
    assert {query for query in latency.QUERIES.values() if query not in shown} == set(RECORDS)
    assert all(f"[{latency.WINDOW_S:g}s]" in expr for expr in RECORDS.values())


@pytest.mark.parametrize(
    "query", [*QUERIES.values(), *ALERTS.values(), *RECORDS.values()], ids=[*QUERIES, *ALERTS, *RECORDS]
)
def test_queries_name_only_what_the_services_show(query, shown):
    assert unknown(query, shown) == []


@pytest.mark.parametrize(
    "query",
    [
        "treeline_no_such_metric",
        "rate(treeline_generation_tokens[$__rate_interval])",
        'treeline_step_phase_seconds_count{phase="lunch"}',
        "sum by (colour) (treeline_steps_total)",
        "1 + sum(treeline_steps_total) / sum(treeline_steps)",
    ],
)
def test_a_wrong_query_would_be_seen(query, shown):
    assert unknown(query, shown)


def test_legends_use_labels_that_the_query_keeps(shown):
    for name, query in QUERIES.items():
        title, _, ref = name.rpartition(" ")
        targets = [t for panel in PANELS if panel["title"] == title for t in panel["targets"] if t["refId"] == ref]
        used = {piece.partition("}}")[0] for piece in targets[0]["legendFormat"].split("{{")[1:]}
        tree = list(parts(promql_parser.parse(substituted(query))))
        aggregates = [part for part in tree if isinstance(part, promql_parser.AggregateExpr)]
        if aggregates:
            kept = set(aggregates[0].modifier.labels if aggregates[0].modifier else ())
        else:
            metrics = [part.name for part in tree if isinstance(part, promql_parser.VectorSelector)]
            kept = TARGET_LABELS | set(shown[metrics[0]])
        assert used <= kept, name


def test_the_dashboard_can_be_provisioned():
    assert DASHBOARD["uid"] == "treeline"
    assert "id" not in DASHBOARD
    variable, replica = DASHBOARD["templating"]["list"]
    assert (variable["name"], variable["type"], variable["query"]) == ("datasource", "datasource", "prometheus")
    assert (replica["name"], replica["allValue"], replica["multi"]) == ("replica", ".*", True)
    assert replica["query"] == "label_values(treeline_num_requests_running, instance)"
    sources = yaml.safe_load((DEPLOY / "grafana/provisioning/datasources/prometheus.yml").read_text())["datasources"]
    assert variable["current"]["value"] == sources[0]["uid"]
    scrape = yaml.safe_load((DEPLOY / "prometheus/prometheus.yml").read_text())["global"]["scrape_interval"]
    assert sources[0]["jsonData"]["timeInterval"] == scrape


def test_what_is_generated_is_current():
    pytest.importorskip("grafana_foundation_sdk", reason="needs grafana-foundation-sdk (tests/deploy/tools.txt)")
    from deploy.monitoring.dashboard import dashboard

    for path, text in ((generated.DASHBOARD, dashboard()), (generated.PROMETHEUS_RULE, generated.prometheus_rule())):
        assert path.read_text() == text, "run `python -m deploy.monitoring`"


def test_every_query_of_a_verifier_follows_the_variable(shown):
    """A panel that did not would mix replicas that were not chosen."""
    verifier_pages = CollectorRegistry()
    VerifierMetrics(verifier_pages)
    series = {family.name for family in verifier_pages.collect()}
    for name, query in QUERIES.items():
        for part in parts(promql_parser.parse(substituted(query))):
            if isinstance(part, promql_parser.VectorSelector):
                of_a_verifier = any(part.name.startswith(stem) for stem in series) and "planner" not in part.name
                assert of_a_verifier == any(m.name == "instance" for m in part.matchers.matchers), name


def test_histograms_are_shown_as_heatmaps():
    heatmaps = [panel for panel in PANELS if panel["type"] == "heatmap"]
    assert len(heatmaps) == 3
    for panel in heatmaps:
        (target,) = panel["targets"]
        assert (target["format"], panel["options"]["calculate"]) == ("heatmap", False)
        assert "_bucket" in target["expr"]


def test_panels_are_complete():
    assert len({panel["title"] for panel in PANELS}) == len(PANELS) > 20
    for panel in PANELS:
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}, panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]
        refs = [target["refId"] for target in panel["targets"]]
        assert len(set(refs)) == len(refs) > 0, panel["title"]
        for target in panel["targets"]:
            assert ("rate(" in target["expr"]) == ("[$__rate_interval]" in target["expr"]), panel["title"]


def test_panels_do_not_overlap():
    boxes = {panel["title"]: SimpleNamespace(**panel["gridPos"]) for panel in DASHBOARD["panels"]}
    assert len(boxes) == len(DASHBOARD["panels"])
    for title, box in boxes.items():
        assert box.x >= 0, title
        assert box.x + box.w <= 24, title
    for (one, a), (two, b) in combinations(boxes.items(), 2):
        apart = a.x + a.w <= b.x or b.x + b.w <= a.x or a.y + a.h <= b.y or b.y + b.h <= a.y
        assert apart, f"{one} and {two}"


@pytest.fixture
def prometheus_folder(tmp_path) -> Path:
    """Prometheus' configuration as its container sees it."""
    for name in ("prometheus.yml", "rules.yml"):
        shutil.copy(DEPLOY / "prometheus" / name, tmp_path)
    return tmp_path


@pytest.mark.skipif(not shutil.which("promtool"), reason="needs promtool")
def test_promtool_accepts_the_configuration(prometheus_folder):
    checked = subprocess.run(
        ["promtool", "check", "config", prometheus_folder / "prometheus.yml"], capture_output=True, text=True
    )
    assert checked.returncode == 0, checked.stderr
    assert f"{len(RULES) + len(RECORDS)} rules found" in checked.stdout


@contextmanager
def targets_page(targets: list[dict[str, Any]]) -> Iterator[str]:
    """A front door's HTTP port, as far as Prometheus sees it; gives "host:port"."""

    class Page(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path == "/targets" else 404)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(json.dumps(targets).encode())

    with HTTPServer(("127.0.0.1", 0), Page) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{server.server_port}"
        server.shutdown()


class Api:
    """Prometheus' query API."""

    def __init__(self, url: str) -> None:
        self._url = f"{url}/api/v1"

    def get(self, path: str, **parameters: str) -> Any:
        with urllib.request.urlopen(f"{self._url}/{path}?{urllib.parse.urlencode(parameters)}", timeout=5) as answer:
            return json.load(answer)["data"]

    def query(self, query: str) -> list[dict[str, Any]]:
        return self.get("query", query=query)["result"]

    def scrapes(self, target: str) -> int:
        """How often the target has answered."""
        try:
            found = self.query(f'sum_over_time(up{{instance="{target}"}}[1m])')
        except OSError:
            return 0
        return int(found[0]["value"][1]) if found else 0


@pytest.mark.skipif(not shutil.which("prometheus"), reason="needs prometheus")
def test_a_real_prometheus_answers_every_query(tmp_path):
    services = Services(CollectorRegistry())
    services.work()
    target = f"127.0.0.1:{serve_metrics(services.registry, MetricsConfig(base_port=0))}"
    prometheus = LocalPrometheus("prometheus")
    api, deadline = Api(prometheus.url), time.monotonic() + 60
    with targets_page([{"targets": [target], "labels": {"service": "verifier"}}]) as front_door:
        prometheus.start(Config(), front_door, tmp_path, tmp_path)
        try:
            while api.scrapes(target) < 4:
                assert time.monotonic() < deadline, (tmp_path / "prometheus.log").read_text()
                services.work()
                time.sleep(0.5)
            answers = {name: api.query(substituted(query)) for name, query in QUERIES.items()}
            marked = {name: api.query(query) for name, query in ANNOTATIONS.items()}
            firing = {alert for alert, query in ALERTS.items() if api.query(query)}
            groups = api.get("rules")["groups"]
            measured = asyncio.run(latency.measure_all(prometheus.url))
        finally:
            prometheus.stop()
    assert [name for name, answer in answers.items() if not answer] == []
    assert marked["Replica started"]
    assert not marked["Replica gone"]
    length = float(answers["Mean acceptance length A"][0]["value"][1])
    assert length == pytest.approx(3.0)  # two of the three nodes, and the target's own token
    depths = {answer["metric"]["position"]: float(answer["value"][1]) for answer in answers["Acceptance by depth A"]}
    assert depths == pytest.approx({"0": 1.0, "1": 0.5})
    assert firing == {"TreelineQueueFull", "TreelineErrors", "TreelinePassesSlow"}  # wrong with the traffic above
    assert {rule["name"] for group in groups for rule in group["rules"]} == ALERTS.keys() | RECORDS.keys()
    assert measured[target].keys() == latency.QUERIES.keys()
    assert measured[target]["inter_token_p95"] == pytest.approx(0.07 / 3, rel=0.15)  # a bucket is as wide
