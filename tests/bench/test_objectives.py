"""The latency controller with the real engine, rule and planner, on the simulator's clock."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from bench.simulator import simulate
from bench.simulator.acceptance import EAGLE3_LIKE
from bench.simulator.devices import Device
from bench.simulator.simulate import Scenario, VirtualEngine
from bench.simulator.virtual import prompt_of
from treeline.config import Config, ObjectivesConfig, PlannerConfig
from treeline.plan import CostCurve, VerifierProfile
from treeline.sampling import SamplingParams
from verifier_svc.engine.request import Chunk, GenerationRequest

CURVE = CostCurve(1, 64, (1, 16, 32, 64, 256), (0.020, 0.022, 0.037, 0.068, 0.26))
"""Nearly flat to 16 tokens, then 1 ms each. Prompts and trees beside 16 streams make the long steps."""
DEVICE = Device("cpu", VerifierProfile((CURVE,), 0.002, 0.00015), 0.0005, 0.001)
SCENARIO = Scenario(DEVICE, EAGLE3_LIKE, 100, prompt_tokens=128, output_tokens=200)
SETTLED_S = 20.0


def arrivals(
    monkeypatch: pytest.MonkeyPatch, objective_ms: float | None, phases: list[tuple[int, float]], policy: str = "smart"
) -> np.ndarray:
    """Float [chunks, 4]: when, seconds waited, tokens, and the step budget then, in a closed loop of phases."""
    config_of = simulate._config

    def with_objective(scenario: Scenario, slots: int) -> Config:
        planner = PlannerConfig(objectives=ObjectivesConfig(inter_token_p95_ms=objective_ms))
        return config_of(scenario, slots).model_copy(update={"planner": planner})

    monkeypatch.setattr(simulate, "_config", with_objective)
    engine, ids, random = VirtualEngine(SCENARIO, 16), itertools.count(1), np.random.default_rng(0)
    monkeypatch.undo()
    chunks, open_requests, ends_s = [], 0, 0.0
    for streams, seconds in phases:
        ends_s += seconds
        while engine.clock() < ends_s:
            while open_requests < streams:
                key, (prompt, output) = next(ids), random.integers((16, 20), (256, 400)).tolist()
                params = SamplingParams()
                engine.engine.add(GenerationRequest(str(key), prompt_of(key, prompt), params, output, policy=policy))
                open_requests += 1
            for output in engine.step():
                item = output.item
                if not isinstance(item, Chunk):
                    open_requests -= 1
                elif not item.first:
                    budget_s = engine.planner.plan.step_budget_s
                    chunks.append((engine.clock(), item.waited_s, len(item.token_ids), budget_s))
    return np.asarray(chunks)


def p95_s(chunks: np.ndarray, since_s: float, until_s: float) -> float:
    inside = chunks[(chunks[:, 0] >= since_s) & (chunks[:, 0] < until_s)]
    return float(np.quantile(np.repeat(inside[:, 1] / inside[:, 2], inside[:, 2].astype(int)), 0.95))


def test_an_objective_is_held_through_steps_of_the_load_and_missed_without_one(monkeypatch):
    plain_s = p95_s(arrivals(monkeypatch, None, [(4, 12)], "off"), 4, 12)
    objective_s = 1.3 * plain_s
    free = arrivals(monkeypatch, None, [(1, 2), (16, 12)])
    assert p95_s(free, 4, 14) > 1.1 * objective_s, "nothing to control here"

    crowded_s, calm_s = 5 + SETTLED_S, 15 + 2 * SETTLED_S
    held = arrivals(monkeypatch, 1000 * objective_s, [(1, 5), (16, SETTLED_S + 10), (4, SETTLED_S + 10)])
    for since_s in (crowded_s, crowded_s + 5, calm_s, calm_s + 5):
        assert p95_s(held, since_s, since_s + 5) <= 1.1 * objective_s
    budgets_s = held[(held[:, 0] > crowded_s) & (held[:, 0] < crowded_s + 10), 3]
    assert math.isfinite(budgets_s.max())
    assert budgets_s.max() < 1.1 * budgets_s.min(), "the budget oscillates"


def test_drafts_become_as_shallow_as_a_tight_objective_needs(monkeypatch):
    """A plain step of 4 takes 22 ms. Drafts as deep as without the objective, 15 ms, would leave no room for a node."""
    plain, held = (arrivals(monkeypatch, 30, [(4, 16)], policy) for policy in ("off", "smart"))
    assert p95_s(held, 6, 16) <= 1.1 * 0.030
    plain_tokens, tokens = (chunks[chunks[:, 0] >= 6, 2].sum() for chunks in (plain, held))
    assert tokens > 1.3 * plain_tokens
