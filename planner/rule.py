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

MAX_ACCEPTANCE = 1 - 2.0**-20
"""Below 1, so that a child is always worth less than its parent, and any order by worth is closed under parents."""


@dataclass(frozen=True)
class Candidate:
    """One decoding request's part of a step.

    Attributes:
        tree: as drafted; empty if nothing was drafted for this request.
        weight: of its tokens.
        ratio: how its drafts fare beside the calibration (`planner.calibration.RequestAcceptance`).
    """

    tree: DraftTree
    policy: Policy
    weight: float
    sampled: bool
    ratio: float = 1.0


@dataclass(frozen=True)
class BatchState:
    """The step that the trees would join.

    Attributes:
        base_tokens: tokens in the pass in any case: one a sequence, and prompt chunks.
        context_tokens: mean committed tokens per sequence.
        draft_s: seconds spent on drafting, or about to be.
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
        gains: float64 [nodes]; w a(u) of every node that could have been pruned, in no order.
        expected_nodes: per candidate, nodes of those kept that the calibration alone expects to be accepted.
        price: R + mu Q, tokens per second.
        node_s: what a node had to beat, as seconds at the price: the worth of the best one left out; 0 if none was.
        goodput: weighted tokens per second expected at the chosen size.
        expected_tokens: weighted tokens expected of the step.
        reason: one line for people.
    """

    keep: list[NDArray[np.bool_]]
    gains: NDArray[np.float64]
    expected_nodes: list[float]
    price: float
    node_s: float
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

    `candidates` are all the requests that decode in this step. Those whose policy does not prune keep their whole
    tree; those nodes are part of the pass at every size.
    """
    sizes = np.asarray([len(c.tree) for c in candidates])
    scores = _scores(candidates, sizes, plan.calibration)
    gains = np.repeat([c.weight * c.ratio for c in candidates], sizes) * scores
    prunable = np.repeat([c.policy.prunes for c in candidates], sizes)
    open_gains = gains[prunable]
    fixed = len(gains) - len(open_gains)
    order = np.argsort(-open_gains)
    cumulative = np.concatenate(([0.0], np.cumsum(open_gains[order])))
    expected = sum(c.weight for c in candidates) + float(gains.sum() - cumulative[-1]) + cumulative
    sequences, base = max(1, len(candidates)), state.base_tokens + fixed
    verify_s = verify_seconds(plan.cost, sequences, state.context_tokens, base + len(order))
    overhead_s = plan.cost.step_overhead_s
    promptless_s = state.draft_s + overhead_s + verify_s[sequences + fixed :][: len(order) + 1]
    price = price_of(
        expected, promptless_s, overhead_s + float(verify_s[sequences]), sequences, state.waiting_startable
    )
    verify_s = verify_s[base:]
    seconds = state.draft_s + overhead_s + verify_s
    size = int(np.argmax(expected - price * seconds))
    chosen = ~prunable
    chosen[np.flatnonzero(prunable)[order[:size]]] = True
    return Pruning(
        keep=_split(chosen, sizes),
        gains=open_gains,
        expected_nodes=_sums(scores, chosen, sizes),
        price=price,
        node_s=float(open_gains[order[size]] / price) if size < len(order) else 0.0,
        goodput=float(expected[size] / seconds[size]),
        expected_tokens=float(expected[size]),
        predicted_verify_s=float(verify_s[size]),
        reason=_reason(size, order, open_gains, verify_s, price, fixed),
    )


def price_of(
    expected: NDArray[np.float64], seconds: NDArray[np.float64], plain_s: float, sequences: int, waiting: int
) -> float:
    """R + mu Q: R is the best goodput of a batch, with what was drafted for it or without any of it.

    Prompts that share the step are left out of all seconds here: they are run whatever is decoded, so what a second is
    worth does not depend on them.

    Args:
        expected, seconds: float64 [sizes]; weighted tokens and seconds of a drafted step, prompts apart.
        plain_s: of a step that is not drafted. Weights are 1 on average, so it brings a token per sequence.
    """
    goodput = max(float((expected / seconds).max()), sequences / plain_s)
    # A waiting request loses its share of the batch's goodput for as long as the step lasts.
    return goodput * (1 + waiting / sequences)


def another_layer(frontiers: list[Frontier], plan: Plan) -> bool:
    """Whether running these nodes through the draft model pays, at the plan's price, for the whole batch.

    Each node's children are worth their total acceptance, less the price of verifying one of them at least.
    """
    if any(not f.policy.prices_drafting and f.depth < f.policy.max_depth for f in frontiers):
        return True
    smart = [f for f in frontiers if f.policy.prices_drafting]
    kappa = plan.calibration.kappa
    gain = sum(f.weight * float(f.scores.sum()) * kappa[int(f.sampled), min(f.depth, DEPTHS - 1)] for f in smart)
    nodes = sum(len(f.scores) for f in smart)
    node_s = plan.cost.draft_node_s + plan.cost.node_s
    return gain > plan.price * (plan.cost.draft_layer_s + node_s * nodes)


def _scores(candidates: list[Candidate], sizes: NDArray[np.intp], calibration: Calibration) -> NDArray[np.float64]:
    """float64 [nodes]: a(u) of every node of the forest, trees one behind the other."""
    total = int(sizes.sum())
    if not total:
        return np.zeros(0)
    trees = [c.tree for c in candidates]
    first = np.repeat(np.cumsum(sizes) - sizes, sizes)
    parents = np.concatenate([tree.parents for tree in trees])
    # The roots become one more node behind all others, which is its own parent.
    jump = np.full(total + 1, total)
    np.copyto(jump[:-1], parents + first, where=parents != ROOT)
    depths, jumps = np.ones(total + 1, np.intp), [jump]
    depths[-1] = 0
    while (jump := jumps[-1]).min() < total:
        # Pointer jumping: every round doubles the distance that is looked up the path.
        depths += depths[jump]
        jumps.append(jump[jump])
    sampled = np.repeat([c.sampled for c in candidates], sizes)
    sources = np.concatenate([tree.sources for tree in trees])
    probs = np.concatenate([tree.draft_probs for tree in trees])
    edges = accepts(calibration, sources, depths[:-1], probs, sampled)
    scores = np.ones(total + 1)
    np.minimum(edges, MAX_ACCEPTANCE, out=scores[:-1])
    for jump in jumps[:-1]:
        scores *= scores[jump]
    return scores[:-1]


def _sums(scores: NDArray[np.float64], chosen: NDArray[np.bool_], sizes: NDArray[np.intp]) -> list[float]:
    """Of each tree, the sum over its chosen nodes."""
    trees = np.repeat(np.arange(len(sizes)), sizes)[chosen]
    return np.bincount(trees, weights=scores[chosen], minlength=len(sizes)).tolist()


def _split(values: NDArray[np.bool_], sizes: NDArray[np.intp]) -> list[NDArray[np.bool_]]:
    """`values` cut into pieces of these sizes."""
    ends = np.cumsum(sizes).tolist()
    return [values[end - size : end] for end, size in zip(ends, sizes.tolist(), strict=True)]


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
