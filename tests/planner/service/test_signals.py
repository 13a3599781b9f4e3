from __future__ import annotations

import json
import socket
import socketserver
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from prometheus_client import CollectorRegistry

from planner.service import signals as signals_module
from planner.service.loop import PlanMaker, VerifierState
from planner.service.signals import Signals, quantile
from tests.planner.builders import linear_cost, record
from treeline.config import LimitsConfig, MetricsConfig, PlannerConfig
from treeline.metrics import VerifierMetrics, serve_metrics
from treeline.plan import VerifierProfile


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


@contextmanager
def answering(answer: Callable[[socket.socket], None]) -> Iterator[str]:
    """A server that treats every connection as `answer` does, once it has read the request."""

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            self.request.recv(65536)
            with suppress(OSError):  # the client may have gone
                answer(self.request)

    server = socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def silent(connection: socket.socket) -> None:
    time.sleep(3)


def dripping(connection: socket.socket) -> None:
    connection.sendall(b"HTTP/1.0 200 OK\r\n\r\n")
    for _ in range(60):
        connection.sendall(b" ")
        time.sleep(0.05)


@pytest.mark.parametrize("answer", [silent, dripping])
@pytest.mark.parametrize("read", [lambda s, url: s.read_prometheus(url, "x"), lambda s, url: s.read_page(url)])
def test_a_slow_server_is_given_up(monkeypatch, answer, read):
    monkeypatch.setattr(signals_module, "TIMEOUT_S", 0.2)
    signals = Signals(10)
    with answering(answer) as url, pytest.raises(OSError, match=r"timed out|did not answer"):
        read(signals, url)
    assert signals.get("itl_p95_s") is None


NONSENSE = [
    b"",
    b"\x00\xff\xfe nonsense\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\nshort",
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    b"HTTP/1.0 503 Busy\r\n\r\n",
    b"HTTP/1.0 200 OK\r\n\r\n<html>",
    b"HTTP/1.0 200 OK\r\n\r\n[]",
    b'HTTP/1.0 200 OK\r\n\r\n{"data": {"result": [{"value": [1, "much"]}]}}',
    b'HTTP/1.0 200 OK\r\n\r\n{"data": {"result": [{"value": "x"}]}}',
    b"HTTP/1.0 200 OK\r\n\r\n\xff\xfe{",
]


@pytest.mark.parametrize("sent", NONSENSE)
@pytest.mark.parametrize("read", [lambda s, url: s.read_prometheus(url, "x"), lambda s, url: s.read_page(url)])
def test_nonsense_is_one_of_two_errors_and_sets_nothing(sent, read):
    signals = Signals(10)
    with answering(lambda connection: connection.sendall(sent)) as url, suppress(OSError, ValueError):
        read(signals, url)
    assert all(signals.get(name) is None for name in ("itl_p50_s", "itl_p95_s", "verify_p50_s", "running"))


@pytest.mark.parametrize("value", ["Infinity", "-Infinity", "NaN"])
def test_what_is_no_number_is_no_signal(value):
    sent = b'HTTP/1.0 200 OK\r\n\r\n{"data": {"result": [{"value": [1, "%s"]}]}}' % value.encode()
    signals = Signals(10)
    with answering(lambda connection: connection.sendall(sent)) as url:
        signals.read_prometheus(url, "x")
    assert signals.get("itl_p95_s") is None


def test_measured_latency_stands_in_for_missing_records_within_bounds():
    """Records have stopped, requests still run, and verification is said to take a thousand times as long."""
    state, maker = VerifierState(VerifierProfile(linear_cost().verify), ""), PlanMaker(LimitsConfig(), PlannerConfig())
    state.observe(record(unix_s=time.time() - 60, predicted_verify_s=0.031))
    signals = Signals(10)
    before = maker.make(state, signals).cost.verify_scale
    signals.set("verify_p50_s", 31.0)
    signals.set("running", 1.0)
    after = maker.make(state, signals).cost.verify_scale
    assert before < after < 1.1 * before
    stale = Signals(0.0)
    stale.set("verify_p50_s", 31.0)
    stale.set("running", 1.0)
    assert maker.make(state, stale).cost.verify_scale == after


def test_quantiles_are_linear_within_a_bucket():
    assert quantile({1.0: 0.0, 2.0: 10.0, float("inf"): 10.0}, 0.5) == pytest.approx(1.5)
    assert quantile({1.0: 0.0, float("inf"): 4.0}, 0.5) == 1.0
    assert quantile({1.0: 0.0, float("inf"): 0.0}, 0.5) is None
    assert quantile({}, 0.5) is None
