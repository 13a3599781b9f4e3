"""What drafting costs, learnt online."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from planner.fast.rls import RecursiveLeastSquares
from treeline.plan import StepRecord

COSTS_S = (1e-3, 3e-4, 3e-3, 2e-4)
"""Believed at first of round trip, request, layer and node; the last two only if the drafter has not measured them."""
COMMON_DEVIATION = 0.5
OWN_DEVIATIONS = (1.0, 0.7, 0.3, 0.5)
"""How far, as logarithms of ratios, the four may drift together and each on its own."""
NOISE = 0.15
MEMORY = 0.999
CATCH_UP_TOKENS = 4
"""A drafter runs this many committed tokens per request in ordinary steps (accepted leaves, lookups' tokens)."""


def catches_up(catch_up_tokens: int, requests: int) -> bool:
    """Whether a draft for so many requests had much to catch up: what it took says little of the next one."""
    return catch_up_tokens > CATCH_UP_TOKENS * requests


class DraftCosts:
    """Tracks r, s, d0 and d1 in r + s * requests + d0 * layers + d1 * nodes.

    What is tracked are their logarithms, by relative errors: a draft that took ten times as long moves nothing far, a
    machine that slows down makes all four dearer at once, and none can become negative.
    """

    def __init__(self, layer_s: float, node_s: float) -> None:
        """`layer_s`, `node_s`: as the drafter measured them, 0 if it did not."""
        costs_s = (*COSTS_S[:2], layer_s or COSTS_S[2], node_s or COSTS_S[3])
        spread = COMMON_DEVIATION**2 + np.diag(np.square(OWN_DEVIATIONS))
        self._logs = RecursiveLeastSquares(np.log(costs_s), spread, NOISE, MEMORY)

    @property
    def seconds(self) -> NDArray[np.float64]:
        """float64 [4]: r, s, d0 and d1 as they are now."""
        return np.exp(self._logs.theta)

    def observe(self, record: StepRecord) -> None:
        """Learn from a step in which the drafter worked, unless it had much to catch up."""
        if not record.drafter_s or catches_up(record.catch_up_tokens, record.drafted_requests):
            return
        layers = record.draft_layer_nodes
        parts_s = self.seconds * [1.0, record.drafted_requests, len(layers), sum(layers)]
        predicted_s = float(parts_s.sum())
        self._logs.update(parts_s / predicted_s, float(np.log(record.draft_s / predicted_s)))
