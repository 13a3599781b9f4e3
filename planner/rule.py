"""The rule: which nodes of a whole batch are worth verifying, and whether another layer is worth drafting.

A node u is worth it if w a(u) / dC(u) > price, price = R + mu Q (see docs/planner.md). Because path acceptance never
grows along a path, the best m nodes of the batch are the m with the largest w a(u), and they are closed under parents;
so looking at every prefix of one sorted list is exact for any cost curve.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from planner.calibration import accepts
from planner.cost import verify_seconds
from planner.policies import Policy
from treeline.plan import DEPTHS, Calibration, Plan
from treeline.tree import ROOT, DraftTree


@dataclass(frozen=True)
class Candidate:
    """One request's drafted tree."""

    tree: DraftTree
    policy: Policy
    weight: float
    sampled: bool


@dataclass(frozen=True)
class BatchState:
    """The step that the trees would join.

    Attributes:
        base_tokens: tokens in the pass in any case: one a sequence, and prompt chunks.
        context_tokens: mean committed tokens per sequence.
        draft_s: seconds spent on drafting.
        waiting_startable: Q, waiting requests that could start when this step ends.
    """

    base_tokens: int
    context_tokens: int
    draft_s: float
    waiting_startable: int


@dataclass(frozen=True)
class Pruning:
    """What to verify, and why.

    Attributes:
        keep: bool [n] per candidate, closed under parents.
        price: R + mu Q, tokens per second.
        goodput: weighted tokens per second expected at the chosen size.
        expected_tokens: weighted tokens expected of the step.
        reason: one line for people.
    """

    keep: list[NDArray[np.bool_]]
    price: float
    goodput: float
    expected_tokens: float
    predicted_verify_s: float
    reason: str


@dataclass(frozen=True)
class Frontier:
    """Nodes of one request that the draft model would be run on next. `scores`: float32 [m], path acceptance."""

    policy: Policy
    weight: float
    scores: NDArray[np.float32]
    depth: int
    sampled: bool


def prune_batch(candidates: list[Candidate], state: BatchState, plan: Plan) -> Pruning:
    """The best size for the batch, over every prefix of the nodes in order of their worth.

    Requests whose policy does not prune keep their whole tree; those nodes are part of the pass at every size.
    """
    gains, prunable = _gains(candidates, plan.calibration)
    fixed = int(len(gains) - prunable.sum())
    order = np.argsort(-gains[prunable], kind="stable")  # equal gains: parents first, as they come first
    cumulative = np.concatenate(([0.0], np.cumsum(gains[prunable][order])))
    expected = sum(c.weight for c in candidates) + gains[~prunable].sum() + cumulative
    base = state.base_tokens + fixed
    sequences = max(1, len(candidates))
    curve = verify_seconds(plan.cost, sequences, state.context_tokens, base + len(order))
    verify_s = curve[base:]
    seconds = state.draft_s + plan.cost.step_overhead_s + verify_s
    best_goodput = float((expected / seconds).max())
    # A waiting request loses its share of the batch's goodput for as long as the step lasts.
    price = best_goodput * (1 + state.waiting_startable / sequences)
    size = int(np.argmax(expected - price * seconds))
    chosen = ~prunable
    chosen[np.flatnonzero(prunable)[order[:size]]] = True
    bounds = np.cumsum([len(c.tree) for c in candidates])[:-1]
    return Pruning(
        keep=np.split(chosen, bounds),
        price=price,
        goodput=float(expected[size] / seconds[size]),
        expected_tokens=float(expected[size]),
        predicted_verify_s=float(verify_s[size]),
        reason=_reason(size, order, gains[prunable], verify_s, price, fixed),
    )


def worth_drafting(policies: list[Policy], weights: list[float], state: BatchState, plan: Plan) -> bool:
    """Whether a first layer pays for these requests; policies other than smart always want to draft."""
    if any(not policy.prunes and policy.max_depth > 0 for policy in policies):
        return True
    smart = [weight for policy, weight in zip(policies, weights, strict=True) if policy.prunes]
    if not smart:
        return False
    cost = plan.cost
    tokens = state.base_tokens + len(smart)
    verify_s = verify_seconds(cost, max(1, state.base_tokens), state.context_tokens, tokens)
    plain = state.base_tokens / (verify_s[state.base_tokens] + cost.step_overhead_s)
    draft_s = cost.draft_round_trip_s + cost.draft_layer_s + cost.draft_node_s * len(smart)
    added_s = draft_s + verify_s[tokens] - verify_s[state.base_tokens]
    return sum(smart) * float(plan.calibration.kappa[:, 0].max()) > plain * added_s


def another_layer(frontiers: list[Frontier], plan: Plan) -> bool:
    """Whether running these nodes through the draft model pays, at the plan's price, for the whole batch."""
    if any(not f.policy.prunes and f.depth < f.policy.max_depth for f in frontiers):
        return True
    smart = [f for f in frontiers if f.policy.prunes]
    kappa = plan.calibration.kappa
    gain = sum(f.weight * float(f.scores.sum()) * kappa[int(f.sampled), min(f.depth, DEPTHS - 1)] for f in smart)
    nodes = sum(len(f.scores) for f in smart)
    return gain > plan.price * (plan.cost.draft_layer_s + plan.cost.draft_node_s * nodes)


def _gains(candidates: list[Candidate], calibration: Calibration) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """(w a(u) of every node of the forest, whether it may be pruned), trees one behind the other."""
    sizes = [len(c.tree) for c in candidates]
    if not sum(sizes):
        return np.zeros(0), np.zeros(0, np.bool_)
    first = np.repeat(np.cumsum([0, *sizes[:-1]]), sizes)
    parents = np.concatenate([c.tree.parents for c in candidates])
    parents = np.where(parents == ROOT, ROOT, parents + first)
    depths = np.ones(len(parents), np.int32)
    above = parents
    while (inner := above != ROOT).any():
        depths += inner
        above = np.where(inner, parents[above], ROOT)
    scores = accepts(
        calibration,
        np.concatenate([c.tree.sources for c in candidates]),
        depths,
        np.concatenate([c.tree.draft_probs for c in candidates]),
        np.repeat([c.sampled for c in candidates], sizes),
    ).astype(np.float64)
    for depth in range(2, int(depths.max()) + 1):
        layer = np.flatnonzero(depths == depth)
        scores[layer] *= scores[parents[layer]]
    weights = np.repeat([c.weight for c in candidates], sizes)
    return weights * scores, np.repeat([c.policy.prunes for c in candidates], sizes)


def _reason(
    size: int,
    order: NDArray[np.intp],
    gains: NDArray[np.float64],
    verify_s: NDArray[np.float64],
    price: float,
    fixed: int,
) -> str:
    kept = f"kept {size} of {len(order)} nodes at {price:.0f} tok/s"
    if fixed:
        kept += f", {fixed} more by fixed policies"
    if size == len(order):
        return kept
    added_s = verify_s[size + 1] - verify_s[size]
    brings = f"{gains[order[size]] / added_s:.0f} tok/s" if added_s > 0 else f"{gains[order[size]]:.2f} tokens"
    return f"{kept}; the next would bring {brings}"
