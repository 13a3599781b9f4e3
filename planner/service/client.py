"""The verifier's side of planning: the plan in force, and the step reports. Neither blocks a step."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable

import grpc

from planner.fast.builtin_plan import builtin_plan
from treeline.config import InternalConfig, LimitsConfig
from treeline.plan import Plan, VerifierProfile, plan_from_proto, profile_to_proto
from treeline.rpc.channels import Discover, connect
from treeline.step_record import StepRecord, step_to_proto
from treeline.v1 import planning_pb2 as pb
from treeline.v1.planning_pb2_grpc import PlanningServiceStub

logger = logging.getLogger(__name__)

RETRY_S = 0.5
"""Between attempts to reach a planner: a plan lives 10 s by default."""
REPORT_INTERVAL_S = 0.1
"""Between messages: two or three per plan at the default `planner.interval_s` of 0.25 s."""
MAX_UNSENT_STEPS = 2048
"""Records kept while the planner is away: 10 s at 5 ms per step. Older ones are stale."""
MAX_STEPS_PER_MESSAGE = 256
MAX_MESSAGE_BYTES = 16 << 20
"""256 records of 64 requests with trees of 64 nodes, at 8 bytes per outcome, take 8 MB."""


class PlanWatcher:
    """Holds the newest plan. Create it on a running event loop; `plan` may be read from any thread."""

    def __init__(
        self,
        discover: Discover,
        verifier_id: str,
        limits: LimitsConfig,
        internal: InternalConfig,
        on_refused: Callable[[], None] = lambda: None,
    ) -> None:
        """`on_refused`: called for each malformed plan, which is ignored."""
        self._verifier_id, self._on_refused = verifier_id, on_refused
        self._builtin = builtin_plan(limits)
        self._received: tuple[Plan, float] | None = None  # and until when it holds
        self._task = asyncio.create_task(_persist(discover, internal, self._watch), name="plan-watcher")

    @property
    def plan(self) -> Plan:
        """The newest plan until it expires, then the built-in one."""
        plan, until_s = self._received or (self._builtin, math.inf)
        return plan if time.monotonic() <= until_s else self._builtin

    async def close(self) -> None:
        await _cancel(self._task)

    async def _watch(self, stub: PlanningServiceStub) -> None:
        problem = ""
        async for message in stub.WatchPlan(pb.WatchPlanRequest(verifier_id=self._verifier_id)):
            try:
                plan = plan_from_proto(message.plan)
            except ValueError as error:
                self._on_refused()
                if str(error) != problem:
                    logger.warning("ignored a malformed plan: %s", error)
                problem = str(error)
                continue
            problem = ""
            self._received = plan, time.monotonic() + plan.lifetime_s


class StepReporter:
    """Sends step records to the planner; without one, drops the oldest. Create it on a running event loop."""

    def __init__(
        self,
        discover: Discover,
        verifier_id: str,
        metrics_url: str,
        profile: VerifierProfile,
        internal: InternalConfig,
    ) -> None:
        self._hello = pb.ReportStepsRequest(
            verifier_id=verifier_id, metrics_url=metrics_url, profile=profile_to_proto(profile)
        )
        self._unsent: deque[StepRecord] = deque(maxlen=MAX_UNSENT_STEPS)
        self._task = asyncio.create_task(_persist(discover, internal, self._send), name="step-reporter")

    def report(self, record: StepRecord) -> None:
        """Never blocks; may be called from any thread."""
        self._unsent.append(record)

    async def close(self) -> None:
        await _cancel(self._task)

    async def _send(self, stub: PlanningServiceStub) -> None:
        await stub.ReportSteps(self._messages())

    async def _messages(self) -> AsyncIterator[pb.ReportStepsRequest]:
        """The profile, then records until the stream ends."""
        yield self._hello
        while True:
            await asyncio.sleep(REPORT_INTERVAL_S)
            count = min(len(self._unsent), MAX_STEPS_PER_MESSAGE)
            steps = [step_to_proto(self._unsent.popleft()) for _ in range(count)]
            # An empty message tells the planner that this verifier is alive and idle.
            yield pb.ReportStepsRequest(verifier_id=self._hello.verifier_id, steps=steps)


async def _persist(
    discover: Discover, internal: InternalConfig, talk: Callable[[PlanningServiceStub], Awaitable[None]]
) -> None:
    """Call `talk` with a planner; whenever it ends, find a planner again."""
    last_problem = ""
    while True:
        try:
            for endpoint in await discover():
                async with connect(endpoint, internal, MAX_MESSAGE_BYTES) as channel:
                    await talk(PlanningServiceStub(channel))
        except Exception as error:  # discovery asks another system, which may fail in any way
            problem = str(error.details() if isinstance(error, grpc.aio.AioRpcError) else error)
            if problem != last_problem:
                logger.warning("no planner, the last plan holds until it expires: %s", problem)
            last_problem = problem
        await asyncio.sleep(RETRY_S)


async def _cancel(task: asyncio.Task[None]) -> None:
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
