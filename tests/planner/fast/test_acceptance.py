from __future__ import annotations

import numpy as np
import pytest

from planner.fast.acceptance import Calibrator, accepts, prior, prob_bins
from tests.planner.builders import outcomes
from treeline.step_record import NodeOutcomes


def test_before_anything_was_seen_the_drafter_is_believed():
    probs = np.asarray([0.1, 0.5, 0.9], np.float32)
    believed = accepts(prior(), np.zeros(3, np.uint8), np.ones(3, np.int32), probs, False)
    np.testing.assert_allclose(believed, probs, atol=0.06)


def test_bins_cover_all_probabilities():
    bins = prob_bins(np.asarray([1e-9, 0.01, 0.5, 1.0], np.float32))
    assert bins.tolist() == sorted(bins.tolist())
    assert bins[0] == 0
    assert bins[-1] == 15


def test_an_over_confident_drafter_is_right_again_within_200_steps():
    random = np.random.default_rng(0)
    calibrator = Calibrator()

    def step() -> None:
        probs = random.uniform(0.2, 1.0, 4)
        calibrator.update(outcomes(probs, random.random(4) < probs / 2))

    step()
    assert abs(float(_believed(calibrator, 0.8)) - 0.8) < 0.1
    for _ in range(200):
        step()
        calibrator.calibration()  # as every plan asks; what is in force is judged
    for prob in (0.3, 0.5, 0.8, 0.95):
        assert float(_believed(calibrator, prob)) == pytest.approx(prob / 2, abs=0.1)
    assert calibrator.ece() < 0.06


def test_old_evidence_is_outweighed_by_a_few_probes_and_forgotten_by_none():
    """100 steps refuse 32 nodes each; nothing is drafted for 500 steps; then each tenth step probes two requests."""
    calibrator, likely = Calibrator(), np.full(32, 0.9)
    for _ in range(100):
        calibrator.update(outcomes(likely, np.zeros(32)))
    for _ in range(500):
        calibrator.update(NodeOutcomes.empty())
    assert float(_believed(calibrator, 0.9)) < 0.1
    for step in range(200):
        calibrator.update(NodeOutcomes.empty() if step % 10 else outcomes(likely[:2], np.ones(2)))
    assert float(_believed(calibrator, 0.9)) > 0.5


def _believed(calibrator: Calibrator, prob: float) -> np.float32:
    one = np.ones(1, np.int32)
    return accepts(calibrator.calibration(), np.zeros(1, np.uint8), one, np.asarray([prob], np.float32), False)[0]


def test_greedy_sampled_sources_and_depths_are_told_apart():
    calibrator = Calibrator()
    for _ in range(100):
        calibrator.update(outcomes(np.full(2, 0.5), np.asarray([True, True]), depth=1))
        calibrator.update(outcomes(np.full(2, 0.5), np.asarray([False, False]), depth=2))
    acceptance = calibrator.calibration().acceptance
    cell = int(prob_bins(np.asarray([0.5], np.float32))[0])
    assert acceptance[0, 0, 0, cell] > 0.9
    assert acceptance[0, 0, 1, cell] < 0.1
    np.testing.assert_array_equal(acceptance[0, 1], prior().acceptance[0, 1])
    np.testing.assert_array_equal(acceptance[1], prior().acceptance[1])


def test_kappa_is_how_often_a_reached_node_goes_on():
    calibrator = Calibrator()
    for step in range(200):
        # The root's children: two siblings, one of them accepted every other step.
        n = NodeOutcomes(
            np.zeros(2, np.uint8),
            np.ones(2, np.uint8),
            np.asarray([True, False]),
            np.zeros(2, np.bool_),
            np.asarray([0.6, 0.3], np.float32),
            np.asarray([step % 2 == 0, False]),
        )
        calibrator.update(n)
    assert calibrator.calibration().kappa[0, 0] == pytest.approx(0.5, abs=0.05)


def test_nothing_observed_changes_nothing():
    calibrator = Calibrator()
    calibrator.update(NodeOutcomes.empty())
    np.testing.assert_array_equal(calibrator.calibration().acceptance, prior().acceptance)
    assert calibrator.ece() == 0.0
