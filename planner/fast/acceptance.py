"""From what a drafter believes to what the target accepts, learnt online."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from treeline.plan import DEPTHS, PROB_BINS, RANKS, SOURCES, Calibration, NodeOutcomes
from treeline.tree import Source

DECAY = 0.99
"""Per update: evidence of 70 steps ago counts half."""
POOLED_WEIGHT = 4.0
PRIOR_WEIGHT = 4.0
NGRAM_PRIOR = 0.8
KAPPA_PRIOR = 0.6
KAPPA_WEIGHT = 8.0
RANK_WEIGHT = 8.0
REQUEST_DECAY = 0.95
REQUEST_WEIGHT = 4.0
"""A request is believed to be like the others as firmly as this many accepted nodes would show it."""
REQUEST_RATIOS = (0.25, 1.5)
_PER_DEPTH, _PER_SAMPLED, _PER_SOURCE = (np.intp(size * PROB_BINS) for size in (1, DEPTHS, 2 * DEPTHS))
_BINS, _LAST_BIN = np.float32(PROB_BINS), np.float32(PROB_BINS - 1)


def accepts(
    calibration: Calibration,
    sources: NDArray[np.uint8],
    depths: NDArray[np.integer],
    draft_probs: NDArray[np.float32],
    sampled: bool | NDArray[np.bool_],
) -> NDArray[np.float32]:
    """float32 [n]: c(v), the calibrated probability that the target accepts each node once its parent was accepted.

    Args:
        depths: [n], or [] if all are equally deep.
        sampled: bool [n], or one for all.
    """
    # One flat index, of typed constants (bytes would overflow), is several times faster than an index of four columns.
    cells = sources * _PER_SOURCE
    cells += sampled * _PER_SAMPLED
    cells += np.minimum(depths, DEPTHS) * _PER_DEPTH
    cells += prob_bins(draft_probs)
    return calibration.acceptance.ravel()[cells - PROB_BINS]


def prob_bins(draft_probs: NDArray[np.float32]) -> NDArray[np.intp]:
    """Bin of each probability. Bins are even in its square root, so that small ones are told apart."""
    return np.minimum(np.sqrt(draft_probs) * _BINS, _LAST_BIN).astype(np.intp)


def prior() -> Calibration:
    """Before anything was seen: the drafter is believed, a lookup a little less."""
    middles = ((np.arange(PROB_BINS, dtype=np.float32) + 0.5) / PROB_BINS) ** 2
    acceptance = np.broadcast_to(middles, (SOURCES, 2, DEPTHS, PROB_BINS)).astype(np.float32)
    acceptance[Source.NGRAM] *= NGRAM_PRIOR
    by_rank = KAPPA_PRIOR / np.arange(1, RANKS + 1, dtype=np.float32) ** 2
    return Calibration(acceptance, np.full((2, DEPTHS), KAPPA_PRIOR, np.float32), np.stack([by_rank, by_rank]))


@dataclass(frozen=True)
class RequestAcceptance:
    """How one request's drafts fare beside the deployment's calibration; forgetful, and shrunk to it.

    Attributes:
        expected, accepted: nodes, by the calibration and in fact, over about the last 20 steps.
    """

    expected: float = 0.0
    accepted: float = 0.0

    @property
    def ratio(self) -> float:
        """By how much to multiply the path acceptance of this request's nodes."""
        low, high = REQUEST_RATIOS
        return min(high, max(low, (self.accepted + REQUEST_WEIGHT) / (self.expected + REQUEST_WEIGHT)))

    def after(self, expected: float, accepted: int) -> RequestAcceptance:
        """After one step more."""
        return RequestAcceptance(REQUEST_DECAY * self.expected + expected, REQUEST_DECAY * self.accepted + accepted)


class Calibrator:
    """Decayed counts per (source, sampled, depth, bin), shrunk to all depths together, and these to the prior."""

    def __init__(self) -> None:
        shape = (SOURCES, 2, DEPTHS, PROB_BINS)
        self._seen, self._accepted = np.zeros(shape), np.zeros(shape)
        self._parents, self._continued = np.zeros((2, DEPTHS)), np.zeros((2, DEPTHS))
        self._rank_seen, self._rank_accepted = np.zeros((2, RANKS)), np.zeros((2, RANKS))
        self._prior = prior()
        self._calibration, self._learnt = self._prior, False
        # Reliability of the predictions in force when each outcome came: predicted, accepted and seen by predicted bin.
        self._reliability = np.zeros((3, PROB_BINS))

    def update(self, outcomes: NodeOutcomes) -> None:
        """Learn from one step."""
        if not len(outcomes.accepted):
            return
        predicted = accepts(
            self._calibration, outcomes.sources, outcomes.depths, outcomes.draft_probs, outcomes.sampled
        )
        accepted, sampled = outcomes.accepted.astype(np.float64), outcomes.sampled.astype(np.intp)
        depths = sampled * DEPTHS + np.minimum(outcomes.depths, DEPTHS) - 1
        cells = (outcomes.sources.astype(np.intp) * (2 * DEPTHS) + depths) * PROB_BINS + prob_bins(outcomes.draft_probs)
        for counts in (self._seen, self._accepted, self._parents, self._continued, self._reliability):
            counts *= DECAY
        for counts in (self._rank_seen, self._rank_accepted):
            counts *= DECAY
        # Of one flat index each, which is several times faster than of one for every axis.
        np.add.at(self._seen.ravel(), cells, 1.0)
        np.add.at(self._accepted.ravel(), cells, accepted)
        # Siblings share one reached parent: the one of rank 0 stands for it.
        np.add.at(self._parents.ravel(), depths, (outcomes.ranks == 0).astype(np.float64))
        np.add.at(self._continued.ravel(), depths, accepted)
        ranks = sampled * RANKS + np.minimum(outcomes.ranks, RANKS - 1)
        np.add.at(self._rank_seen.ravel(), ranks, 1.0)
        np.add.at(self._rank_accepted.ravel(), ranks, accepted)
        bins = prob_bins(predicted)
        np.add.at(self._reliability[0], bins, predicted.astype(np.float64))
        np.add.at(self._reliability[1], bins, accepted)
        np.add.at(self._reliability[2], bins, 1.0)
        self._learnt = True

    def calibration(self) -> Calibration:
        """The calibration as it is now, in force from now on."""
        if self._learnt:
            self._calibration, self._learnt = self._estimate(), False
        return self._calibration

    def ece(self) -> float:
        """Expected calibration error of the recent predictions: mean |predicted - accepted| over bins, by weight."""
        predicted, accepted, seen = self._reliability
        return float(np.abs(predicted - accepted).sum() / seen.sum()) if seen.sum() else 0.0

    def _estimate(self) -> Calibration:
        pooled_seen, pooled_accepted = self._seen.sum(2, keepdims=True), self._accepted.sum(2, keepdims=True)
        pooled = (pooled_accepted + PRIOR_WEIGHT * self._prior.acceptance) / (pooled_seen + PRIOR_WEIGHT)
        acceptance = (self._accepted + POOLED_WEIGHT * pooled) / (self._seen + POOLED_WEIGHT)
        kappa = (self._continued + KAPPA_WEIGHT * self._prior.kappa) / (self._parents + KAPPA_WEIGHT)
        by_rank = (self._rank_accepted + RANK_WEIGHT * self._prior.by_rank) / (self._rank_seen + RANK_WEIGHT)
        return Calibration(
            acceptance.astype(np.float32), np.minimum(kappa, 1).astype(np.float32), by_rank.astype(np.float32)
        )
