"""The planner service: step records in, plans out."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import urllib.parse
from collections.abc import AsyncIterator

import grpc
from grpc_health.v1 import health
from prometheus_client import CollectorRegistry

from planner.service.client import MAX_MESSAGE_BYTES
from planner.service.loop import PlanMaker, VerifierState
from planner.service.signals import Signals
from treeline.config import Config, PlannerConfig
from treeline.metrics import PlannerMetrics, serve_metrics
from treeline.plan import Plan
from treeline.plan_wire import plan_to_proto, profile_from_proto, step_from_proto
from treeline.rpc import add_standard_services, bind, new_server
from treeline.v1 import planning_pb2 as pb
from treeline.v1 import planning_pb2_grpc as pb_grpc

logger = logging.getLogger(__name__)

SERVICE = pb.DESCRIPTOR.services_by_name["PlanningService"].full_name
SIGNAL_INTERVAL_S = 1.0
PAGE_INTERVAL_S = 4.0
"""A verifier's own page takes it and the planner some ten milliseconds each, and only matters when records stop."""
FORGET_S = 30.0


class PlannerServer:
    """One planner.

    Attributes:
        endpoint: "host:port" of its planning service.
        metrics_port: port of /metrics.
    """

    def __init__(
        self,
        endpoint: str,
        metrics_port: int,
        server: grpc.aio.Server,
        health_servicer: health.aio.HealthServicer,
        tasks: list[asyncio.Task[None]],
    ) -> None:
        self.endpoint, self.metrics_port = endpoint, metrics_port
        self._server, self._health, self._tasks = server, health_servicer, tasks

    @classmethod
    async def start(cls, config: Config) -> PlannerServer:
        """A planner that listens.

        Raises:
            ConfigError: a port is taken, or a certificate or token file cannot be read.
        """
        registry = CollectorRegistry()
        servicer = PlanningServicer(config, PlannerMetrics(registry))
        server = new_server(config.internal, MAX_MESSAGE_BYTES)
        pb_grpc.add_PlanningServiceServicer_to_server(servicer, server)
        health_servicer = await add_standard_services(server, SERVICE)
        endpoint = bind(server, config.internal)
        metrics_port = serve_metrics(registry, config.metrics)
        await server.start()
        tasks = [
            asyncio.create_task(servicer.make_plans(), name="plans"),
            asyncio.create_task(servicer.read_signals(), name="signals"),
        ]
        return cls(endpoint, metrics_port, server, health_servicer, tasks)

    async def check(self) -> None:
        """Raise RuntimeError if plans are no longer made."""
        for task in self._tasks:
            if task.done():
                raise RuntimeError(f"the planner's loop '{task.get_name()}' has ended")

    async def stop(self, grace_s: float = 5) -> None:
        """Say NOT_SERVING and end; the verifiers go on with the last plan."""
        await self._health.enter_graceful_shutdown()
        for task in self._tasks:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
        await self._server.stop(min(grace_s, 0.5))  # its streams have no end of their own


class PlanningServicer(pb_grpc.PlanningServiceServicer):
    """Owns the state of every verifier and their plans; all of it on one event loop."""

    def __init__(self, config: Config, metrics: PlannerMetrics) -> None:
        self._config: PlannerConfig = config.planner
        self._maker = PlanMaker(config.limits, config.planner)
        self._metrics = metrics
        self._states: dict[str, VerifierState] = {}
        self._signals: dict[str, Signals] = {}
        self._plans: dict[str, Plan] = {}
        self._changed = asyncio.Condition()

    async def WatchPlan(
        self, request: pb.WatchPlanRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[pb.WatchPlanResponse]:
        sent = None
        while True:
            async with self._changed:
                while (plan := self._plans.get(request.verifier_id)) is sent:
                    await self._changed.wait()
            sent = plan
            if plan is not None:
                yield pb.WatchPlanResponse(plan=plan_to_proto(plan))

    async def GetPlan(self, request: pb.GetPlanRequest, context: grpc.aio.ServicerContext) -> pb.GetPlanResponse:
        plan = self._plans.get(request.verifier_id)
        if plan is None:
            await context.abort(grpc.StatusCode.NOT_FOUND, "no plan yet for this verifier")
        assert plan is not None
        return pb.GetPlanResponse(plan=plan_to_proto(plan))

    async def ReportSteps(
        self, request_iterator: AsyncIterator[pb.ReportStepsRequest], context: grpc.aio.ServicerContext
    ) -> pb.ReportStepsResponse:
        received = 0
        async for request in request_iterator:
            try:
                received += self._take(request)
            except ValueError as error:
                await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        return pb.ReportStepsResponse(steps=received)

    async def make_plans(self) -> None:
        """A new plan for every verifier, every interval."""
        while True:
            now = time.monotonic()
            for verifier_id in [v for v, state in self._states.items() if now - state.last_heard_s > FORGET_S]:
                self._forget(verifier_id)
            for verifier_id, state in self._states.items():
                self._plans[verifier_id] = plan = self._maker.make(state, self._signals[verifier_id])
                self._show(verifier_id, state, plan)
            async with self._changed:
                self._changed.notify_all()
            await asyncio.sleep(self._config.interval_s)

    async def read_signals(self) -> None:
        """Read every verifier's latency, from Prometheus or from its own page; none waits for another's."""
        while True:
            await asyncio.gather(*(asyncio.to_thread(self._read, verifier_id) for verifier_id in self._states))
            await asyncio.sleep(SIGNAL_INTERVAL_S if self._config.prometheus_url else PAGE_INTERVAL_S)

    def _read(self, verifier_id: str) -> None:
        state, signals = self._states.get(verifier_id), self._signals.get(verifier_id)
        if state is None or signals is None:
            return  # forgotten meanwhile
        try:
            if self._config.prometheus_url:
                signals.read_prometheus(self._config.prometheus_url, urllib.parse.urlsplit(state.metrics_url).netloc)
            else:
                signals.read_page(state.metrics_url)
        except (OSError, ValueError) as error:
            logger.debug("no live signals of %s: %s", verifier_id, error)

    def _take(self, request: pb.ReportStepsRequest) -> int:
        """Take in one message of a verifier; raises ValueError for one that makes no sense."""
        verifier_id = request.verifier_id
        if request.HasField("profile"):
            profile = profile_from_proto(request.profile)
            if verifier_id not in self._states:
                self._states[verifier_id] = VerifierState(profile, request.metrics_url)
                self._signals[verifier_id] = Signals(self._config.signal_max_age_s)
        state = self._states.get(verifier_id)
        if state is None:
            raise ValueError("steps before the profile")
        state.last_heard_s = time.monotonic()
        for message in request.steps:
            state.observe(step_from_proto(message))
        self._metrics.steps.labels(verifier_id).inc(len(request.steps))
        return len(request.steps)

    def _forget(self, verifier_id: str) -> None:
        self._states.pop(verifier_id)
        self._signals.pop(verifier_id)
        self._plans.pop(verifier_id, None)
        self._metrics.forget(verifier_id)

    def _show(self, verifier_id: str, state: VerifierState, plan: Plan) -> None:
        metrics = self._metrics
        metrics.plans.labels(verifier_id).inc()
        metrics.plan_version.labels(verifier_id).set(plan.version)
        metrics.price.labels(verifier_id).set(plan.price)
        metrics.max_nodes.labels(verifier_id).set(plan.max_nodes)
        metrics.verify_scale.labels(verifier_id).set(plan.cost.verify_scale)
        for quantile, error in zip(("0.5", "0.95"), state.tracker.error(), strict=True):
            metrics.cost_error.labels(verifier_id, quantile).set(error)
        metrics.calibration_error.labels(verifier_id).set(state.calibrator.ece())
        for signal in ("itl_p95_s", "verify_p50_s"):
            metrics.signal_age_seconds.labels(verifier_id, signal).set(self._signals[verifier_id].age_s(signal))
