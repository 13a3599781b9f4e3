"""What queue depth and latency alone do to price, budget and trees; `python -m` of this prints the docs' table."""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

import pytest

from planner.policies import parse_policy
from planner.service.latency import PROMETHEUS
from planner.service.loop import PlanMaker, VerifierState
from planner.service.objectives import AIM
from tests.planner.builders import Drafted, prune, record
from tests.trees import tree_of
from treeline.config import LimitsConfig, ObjectivesConfig, PlannerConfig
from treeline.plan import CostCurve, Plan, VerifierProfile

BATCH = 4
STEP_S = 0.05
CURVE = CostCurve(1, 64, (1, 8, 256), (0.018, 0.02, 0.268))
"""Flat to 8 tokens, then 1 ms each."""
TREE = tree_of(list(range(8)), [-1, 0, 1, 2, 3, 4, 5, 6], [0.85] * 8)
OBJECTIVES = ObjectivesConfig(inter_token_p95_ms=40, time_to_first_token_p95_ms=500)


class Outcome(NamedTuple):
    plan: Plan
    nodes: float
    """Per request."""


def decided(
    waiting: int = 0,
    itl_p95_s: float = 0.03,
    ttft_p95_s: float = 0.3,
    objectives: ObjectivesConfig = OBJECTIVES,
    seconds: float = 10.0,
    by_priority: dict[int, ObjectivesConfig] | None = None,
) -> Outcome:
    """The plan after some seconds of the same load and latency, and what the rule then keeps of the same trees."""
    now_s = 1000.0
    state = VerifierState(VerifierProfile((CURVE,)), "", lambda: now_s)
    maker = PlanMaker(LimitsConfig(), PlannerConfig(objectives=objectives, objectives_by_priority=by_priority or {}))
    plan = maker.make(state)
    while now_s < 1000.0 + seconds:
        for _ in range(5):
            now_s += STEP_S
            state.observe(
                record(unix_s=now_s, sequences=BATCH, running=BATCH + waiting, startable=waiting, tokens=32,
                       context_tokens=64 * BATCH, emitted_tokens=3 * BATCH, draft_s=0.003, verify_s=0.044,
                       step_s=STEP_S, node_s=0.001,
                       gaps=((STEP_S, 3),) * (BATCH - 1) + ((STEP_S, 1),), gap_priority=(0,) * (BATCH - 1) + (2,))
            )  # fmt: skip
        readings = {"inter_token_p95": (itl_p95_s, now_s), "time_to_first_token_p95": (ttft_p95_s, now_s)}
        state.latency.update(PROMETHEUS, readings)
        plan = maker.make(state)
    pruning = prune([Drafted(TREE, parse_policy("smart"), 1.0, False)] * BATCH, plan, startable=waiting)
    return Outcome(plan, pruning.kept / BATCH)


def test_queue_depth_alone_raises_the_price_by_its_share_of_the_batch_and_shrinks_trees():
    none, two = decided(0), decided(2)
    assert two.plan.price == pytest.approx(none.plan.price * (1 + 2 / BATCH))
    assert two.plan.step_budget_s == none.plan.step_budget_s == math.inf
    assert two.nodes < none.nodes


def test_an_objective_of_one_priority_sets_the_budget_while_its_requests_miss_it():
    # One token each 50 ms; the others have three.
    held = decided(objectives=ObjectivesConfig(), by_priority={0: OBJECTIVES, 2: OBJECTIVES}).plan
    assert held.step_budget_s == pytest.approx(AIM * 0.04)
    assert "inter token p95 priority 2 of 40 ms asked for, 50 ms by steps" in held.reason
    assert decided(objectives=ObjectivesConfig(), by_priority={0: OBJECTIVES}).plan.step_budget_s == math.inf


def test_inter_token_latency_alone_sets_the_budget_and_shrinks_trees():
    met, missed = decided(itl_p95_s=0.03), decided(itl_p95_s=0.06)
    assert missed.plan.price == met.plan.price
    assert missed.plan.step_budget_s == pytest.approx(AIM * 0.04 * STEP_S / 0.06)
    assert missed.nodes < met.nodes
    assert "steps up to" in missed.plan.reason


def test_late_first_tokens_alone_raise_what_waiting_costs():
    early, late = decided(2, ttft_p95_s=0.3), decided(2, ttft_p95_s=1.0)
    assert late.plan.wait_factor == pytest.approx(2.0, rel=0.02)
    ratio = (1 + late.plan.wait_factor * 2 / BATCH) / (1 + 2 / BATCH)
    assert late.plan.price == pytest.approx(early.plan.price * ratio, rel=0.03)  # the dead band
    assert late.nodes <= early.nodes


def test_without_objectives_latency_changes_nothing():
    def facts(outcome: Outcome) -> tuple[float, ...]:
        return outcome.plan.price, outcome.plan.step_budget_s, outcome.plan.wait_factor, outcome.nodes

    none = ObjectivesConfig()
    assert facts(decided(2, objectives=none)) == facts(decided(2, 9.0, 9.0, none))
    assert facts(decided(2, objectives=none)) == facts(decided(2, objectives=OBJECTIVES))


def test_what_is_out_of_reach_is_said_and_the_goodput_rule_holds():
    outcome = decided(itl_p95_s=0.06, objectives=ObjectivesConfig(inter_token_p95_ms=10))
    assert "inter token p95 of 10 ms out of reach" in outcome.plan.reason
    assert outcome.plan.step_budget_s == math.inf


def table() -> str:
    """Markdown: one row per case, each of which changes one thing."""
    lines = [
        "| waiting | inter-token p95 | time to first token p95 | price, tok/s | step budget | nodes per request |",
        "|---|---|---|---|---|---|",
    ]
    for waiting, itl_s, ttft_s in ((0, 0.03, 0.3), (2, 0.03, 0.3), (4, 0.03, 0.3), (2, 0.03, 1.0), (0, 0.06, 0.3),
                                   (0, 0.08, 0.3)):  # fmt: skip
        plan, nodes = decided(waiting, itl_s, ttft_s)
        budget = f"{1000 * plan.step_budget_s:.0f} ms" if plan.step_budget_s < math.inf else "none"
        lines.append(
            f"| {waiting} | {1000 * itl_s:.0f} ms | {1000 * ttft_s:.0f} ms "
            f"| {plan.price:.0f} | {budget} | {nodes:.1f} |"
        )
    return "\n".join(lines)


def test_the_table_of_the_docs_is_what_running_it_gives():
    assert table() in (Path(__file__).parents[3] / "docs/objectives.md").read_text()


if __name__ == "__main__":
    print(table())
