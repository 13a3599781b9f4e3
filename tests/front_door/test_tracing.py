"""A request's trace: from the caller's own span through front door and verifier to queue, prefill and decode."""

import asyncio
import time

import grpc
import pytest
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from tests.front_door.doors import with_front_door
from tests.front_door.http.calling import HELLO, post
from tests.verifier_svc.fake_engine import FakeEngine
from tests.verifier_svc.service.test_service import collect, failure, request
from treeline.config import TracingConfig
from treeline.errors import QueueFullError
from treeline.telemetry import tracing

TRACE = "0af7651916cd43dd8448eb211c80319c"
PARENT = "b7ad6b7169203331"
HEADERS = {"traceparent": f"00-{TRACE}-{PARENT}-01"}


@pytest.fixture
def spans(monkeypatch):
    """Those that have ended, by name."""
    monkeypatch.setattr(tracing, "_tracer", None)
    exporter = InMemorySpanExporter()
    tracing.use("test", SimpleSpanProcessor(exporter))
    return lambda: {span.name: span for span in exporter.get_finished_spans()}


def over_http(s):
    body = {"model": "fake", "messages": HELLO, "max_tokens": 6}
    return asyncio.to_thread(post, s.door.http.port, "/v1/chat/completions", body, HEADERS)


def over_grpc(s):
    return collect(s.stub.Generate(request(), metadata=tuple(HEADERS.items())))


@pytest.mark.parametrize("ask", [over_http, over_grpc])
def test_a_trace_goes_on_through_all_services(spans, ask):
    with_front_door(ask, FakeEngine(step_s=0.02))
    found = spans()
    assert {f"{span.context.trace_id:032x}" for span in found.values()} == {TRACE}
    door, verifier = found["generate"], found["verify"]
    assert f"{door.parent.span_id:016x}" == PARENT
    assert verifier.parent.span_id == door.context.span_id
    for part in ("queue", "prefill", "decode"):
        assert found[part].parent.span_id == verifier.context.span_id
        assert verifier.start_time <= found[part].start_time < found[part].end_time <= verifier.end_time
    assert found["decode"].attributes["treeline.steps"] == 3
    assert door.attributes["treeline.policy"] == verifier.attributes["treeline.policy"] == "smart"
    assert door.attributes["treeline.request_id"] == verifier.attributes["treeline.request_id"]
    assert "treeline.prompt" not in door.attributes


def test_a_failure_is_the_spans_status(spans):
    async def scenario(s):
        await failure(s.stub.Generate(request()))

    with_front_door(scenario, FakeEngine(fail=QueueFullError("no")))
    assert not spans()["generate"].status.is_ok
    assert spans()["verify"].status.description == "QueueFullError"


def test_spans_reach_a_collector(monkeypatch):
    monkeypatch.setattr(tracing, "_tracer", None)

    class Collector(trace_service_pb2_grpc.TraceServiceServicer):
        async def Export(self, request, context):
            received.set_result(request)
            return trace_service_pb2.ExportTraceServiceResponse()

    async def run():
        nonlocal received
        received = asyncio.get_running_loop().create_future()
        server = grpc.aio.server()
        trace_service_pb2_grpc.add_TraceServiceServicer_to_server(Collector(), server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        tracing.configure(TracingConfig(endpoint=f"http://127.0.0.1:{port}"), "verifier")
        with tracing.span("generate", {}) as span:
            span.part("decode", time.time(), time.time() + 1)
        provider = tracing._tracer.span_processor
        await asyncio.to_thread(provider.force_flush)
        exported = await asyncio.wait_for(received, 5)
        await server.stop(None)
        return exported.resource_spans[0]

    received = None
    resource = asyncio.run(run())
    assert "treeline-verifier" in str(resource.resource)
    assert [span.name for span in resource.scope_spans[0].spans] == ["decode", "generate"]


def test_nothing_is_imported_or_sent_while_tracing_is_off(monkeypatch):
    monkeypatch.setattr(tracing, "_tracer", None)
    tracing.configure(TracingConfig(), "verifier")
    with tracing.span("generate", HEADERS) as span:
        span.note({"x": 1})
        assert span.headers == ()
