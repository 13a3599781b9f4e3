from __future__ import annotations

import numpy as np
import pytest

from planner.fast.acceptance import Calibrator, RequestAcceptance, accepts, prior, prob_bins
from tests.planner.builders import outcomes
from treeline.plan import NodeOutcomes
from treeline.tree import Source


def test_before_anything_was_seen_the_drafter_is_believed():
    probs = np.asarray([0.1, 0.5, 0.9], np.float32)
    believed = accepts(prior(), np.zeros(3, np.uint8), np.ones(3, np.int32), probs, False)
    np.testing.assert_allclose(believed, probs, atol=0.06)
    looked_up = accepts(prior(), np.full(3, Source.NGRAM, np.uint8), np.ones(3, np.int32), probs, False)
    assert (looked_up < believed).all()


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
            np.asarray([0, 1], np.uint8),
            np.zeros(2, np.bool_),
            np.asarray([0.6, 0.3], np.float32),
            np.asarray([step % 2 == 0, False]),
        )
        calibrator.update(n)
    assert calibrator.calibration().kappa[0, 0] == pytest.approx(0.5, abs=0.05)


def test_acceptance_by_rank_is_counted_over_sources_and_depths():
    calibrator = Calibrator()
    for step in range(300):
        columns = np.asarray([1, 1, 3], np.uint8), np.asarray([0, 1, 12], np.uint8)
        accepted = np.asarray([step % 4 != 0, step % 4 == 0, False])
        probs = np.asarray([0.5, 0.3, 0.1], np.float32)
        calibrator.update(NodeOutcomes(np.arange(3, dtype=np.uint8), *columns, np.zeros(3, np.bool_), probs, accepted))
    by_rank = calibrator.calibration().by_rank
    np.testing.assert_allclose(by_rank[0, [0, 1, 7]], [0.75, 0.25, 0.0], atol=0.05)
    np.testing.assert_array_equal(by_rank[1], prior().by_rank[1])


def test_nothing_observed_changes_nothing():
    calibrator = Calibrator()
    calibrator.update(NodeOutcomes.empty())
    np.testing.assert_array_equal(calibrator.calibration().acceptance, prior().acceptance)
    assert calibrator.ece() == 0.0


def test_a_request_is_like_the_others_until_it_shows_otherwise_and_again_when_that_is_long_ago():
    random, request = np.random.default_rng(0), RequestAcceptance()
    assert request.ratio == 1.0
    assert request.after(2.0, 0).ratio > 0.6, "one step says little"
    ratios = []
    for _ in range(200):  # accepted half as often as calibrated
        request = request.after(2.0, int(random.binomial(4, 0.25)))
        ratios.append(request.ratio)
    assert np.mean(ratios[50:]) == pytest.approx(0.55, abs=0.1)
    for _ in range(100):
        request = request.after(0.0, 0)
    assert request.ratio == pytest.approx(1.0, abs=0.05)


def test_a_requests_ratio_is_bounded():
    request = RequestAcceptance()
    for _ in range(100):
        request = request.after(0.1, 8)
    assert request.ratio <= 1.5
    for _ in range(200):
        request = request.after(8.0, 0)
    assert request.ratio >= 0.25
