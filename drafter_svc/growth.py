"""Growing draft trees layer by layer: one loop for every proposer and every policy.

A batch's trees grow together: each layer takes a few array operations, however many trees there are.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from drafter_svc.candidates import Candidates, merge
from drafter_svc.proposer import GrowingTree, Proposer
from planner.fast.rule import Frontier, another_layer
from planner.policies import Layer
from planner.policies.base import places_by_score
from treeline.plan import Plan
from treeline.tree import ROOT, DraftTree

MIN_PROB = np.finfo(np.float32).tiny


class Expansion(NamedTuple):
    """Nodes of a tree's last layer to run through a draft model next, and their value for the layer rule."""

    tree: GrowingTree
    nodes: list[int]
    frontier: Frontier


class GrowingForest:
    """The trees of one policy while they grow. All nodes are kept in the order in which they joined: layer by layer,
    within a layer tree by tree.

    Attributes:
        trees: at least one; those that still grow are equally deep.
    """

    def __init__(self, trees: list[GrowingTree]) -> None:
        self.trees = trees
        self._policy = trees[0].policy
        self._limits = np.asarray([tree.sequence.max_nodes for tree in trees])
        self._weights = np.asarray([tree.sequence.weight for tree in trees], np.float32)
        self._sampled = np.asarray([not tree.sequence.sampling.greedy for tree in trees])
        self._layers: list[Candidates] = []
        # By tree: nodes, those of them that have children, the sum of their path probabilities.
        self._sizes, self._inner = np.zeros((2, len(trees)), np.intp)
        self._path_probs_sums = np.zeros(len(trees))
        self._above = np.ones(len(trees), np.intp)  # what leads from a node of the last layer to its place
        # By node, the roots first as one.
        self._scores, self._path_probs = np.ones((2, 1), np.float32)
        self._tree_of = np.zeros(1, np.intp)
        self._decision: tuple[Layer, NDArray[np.bool_]] | None = None

    def add_layer(self, plan: Plan, batch: int) -> None:
        """Let the policy choose the next layer among all that was proposed. `batch`: trees that grow together."""
        growing = [(place, tree) for place, tree in enumerate(self.trees) if tree.grows]
        proposed = [(place, *answer) for place, tree in growing for answer in tree.proposed]
        self._decision = None
        if not proposed:
            for _, tree in growing:
                tree.add_layer([], [])
            return
        depth = growing[0][1].depth + 1
        new = merge(proposed, self._above, depth, self._sampled, plan.calibration)
        layer = Layer(
            depth=depth,
            tree_of=new.tree_of,
            scores=self._scores[new.above] * np.minimum(new.accepts, 1),
            path_probs=self._path_probs[new.above] * new.probs,
            ranks=new.ranks,
            sizes=self._sizes,
            paths=np.maximum(1, self._sizes - self._inner),
            path_probs_so_far=self._path_probs_sums,
            weights=self._weights,
            sampled=self._sampled,
            batch=batch,
        )
        kept = self._policy.keep(layer, plan)
        if np.count_nonzero(self._sizes + self._count(new.tree_of[kept]) > self._limits):
            kept = kept & self._within_limits(layer, kept)
        self._join(new.take(kept), layer, kept)
        self._decision = (layer, kept)
        for _, tree in growing:
            tree.proposed = []

    def expansions(self, plan: Plan) -> list[Expansion]:
        """Which nodes of the last layer to run through a draft model next, of each tree that grows and has any.

        The policy chooses; in a tree that is full, only nodes better than its last one can have children that stay.
        """
        if self._decision is None:
            return []
        layer, kept = self._decision
        first = len(self._scores) - np.count_nonzero(kept)
        nodes = first - 1 + kept.cumsum()[self._policy.expand(layer, kept, plan)]
        full = self._sizes >= self._limits
        if np.count_nonzero(full):
            nodes = nodes[self._scores[nodes] > self._least_that_stays(full)[self._tree_of[nodes]]]
        scores, tree_of = self._scores[nodes], self._tree_of[nodes]
        acceptance = np.bincount(tree_of, scores, len(self.trees)).tolist()
        ends = [0, *self._count(tree_of).cumsum().tolist()]
        local = (nodes - self._above[tree_of]).tolist()
        return [
            Expansion(
                tree,
                local[a:b],
                Frontier(self._policy, tree.sequence.weight, b - a, acceptance[place], layer.depth, sampled),
            )
            for place, (tree, sampled, (a, b)) in enumerate(
                zip(self.trees, self._sampled.tolist(), pairwise(ends), strict=True)
            )
            if a < b and tree.grows
        ]

    def finish(self) -> list[DraftTree]:
        """The trees, after the policy's last cut."""
        scores, tree_of = self._scores[1:], self._tree_of[1:]
        if not len(scores):
            return [DraftTree.empty()] * len(self.trees)
        stays = self._policy.finish(scores, tree_of)
        if np.count_nonzero(self._sizes > self._limits):
            stays = stays & (places_by_score(scores, tree_of) < self._limits[tree_of])
        nodes = stays.nonzero()[0]
        nodes = nodes[np.argsort(tree_of[nodes], kind="stable")]
        ends = [0, *self._count(tree_of[nodes]).cumsum().tolist()]
        indices = np.full(len(self._scores), ROOT - 1, np.int32)  # by place; no tree may have a parent that was cut
        indices[0] = ROOT
        indices[1 + nodes] = np.arange(len(nodes)) - np.asarray(ends)[tree_of[nodes]]
        above, token_ids, probs, ranks, sources = (
            np.concatenate([getattr(layer, name) for layer in self._layers])[nodes]
            for name in ("above", "token_ids", "probs", "ranks", "sources")
        )
        parents, probs = indices[above], np.clip(probs, MIN_PROB, 1.0)
        return [
            DraftTree(token_ids[a:b], parents[a:b], probs[a:b], ranks[a:b], sources[a:b])
            if a < b
            else DraftTree.empty()
            for a, b in pairwise(ends)
        ]

    def _count(self, tree_of: NDArray[np.intp]) -> NDArray[np.intp]:
        """intp [trees]: nodes of each."""
        return np.bincount(tree_of, minlength=len(self.trees))

    def _join(self, joining: Candidates, layer: Layer, kept: NDArray[np.bool_]) -> None:
        counts, path_probs = self._count(joining.tree_of), layer.path_probs[kept]
        ends = counts.cumsum()
        self._above = len(self._scores) + ends - counts - self._sizes
        if self._layers:
            self._inner = self._inner + self._count(self._tree_of[np.bincount(joining.above).nonzero()[0]])
        self._sizes = self._sizes + counts
        self._path_probs_sums = self._path_probs_sums + np.bincount(joining.tree_of, path_probs, len(counts))
        self._scores = np.concatenate([self._scores, layer.scores[kept]])
        self._path_probs = np.concatenate([self._path_probs, path_probs])
        self._tree_of = np.concatenate([self._tree_of, joining.tree_of])
        self._layers.append(joining)
        parents, token_ids = joining.parents.tolist(), joining.token_ids.tolist()
        for tree, (a, b) in zip(self.trees, pairwise([0, *ends.tolist()]), strict=True):
            if tree.grows:
                tree.add_layer(parents[a:b], token_ids[a:b])

    def _within_limits(self, layer: Layer, kept: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Which candidates are among their tree's best `max_nodes` so far; no others can be in the end."""
        scores = np.concatenate([self._scores[1:], np.where(kept, layer.scores, np.float32(-1))])
        tree_of = np.concatenate([self._tree_of[1:], layer.tree_of])
        return (places_by_score(scores, tree_of) < self._limits[tree_of])[len(self._scores) - 1 :]

    def _least_that_stays(self, full: NDArray[np.bool_]) -> NDArray[np.float32]:
        """float32 [trees]: the score of the last node that fits into each `full` tree; below all scores elsewhere."""
        scores, tree_of = self._scores[1:], self._tree_of[1:]
        last = (places_by_score(scores, tree_of) == self._limits[tree_of] - 1) & full[tree_of]
        least = np.full(len(full), -1, np.float32)
        least[tree_of[last]] = scores[last]
        return least


def grow(trees: list[GrowingTree], plan: Plan, lookups: list[Proposer], model: Proposer | None) -> list[DraftTree]:
    """Grow all trees of a step, until no policy wants more.

    `lookups` are free and asked about every node. The `model` is asked about the nodes that each policy chooses, as
    long as another layer pays for the whole batch; the lookups may then go on alone.
    """
    of_policies: dict[str, list[GrowingTree]] = {}
    for tree in trees:
        of_policies.setdefault(tree.policy.spec, []).append(tree)
    forests = [GrowingForest(alike) for alike in of_policies.values()]
    growing = [tree for tree in trees if tree.grows]
    wanted = [(tree, tree.layer) for tree in growing if tree.models] if model else []
    while growing:
        if model and wanted:
            _ask(model, wanted)
        modelled = {id(tree) for tree, _ in wanted if tree.proposed}
        for lookup in lookups:
            _ask(lookup, [(tree, tree.layer) for tree in growing])
        for forest in forests:
            forest.add_layer(plan, batch=len(trees))
        growing = [tree for tree in growing if tree.grows]
        wanted = _next_model_layer(forests, modelled, plan) if modelled else []
    finished = {id(tree): done for forest in forests for tree, done in zip(forest.trees, forest.finish(), strict=True)}
    return [finished[id(tree)] for tree in trees]


def _ask(proposer: Proposer, wanted: list[tuple[GrowingTree, list[int]]]) -> None:
    for (tree, _), children in zip(wanted, proposer.propose(wanted), strict=True):
        if children.parents:
            tree.proposed.append((proposer.source, children))


def _next_model_layer(
    forests: list[GrowingForest], modelled: set[int], plan: Plan
) -> list[tuple[GrowingTree, list[int]]]:
    """The nodes to run through the draft model next; none if another layer does not pay.

    modelled: ids of the trees that the model had children for.
    """
    growing = [forest for forest in forests if any(tree.models for tree in forest.trees)]
    found = [one for forest in growing for one in forest.expansions(plan)]
    found = [one for one in found if one.tree.models and id(one.tree) in modelled]
    if not found or not another_layer([one.frontier for one in found], plan):
        return []
    return [(one.tree, one.nodes) for one in found]
