"""Other people's policies, for benchmarks only: importing this module makes `parse_policy` know them in this process.

All read the plan's measured costs and calibration, which the originals mostly lack; each docstring names what differs.
"""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from planner.fast.cost import pass_s, verify_seconds
from planner.policies import Layer, Policy
from planner.policies.base import MAX_CHILDREN, places_by_score
from planner.policies.parse import bounded, register
from treeline.config import MAX_TREE_DEPTH, MAX_TREE_NODES
from treeline.plan import CostModel, Plan

MAX_LENGTH = 8
"""Longest chain of `smartspec` and `sglang-ema`, draft tokens: both projects' examples stay below it."""
VLLM_LENGTH = 5
"""Chain length that `vllm-adaptive` drafts before it cuts, draft tokens: vLLM's example for EAGLE."""
OPT_TREE_THRESHOLD = 0.5
"""Expected tokens that a layer must add for OPT-Tree to go on; what its authors run with."""
RANKS = 8
"""Children per node that Sequoia considers."""


def first_choice(plan: Plan, sampled: bool) -> float:
    """P(the target accepts the drafter's first choice), over all depths: a chain's kappa, since it keeps one child."""
    return float(plan.calibration.kappa[int(sampled)].mean())


class _Chain(Policy):
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
class SloChain(_Chain):
    """SmartSpec within a latency objective: the best k for goodput among those whose step the step budget allows.

    Much as SpecServe (arXiv 2503.05096) does, which predicts latency by itself; here it gets our planner's budget.
    """

    spec = "slo-chain"

    def layers(self, plan: Plan, batch: int, sampled: bool) -> int:
        return _best_length(plan.cost, first_choice(plan, sampled), batch, plan.step_budget_s)


@lru_cache(maxsize=256)
def _best_length(cost: CostModel, acceptance: float, batch: int, longest_s: float = math.inf) -> int:
    lengths = np.arange(MAX_LENGTH + 1)
    expected = np.cumsum(np.power(acceptance, lengths))
    verify_s = verify_seconds(cost, batch, 0, batch * (MAX_LENGTH + 1))[batch * (lengths + 1)]
    draft_s = lengths * (cost.draft_layer_s + cost.draft_node_s * batch) + (lengths > 0) * cost.draft_round_trip_s
    step_s = verify_s + draft_s + cost.step_overhead_s
    return int(np.argmax(np.where((step_s <= longest_s) | (lengths == 0), expected / step_s, 0)))


@dataclass(frozen=True)
class SglangEma(_Chain):
    """SGLang's adaptive steps: with a accepted tokens on average, the next chain has round(a) + 1.

    That average depends on the length in force, so lengths settle where k = round(a(k)) + 1. From the longest chain
    they settle at the greatest such k, which is found here without a state of its own.
    """

    spec = "sglang-ema"

    def layers(self, plan: Plan, batch: int, sampled: bool) -> int:
        acceptance, length = first_choice(plan, sampled), MAX_LENGTH
        while (wanted := round(sum(acceptance**i for i in range(1, length + 1))) + 1) < length:
            length = wanted
        return length


@dataclass(frozen=True)
class VllmAdaptive(_Chain):
    """vLLM's adaptive verification: equal chains, each cut where a token's chance of acceptance is not worth its cost.

    Drafting is never skipped. Worth is the plan's price times what a token adds to this batch's pass; vLLM cuts after
    the whole chain was drafted, this cuts while it grows, which can only help it.
    """

    spec = "vllm-adaptive"
    max_depth = VLLM_LENGTH

    def keep(self, layer: Layer, plan: Plan) -> NDArray[np.bool_]:
        batch = layer.batch
        token_s = (pass_s(plan.cost, batch, 0, 2 * batch) - pass_s(plan.cost, batch, 0, batch)) / batch
        return super().keep(layer, plan) & (layer.scores > plan.price * token_s)


@dataclass(frozen=True)
class OptTree(Policy):
    """OPT-Tree (arXiv 2406.17276): the `nodes` best of each layer go on, the `nodes` best of all are kept.

    Here drafting stops at the first layer whose best `nodes` are worth at most `threshold` tokens together. The paper
    counts only what they add to the best nodes so far, which stops at the same layer or an earlier one.
    """

    nodes: int
    depth: int
    threshold: float = OPT_TREE_THRESHOLD

    @property
    def spec(self) -> str:
        threshold = "" if self.threshold == OPT_TREE_THRESHOLD else f",{self.threshold:g}"
        return f"opt-tree:{self.nodes},{self.depth}{threshold}"

    @property
    def max_depth(self) -> int:
        return self.depth

    @property
    def max_children(self) -> int:
        return min(self.nodes, MAX_CHILDREN)

    def keep(self, layer: Layer, plan: Plan) -> NDArray[np.bool_]:
        return places_by_score(layer.scores, layer.tree_of) < self.nodes

    def expand(self, layer: Layer, kept: NDArray[np.bool_], plan: Plan) -> NDArray[np.intp]:
        worth = np.bincount(layer.tree_of, layer.scores * kept, len(layer.sizes))
        return np.flatnonzero(kept & (worth > self.threshold)[layer.tree_of])

    def finish(self, scores: NDArray[np.float32], tree_of: NDArray[np.intp]) -> NDArray[np.bool_]:
        return places_by_score(scores, tree_of) < self.nodes


@dataclass(frozen=True)
class Sequoia(Policy):
    """Sequoia (arXiv 2402.12374): level sizes of the static tree with most expected tokens for acceptance by rank.

    Which nodes fill a level is chosen by calibrated path acceptance instead of by rank, which can only help it.
    Acceptance by rank is the measured kappa, shared out in proportion to 1 / (rank + 1)^2.
    """

    nodes: int
    depth: int
    max_children = RANKS

    @property
    def spec(self) -> str:
        return f"sequoia:{self.nodes},{self.depth}"

    @property
    def max_depth(self) -> int:
        return self.depth

    def keep(self, layer: Layer, plan: Plan) -> NDArray[np.bool_]:
        return self._best(layer, plan, np.ones(len(layer.scores), np.bool_), 0)

    def expand(self, layer: Layer, kept: NDArray[np.bool_], plan: Plan) -> NDArray[np.intp]:
        return np.flatnonzero(self._best(layer, plan, kept, 1))

    def _best(self, layer: Layer, plan: Plan, among: NDArray[np.bool_], column: int) -> NDArray[np.bool_]:
        """bool [m]: of each tree as many as the level has nodes (column 0) or parents (column 1)."""
        counts = np.zeros(len(layer.sizes), np.intp)
        for sampled in {*layer.sampled.tolist()}:
            # Rounded, so that noise in the measurement does not change the tree in every step.
            levels = optimal_levels(round(first_choice(plan, sampled), 2), self.nodes, self.depth)
            counts[layer.sampled == sampled] = levels[layer.depth - 1][column]
        scores = np.where(among, layer.scores, np.float32(-1))
        return among & (places_by_score(scores, layer.tree_of) < counts[layer.tree_of])


@lru_cache(maxsize=64)
def optimal_levels(kappa: float, nodes: int, depth: int) -> tuple[tuple[int, int], ...]:
    """(nodes, nodes with children) of each level of the best tree, children of rank r being accepted with a share of
    kappa in proportion to 1 / (r + 1)^2.

    A node is worth the product of acceptance over its path, which falls towards children and towards later siblings;
    so the `nodes` nodes of most worth form a tree, and no tree is worth more (the paper's dynamic programme).
    """
    shares = 1 / np.arange(1, RANKS + 1) ** 2
    acceptance = (kappa * shares / shares.sum()).tolist()
    levels = [[0, 0] for _ in range(depth + 1)]
    heap = [(-acceptance[0], 1, 0, 1.0)]  # (-worth, level, rank, worth of the parent)
    for _ in range(nodes):
        if not heap:
            break
        worth, level, rank, parent_worth = heapq.heappop(heap)
        levels[level - 1][0] += 1
        if rank == 0 and level > 1:
            levels[level - 2][1] += 1
        if rank + 1 < RANKS:
            heapq.heappush(heap, (-parent_worth * acceptance[rank + 1], level, rank + 1, parent_worth))
        if level < depth:
            heapq.heappush(heap, (worth * acceptance[0], level + 1, 0, -worth))
    return tuple((count, parents) for count, parents in levels[:depth])


@dataclass(frozen=True)
class Cast(Policy):
    """CAST (arXiv 2510.26577): EAGLE's dynamic tree, pruned by cost tables f(batch, context, tokens) of both models.

    A layer keeps its n best candidates, n maximising (E + their sum) / cost, where E is what the tree
    expects so far and cost is a step of the whole batch with n more nodes in every tree; n = 0 ends the tree. The paper
    re-ranks all nodes again at the end; here the ratio is applied while the layers join. Written from the paper's
    description, its code being unpublished.
    """

    spec = "cast"
    max_depth = MAX_LENGTH
    max_children = 10  # EAGLE-2's and CAST's top-k

    def keep(self, layer: Layer, plan: Plan) -> NDArray[np.bool_]:
        places, kept = places_by_score(layer.path_probs, layer.tree_of), np.zeros(len(layer.scores), np.bool_)
        for tree in {*layer.tree_of.tolist()}:
            mine = (layer.tree_of == tree).nonzero()[0]
            ranked = np.sort(layer.path_probs[mine])[::-1]
            expected = 1 + layer.path_probs_so_far.item(tree) + np.concatenate([[0.0], np.cumsum(ranked)])
            step_s = self._step_s(layer, plan, layer.sizes.item(tree), len(ranked))
            kept[mine] = places[mine] < (expected / step_s).argmax()
        return kept

    def expand(self, layer: Layer, kept: NDArray[np.bool_], plan: Plan) -> NDArray[np.intp]:
        probs = np.where(kept, layer.path_probs, np.float32(-1))
        return np.flatnonzero(kept & (places_by_score(probs, layer.tree_of) < self.max_children))

    def _step_s(self, layer: Layer, plan: Plan, size: int, most: int) -> NDArray[np.float64]:
        """float64 [1 + most]: seconds of a step whose trees all have `size` nodes and 0 .. `most` more."""
        cost, batch = plan.cost, layer.batch
        tokens = batch * (1 + size + np.arange(most + 1))
        draft_s = cost.draft_round_trip_s + layer.depth * cost.draft_layer_s + batch * (size + 1) * cost.draft_node_s
        return verify_seconds(cost, batch, 0, int(tokens[-1]))[tokens] + draft_s + cost.step_overhead_s


def _opt_tree(parameters: list[str]) -> Policy:
    nodes, depth, *threshold = parameters
    if len(threshold) > 1 or (threshold and not 0 <= float(threshold[0]) < 1):
        raise ValueError
    return OptTree(bounded(nodes, MAX_TREE_NODES), bounded(depth, MAX_TREE_DEPTH), *map(float, threshold))


def _sequoia(parameters: list[str]) -> Policy:
    nodes, depth = parameters
    return Sequoia(bounded(nodes, MAX_TREE_NODES), bounded(depth, MAX_TREE_DEPTH))


register("sequoia", "NODES,DEPTH", _sequoia)
register("opt-tree", "NODES,DEPTH[,THRESHOLD]", _opt_tree)
for _plain in (SmartSpec, SloChain, SglangEma, VllmAdaptive, Cast):
    register(_plain.spec, "", lambda _, make=_plain: make())  # type: ignore[misc]
