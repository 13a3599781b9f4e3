"""Traces of requests through the services, for an OpenTelemetry collector. Nothing is imported while tracing is off.

A request's span lives as long as its call, and its parts (queue, prefill, decode) are added when they are known. Spans
name their parents explicitly: a stream's generator may run in several contexts.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from treeline.config import TracingConfig
from treeline.errors import ConfigError

_tracer: Any = None


def configure(config: TracingConfig, service: str) -> None:
    """Send this process's spans to `config.endpoint`, if there is one. OpenTelemetry's own variables apply too.

    Raises:
        ConfigError: OpenTelemetry is not installed.
    """
    if config.endpoint is None:
        return
    try:
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError:
        raise ConfigError("tracing.endpoint needs OpenTelemetry: pip install 'treeline-serve[tracing]'") from None
    use(service, BatchSpanProcessor(OTLPSpanExporter(endpoint=config.endpoint)))


def use(service: str, processor: Any) -> None:
    """Give this process's spans to `processor`, an OpenTelemetry SpanProcessor."""
    global _tracer
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider

    provider = TracerProvider(resource=Resource.create({"service.name": f"treeline-{service}"}))
    provider.add_span_processor(processor)
    _tracer = provider.get_tracer("treeline")


class Span:
    """One service's work on a request. Every method does nothing while tracing is off."""

    def __init__(self, span: Any = None) -> None:
        self._span, self._started_s = span, time.time()

    @property
    def headers(self) -> tuple[tuple[str, str], ...]:
        """`traceparent`, and `tracestate` if there is one: they make another service's spans children of this one."""
        if self._span is None:
            return ()
        from opentelemetry.trace import set_span_in_context
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        headers: dict[str, str] = {}
        TraceContextTextMapPropagator().inject(headers, set_span_in_context(self._span))
        return tuple(headers.items())

    def note(self, fields: Mapping[str, Any]) -> None:
        """Add attributes."""
        if self._span is not None:
            self._span.set_attributes({f"treeline.{name}": value for name, value in fields.items()})

    def part(self, name: str, start_s: float, end_s: float, **fields: Any) -> None:
        """Add a child from `start_s` to `end_s` (Unix time), clipped to this span's start."""
        start_s = max(start_s, self._started_s)
        if self._span is None or end_s <= start_s:
            return
        from opentelemetry.trace import set_span_in_context

        child = _tracer.start_span(name, set_span_in_context(self._span), start_time=_ns(start_s))
        Span(child).note(fields)
        child.end(_ns(end_s))


@contextmanager
def span(name: str, headers: Mapping[str, str | bytes]) -> Iterator[Span]:
    """A span, a child of the caller's if `headers` name one. An exception becomes the span's status."""
    if _tracer is None:
        yield Span()
        return
    from opentelemetry.trace import SpanKind, Status, StatusCode
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    parent = TraceContextTextMapPropagator().extract(headers)
    made = _tracer.start_span(name, parent, SpanKind.SERVER)
    try:
        yield Span(made)
    except (asyncio.CancelledError, GeneratorExit):
        made.set_attribute("treeline.error", "cancelled")
        raise
    except Exception as error:
        made.set_status(Status(StatusCode.ERROR, type(error).__name__))
        raise
    finally:
        made.end()


def _ns(seconds: float) -> int:
    return round(seconds * 1e9)
