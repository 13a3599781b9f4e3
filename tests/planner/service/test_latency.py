from __future__ import annotations

import asyncio
import json
import logging
import math
import random
import socket
import socketserver
import threading
import time
import urllib.parse
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import grpc
import pytest
from prometheus_client import CollectorRegistry

from cli.doctor import examine
from planner.service import latency as latency_module
from planner.service import server as server_module
from planner.service.latency import PROMETHEUS, QUERIES, STEPS, Latency, PrometheusError, StepQuantiles, measure_all
from planner.service.loop import PlanMaker, VerifierState
from planner.service.server import PlannerServer
from tests.planner.builders import linear_cost, record
from treeline.config import Config, LimitsConfig, MetricsConfig, ObjectivesConfig, PlannerConfig
from treeline.plan import Plan, VerifierProfile, plan_from_proto, profile_to_proto
from treeline.step_record import step_to_proto
from treeline.telemetry.page import serve_metrics
from treeline.v1 import planning_pb2 as pb
from treeline.v1.planning_pb2_grpc import PlanningServiceStub

VALUES = {"inter_token_p95": "0.12", "time_to_first_token_p95": "NaN", "running": "3"}


class PrometheusApi(BaseHTTPRequestHandler):
    """Answers instant queries as Prometheus does: the values of two replicas."""

    def do_GET(self) -> None:
        query = urllib.parse.parse_qs(urllib.parse.urlsplit(self.path).query)["query"][0]
        self.server.queries.append(query)  # type: ignore[attr-defined]
        (name,) = (name for name, known in QUERIES.items() if known == query)
        value = self.server.values.get(name)  # type: ignore[attr-defined]
        instances = ("host:9400", "host:9401") if value else ()
        result = [{"metric": {"instance": instance}, "value": [1.0, value]} for instance in instances]
        body = json.dumps({"status": "success", "data": {"resultType": "vector", "result": result}}).encode()
        self.send_response(200)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def prometheus() -> Iterator[ThreadingHTTPServer]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), PrometheusApi)
    server.queries, server.values = [], dict(VALUES)  # type: ignore[attr-defined]
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


def url_of(server: ThreadingHTTPServer) -> str:
    return f"http://127.0.0.1:{server.server_port}"


def test_one_query_per_signal_measures_all_replicas(prometheus):
    found = asyncio.run(measure_all(url_of(prometheus)))
    assert found == {host: {"inter_token_p95": 0.12, "running": 3} for host in ("host:9400", "host:9401")}
    assert sorted(prometheus.queries) == sorted(QUERIES.values())


def test_prometheus_counts_while_it_is_fresh_and_step_records_after_that():
    latency = Latency()
    latency.update(PROMETHEUS, {"inter_token_p95": (0.1, 100.0)})
    latency.update(STEPS, {"inter_token_p95": (0.2, 105.0)})
    assert latency.newest("inter_token_p95", 103.0, 10.0) == (0.1, 3.0, PROMETHEUS)
    assert latency.newest("inter_token_p95", 106.0, 10.0) == (0.2, 1.0, STEPS)
    assert latency.newest("inter_token_p95", 116.0, 10.0).value is None
    assert latency.newest("running", 116.0, 10.0).value is None


def test_step_records_give_the_quantiles_of_the_last_seconds_by_token():
    steps = StepQuantiles()
    steps.observe(record(gaps=((9.0, 1),), step_s=9.0), 100.0)
    # 94 tokens after 10 ms each, 6 after 50 ms each.
    steps.observe(record(gaps=((0.94, 94),), step_s=0.01, first_token_s=(0.3, 0.4)), 104.0)
    steps.observe(record(gaps=((0.1, 2),) * 3, step_s=0.05), 105.5)
    assert steps.quantiles(106.0) == {
        "inter_token_p95": (pytest.approx(0.05), 105.5),
        "step_p95": (0.05, 105.5),
        "time_to_first_token_p95": (0.4, 104.0),
    }
    assert steps.quantiles(120.0) == {}


def test_step_records_also_give_the_quantiles_of_each_priority():
    steps = StepQuantiles()
    steps.observe(record(gaps=((0.1, 1),), step_s=0.08, first_token_s=(0.5,)), 100.0)  # none named: priority 0
    steps.observe(
        record(gaps=((0.3, 1), (0.2, 1)), gap_priority=(0, 2), step_s=0.15, first_token_s=(0.7,),
               first_token_priority=(2,)), 101.0)  # fmt: skip
    found = steps.quantiles(102.0, priorities=(0, 2, -1))
    assert found["inter_token_p95"] == found["inter_token_p95_priority_0"] == (0.3, 101.0)
    assert found["inter_token_p95_priority_2"] == (0.2, 101.0)
    assert found["step_p95_priority_2"] == (0.15, 101.0)
    assert found["time_to_first_token_p95_priority_0"] == (0.5, 100.0)
    assert found["time_to_first_token_p95_priority_2"] == (0.7, 101.0)
    assert not any(name.endswith("priority_-1") for name in found)


def problem_of(url: str) -> str:
    with pytest.raises(PrometheusError) as caught:
        asyncio.run(measure_all(url))
    return str(caught.value)


def test_a_server_that_is_not_there_is_named_by_doctor_too():
    assert "cannot be reached" in problem_of("http://127.0.0.1:9")
    config = Config(planner=PlannerConfig(prometheus_url="http://127.0.0.1:9"))
    fine, _, said = next(found for found in examine(config) if found[1] == "prometheus")
    assert not fine
    assert "cannot be reached" in said


def test_a_server_that_is_no_prometheus_is_named():
    registry = CollectorRegistry()
    port = serve_metrics(registry, MetricsConfig(base_port=0))
    assert "answers 404" in problem_of(f"http://127.0.0.1:{port}")


@pytest.mark.parametrize("value", ["-1", "Infinity", "-Infinity"])
def test_an_impossible_value_is_named(prometheus, value):
    prometheus.values["inter_token_p95"] = value
    assert "impossible inter_token_p95" in problem_of(url_of(prometheus))


def busy_plans(url: str, seconds: float, during: Callable[[list[Plan]], None]) -> list[Plan]:
    """The plans of a verifier that works while a planner asks `url`; `during` is called after each of them."""

    async def scenario() -> list[Plan]:
        objectives = ObjectivesConfig(inter_token_p95_ms=100)
        planner = PlannerConfig(prometheus_url=url, interval_s=0.05, signal_max_age_s=0.3, objectives=objectives)
        running = await PlannerServer.start(Config(planner=planner, metrics=MetricsConfig(base_port=0)))
        profile, plans = profile_to_proto(VerifierProfile(linear_cost().verify)), list[Plan]()

        async def reports():
            yield pb.ReportStepsRequest(verifier_id="v", metrics_url="http://host:9400/metrics", profile=profile)
            while True:
                await asyncio.sleep(0.02)
                step = step_to_proto(record(unix_s=time.time(), gaps=((0.05, 1),), step_s=0.05))
                yield pb.ReportStepsRequest(verifier_id="v", steps=[step])

        async with grpc.aio.insecure_channel(running.endpoint) as channel:
            stub = PlanningServiceStub(channel)
            call = asyncio.create_task(stub.ReportSteps(reports()).wait_for_connection())
            until_s = time.monotonic() + seconds
            async for message in stub.WatchPlan(pb.WatchPlanRequest(verifier_id="v")):
                plans.append(plan_from_proto(message.plan))
                during(plans)
                if time.monotonic() > until_s:
                    break
            call.cancel()
        await running.stop()
        return plans

    return asyncio.run(scenario())


def test_plans_follow_prometheus_and_fall_back_to_step_records_and_say_so_once(prometheus, monkeypatch, caplog):
    monkeypatch.setattr(server_module, "LATENCY_INTERVAL_S", 0.05)
    monkeypatch.setattr(latency_module, "WINDOW_S", 0.2)
    monkeypatch.setattr(latency_module, "LATE_S", 0.3)
    monkeypatch.setattr(server_module, "PROBLEM_S", 0.3)
    gone = time.monotonic() + 1.5

    def during(plans: list[Plan]) -> None:
        if time.monotonic() > gone:
            prometheus.values.clear()

    with caplog.at_level(logging.WARNING, "planner.service.server"):
        plans = busy_plans(url_of(prometheus), 3.5, during)
    sources = [plan.signals[0].source for plan in plans if plan.signals[0].value_s is not None]
    assert sources.index("prometheus") < len(sources) - 1
    assert sources[-1] == "steps"
    over = [plan for plan in plans if plan.signals[0].source == "prometheus" and plan.step_budget_s < 1]
    assert over, "120 ms between tokens are above the objective of 100"
    assert plans[-1].signals[0].value_s == pytest.approx(0.05)
    assert len([r for r in caplog.records if "has no latency of a busy verifier" in r.message]) == 1


def test_a_prometheus_that_starts_after_the_planner_is_no_problem(monkeypatch, caplog):
    monkeypatch.setattr(server_module, "LATENCY_INTERVAL_S", 0.05)
    busy_plans("http://127.0.0.1:9", 0.5, lambda plans: None)
    assert not [line for line in caplog.messages if "Prometheus" in line]


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
    with answering(answer) as url:
        assert "did not answer in 0.2 s" in problem_of(url)


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
    b"HTTP/1.0 200 OK\r\n\r\n" + b"[" * 100_000,
    b'HTTP/1.0 200 OK\r\n\r\n{"data": {"result": [{"metric": {"instance": "a"}, "value": [1, ' + b"9" * 400 + b"]}]}}",
]


@pytest.mark.parametrize("sent", NONSENSE)
def test_nonsense_is_named(sent):
    with answering(lambda connection: connection.sendall(sent)) as url:
        problem_of(url)


class Answer:
    """What aiohttp gives for a response of 200 with this body, in the form in which `_query` reads it."""

    status = 200

    def __init__(self, body: bytes) -> None:
        self._body = body
        self.content = self

    async def iter_any(self) -> AsyncIterator[bytes]:
        yield self._body

    async def __aenter__(self) -> Answer:
        return self

    async def __aexit__(self, *_: object) -> None:
        pass


def test_mutated_answers_are_read_or_named():
    """Each value replaced by any other, and bytes by others: numbers in range or PrometheusError, nothing else."""
    rng, refused = random.Random(0), 0
    odd = [None, True, -1, 10**400, 1.5, "", "NaN", "x", "9" * 5000, [], [[1, "2"]], {}, {"instance": [1]}]

    def spoilt(value: object) -> object:
        if rng.random() < 0.08:
            return rng.choice(odd)
        if isinstance(value, dict):
            return {key: spoilt(one) for key, one in value.items() if rng.random() > 0.02}
        return [spoilt(one) for one in value] if isinstance(value, list) else value

    series = [{"metric": {"instance": f"host:{port}"}, "value": [1.0, "0.5"]} for port in (9400, 9401)]
    whole = {"status": "success", "data": {"resultType": "vector", "result": series}}
    for _ in range(500):
        body = bytearray(json.dumps(spoilt(whole)).encode())
        if rng.random() < 0.5:
            body[rng.randrange(len(body))] = rng.randrange(256)
        session = SimpleNamespace(get=lambda *_, **__: Answer(bytes(body)))  # noqa: B023
        try:
            found = asyncio.run(latency_module.read_prometheus(session, "http://x"))
        except PrometheusError:
            refused += 1
            continue
        for instance, values in found.items():
            assert isinstance(instance, str)
            assert all(0 <= value < math.inf for value in values.values())
    assert 50 < refused < 450, "some are refused, some are not"


def test_measured_latency_stands_in_for_missing_records_within_bounds():
    """Records have stopped, requests still run, and verification is said to take a thousand times as long."""
    maker = PlanMaker(LimitsConfig(), PlannerConfig())
    now_s = 1000.0
    state = VerifierState(VerifierProfile(linear_cost().verify), "", lambda: now_s)
    state.observe(record(unix_s=time.time() - 60, predicted_verify_s=0.031))
    before = maker.make(state).cost.verify_scale
    state.latency.update(PROMETHEUS, {"verify_p50": (31.0, now_s), "running": (1.0, now_s)})
    after = maker.make(state).cost.verify_scale
    assert before < after < 1.1 * before
    now_s += 20
    assert maker.make(state).cost.verify_scale == after, "what is stale counts no more"
