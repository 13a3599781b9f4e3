"""Calibration: from the drafter's probability to the probability that the target accepts, learnt online."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from treeline.plan import DEPTHS, PROB_BINS, SOURCES, Calibration
from treeline.step_record import NodeOutcomes

DECAY = 0.99
"""Share of the counts kept per step: their half-life is 70 steps, 2 to 4 s of decoding on a CPU. With it the expected
calibration error of the shipped head is 0.04 to 0.05."""
LASTING_NODES = 32.0
"""Weight, in nodes, to which old counts decay while no node is verified: low enough for a closed gate's probes to
outweigh them. After 5 s of text that cannot be guessed, 32 and 64 streams of a simulated H100 regain 0.95 of their
goodput in 2.3 and 4.4 s; with counts that decay only in steps that verify nodes, in 12.8 and more than 15 s.
"""
PRIOR_NODES = 4.0
"""Weight, in nodes, of the estimate that counts are shrunk to: a cell to all depths pooled, these to the prior. A cell
in use sees a few nodes per step, so its own counts dominate within seconds."""
KAPPA_PRIOR = 0.6
"""P(a reached node has an accepted child) before any was seen: a guess, outweighed after PRIOR_NODES nodes."""
# Strides of the flattened acceptance table [source, sampled, depth, bin].
_PER_DEPTH, _PER_SAMPLED, _PER_SOURCE = (np.intp(size * PROB_BINS) for size in (1, DEPTHS, 2 * DEPTHS))
_BINS, _LAST_BIN = np.float32(PROB_BINS), np.float32(PROB_BINS - 1)


def accepts(
    calibration: Calibration,
    sources: int | NDArray[np.uint8],
    depths: int | NDArray[np.integer],
    draft_probs: NDArray[np.float32],
    sampled: bool | NDArray[np.bool_],
) -> NDArray[np.float32]:
    """float32 [n]: c(v), the calibrated probability that the target accepts each node once its parent was accepted.

    Args:
        sources, depths, sampled: [n], or one for all.
    """
    # One flat index is several times faster than four index columns. The strides are typed, because uint8 overflows.
    # Example: source 1, greedy, depth 2, bin 3 -> 1 * 256 + 0 * 128 + 2 * 16 + 3, less 16 as depths count from 1.
    cells = prob_bins(draft_probs) + (sources * _PER_SOURCE + np.minimum(depths, DEPTHS) * _PER_DEPTH - PROB_BINS)
    cells += sampled * _PER_SAMPLED
    return calibration.acceptance.ravel()[cells]


def prob_bins(draft_probs: NDArray[np.float32]) -> NDArray[np.intp]:
    """intp [n]: the bin of each probability. Bins are even in its square root, so that small ones are resolved."""
    return np.minimum(np.sqrt(draft_probs) * _BINS, _LAST_BIN).astype(np.intp)


def prior() -> Calibration:
    """The calibration before anything was seen: acceptance equals the drafter's probability."""
    middles = ((np.arange(PROB_BINS, dtype=np.float32) + 0.5) / PROB_BINS) ** 2
    acceptance = np.broadcast_to(middles, (SOURCES, 2, DEPTHS, PROB_BINS)).astype(np.float32)
    return Calibration(acceptance, np.full((2, DEPTHS), KAPPA_PRIOR, np.float32))


class Calibrator:
    """Decayed counts per (source, sampled, depth, bin), shrunk to all depths pooled, and these to the prior."""

    def __init__(self) -> None:
        self._nodes = np.zeros((2, SOURCES, 2, DEPTHS, PROB_BINS))  # seen, accepted
        self._parents = np.zeros((2, 2, DEPTHS))  # seen, continued
        self._prior = prior()
        self._calibration, self._learnt = self._prior, False
        # Reliability of the predictions in force: rows predicted, accepted and seen, by bin of the prediction.
        self._reliability = np.zeros((3, PROB_BINS))

    def update(self, outcomes: NodeOutcomes) -> None:
        """Learn from one step, and let the counts of earlier ones fall."""
        self._learnt = True
        if not len(outcomes.accepted):
            for old in (self._nodes, self._parents):
                old *= np.maximum(DECAY, LASTING_NODES / np.maximum(old[0], LASTING_NODES))
            return
        predicted = accepts(
            self._calibration, outcomes.sources, outcomes.depths, outcomes.draft_probs, outcomes.sampled
        )
        accepted, sampled = outcomes.accepted.astype(np.float64), outcomes.sampled.astype(np.intp)
        depths = sampled * DEPTHS + np.minimum(outcomes.depths, DEPTHS) - 1
        cells = (outcomes.sources.astype(np.intp) * (2 * DEPTHS) + depths) * PROB_BINS + prob_bins(outcomes.draft_probs)
        for counts in (self._nodes, self._parents, self._reliability):
            counts *= DECAY
        np.add.at(self._nodes[0].ravel(), cells, 1.0)
        np.add.at(self._nodes[1].ravel(), cells, accepted)
        # Siblings share one parent: its first child counts it.
        np.add.at(self._parents[0].ravel(), depths, outcomes.first.astype(np.float64))
        np.add.at(self._parents[1].ravel(), depths, accepted)
        bins = prob_bins(predicted)
        np.add.at(self._reliability[0], bins, predicted.astype(np.float64))
        np.add.at(self._reliability[1], bins, accepted)
        np.add.at(self._reliability[2], bins, 1.0)

    def calibration(self) -> Calibration:
        """The present estimate. Reliability is measured against it from now on."""
        if self._learnt:
            self._calibration, self._learnt = self._estimate(), False
        return self._calibration

    def ece(self) -> float:
        """Expected calibration error of the recent predictions: mean |predicted - accepted| over bins, by weight."""
        predicted, accepted, seen = self._reliability
        return float(np.abs(predicted - accepted).sum() / seen.sum()) if seen.sum() else 0.0

    def _estimate(self) -> Calibration:
        pooled = _shrunk(self._nodes.sum(3, keepdims=True), self._prior.acceptance)
        acceptance, kappa = _shrunk(self._nodes, pooled), _shrunk(self._parents, self._prior.kappa)
        return Calibration(acceptance.astype(np.float32), np.minimum(kappa, 1).astype(np.float32))


def _shrunk(counts: NDArray[np.float64], towards: NDArray[np.floating]) -> NDArray[np.float64]:
    """float64: share of successes in `counts` (seen, successes), `towards` weighing as much as PRIOR_NODES."""
    seen, successes = counts
    return (successes + PRIOR_NODES * towards) / (seen + PRIOR_NODES)
