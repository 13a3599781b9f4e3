"""The law of acceptance: how often a target accepts a draft, and how sure of it the drafter claims to be."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

KINDS = 4096
"""Kinds of text position, drawn once per depth: enough that a run meets most of them about equally often."""
MAX_CLAIM = 0.999


@dataclass(frozen=True)
class AcceptanceLaw:
    """How good drafts are.

    Attributes:
        by_depth: [depths][ranks], mean probability that the target accepts the choice of this rank below an accepted
            node; non-increasing by rank, the sum below 1. The last depth stands for all deeper ones.
        concentration: of the Beta distribution of the first choice's probability. Small: the drafter is either sure or
            lost. Large: it is always equally sure.
        over_confidence: claimed over true probability of the first choice. The other choices share the rest.
    """

    by_depth: tuple[tuple[float, ...], ...]
    concentration: float
    over_confidence: float

    def draw(self, depth: int, random: np.random.Generator) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """(true, claimed) acceptance float64 [KINDS, ranks] of the children at this depth, counted from 1.

        With means s of the first choice and t of the second, the first is drawn as l + (1 - l) * Beta with
        l = t / (1 - s + t), so that it never falls below the second. Over all kinds every rank has its own mean.
        """
        means = np.asarray(self.by_depth[min(depth, len(self.by_depth)) - 1])
        first, rest = means[0], 1 - means[0]
        least = means[1] / (rest + means[1]) if len(means) > 1 else 0.0
        mean = (first - least) / (1 - least)
        share = random.beta(max(1e-3, mean * self.concentration), max(1e-3, (1 - mean) * self.concentration), KINDS)
        drawn = least + (1 - least) * share[:, None]
        claimed = np.minimum(drawn * self.over_confidence, MAX_CLAIM)
        others = means[1:] / rest
        return np.hstack([drawn, others * (1 - drawn)]), np.hstack([claimed, others * (1 - claimed)])


EAGLE3_LIKE = AcceptanceLaw(((0.72, 0.12, 0.05, 0.03, 0.015, 0.01, 0.005, 0.005),), 1.5, 1.2)
"""An assumption, not a measurement: a head whose first choice is right in 72 of 100 places, at any depth."""
