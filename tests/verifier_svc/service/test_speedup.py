"""How fast a verifier is beside plain decoding, for everybody to see."""

from dataclasses import replace

import pytest

from tests.planner.builders import record as step
from treeline.plan import CostCurve, CostModel
from verifier_svc.service.speedup import WINDOW_S, Speedup

COST = CostModel((CostCurve(3, 0, (1, 3, 64), (0.010, 0.018, 0.079)),), step_overhead_s=0.002)
"""Three sequences: 18 ms a pass, 20 ms a plain step; 1 ms per token more."""


def decoded(**fields):
    return replace(
        step(), **{"unix_s": 0.0, "sequences": 3, "prefill_tokens": 0, "running": 3, "context_tokens": 0} | fields
    )


def test_tokens_are_weighed_by_what_plain_decoding_takes_for_them():
    speedup = Speedup()
    assert speedup.observe(decoded(emitted_tokens=6, step_s=0.03), COST) == pytest.approx(0.04 / 0.03)
    plain = decoded(emitted_tokens=3, step_s=0.02, unix_s=1.0)
    assert speedup.observe(plain, COST) == pytest.approx(0.06 / 0.05)
    later = replace(plain, unix_s=1.5 + WINDOW_S)
    assert speedup.observe(later, COST) == pytest.approx(1.0)


def test_prompts_and_first_tokens_are_nothing_that_speculation_brings():
    mixed = decoded(emitted_tokens=7, first_token_s=(0.5,), prefill_tokens=10, step_s=0.05)
    assert Speedup().observe(mixed, COST) == pytest.approx((0.028 + 0.002 + 0.020) / 0.05)
    prompt = decoded(sequences=0, running=1, emitted_tokens=1, first_token_s=(0.5,), prefill_tokens=20, step_s=0.037)
    assert Speedup().observe(prompt, COST) == pytest.approx(1.0)
