from __future__ import annotations

import numpy as np
import pytest

from planner.fast.cost import as_decoded, cheapest_slopes_s, context_token_s, pass_s, plain_decode_s, verify_seconds
from planner.service.tracker import CostTracker, fit_paper
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
    assert 800 * context_token_s(cost, 4, 32) == pytest.approx(4 * 0.02)


def test_the_cheapest_node_is_the_flattest_secant():
    def slopes(cost: CostModel, sequences: int, *tokens: int) -> list[float]:
        return cheapest_slopes_s(cost, sequences, 64, np.asarray(tokens)).tolist()

    assert slopes(CostModel((STEPS,)), 1, 1) == [0.0]
    assert slopes(linear_cost(token_s=0.002), 1, 1, 7) == pytest.approx([0.002, 0.002])
    two_prices = CostCurve(1, 64, (1, 9, 129), (0.03, 0.03, 0.03 + 120 * 0.001))
    assert slopes(CostModel((two_prices,)), 1, 1, 16, 8) == pytest.approx([0.0, 0.001, 0.0])
    assert slopes(CostModel((two_prices,)), 16, 16) == pytest.approx([0.001])
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


def test_outliers_pauses_and_odd_prompts_teach_nothing_of_decoding():
    tracked = tracker()
    for step in range(100):
        tracked.observe(record(tokens=4, verify_s=5.0 if step % 10 == 0 else 0.034))
        tracked.observe(record(tokens=200, prefill_tokens=196, verify_s=1.0))
    assert predicted_s(tracked) == pytest.approx(0.034, rel=0.05)


def test_what_trees_cost_beside_the_pass_is_learnt_by_kind_of_step():
    tracked = tracker()
    before = tracked.model()
    for _ in range(15):
        tracked.observe(record(verify_s=0.031, step_s=0.032))
        tracked.observe(record(verify_s=0.031, step_s=0.0335, drafted_nodes=2, verified_nodes=2))
        # Its relative errors teach the drafter's own seconds: here there are none.
        draft_s = before.draft_round_trip_s + before.draft_sequence_s + before.draft_layer_s + before.draft_node_s
        drafted = {"drafted_requests": 1, "draft_layer_nodes": (1,), "draft_s": draft_s, "drafter_s": 0.001}
        tracked.observe(record(verify_s=0.031, step_s=0.0327 + draft_s, **drafted))
    cost = tracked.model()
    assert cost.step_overhead_s == pytest.approx(0.001)
    assert cost.lookup_s == pytest.approx(0.0015)
    assert cost.draft_round_trip_s - before.draft_round_trip_s == pytest.approx(0.0007, rel=0.01)


def test_a_server_that_always_runs_prompts_learns_what_passes_cost_as_well():
    tracked, random = tracker(), np.random.default_rng(0)
    for _ in range(100):
        prompt = int(random.integers(8, 40))
        verify_s = 1.8 * (0.03 + 0.001 * (8 + 0.7 * prompt)) * random.normal(1, 0.05)
        tracked.observe(record(sequences=8, running=9, tokens=8 + prompt, prefill_tokens=prompt, verify_s=verify_s))
    cost = tracked.model()
    assert pass_s(cost, 8, 64, 8) == pytest.approx(1.8 * 0.038, rel=0.1)
    assert pass_s(cost, 8, 64, 8 + as_decoded(cost, 40)) == pytest.approx(1.8 * 0.066, rel=0.1)
    assert 0.6 < cost.prompt_ratio < 0.95


def test_drafting_costs_are_learnt_beside_prompts_as_well():
    tracked = tracker()
    usual_s = tracked.model().draft_round_trip_s
    for _ in range(100):
        drafting = {"drafter_s": 0.01, "draft_s": 0.011, "draft_layer_nodes": (1,), "drafted_requests": 1}
        tracked.observe(record(prefill_tokens=64, step_s=0.5, **drafting))
    cost = tracked.model()
    drafted_s = cost.draft_round_trip_s + cost.draft_sequence_s + cost.draft_layer_s + cost.draft_node_s
    assert drafted_s == pytest.approx(0.011, rel=0.1)
    assert cost.draft_round_trip_s != usual_s


def test_drafting_costs_are_learnt_from_requests_layers_and_nodes():
    tracked = tracker()
    random = np.random.default_rng(0)
    for step in range(400):
        sequences = int(random.integers(1, 33))
        layers = tuple(random.integers(1, 12, random.integers(1, 6)).tolist())
        drafter_s = 0.0002 * sequences + 0.010 * len(layers) + 0.001 * sum(layers)
        draft_s = 0.0007 + drafter_s + (0.3 if step % 20 == 7 else 0.0)  # now and then something else takes the CPU
        tracked.observe(
            record(
                sequences=32,
                drafted_requests=sequences,
                drafter_s=drafter_s,
                draft_s=draft_s,
                draft_layer_nodes=layers,
                step_s=1.0,
            )
        )
        tracked.observe(record(drafter_s=0.4, draft_s=0.4, draft_layer_nodes=(1,), step_s=1.0, catch_up_tokens=400))
    cost = tracked.model()
    assert cost.draft_sequence_s == pytest.approx(0.0002, rel=0.2)
    assert cost.draft_layer_s == pytest.approx(0.010, rel=0.1)
    assert cost.draft_node_s == pytest.approx(0.001, rel=0.1)
    assert cost.draft_round_trip_s == pytest.approx(0.0007, abs=0.0005)


def test_the_first_drafts_are_slow_and_hardly_count():
    """First calls take ten times as long; right behind them drafting must not look that dear."""
    tracked = tracker()
    layers = (7, 20, 30)
    usual_s = 0.001 + 7 * 0.0003 + 3 * 0.004 + 57 * 0.0002

    def drafted(times: float) -> None:
        tracked.observe(
            record(sequences=7, drafted_requests=7, drafter_s=0.01, draft_s=times * usual_s, draft_layer_nodes=layers)
        )

    def predicted() -> float:
        cost = tracked.model()
        fixed_s = cost.draft_round_trip_s + 7 * cost.draft_sequence_s
        return fixed_s + 3 * cost.draft_layer_s + 57 * cost.draft_node_s

    for _ in range(3):
        drafted(10.0)
    assert predicted() < 4 * usual_s
    for _ in range(5):
        drafted(1.0)
    assert predicted() == pytest.approx(usual_s, rel=0.3)
    for _ in range(30):
        drafted(2.0)
    assert predicted() == pytest.approx(2 * usual_s, rel=0.15), "a lasting slow-down is believed"


def test_errors_are_of_what_was_predicted_before_the_step():
    tracked = tracker()
    assert tracked.error() == (0.0, 0.0)
    for _ in range(19):
        tracked.observe(record(tokens=4, verify_s=0.040, predicted_verify_s=0.030))
    tracked.observe(record(tokens=4, verify_s=0.040, predicted_verify_s=0.080))
    p50, p95 = tracked.error()
    assert p50 == pytest.approx(0.25)
    assert 0.25 < p95 < 1.0
    tracked.observe(record(plan_version=0, verify_s=0.040, predicted_verify_s=4.0))  # the built-in plan only guesses
    assert tracked.error() == pytest.approx((p50, p95))


def regions() -> CostTracker:
    """Two batch sizes, a step in the curve at 8 tokens, and a longer context."""
    tokens = (1, 2, 4, 8, 9, 16, 32, 64)

    def curve(sequences: int, context: int, more_s: float) -> CostCurve:
        return CostCurve(
            sequences, context, tokens, tuple(more_s + 0.02 + 0.01 * (n > 8) + 0.0005 * max(0, n - 8) for n in tokens)
        )

    return CostTracker(VerifierProfile((curve(1, 64, 0.0), curve(16, 64, 0.003), curve(1, 768, 0.006))))


def at(tracked: CostTracker, sequences: int, tokens: int, context: int = 64) -> float:
    return float(verify_seconds(tracked.model(), sequences, context, tokens)[tokens])


def test_a_region_is_corrected_where_it_was_wrong_and_only_there():
    tracked = regions()
    lone, batch = at(tracked, 1, 4), at(tracked, 16, 32)
    for _ in range(200):
        tracked.observe(record(tokens=4, verify_s=lone))
        tracked.observe(record(sequences=16, tokens=32, context_tokens=16 * 64, verify_s=1.3 * batch))
    assert at(tracked, 1, 4) == pytest.approx(lone, rel=0.05)
    assert at(tracked, 16, 32) == pytest.approx(1.3 * batch, rel=0.05)


def test_steps_of_the_curve_stay_steps():
    tracked = regions()
    for _ in range(200):
        for tokens in (1, 8, 9):
            tracked.observe(record(tokens=tokens, verify_s=1.5 * (0.02 if tokens <= 8 else 0.0305)))
    assert at(tracked, 1, 8) == pytest.approx(1.5 * 0.02, rel=0.05)
    assert at(tracked, 1, 9) == pytest.approx(1.5 * 0.0305, rel=0.05)


def test_what_context_costs_is_corrected_too():
    tracked = regions()
    for step in range(300):
        context = (64, 400, 768)[step % 3]
        verify_s = 0.02 + 2 * 0.006 * (context - 64) / (768 - 64)  # twice the profile's
        tracked.observe(record(tokens=4, context_tokens=context, verify_s=verify_s))
    assert at(tracked, 1, 4, 768) == pytest.approx(0.032, rel=0.07)
    assert at(tracked, 1, 4, 64) == pytest.approx(0.02, rel=0.07)


@pytest.mark.parametrize("factor", [2.0, 0.5])
def test_when_the_device_slows_down_every_region_is_right_again_within_50_steps(factor):
    tracked, truth, random = regions(), regions(), np.random.default_rng(1)

    def run(steps: int, factor: float) -> None:
        for _ in range(steps):
            sequences = int(random.choice([1, 4, 16]))
            tokens = sequences + int(random.integers(0, 16))
            verify_s = factor * at(truth, sequences, tokens) * random.lognormal(0, 0.05)
            verify_s += random.choice([0.0, 0.5], p=[0.97, 0.03])  # a pause
            tracked.observe(
                record(sequences=sequences, tokens=tokens, context_tokens=64 * sequences, verify_s=verify_s)
            )

    run(100, 1.0)
    run(50, factor)
    for sequences, tokens in ((1, 1), (1, 8), (4, 9), (16, 32)):
        assert at(tracked, sequences, tokens) == pytest.approx(factor * at(truth, sequences, tokens), rel=0.15)
    run(50, 1.0)
    for sequences, tokens in ((1, 1), (1, 8), (4, 9), (16, 32)):
        assert at(tracked, sequences, tokens) == pytest.approx(at(truth, sequences, tokens), rel=0.15)


def test_the_papers_fit_follows_a_curve_of_its_own_shape():
    tokens = np.asarray([1, 2, 4, 8, 16, 32, 64])
    seconds = 0.02 * np.expm1(0.2 * tokens**0.6)
    fit = fit_paper(CostCurve(1, 64, tuple(tokens.tolist()), tuple(seconds.tolist())), 0.001)
    fitted = fit.gamma_s * np.expm1(fit.delta * tokens**fit.rho)
    np.testing.assert_allclose(fitted, seconds, rtol=0.02)
    assert fit.lambda_s == 0.001
