"""The alarm for drafters that are loaded wrong."""

import logging

import numpy as np

from treeline.forest import Source
from treeline.step_record import NodeOutcomes
from verifier_svc.speculation.alarm import AcceptanceAlarm


def outcomes(accepted: float, confidence: float, *, first: bool = True, source: int = Source.MODEL) -> NodeOutcomes:
    """Twenty nodes of one step."""
    took = np.arange(20) < 20 * accepted
    column = np.ones(20, np.uint8)
    probs = np.full(20, confidence, np.float32)
    return NodeOutcomes(source * column, column, np.full(20, first), np.zeros(20, np.bool_), probs, took)


def after(steps: int, *args: float, **kwargs: int) -> str:
    alarm = AcceptanceAlarm()
    for _ in range(steps):
        alarm.observe(outcomes(*args, **kwargs))
    return alarm.problem


def test_a_head_that_is_never_right_is_named_and_with_what_to_check(caplog):
    with caplog.at_level(logging.WARNING):
        assert "accepts 0% of the drafter's first choices, whose mean probability is 60%" in after(8, 0.0, 0.6)
    assert len(caplog.messages) == 1
    assert "head_layers" in caplog.text


def test_far_below_its_own_confidence_is_named_as_well():
    assert after(8, 0.1, 0.6)
    assert not after(8, 0.1, 0.2)


def test_a_random_head_is_named_though_it_is_not_sure_of_itself():
    assert after(8, 0.0, 0.02)


def test_little_evidence_other_choices_and_lookups_say_nothing():
    assert not after(3, 0.0, 0.6)
    assert not after(50, 0.0, 0.6, first=False)
    assert not after(50, 0.0, 0.6, source=Source.NGRAM)


def test_it_ends_when_the_drafter_is_right_again(caplog):
    alarm = AcceptanceAlarm()
    for _ in range(10):
        alarm.observe(outcomes(0.0, 0.6))
    for _ in range(40):
        alarm.observe(outcomes(0.5, 0.6))
    assert not alarm.problem
    assert "again" in caplog.text
