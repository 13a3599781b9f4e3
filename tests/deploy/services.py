"""All metrics of all services, with traffic that shows in each of them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from prometheus_client import CollectorRegistry

from treeline.metrics import DrafterMetrics, FrontDoorMetrics, PlannerMetrics, VerifierMetrics
from treeline.step_record import NodeOutcomes, StepRecord
from treeline.telemetry.page import labelled


@dataclass
class Services:
    """The metrics of all four services on one page, and traffic that shows in each of them."""

    registry: CollectorRegistry

    def __post_init__(self) -> None:
        of_a_verifier = CollectorRegistry()
        self.verifier, self.drafter = VerifierMetrics(of_a_verifier), DrafterMetrics(self.registry)
        self.registry.register(labelled(of_a_verifier, model_name="m", replica="0"))
        self.planner, self.front_door = PlannerMetrics(self.registry), FrontDoorMetrics(self.registry)

    def work(self) -> None:
        self._verify()
        self._draft()
        self._plan()
        self.front_door.verifiers.set(1)
        for code in ("OK", "RESOURCE_EXHAUSTED", "UNAUTHENTICATED", "UNAVAILABLE"):
            self.front_door.started("Generate")
            self.front_door.handled("Generate", code, 0.5)

    def _verify(self) -> None:
        columns = (np.zeros(3, np.uint8), np.array([1, 2, 2], np.uint8), np.ones(3, bool))
        outcomes = NodeOutcomes(*columns, np.zeros(3, bool), np.ones(3, np.float32), np.array([True, True, False]))
        step = StepRecord(
            step_id=1,
            unix_s=0.0,
            plan_version=7,
            sequences=1,
            tokens=5,
            prefill_tokens=2,
            context_tokens=9,
            drafted_nodes=4,
            verified_nodes=3,
            accepted_nodes=2,
            emitted_tokens=3,
            running=1,
            waiting=0,
            startable=0,
            draft_s=0.01,
            drafter_s=0.008,
            draft_layer_nodes=(1, 2),
            verify_s=0.05,
            predicted_verify_s=0.05,
            step_s=0.07,
            goodput=40.0,
            price=20.0,
            pass_how="eager",
            outcomes=outcomes,
        )
        self.verifier.observe_step(step)
        self.verifier.set_speedup(1.5)
        self.verifier.observe_first_token(0.1)
        self.verifier.observe_tokens(3, 0.07)
        self.verifier.observe_finished("stop", 32, 3, queue_s=0.01, ttft_s=0.1, total_s=0.5, accepted_length=3.0)
        self.verifier.set_load(running=1, waiting=0, kv_used=4, kv_total=64, drafter_ready=True, problem=False)
        self.verifier.observe_prefix(prompt_tokens=32, cached_tokens=16)

    def _draft(self) -> None:
        self.drafter.sessions.set(1)
        self.drafter.steps.inc()
        self.drafter.nodes.inc(4)
        self.drafter.passes.labels("packed").inc(3)
        self.drafter.catch_up_tokens.inc(3)
        self.drafter.step_seconds.observe(0.008)
        self.drafter.layer_seconds.observe(0.004)

    def _plan(self) -> None:
        for gauge in (
            "plan_version",
            "price",
            "max_nodes",
            "verify_scale",
            "calibration_error",
            "step_budget",
            "wait_factor",
        ):
            getattr(self.planner, gauge).labels("v").set(1)
        for objective in ("inter_token_p95", "time_to_first_token_p95"):
            self.planner.objective.labels(objective).set(0.03)
        for quantile in ("0.5", "0.95"):
            self.planner.cost_error.labels("v", quantile).set(0.1)
        self.planner.signal_age_seconds.labels("v", "inter_token_p95").set(1)
        self.planner.objective_unreachable.labels("v", "inter_token_p95").set(0)
        self.planner.steps.labels("v").inc()
        self.planner.plans.labels("v").inc()
