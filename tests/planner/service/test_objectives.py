"""The controller by itself: a pure function, on a plant that answers late as a measuring window does."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import replace

import pytest

from planner.service.objectives import (
    AIM,
    FIRST_TOKEN,
    FLOOR_S,
    INTER_TOKEN,
    MAX_WAIT,
    RELAX,
    SHRINK,
    Control,
    Seen,
    regulate,
    tightest,
)
from treeline.config import ObjectivesConfig

ITL = ObjectivesConfig(inter_token_p95_ms=40)
TTFT = ObjectivesConfig(time_to_first_token_p95_ms=500)
CALM = Seen(itl_p95_s=0.03, ttft_p95_s=0.4, step_p95_s=0.04, plain_s=0.02, delayed=0)
LATE = replace(CALM, itl_p95_s=0.06, step_p95_s=0.06)
INTERVAL_S = 0.25


def repeated(objectives: ObjectivesConfig, seen: Seen, seconds: float, control: Control | None = None) -> Control:
    control = control or Control()
    for _ in range(round(seconds / INTERVAL_S)):
        control = regulate(objectives, seen, control, INTERVAL_S)
    return control


def test_the_tightest_class_decides():
    controls = [Control(0.04, 1.0), Control(0.03, 1.0, ("a",)), Control(wait_factor=2.0, unreachable=("b",))]
    assert tightest(controls) == Control(0.03, 2.0, ("a", "b"))


def test_without_objectives_nothing_is_controlled():
    assert repeated(ObjectivesConfig(), replace(LATE, ttft_p95_s=9.0, delayed=5), 10) == Control()


def test_a_met_objective_sets_no_budget_and_a_missed_one_does_at_a_bounded_rate():
    assert repeated(ITL, CALM, 10).step_budget_s == math.inf
    once = regulate(ITL, LATE, Control(), INTERVAL_S)
    assert once.step_budget_s == pytest.approx(0.06 / SHRINK**INTERVAL_S)
    # However long the same is measured, the budget is what brings the objective: it does not wind down further.
    assert repeated(ITL, LATE, 60).step_budget_s == pytest.approx(AIM * 0.04 * 0.06 / 0.06)


def test_a_budget_far_above_what_steps_take_bites_at_once():
    wide = Control(step_budget_s=10.0, free_s=20.0)
    assert regulate(ITL, LATE, wide, INTERVAL_S).step_budget_s < LATE.step_p95_s


def test_a_budget_relaxes_slowly_up_to_none():
    bound = Control(step_budget_s=0.03, free_s=0.05)
    fast = replace(CALM, itl_p95_s=0.01, step_p95_s=0.03)
    assert regulate(ITL, fast, bound, 1.0).step_budget_s == pytest.approx(0.03 * RELAX)
    assert repeated(ITL, fast, 10, bound).step_budget_s == math.inf


@pytest.mark.parametrize("missing", ["itl_p95_s", "step_p95_s"])
def test_nothing_fresh_is_no_budget(missing):
    bound = repeated(ITL, LATE, 5)
    assert regulate(ITL, replace(LATE, **{missing: None}), bound, INTERVAL_S).step_budget_s == math.inf


def test_what_a_plain_step_takes_longer_than_is_out_of_reach_and_does_not_flap():
    control = regulate(ITL, replace(LATE, plain_s=0.041), Control(), INTERVAL_S)
    assert (control.step_budget_s, control.unreachable) == (math.inf, (INTER_TOKEN,))
    assert regulate(ITL, replace(LATE, plain_s=0.0395), control, INTERVAL_S).unreachable == (INTER_TOKEN,)
    assert regulate(ITL, replace(LATE, plain_s=0.03), control, INTERVAL_S).unreachable == ()


def test_what_plain_decoding_misses_in_practice_is_out_of_reach_after_a_while():
    """Predicted plain steps are fast enough, measured ones are not: somebody else uses the device."""
    noisy = replace(LATE, plain_s=0.035, step_p95_s=0.035)
    assert repeated(ITL, noisy, FLOOR_S - 1).step_budget_s == pytest.approx(0.035)
    lost = repeated(ITL, noisy, FLOOR_S + 1)
    assert (lost.step_budget_s, lost.unreachable) == (math.inf, (INTER_TOKEN,))
    assert repeated(ITL, noisy, 10, lost).unreachable == (INTER_TOKEN,), "the goodput rule holds, and goes on holding"
    assert repeated(ITL, replace(noisy, plain_s=0.02), 1, lost).unreachable == ()


def test_waiting_costs_more_while_first_tokens_are_late_and_requests_wait():
    late = replace(CALM, ttft_p95_s=1.0, delayed=3)
    assert repeated(TTFT, late, 10).wait_factor == pytest.approx(2.0)
    assert repeated(TTFT, replace(late, delayed=0), 10).wait_factor == 1.0
    full = repeated(TTFT, late, 60)
    assert (full.wait_factor, full.unreachable) == (MAX_WAIT, (FIRST_TOKEN,))
    assert repeated(TTFT, replace(late, ttft_p95_s=0.2), 60, full).wait_factor == 1.0
    assert regulate(TTFT, replace(late, ttft_p95_s=None), full, INTERVAL_S).wait_factor == 1.0


@pytest.mark.parametrize("tokens_per_step", [1.0, 1.6])
@pytest.mark.parametrize("wanted_s", [0.05, 0.2])
def test_the_loop_settles_behind_a_window_of_seven_seconds(tokens_per_step, wanted_s):
    """Steps take what the rule wants or the budget allows; quantiles are those of the last 7 s: window and scrapes."""
    control, window = Control(), deque(maxlen=round(7 / INTERVAL_S))
    taken: list[float] = []
    for _ in range(round(60 / INTERVAL_S)):
        step_s = max(0.02, min(wanted_s, control.step_budget_s))
        taken.append(step_s)
        window.append(step_s)
        slow_s = sorted(window)[int(0.95 * len(window))]
        seen = Seen(slow_s / tokens_per_step, None, slow_s, 0.02, 0)
        control = regulate(ITL, seen, control, INTERVAL_S)
    settled = taken[round(20 / INTERVAL_S) :]
    assert max(settled) / tokens_per_step <= 0.04
    assert max(settled) < 1.05 * min(settled)
