"""The clients' port: a gRPC server with TLS, tokens, health checks and metrics over `FrontDoor`. Imports no torch."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from contextlib import AsyncExitStack
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2

from front_door.access import AccessLog
from front_door.clients import Clients, address_of
from front_door.http.server import HttpServer
from front_door.routing import VerifierPool
from front_door.service import FrontDoor
from front_door.silent_streams import MAX_SILENT, MAX_WATCHES, StreamLimits
from treeline.config import Config
from treeline.metrics import FrontDoorMetrics
from treeline.rpc.channels import Discover, DiscoverPages, add_standard_services, bind, new_server
from treeline.rpc.interceptors import SERVICE, CallInterceptor
from treeline.rpc.tokens import TOKEN_NEEDED, TokenFile
from treeline.telemetry.page import new_registry, serve_metrics
from treeline.v1.generation_pb2_grpc import add_GenerationServiceServicer_to_server

logger = logging.getLogger(__name__)

EXTRA_RPCS = 256
"""Calls allowed in addition to open generation requests: health checks, load, aborts."""
SERVING_CHECK_INTERVAL_S = 0.1
HEALTH_TIMEOUT_S = 1.0
"""Limit for telling health watchers of a stop: one of them may not read."""
QUIET_TURNS, QUIET_TURN_S = 10, 0.01
"""Quiet round trips to wait for before a stop. gRPC's core ends calls that reach a stopping server with CANCELLED,
which clients need not retry, so late callers get UNAVAILABLE first. The wait is split into turns, as a busy machine may
halt this process for longer than all of them while calls pile up."""
NOTICE_S = 1.0
"""Longest such wait: there may always be another call."""


async def no_pages() -> dict[str, list[str]]:
    return {}


class FrontDoorServer:
    """One front door. Verifiers may come and go; while there is none, calls get UNAVAILABLE.

    Attributes:
        endpoint: "host:port" of the clients' port.
        metrics_port: port of /metrics.
        http: the HTTP port; None if it is not enabled.
    """

    def __init__(
        self,
        server: grpc.aio.Server,
        endpoint: str,
        metrics_port: int,
        door: FrontDoor,
        health_servicer: health.aio.HealthServicer,
        showing: asyncio.Task[None],
        http: HttpServer | None,
    ) -> None:
        self.endpoint, self.metrics_port, self.http = endpoint, metrics_port, http
        self._server, self._door, self._health, self._showing = server, door, health_servicer, showing

    @classmethod
    async def start(cls, config: Config, verifiers: Discover, pages: DiscoverPages = no_pages) -> FrontDoorServer:
        """A front door that listens.

        `pages`: finds the metrics pages ("host:port") of all replicas, by service.

        Raises:
            ConfigError: the port is taken, or a certificate or token file cannot be read.
        """
        registry = new_registry()
        metrics, access = FrontDoorMetrics(registry), AccessLog()
        generating = config.limits.max_running_requests + config.limits.max_waiting_requests
        calls = generating * config.verifier.resources.most_replicas + EXTRA_RPCS

        def refused(method: str, context: Any) -> None:
            for observer in (metrics, access):
                observer.started(method)
            metrics.handled(method, "UNAUTHENTICATED", 0.0)
            access.handled(method, "UNAUTHENTICATED", 0.0, TOKEN_NEEDED, address=address_of(context))

        server = new_server(
            config.server,
            config.limits.max_message_bytes,
            refused=refused,
            interceptors=[StreamLimits(), CallInterceptor(metrics, access)],
            max_concurrent_rpcs=calls + MAX_SILENT + MAX_WATCHES,
        )
        health_servicer = await add_standard_services(server, SERVICE)

        polled = asyncio.Event()

        def on_poll(serving: int) -> None:
            metrics.verifiers.set(serving)
            polled.set()

        async def show_health() -> None:
            status = health_pb2.HealthCheckResponse
            for service in ("", SERVICE):
                await health_servicer.set(service, status.SERVING if pool.serving else status.NOT_SERVING)

        async def keep_health_shown() -> None:
            """Runs apart from the polls: a health watcher that does not read makes `set` wait."""
            while True:
                await polled.wait()
                polled.clear()
                await show_health()

        endpoint = bind(server, config.server, config.server.port)
        tokens = TokenFile(config.server.token_file) if config.server.token_file else None
        async with AsyncExitStack() as if_it_fails:
            pool = await VerifierPool.start(config, verifiers, on_poll)
            if_it_fails.push_async_callback(pool.stop)
            await show_health()
            showing = asyncio.create_task(keep_health_shown(), name="front-door-health")
            if_it_fails.callback(showing.cancel)
            door = FrontDoor(pool, Clients(tokens), config.server.resume_wait_s, config.logging.prompts)
            add_GenerationServiceServicer_to_server(door, server)
            await server.start()
            if_it_fails.push_async_callback(server.stop, None)
            http = None
            if config.server.http.enabled:
                http = await HttpServer.start(
                    config.server, config.limits.max_message_bytes, door, tokens, registry, pages, access
                )
                if_it_fails.push_async_callback(http.stop, 0)
            metrics_port = serve_metrics(registry, config.metrics)
            if_it_fails.pop_all()
        logger.info("front door at %s, HTTP port %s", endpoint, http.port if http else "off")
        return cls(server, endpoint, metrics_port, door, health_servicer, showing, http)

    async def until_serving(self) -> None:
        """Wait until there is a verifier to forward to."""
        while not self._door.pool.serving:
            await asyncio.sleep(SERVING_CHECK_INTERVAL_S)

    async def check(self) -> None:
        """Raise RuntimeError if this front door can no longer forward. Having no verifier does not count."""
        self._door.pool.check()

    async def stop(self, grace_s: float = 5) -> None:
        """Report NOT_SERVING, refuse new requests, let running ones end within `grace_s`."""
        self._door.draining = True
        self._showing.cancel()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._health.enter_graceful_shutdown(), HEALTH_TIMEOUT_S)
        await self._until_nobody_calls(min(grace_s, NOTICE_S))
        await asyncio.gather(self._server.stop(grace_s), *([self.http.stop(grace_s)] if self.http else []))
        await self._door.pool.stop()

    async def _until_nobody_calls(self, within_s: float) -> None:
        deadline_s, quiet_turns = time.monotonic() + within_s, 0
        while quiet_turns < QUIET_TURNS and time.monotonic() < deadline_s:
            turned_away = self._door.turned_away
            await asyncio.sleep(QUIET_TURN_S)
            quiet_turns = quiet_turns + 1 if self._door.turned_away == turned_away else 0
