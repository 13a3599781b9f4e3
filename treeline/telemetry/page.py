"""A process's metrics page: /metrics for Prometheus, /healthz for probes, and nothing else."""

from __future__ import annotations

import errno
from collections.abc import Iterable
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Info, Metric, ProcessCollector, start_http_server
from prometheus_client.registry import Collector

from treeline import __version__
from treeline.config import MetricsConfig
from treeline.errors import ConfigError
from treeline.rpc.tokens import TokenFile

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

PORTS_TRIED = 64


def new_registry() -> CollectorRegistry:
    """A registry with what every service shows: `treeline_build_info`, and the process's memory, CPU time and files."""
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    Info("treeline_build", "What runs", registry=registry).info({"version": __version__})
    return registry


def labelled(registry: CollectorRegistry, **labels: str) -> CollectorRegistry:
    """The same series, each with `labels` added."""
    page = CollectorRegistry()
    page.register(_Labelled(registry, labels))
    return page


class _Labelled(Collector):
    def __init__(self, registry: CollectorRegistry, labels: dict[str, str]) -> None:
        self._registry, self._labels = registry, labels

    def collect(self) -> Iterable[Metric]:
        for metric in self._registry.collect():
            metric.samples = [sample._replace(labels=sample.labels | self._labels) for sample in metric.samples]
            yield metric


def serve_metrics(registry: CollectorRegistry, config: MetricsConfig) -> int:
    """Serve the page on the first free port from `config.base_port` on (0: any free port). Returns the port.

    Raises:
        ConfigError: none of them is free, or the token file cannot be read.
    """
    tokens = TokenFile(config.token_file) if config.token_file else None
    ports = range(config.base_port, config.base_port + PORTS_TRIED) if config.base_port else [0]
    for port in ports:
        try:
            server, _ = start_http_server(port, config.host, registry)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise ConfigError(f"cannot serve metrics on {config.host}:{port}: {error.strerror}") from None
        else:
            if page := server.get_app():
                server.set_app(_routes(page, tokens))
            return server.server_port
    raise ConfigError(f"no free port for metrics in {config.base_port}..{config.base_port + PORTS_TRIED - 1}")


def _routes(page: WSGIApplication, tokens: TokenFile | None) -> WSGIApplication:
    """`page` at /metrics, which needs a token if there are `tokens`. A probe needs none."""

    def answer(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        def say(status: str, text: bytes, *headers: tuple[str, str]) -> Iterable[bytes]:
            start_response(status, [("Content-Type", "text/plain"), *headers])
            return [text]

        path = environ.get("PATH_INFO")
        if path == "/healthz":
            return say("200 OK", b"alive\n")
        if path != "/metrics":
            return say("404 Not Found", b"there are /metrics and /healthz\n")
        if tokens is not None and tokens.client(environ.get("HTTP_AUTHORIZATION", "")) is None:
            return say("401 Unauthorized", b"a valid bearer token is needed\n", ("WWW-Authenticate", "Bearer"))
        return page(environ, start_response)

    return answer
