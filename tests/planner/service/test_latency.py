from __future__ import annotations

import asyncio
import json
import socket
import socketserver
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import grpc
import pytest
from prometheus_client import CollectorRegistry

from planner.service import latency as latency_module
from planner.service import server as server_module
from planner.service.latency import Latency, read_prometheus
from planner.service.loop import PlanMaker, VerifierState
from planner.service.server import PlannerServer
from tests.planner.builders import linear_cost, record
from treeline.config import Config, LimitsConfig, MetricsConfig, PlannerConfig
from treeline.metrics import serve_metrics
from treeline.plan import VerifierProfile
from treeline.plan_wire import profile_to_proto
from treeline.v1 import planning_pb2 as pb
from treeline.v1.planning_pb2_grpc import PlanningServiceStub


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
    found = read_prometheus(f"http://127.0.0.1:{prometheus.server_port}", "host:9400")
    assert found == {"itl_p95_s": 0.12, "running": 3}, "NaN means that nothing was measured"
    assert all('instance="host:9400"' in query for query in prometheus.queries)


def test_stale_values_are_dropped():
    latency = Latency(max_age_s=0.05)
    latency.update({"itl_p95_s": 0.1})
    assert latency.get("itl_p95_s") == 0.1
    time.sleep(0.1)
    assert latency.get("itl_p95_s") is None
    assert latency.age_s("itl_p95_s") > 0.05


def test_the_planner_takes_measurements_in_on_its_event_loop_alone(prometheus, monkeypatch):
    """A thread waits for Prometheus; another one must not write what plans are made from."""
    taken: list[int] = []
    monkeypatch.setattr(Latency, "update", lambda self, values: taken.append(threading.get_ident()))
    monkeypatch.setattr(server_module, "LATENCY_INTERVAL_S", 0.02)

    async def scenario() -> None:
        planner = PlannerConfig(prometheus_url=f"http://127.0.0.1:{prometheus.server_port}")
        running = await PlannerServer.start(Config(planner=planner, metrics=MetricsConfig(base_port=0)))
        profile = profile_to_proto(VerifierProfile(linear_cost().verify))
        hello = pb.ReportStepsRequest(verifier_id="v1", metrics_url="http://host:9400/metrics", profile=profile)
        async with grpc.aio.insecure_channel(running.endpoint) as channel:
            await PlanningServiceStub(channel).ReportSteps(iter([hello]))
        deadline_s = time.monotonic() + 5
        while not taken and time.monotonic() < deadline_s:
            await asyncio.sleep(0.01)
        await running.stop()

    asyncio.run(scenario())
    assert {*taken} == {threading.get_ident()}


def test_a_server_that_is_not_there_is_an_error_at_once():
    with pytest.raises(OSError, match="refused"):
        read_prometheus("http://127.0.0.1:9", "x")


def test_a_server_that_is_no_prometheus_is_an_error():
    registry = CollectorRegistry()
    port = serve_metrics(registry, MetricsConfig(base_port=0))
    with pytest.raises(ValueError):  # noqa: PT011 - from the JSON parser, or from us
        read_prometheus(f"http://127.0.0.1:{port}", "x")


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
def test_a_slow_server_is_given_up(monkeypatch, answer):
    monkeypatch.setattr(latency_module, "TIMEOUT_S", 0.2)
    with answering(answer) as url, pytest.raises(OSError, match=r"timed out|did not answer"):
        read_prometheus(url, "x")


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
def test_nonsense_is_one_of_two_errors(sent):
    with (
        answering(lambda connection: connection.sendall(sent)) as url,
        pytest.raises((OSError, ValueError)),
    ):
        read_prometheus(url, "x")


@pytest.mark.parametrize("value", ["Infinity", "-Infinity", "NaN"])
def test_what_is_no_number_is_no_measurement(value):
    sent = b'HTTP/1.0 200 OK\r\n\r\n{"data": {"result": [{"value": [1, "%s"]}]}}' % value.encode()
    with answering(lambda connection: connection.sendall(sent)) as url:
        assert read_prometheus(url, "x") == {}


def test_measured_latency_stands_in_for_missing_records_within_bounds():
    """Records have stopped, requests still run, and verification is said to take a thousand times as long."""
    maker = PlanMaker(LimitsConfig(), PlannerConfig())
    state = VerifierState(VerifierProfile(linear_cost().verify), "", Latency(10))
    state.observe(record(unix_s=time.time() - 60, predicted_verify_s=0.031))
    before = maker.make(state).cost.verify_scale
    state.latency.update({"verify_p50_s": 31.0, "running": 1.0})
    after = maker.make(state).cost.verify_scale
    assert before < after < 1.1 * before
    state.latency = Latency(0.0)
    state.latency.update({"verify_p50_s": 31.0, "running": 1.0})
    assert maker.make(state).cost.verify_scale == after
