"""How many replicas are wanted, from what they record."""

from __future__ import annotations

import pytest

from deploy.autoscaling import CROWDED, drafters, drafters_wanted, scaling, verifiers, verifiers_wanted
from treeline.config import ReplicaRange

SLOTS = 10


def verifier_stats(*loads: tuple[float, float], late: float = 0.0) -> dict[str, dict[str, float]]:
    """Of verifiers with so many requests running and waiting each; the first one misses its objective."""
    names = [f"verifier {place}" for place in range(len(loads))]
    columns = {
        "running": [running for running, _ in loads],
        "waiting": [waiting for _, waiting in loads],
        "slots": [float(SLOTS)] * len(loads),
        "late": [late] + [0.0] * (len(loads) - 1),
    }
    return {statistic: dict(zip(names, values, strict=True)) for statistic, values in columns.items()}


@pytest.mark.parametrize(
    ("loads", "late", "wanted"),
    [
        ([(10, 3)], 0.0, 2),
        ([(10, 40)], 0.0, 5),
        ([(10, 0.2)], 0.0, 1),
        ([(4, 0)], 0.9, 2),
        ([(4, 0)], 0.3, 1),
        ([(3, 0), (3, 0)], 0.0, 1),
        ([(4, 0), (4, 0)], 0.0, 2),
        ([(3, 0), (3, 0)], 0.3, 2),
        ([(0, 0), (0, 0), (0, 0)], 0.0, 2),
    ],
    ids=["wait", "wait long", "burst", "late", "late at times", "few", "too many for one", "few but late", "idle"],
)
def test_verifiers_by_waiting_requests_and_objectives(loads, late, wanted):
    assert verifiers_wanted(verifier_stats(*loads, late=late), len(loads)) == wanted


def test_a_verifier_that_starts_is_not_asked_for_twice():
    """While the second one loads, the first one alone reports, and two are wanted."""
    assert verifiers_wanted(verifier_stats((10, 5)), 1) == 2


@pytest.mark.parametrize(
    ("streams", "queued", "busy", "replicas", "wanted"),
    [
        (4, 4 * CROWDED + 0.1, 0.9, 1, 2),
        (4, 4 * CROWDED - 0.1, 0.9, 1, 1),
        (1, 0.9, 0.9, 1, 1),
        (2, 0.0, 0.4, 2, 1),
        (2, 0.0, 0.6, 2, 2),
    ],
    ids=["crowded", "not crowded", "one verifier has one drafter", "idle", "busy"],
)
def test_drafters_by_the_time_that_verifiers_wait_for_their_turn(streams, queued, busy, replicas, wanted):
    stats = {"streams": {"a": streams}, "queued": {"a": queued}, "busy": {"a": busy}}
    assert drafters_wanted(stats, replicas) == wanted


def test_without_statistics_nothing_changes():
    assert (verifiers_wanted({}, 3), drafters_wanted({}, 2)) == (3, 2)


def test_serve_finds_the_policies():
    for policy in (verifiers, drafters):
        settings = scaling(ReplicaRange(min=1, max=3, up_after_s=1, down_after_s=2), policy.__name__)
        assert settings.policy.policy_function == f"deploy.autoscaling:{policy.__name__}"
        assert (settings.min_replicas, settings.max_replicas) == (1, 3)
