"""The rule: which nodes of a whole batch are worth verifying, and whether another layer is worth drafting.

A node u is worth it if w a(u) / dC(u) > price, price = R + mu Q (see docs/planner.md). Because path acceptance never
grows along a path, the best m nodes of the batch are the m with the largest w a(u), and they are closed under parents;
so looking at every prefix of one sorted list is exact for any cost curve.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from planner.fast.acceptance import accepts
from planner.fast.cost import verify_seconds
from planner.policies import Policy
from treeline.forest import Forest
from treeline.plan import DEPTHS, Calibration, Plan

MAX_ACCEPTANCE = np.float32(1 - 2.0**-16)
"""Below 1 by more than a deep path's rounding, so that a child is worth less than its parent, and any order by worth is
closed under parents. A request whose drafts fare better than calibrated has no surer nodes than this either."""
LEAST_S = 1e-9
"""Where more tokens cost nothing, they still take some time."""


class Candidate(NamedTuple):
    """One decoding request's part of a step, beside its tree.

    Attributes:
        weight: of its tokens.
        ratio: how its drafts fare beside the calibration (`planner.fast.acceptance.RequestAcceptance`).
    """

    policy: Policy
    weight: float
    sampled: bool
    ratio: float = 1.0


class BatchState(NamedTuple):
    """The step that the trees would join.

    Attributes:
        base_tokens: tokens in the pass in any case: one a sequence, and prompt chunks.
        context_tokens: mean committed tokens per sequence.
        draft_s: seconds spent on drafting, or about to be.
        waiting_startable: Q, waiting requests that could start when this step ends.
        prompts_go_on: the next step will carry prompts as well, whatever is decoded in this one.
    """

    base_tokens: int
    context_tokens: int
    draft_s: float
    waiting_startable: int
    prompts_go_on: bool = False


class Candidates(NamedTuple):
    """What the choice reads of all candidates.

    Attributes:
        ratios, weights: float32 [candidates]; by which a node's acceptance, below 1 all the same, is multiplied.
        weight: the sum of all weights.
        prunes: bool [candidates]; whose nodes may be left out. None: everyone's.
    """

    ratios: NDArray[np.float32]
    weights: NDArray[np.float32]
    weight: float
    prunes: NDArray[np.bool_] | None

    @staticmethod
    def of(candidates: list[Candidate]) -> Candidates:
        prunes = [c.policy.priced for c in candidates]
        return Candidates(
            np.asarray([c.ratio for c in candidates], np.float32),
            np.asarray([c.weight for c in candidates], np.float32),
            sum([c.weight for c in candidates]),
            None if all(prunes) else np.asarray(prunes),
        )


@dataclass(frozen=True)
class Pruning:
    """What to verify, and why.

    Attributes:
        tree_of: intp [nodes]; which candidate's node it is.
        scores: float32 [nodes]; a(u).
        candidates: how many.
        prunable: index of the forest's nodes that could be pruned.
        chosen: bool [nodes] of the forest; closed under parents.
        gains: float32 [prunable nodes]; w a(u) of each.
        price: R + mu Q, tokens per second.
        goodput: weighted tokens per second expected at the chosen size.
        expected_tokens: weighted tokens expected of the step.
        kept: how many of `gains` were chosen.
        next_gain: the largest of `gains` that was not; 0 if there was none.
        next_s: seconds that it would have added to the pass.
    """

    tree_of: NDArray[np.intp]
    scores: NDArray[np.float32]
    candidates: int
    prunable: NDArray[np.bool_] | slice
    chosen: NDArray[np.bool_]
    gains: NDArray[np.float32]
    price: float
    goodput: float
    expected_tokens: float
    predicted_verify_s: float
    kept: int
    next_gain: float
    next_s: float

    @property
    def expected_nodes(self) -> list[float]:
        """Per candidate, nodes of those chosen that the calibration alone expects to be accepted."""
        return np.bincount(self.tree_of, self.scores * self.chosen, self.candidates).tolist()

    @property
    def node_s(self) -> float:
        """What a node had to beat, as seconds at the price: the worth of the best one left out; 0 if none was."""
        return self.next_gain / self.price

    @property
    def reason(self) -> str:
        """One line for people."""
        said = f"kept {self.kept} of {len(self.gains)} nodes at {self.price:.0f} tok/s"
        if fixed := len(self.chosen) - len(self.gains):
            said += f", {fixed} more by fixed policies"
        if self.kept == len(self.gains):
            return said
        brings = f"{self.next_gain / self.next_s:.0f} tok/s" if self.next_s > 0 else f"{self.next_gain:.2f} tokens"
        return f"{said}; the next would bring {brings}"


class Frontier(NamedTuple):
    """Nodes of one request that the draft model would be run on next. `acceptance`: the sum of a(u) over them."""

    policy: Policy
    weight: float
    nodes: int
    acceptance: float
    depth: int
    sampled: bool


def prune_batch(forest: Forest, candidates: list[Candidate], state: BatchState, plan: Plan) -> Pruning:
    """Which nodes of a batch's trees to verify, one candidate per tree.

    `candidates` are all the requests that decode in this step. Those whose policy does not prune keep their whole
    tree; those nodes are part of the pass at every size.
    """
    scores = path_acceptance(forest, [c.sampled for c in candidates], plan.calibration)
    return best_size(forest.tree_of, scores, Candidates.of(candidates), state, plan)


def best_size(
    tree_of: NDArray[np.intp], scores: NDArray[np.float32], candidates: Candidates, state: BatchState, plan: Plan
) -> Pruning:
    """The best size for the batch, over every prefix of the nodes in order of their worth.

    Args:
        tree_of: intp [nodes]; which candidate's node it is.
        scores: float32 [nodes]; a(u).
    """
    gains = np.minimum(scores * candidates.ratios[tree_of], MAX_ACCEPTANCE) * candidates.weights[tree_of]
    prunable = slice(None) if candidates.prunes is None else candidates.prunes[tree_of]
    open_gains = gains[prunable]
    fixed = len(gains) - len(open_gains)
    # Sorting values alone is several times faster than sorting their places.
    ranked = np.sort(open_gains)[::-1]
    expected = np.empty(len(ranked) + 1)
    expected[0] = candidates.weight
    if fixed:
        expected[0] += float(gains.sum()) - float(ranked.sum())
    expected[1:] = ranked
    expected.cumsum(out=expected)
    sequences, base = len(candidates.weights), state.base_tokens + fixed
    verify_s = verify_seconds(plan.cost, sequences, state.context_tokens, base + len(ranked))
    beside_s = state.draft_s + plan.cost.step_overhead_s
    own_s = own_seconds(verify_s, sequences, state, plan)
    drafted_s = own_s[fixed : fixed + len(expected)] + state.draft_s
    price = price_of(expected / drafted_s, own_s.item(0), sequences, state.waiting_startable)
    verify_s = verify_s[base:]
    size = int((expected - price * verify_s).argmax())
    best = _best(open_gains, ranked, size)
    if fixed:
        chosen = np.ones(len(gains), np.bool_)
        chosen[prunable] = best
    else:
        chosen = best
    left_out, best_s = size < len(ranked), verify_s.item(size)
    return Pruning(
        tree_of,
        scores,
        sequences,
        prunable=prunable,
        chosen=chosen,
        gains=open_gains,
        price=price,
        goodput=expected.item(size) / (beside_s + best_s),
        expected_tokens=expected.item(size),
        predicted_verify_s=best_s,
        kept=size,
        next_gain=ranked.item(size) if left_out else 0.0,
        next_s=verify_s.item(size + 1) - best_s if left_out else 0.0,
    )


def least_gain(nodes: int, margin: float, sequences: int, state: BatchState, plan: Plan) -> float:
    """Tokens that one at least of up to so many nodes must gain if together they are to be worth their place, and
    `margin` tokens more. Less is certainly not enough; to look at the nodes themselves takes several times as long.
    """
    seconds = verify_seconds(plan.cost, sequences, state.context_tokens, state.base_tokens + nodes)
    plain_s = own_seconds(seconds, sequences, state, plan).item(0)
    # The price is at least that of plain decoding.
    price = price_of(np.zeros(1), plain_s, sequences, state.waiting_startable)
    added_s = seconds[state.base_tokens + 1 :] - seconds[state.base_tokens]
    return float(((margin + price * added_s) / np.arange(1, nodes + 1)).min(initial=math.inf))


def own_seconds(verify_s: NDArray[np.float64], sequences: int, state: BatchState, plan: Plan) -> NDArray[np.float64]:
    """float64 [n]: what decoding one token of each sequence and 0, 1, 2, ... nodes takes of a step, prompts apart.

    Prompts that share the step are run whatever is decoded, so what a second is worth does not depend on them: the step
    is counted without them. But if they go on in the next one, its fixed costs are theirs, however few tokens are left
    to decode: then decoding takes only what it adds to their pass.

    Args:
        verify_s: float64 [tokens]; of passes over so many tokens.
    """
    if not state.prompts_go_on:
        return verify_s[sequences:] + plan.cost.step_overhead_s
    prompt_tokens = state.base_tokens - sequences
    return np.maximum(verify_s[state.base_tokens :] - verify_s[prompt_tokens], LEAST_S)


def price_of(goodputs: NDArray[np.float64], plain_s: float, sequences: int, waiting: int) -> float:
    """R + mu Q: R is the best goodput of a batch, with what was drafted for it or without any of it.

    Args:
        goodputs: float64 [sizes]; weighted tokens per second of a drafted step, by its `own_seconds`.
        plain_s: of a step that is not drafted. Weights are 1 on average, so it brings a token per sequence.
    """
    goodput = max(goodputs.item(goodputs.argmax()), sequences / plain_s)
    # A waiting request loses its share of the batch's goodput for as long as the step lasts.
    return goodput * (1 + waiting / sequences)


def another_layer(frontiers: list[Frontier], plan: Plan) -> bool:
    """Whether running these nodes through the draft model pays, at the plan's price, for the whole batch.

    Each node's children are worth their total acceptance, less the price of verifying one of them at least.
    """
    kappa, gain, nodes = plan.calibration.kappa, 0.0, 0
    for f in frontiers:
        if f.policy.priced:
            gain += f.weight * f.acceptance * kappa.item(int(f.sampled), min(f.depth, DEPTHS - 1))
            nodes += f.nodes
        elif f.depth < f.policy.max_depth:
            return True
    node_s = plan.cost.draft_node_s + plan.cost.node_s
    return gain > plan.price * (plan.cost.draft_layer_s + node_s * nodes)


def path_acceptance(forest: Forest, sampled: list[bool], calibration: Calibration) -> NDArray[np.float32]:
    """float32 [nodes]: a(u) of every node of the forest. `sampled`: per tree, sampled or greedy."""
    sampled_nodes = np.asarray(sampled, np.bool_)[forest.tree_of]
    edges = accepts(calibration, forest.sources, forest.depths, forest.draft_probs, sampled_nodes)
    return forest.path_products(np.minimum(edges, MAX_ACCEPTANCE))


def _best(values: NDArray[np.float32], ranked: NDArray[np.float32], count: int) -> NDArray[np.bool_]:
    """bool [n]: the `count` largest of `values`, the earlier of equals; `ranked` is `values` in falling order."""
    if not count:
        return np.zeros(len(values), np.bool_)
    least = ranked[count - 1]
    best = values >= least
    if count < len(ranked) and ranked[count] == least:
        equal = (values == least).nonzero()[0]
        best[equal[count - np.count_nonzero(best) :]] = False
    return best
