from __future__ import annotations

import numpy as np
import pytest

from planner.cost import cheapest_node_s, plain_decode_s, verify_seconds
from planner.tracker import CostTracker, fit_paper
from tests.planner.builders import linear_cost, record
from treeline.plan import CostCurve, CostModel, VerifierProfile

STEPS = CostCurve(1, 64, (1, 2, 3, 4, 5, 6), (0.03, 0.03, 0.03, 0.05, 0.05, 0.05))


def test_measured_steps_are_kept():
    seconds = verify_seconds(CostModel((STEPS,)), 1, 64, 6)
    assert seconds[1:].tolist() == [0.03, 0.03, 0.03, 0.05, 0.05, 0.05]


def test_between_points_the_curve_is_linear_and_goes_on_beyond_the_last():
    curve = CostCurve(1, 64, (1, 5, 9), (0.01, 0.02, 0.03))
    seconds = verify_seconds(CostModel((curve,)), 1, 64, 13)
    assert seconds[3] == pytest.approx(0.015)
    assert seconds[13] == pytest.approx(0.04)
    assert (np.diff(seconds) >= 0).all()


def test_batches_between_regions_are_interpolated_and_scaled():
    few, many = CostCurve(1, 64, (1, 16), (0.03, 0.05)), CostCurve(9, 64, (1, 16), (0.05, 0.09))
    cost = CostModel((many, few), verify_scale=2.0)
    assert verify_seconds(cost, 5, 64, 16)[16] == pytest.approx(2 * 0.07)
    assert verify_seconds(cost, 32, 64, 16)[16] == pytest.approx(2 * 0.09)


def test_longer_context_adds_what_it_added_in_the_profile_for_every_sequence():
    near, far = CostCurve(1, 100, (1, 8), (0.03, 0.04)), CostCurve(1, 900, (1, 8), (0.04, 0.06))
    cost = CostModel((near, far))
    assert verify_seconds(cost, 1, 100, 8)[8] == pytest.approx(0.04)
    assert verify_seconds(cost, 1, 500, 8)[8] == pytest.approx(0.05)
    four = verify_seconds(cost, 4, 900, 32)
    assert four[32] - verify_seconds(cost, 4, 100, 32)[32] == pytest.approx(4 * 0.02)


def test_the_cheapest_node_is_the_flattest_secant():
    assert cheapest_node_s(CostModel((STEPS,))) == 0.0
    assert cheapest_node_s(linear_cost(token_s=0.002)) == pytest.approx(0.002)
    assert plain_decode_s(linear_cost(fixed_s=0.03, token_s=0.001)) == pytest.approx(0.031)


def tracker() -> CostTracker:
    return CostTracker(VerifierProfile(linear_cost().verify, 0.004, 0.0002))


def predicted_s(tracked: CostTracker) -> float:
    return float(verify_seconds(tracked.model(), 1, 64, 4)[4])


def test_a_lasting_slowdown_is_learnt_within_50_steps():
    tracked = tracker()
    for _ in range(50):
        tracked.observe(record(tokens=4, verify_s=2 * 0.034))
    assert predicted_s(tracked) == pytest.approx(2 * 0.034, rel=0.15)


def test_outliers_pauses_and_prompts_teach_nothing():
    tracked = tracker()
    for step in range(100):
        tracked.observe(record(tokens=4, verify_s=5.0 if step % 10 == 0 else 0.034))
        tracked.observe(record(tokens=200, prefill_tokens=196, verify_s=1.0))
    assert predicted_s(tracked) == pytest.approx(0.034, rel=0.05)


def test_drafting_costs_are_learnt_from_layers_and_nodes():
    tracked = tracker()
    random = np.random.default_rng(0)
    for _ in range(300):
        layers = tuple(random.integers(1, 12, random.integers(1, 6)).tolist())
        drafter_s = 0.010 * len(layers) + 0.001 * sum(layers)
        tracked.observe(record(drafter_s=drafter_s, draft_s=drafter_s + 0.0005, draft_layer_nodes=layers, step_s=0.1))
    cost = tracked.model()
    assert cost.draft_layer_s == pytest.approx(0.010, rel=0.05)
    assert cost.draft_node_s == pytest.approx(0.001, rel=0.05)
    assert cost.draft_round_trip_s == pytest.approx(0.0005, rel=0.05)


def test_prediction_errors_are_reported():
    tracked = tracker()
    for _ in range(20):
        tracked.observe(record(tokens=4, verify_s=0.034))
    assert tracked.error() == pytest.approx((0.0, 0.0), abs=1e-6)


def test_the_papers_fit_follows_a_curve_of_its_own_shape():
    tokens = np.asarray([1, 2, 4, 8, 16, 32, 64])
    seconds = 0.02 * np.expm1(0.2 * tokens**0.6)
    fit = fit_paper(CostCurve(1, 64, tuple(tokens.tolist()), tuple(seconds.tolist())), 0.001)
    fitted = fit.gamma_s * np.expm1(fit.delta * tokens**fit.rho)
    np.testing.assert_allclose(fitted, seconds, rtol=0.02)
    assert fit.lambda_s == 0.001
