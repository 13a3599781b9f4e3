"""How fast a verifier is beside plain decoding, for everybody to see."""

from dataclasses import replace

import pytest

from tests.planner.builders import record as step
from treeline.plan import CostCurve, CostModel
from verifier_svc.service.speedup import WINDOW_S, Speedup

COST = CostModel((CostCurve(3, 0, (1, 3, 64), (0.010, 0.018, 0.079)),))
"""Of three sequences: 18 ms a plain pass, 1 ms per node more."""
DRAFTED = {"emitted_tokens": 6, "verified_nodes": 9, "verify_s": 0.027, "draft_s": 0.005, "step_s": 0.034}
PLAIN = {"emitted_tokens": 3, "verified_nodes": 0, "verify_s": 0.018, "draft_s": 0.0, "step_s": 0.020}


def decoded(**fields):
    counts = {"sequences": 3, "running": 3, "prefill_tokens": 0, "context_tokens": 0}
    return replace(step(), **{"unix_s": 0.0} | counts | fields)


def slowed(fields, factor):
    return {name: value * factor if name.endswith("_s") else value for name, value in fields.items()}


@pytest.mark.parametrize("factor", [1, 3])
def test_a_neighbour_slows_both_alike(factor):
    assert Speedup().observe(decoded(**slowed(DRAFTED, factor)), COST) == pytest.approx(40 / 34)
    assert Speedup().observe(decoded(**slowed(PLAIN, factor)), COST) == pytest.approx(1)


def test_steps_weigh_by_their_time_and_leave_with_the_window():
    speedup = Speedup()
    speedup.observe(decoded(**DRAFTED), COST)
    assert speedup.observe(decoded(**PLAIN, unix_s=1.0), COST) == pytest.approx(60 / 54)
    assert speedup.observe(decoded(**PLAIN, unix_s=0.5 + WINDOW_S), COST) == pytest.approx(1)


def test_prompts_and_first_tokens_are_nothing_that_speculation_brings():
    first = {"first_token_s": (0.5,), "emitted_tokens": 7, "prefill_tokens": 10, "verify_s": 0.037, "step_s": 0.044}
    assert Speedup().observe(decoded(**DRAFTED | first), COST) == pytest.approx(50 / 44)
    prompt = decoded(**PLAIN | {"first_token_s": (0.5,), "sequences": 0, "emitted_tokens": 1, "prefill_tokens": 20})
    assert Speedup().observe(prompt, COST) == pytest.approx(1)
