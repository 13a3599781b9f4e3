from __future__ import annotations

import json
import threading
import time
import urllib.parse
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from prometheus_client import CollectorRegistry

from planner.signals import Signals, quantile
from treeline.config import MetricsConfig
from treeline.metrics import VerifierMetrics, serve_metrics


class PrometheusApi(BaseHTTPRequestHandler):
    """Answers instant queries as Prometheus does, by a word in the query."""

    def do_GET(self) -> None:
        parsed = urllib.parse.urlsplit(self.path)
        query = urllib.parse.parse_qs(parsed.query)["query"][0]
        self.server.queries.append(query)  # type: ignore[attr-defined]
        if "(0.95" in query:
            result = [{"metric": {}, "value": [1.0, "0.12"]}]
        elif "phase" in query:
            result = [{"metric": {}, "value": [1.0, "NaN"]}]
        elif "running" in query:
            result = [{"metric": {}, "value": [1.0, "3"]}]
        else:
            result = []
        body = json.dumps({"status": "success", "data": {"resultType": "vector", "result": result}}).encode()
        self.send_response(200)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def prometheus() -> Iterator[ThreadingHTTPServer]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), PrometheusApi)
    server.queries = []  # type: ignore[attr-defined]
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


def test_latency_comes_from_the_query_api_for_this_verifier_alone(prometheus):
    signals = Signals(max_age_s=10)
    signals.read_prometheus(f"http://127.0.0.1:{prometheus.server_port}", "host:9400")
    assert signals.get("itl_p95_s") == 0.12
    assert signals.get("running") == 3
    assert signals.get("verify_p50_s") is None, "NaN means that nothing was measured"
    assert signals.get("itl_p50_s") is None
    assert all('instance="host:9400"' in query for query in prometheus.queries)


def test_a_page_of_our_own_gives_what_came_since_the_last_reading():
    registry = CollectorRegistry()
    metrics = VerifierMetrics(registry)
    url = f"http://127.0.0.1:{serve_metrics(registry, MetricsConfig(base_port=0))}/metrics"
    signals = Signals(max_age_s=10)
    metrics.observe_tokens(100, 100 * 1.5)  # long ago, and slow
    signals.read_page(url)
    assert signals.get("itl_p95_s") is None
    metrics.observe_tokens(100, 100 * 0.035)
    metrics.set_load(2, 1, 5, 10, True)
    signals.read_page(url)
    assert 0.03 <= signals.get("itl_p50_s") <= 0.04
    assert signals.get("running") == 2


def test_stale_signals_are_dropped():
    signals = Signals(max_age_s=0.05)
    signals.set("itl_p95_s", 0.1)
    assert signals.get("itl_p95_s") == 0.1
    time.sleep(0.1)
    assert signals.get("itl_p95_s") is None
    assert signals.age_s("itl_p95_s") > 0.05


def test_a_server_that_is_not_there_is_an_error_at_once():
    with pytest.raises(OSError, match="refused"):
        Signals(10).read_prometheus("http://127.0.0.1:9", "x")


def test_a_server_that_is_no_prometheus_is_an_error():
    registry = CollectorRegistry()
    port = serve_metrics(registry, MetricsConfig(base_port=0))
    with pytest.raises(ValueError):  # noqa: PT011 - from the JSON parser, or from us
        Signals(10).read_prometheus(f"http://127.0.0.1:{port}", "x")


def test_quantiles_are_linear_within_a_bucket():
    assert quantile({1.0: 0.0, 2.0: 10.0, float("inf"): 10.0}, 0.5) == pytest.approx(1.5)
    assert quantile({1.0: 0.0, float("inf"): 4.0}, 0.5) == 1.0
    assert quantile({1.0: 0.0, float("inf"): 0.0}, 0.5) is None
    assert quantile({}, 0.5) is None
