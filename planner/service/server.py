"""The planner service: it receives step records and publishes plans."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import urllib.parse
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

import grpc
from grpc_health.v1 import health

from planner.service.client import MAX_MESSAGE_BYTES
from planner.service.latency import PROMETHEUS, PrometheusError, read_prometheus
from planner.service.loop import PlanMaker, VerifierState
from planner.service.objectives import INTER_TOKEN, classes, goals
from treeline.config import Config, PlannerConfig
from treeline.metrics import PlannerMetrics
from treeline.plan import Plan, plan_to_proto, profile_from_proto
from treeline.rpc.channels import add_standard_services, bind, new_server
from treeline.step_record import step_from_proto
from treeline.telemetry.page import new_registry, serve_metrics
from treeline.v1 import planning_pb2 as pb
from treeline.v1 import planning_pb2_grpc as pb_grpc

if TYPE_CHECKING:
    import aiohttp

logger = logging.getLogger(__name__)

SERVICE = pb.DESCRIPTOR.services_by_name["PlanningService"].full_name
LATENCY_INTERVAL_S = 1.0
"""Between queries of Prometheus: the scrape interval of deploy/prometheus."""
PROBLEM_S = 30.0
"""A problem of Prometheus is logged once it has lasted this long with a verifier present (metrics show it at once):
`treeline serve` starts Prometheus last."""
MAX_VERIFIERS, MAX_ID_CHARS = 1024, 256
"""Each verifier costs memory and a few plans per second. Ids label metrics; a verifier's own has 32 characters."""
FORGET_S = 30.0
"""A verifier is gone after this long without a message; idle ones send empty messages ten times per second."""


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
        registry = new_registry()
        servicer = PlanningServicer(config, PlannerMetrics(registry))
        server = new_server(config.internal, MAX_MESSAGE_BYTES)
        pb_grpc.add_PlanningServiceServicer_to_server(servicer, server)
        health_servicer = await add_standard_services(server, SERVICE)
        endpoint = bind(server, config.internal)
        metrics_port = serve_metrics(registry, config.metrics)
        await server.start()
        logger.info("planner at %s", endpoint)
        tasks = [
            asyncio.create_task(servicer.make_plans(), name="plans"),
            asyncio.create_task(servicer.read_latency(), name="latency"),
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
        await self._server.stop(min(grace_s, 0.5))  # the streams never end by themselves


class PlanningServicer(pb_grpc.PlanningServiceServicer):
    """Owns the state and the plan of every verifier; only the event loop reads or writes them."""

    def __init__(self, config: Config, metrics: PlannerMetrics) -> None:
        self._config: PlannerConfig = config.planner
        self._maker = PlanMaker(config.limits, config.planner)
        self._metrics = metrics
        for name, ms in (goal for one in classes(config.planner) for goal in goals(*one)):
            if ms is not None:
                metrics.objective.labels(name).set(ms / 1000)
        self._states: dict[str, VerifierState] = {}
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
            for verifier_id, state in list(self._states.items()):
                try:
                    self._plans[verifier_id] = plan = self._maker.make(state)
                    self._show(verifier_id, state, plan)
                except Exception:  # one verifier's records must not cost the others their plans
                    logger.exception("no plan can be made for verifier %s; its state is reset", verifier_id)
                    self._forget(verifier_id)
            async with self._changed:
                self._changed.notify_all()
            await asyncio.sleep(self._config.interval_s)

    async def read_latency(self) -> None:
        """Query Prometheus for the latency of all verifiers, every LATENCY_INTERVAL_S."""
        url, known, logged, since_s = self._config.prometheus_url, "", "", 0.0
        if url is None:
            await asyncio.Event().wait()  # a task that ends counts as a failure
            return
        import aiohttp  # takes a third of a second, which a start without Prometheus saves

        async with aiohttp.ClientSession() as session:
            while True:
                problem = await self._read_latency(session, url)
                if problem != known or not self._states:  # without a verifier there is nothing to read
                    known, since_s = problem, time.monotonic()
                if known != logged and (not known or time.monotonic() - since_s >= PROBLEM_S):
                    logger.warning("Prometheus: %s", known or f"{url} answers again")
                    logged = known
                self._metrics.prometheus_up.set(not problem)
                await asyncio.sleep(LATENCY_INTERVAL_S)

    async def _read_latency(self, session: aiohttp.ClientSession, url: str) -> str:
        """Update every verifier's latency; returns the problem, empty if there is none."""
        try:
            found = await read_prometheus(session, url)
        except PrometheusError as error:
            return str(error)
        unmeasured = False
        for state in self._states.values():
            values = found.get(urllib.parse.urlsplit(state.metrics_url).netloc, {})
            state.latency.update(PROMETHEUS, {name: (value, state.clock()) for name, value in values.items()})
            unmeasured |= INTER_TOKEN not in values and state.busy
        if unmeasured:
            return f"{url} has no latency of a busy verifier: is it a target, and are the recording rules loaded?"
        return ""

    def _take(self, request: pb.ReportStepsRequest) -> int:
        """Apply one message of a verifier; returns its steps. Raises ValueError if it is malformed."""
        verifier_id = request.verifier_id
        if request.HasField("profile"):
            profile = profile_from_proto(request.profile)
            if verifier_id not in self._states:
                urllib.parse.urlsplit(request.metrics_url)  # a malformed one fails here, not in every round
                if len(verifier_id) > MAX_ID_CHARS or len(self._states) >= MAX_VERIFIERS:
                    raise ValueError("the id is too long, or there are too many verifiers")
                self._states[verifier_id] = VerifierState(profile, request.metrics_url)
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
        metrics.step_budget.labels(verifier_id).set(plan.step_budget_s)
        metrics.wait_factor.labels(verifier_id).set(plan.wait_factor)
        for signal in plan.signals:
            metrics.signal_age_seconds.labels(verifier_id, signal.name).set(signal.age_s)
            out_of_reach = signal.name in state.control.unreachable
            metrics.objective_unreachable.labels(verifier_id, signal.name).set(out_of_reach)
