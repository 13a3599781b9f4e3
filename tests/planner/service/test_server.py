"""Plans and reports through a real planner and a real port."""

from __future__ import annotations

import asyncio
import math
import time
from dataclasses import replace

import grpc
import numpy as np
import pytest
from prometheus_client import CollectorRegistry

from planner.fast.builtin_plan import builtin_plan
from planner.service.client import PlanWatcher, StepReporter
from planner.service.objectives import FIRST_TOKEN, INTER_TOKEN
from planner.service.server import PlannerServer, PlanningServicer
from tests.planner.builders import linear_cost, outcomes, plan_with, record
from treeline.config import Config, MetricsConfig, ObjectivesConfig, PlannerConfig
from treeline.metrics import PlannerMetrics
from treeline.plan import (
    PaperFit,
    Signal,
    VerifierProfile,
    plan_from_proto,
    plan_to_proto,
    profile_from_proto,
    profile_to_proto,
)
from treeline.step_record import step_from_proto, step_to_proto
from treeline.v1 import planning_pb2 as pb
from treeline.v1.planning_pb2_grpc import (
    PlanningServiceServicer,
    PlanningServiceStub,
    add_PlanningServiceServicer_to_server,
)

CONFIG = Config(planner=PlannerConfig(interval_s=0.05, plan_lifetime_s=0.6), metrics=MetricsConfig(base_port=0))
PROFILE = VerifierProfile(linear_cost().verify, 0.004, 0.0002)
NOWHERE = "http://127.0.0.1:9/metrics"


def test_plans_survive_the_wire():
    cost = replace(linear_cost(), verify_scale=1.5, paper=PaperFit(0.1, 0.2, 0.3, 0.4), draft_layer_s=0.01)
    signals = (Signal("inter_token_p95", 0.03, 0.04, 1.5, "steps"), Signal("x", None, None, math.inf, "prometheus"))
    plan = plan_with(
        cost, price=61.5, version=7, reason="because", step_budget_s=0.05, wait_factor=1.5, signals=signals
    )
    back = plan_from_proto(pb.Plan.FromString(plan_to_proto(plan).SerializeToString()))
    np.testing.assert_array_equal(back.calibration.acceptance, plan.calibration.acceptance)
    np.testing.assert_array_equal(back.calibration.kappa, plan.calibration.kappa)
    assert replace(back, calibration=plan.calibration) == plan
    assert plan_from_proto(plan_to_proto(plan_with(cost))).step_budget_s == math.inf


def test_records_survive_the_wire():
    told = {"gaps": ((0.25, 3), (0.5, 1)), "gap_priority": (-4, 2)}
    told |= {"first_token_s": (1.5,), "first_token_priority": (0,)}
    sent = record(
        draft_layer_nodes=(1, 4), price=3.5, **told, outcomes=outcomes(np.asarray([0.25, 0.5]), [True, False], 2)
    )
    back = step_from_proto(pb.StepRecord.FromString(step_to_proto(sent).SerializeToString()))
    for name, column in vars(sent.outcomes).items():
        np.testing.assert_array_equal(getattr(back.outcomes, name), column)
    assert replace(back, outcomes=sent.outcomes) == sent


def test_profiles_survive_the_wire_and_empty_ones_are_refused():
    assert profile_from_proto(profile_to_proto(PROFILE)) == PROFILE
    with pytest.raises(ValueError, match="without a cost curve"):
        profile_from_proto(pb.VerifierProfile())


async def eventually(condition, timeout_s: float = 5.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it never came true"
        await asyncio.sleep(0.01)


class Place:
    """Where the planner is now, for those who look for it."""

    endpoints: list[str]

    async def __call__(self) -> list[str]:
        return self.endpoints


def test_plans_arrive_freeze_fall_back_and_come_again():
    async def scenario() -> None:
        place = Place()
        place.endpoints = []
        watcher = PlanWatcher(place, "v1", CONFIG.limits, CONFIG.internal)
        reporter = StepReporter(place, "v1", NOWHERE, PROFILE, CONFIG.internal)
        assert watcher.plan.reason == builtin_plan(CONFIG.limits).reason
        planner = await PlannerServer.start(CONFIG)
        place.endpoints = [planner.endpoint]
        await eventually(lambda: watcher.plan.version > 3)
        assert watcher.plan.cost.verify == PROFILE.verify
        for _ in range(60):
            reporter.report(record(tokens=4, verify_s=0.068))
        await eventually(lambda: watcher.plan.cost.verify_scale > 1.5)
        await planner.check()

        await planner.stop()
        frozen = watcher.plan
        assert frozen.version > 3, "a dead planner freezes the plan"
        await eventually(lambda: watcher.plan.version == 0, CONFIG.planner.plan_lifetime_s + 1)

        planner = await PlannerServer.start(CONFIG)
        place.endpoints = [planner.endpoint]
        await eventually(lambda: watcher.plan.version > 0)
        await watcher.close()
        await reporter.close()
        await planner.stop()

    asyncio.run(scenario())


def test_reporting_never_blocks_and_nothing_grows_without_a_planner():
    async def scenario() -> None:
        place = Place()
        place.endpoints = []
        reporter = StepReporter(place, "v1", NOWHERE, PROFILE, CONFIG.internal)
        for step in range(10_000):
            reporter.report(record(step_id=step))
        assert len(reporter._unsent) < 10_000
        await reporter.close()

    asyncio.run(scenario())


def test_a_plan_follows_a_profile_and_nonsense_is_refused():
    async def scenario() -> None:
        planner = await PlannerServer.start(CONFIG)
        async with grpc.aio.insecure_channel(planner.endpoint) as channel:
            stub = PlanningServiceStub(channel)
            with pytest.raises(grpc.aio.AioRpcError) as no_profile:
                await stub.ReportSteps(iter([pb.ReportStepsRequest(verifier_id="v1", steps=[pb.StepRecord()])]))
            assert no_profile.value.code() is grpc.StatusCode.INVALID_ARGUMENT
            hello = pb.ReportStepsRequest(verifier_id="v1", metrics_url=NOWHERE, profile=profile_to_proto(PROFILE))
            assert (await stub.ReportSteps(iter([hello]))).steps == 0
            plan = (await stub.WatchPlan(pb.WatchPlanRequest(verifier_id="v1")).read()).plan
            assert plan.version > 0
            assert plan.price == pytest.approx(1 / 0.031, rel=0.01)
        await planner.stop()

    asyncio.run(scenario())


class FakePlanner(PlanningServiceServicer):
    """Sends the plans it is given, one after the other."""

    def __init__(self, plans: list[pb.Plan]) -> None:
        self.plans = plans

    async def WatchPlan(self, request, context):
        for plan in self.plans:
            yield pb.WatchPlanResponse(plan=plan)
        await asyncio.Event().wait()


def test_a_plan_that_makes_no_sense_is_no_plan_and_counted(caplog):
    good, bad = plan_to_proto(plan_with(linear_cost(), version=7)), plan_to_proto(plan_with(linear_cost(), version=8))
    bad.cost.prompt_ratio = float("nan")

    async def scenario() -> None:
        server = grpc.aio.server()
        add_PlanningServiceServicer_to_server(FakePlanner([bad, good, bad, bad]), server)
        endpoint = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
        await server.start()
        place, refused = Place(), []
        place.endpoints = [endpoint]
        watcher = PlanWatcher(place, "v1", CONFIG.limits, CONFIG.internal, lambda: refused.append(1))
        await eventually(lambda: len(refused) == 3)
        assert watcher.plan.version == 7
        assert sum("prompt_ratio" in line for line in caplog.messages) == 2, "once for each change"
        await watcher.close()
        await server.stop(None)

    asyncio.run(scenario())


def test_a_record_that_makes_no_sense_is_refused_and_changes_nothing():
    async def scenario() -> None:
        planner = await PlannerServer.start(CONFIG)
        async with grpc.aio.insecure_channel(planner.endpoint) as channel:
            stub = PlanningServiceStub(channel)
            hello = pb.ReportStepsRequest(verifier_id="v1", metrics_url=NOWHERE, profile=profile_to_proto(PROFILE))
            await stub.ReportSteps(iter([hello]))
            for bad in (record(verify_s=float("nan")), record(tokens=0), record(outcomes=outcomes(np.ones(1), [1], 0))):
                spoilt = pb.ReportStepsRequest(verifier_id="v1", steps=[step_to_proto(bad)])
                with pytest.raises(grpc.aio.AioRpcError) as refused:
                    await stub.ReportSteps(iter([spoilt]))
                assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
            spoilt = pb.ReportStepsRequest(verifier_id="v2", metrics_url="http://[", profile=profile_to_proto(PROFILE))
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await stub.ReportSteps(iter([spoilt]))
            assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
            plan = (await stub.WatchPlan(pb.WatchPlanRequest(verifier_id="v1")).read()).plan
            assert plan_from_proto(plan).cost.verify == PROFILE.verify
        await planner.check()
        await planner.stop()

    asyncio.run(scenario())


def test_objectives_are_shown():
    pages = CollectorRegistry()
    objectives = ObjectivesConfig(inter_token_p95_ms=40)
    PlanningServicer(Config(planner=PlannerConfig(objectives=objectives)), PlannerMetrics(pages))
    shown = [
        pages.get_sample_value("treeline_planner_objective_seconds", {"objective": name})
        for name in (INTER_TOKEN, FIRST_TOKEN)
    ]
    assert shown == [0.04, None]
