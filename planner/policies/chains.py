"""Chains whose length follows the load or the acceptance, as today's servers do it.

All of them read the plan: costs as measured, and the acceptance of first choices, a decayed average.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from planner.fast.cost import verify_seconds
from planner.policies.base import Growth, Layer, places_by_score
from treeline.plan import CostModel, Plan

MAX_LENGTH = 8
ADAPTIVE_LENGTH = 5


class _Chain(Growth):
    max_depth = MAX_LENGTH
    max_children = 1

    def keep(self, layer: Layer, plan: Plan) -> NDArray[np.bool_]:
        return places_by_score(layer.scores, layer.tree_of) < 1


@dataclass(frozen=True)
class SmartSpec(_Chain):
    """SmartSpec (arXiv 2406.14066): all requests draft the k that is best for the batch's goodput; k may be 0.

    With one acceptance rate a for all, goodput(k) = B (1 - a^(k+1)) / (1 - a) / (k t_draft + t_target((k + 1) B)).
    """

    spec = "smartspec"

    def layers(self, plan: Plan, batch: int, sampled: bool) -> int:
        return _best_length(plan.cost, first_choice(plan, sampled), batch)


@dataclass(frozen=True)
class SglangEma(_Chain):
    """SGLang's adaptive steps: from the average number a of accepted tokens, the next length is round(a) + 1.

    That number depends on the length itself, so lengths settle where k = round(a(k)) + 1. They start at the longest
    chain and settle at the greatest such k, which is found here without a state of its own.
    """

    spec = "sglang-ema"

    def layers(self, plan: Plan, batch: int, sampled: bool) -> int:
        acceptance, length = first_choice(plan, sampled), MAX_LENGTH
        while (wanted := round(expected_accepted(acceptance, length)) + 1) < length:
            length = wanted
        return length


@dataclass(frozen=True)
class VllmAdaptive(_Chain):
    """vLLM's adaptive verification: equal chains for all, cut over the whole batch where a token's chance to survive
    is not worth its measured cost. Drafting itself is never skipped.
    """

    spec = "vllm-adaptive"
    max_depth = ADAPTIVE_LENGTH
    prunes = True


def first_choice(plan: Plan, sampled: bool) -> float:
    """The measured probability that the target accepts the drafter's first choice."""
    return float(plan.calibration.by_rank[int(sampled), 0])


def expected_accepted(acceptance: float, length: int) -> float:
    """Draft tokens accepted of a chain: the sum of acceptance^i for i = 1 .. length."""
    return float(sum(acceptance**i for i in range(1, length + 1)))


@lru_cache(maxsize=256)
def _best_length(cost: CostModel, acceptance: float, batch: int) -> int:
    lengths = np.arange(MAX_LENGTH + 1)
    expected = np.cumsum(np.power(acceptance, lengths))
    context_tokens = min(curve.context_tokens for curve in cost.verify)
    verify_s = verify_seconds(cost, batch, context_tokens, batch * (MAX_LENGTH + 1))[batch * (lengths + 1)]
    draft_s = lengths * (cost.draft_layer_s + cost.draft_node_s * batch) + (lengths > 0) * cost.draft_round_trip_s
    return int(np.argmax(expected / (verify_s + draft_s + cost.step_overhead_s)))
