"""Grows draft trees layer by layer: one loop for all proposers and policies.

The trees of a batch grow together: a layer takes a few array operations, whatever the number of trees.
"""

from __future__ import annotations

from itertools import accumulate, pairwise

import numpy as np
from numpy.typing import NDArray

from drafter_svc.proposer import Children, Frontier, Proposer, Root
from planner.fast.acceptance import accepts
from planner.fast.rule import PricedFrontier, another_layer
from planner.policies import Layer
from planner.policies.base import places_by_score
from treeline.forest import COLUMNS, ROOT, Forest, Source
from treeline.plan import Plan

MIN_PROB = np.finfo(np.float32).tiny
"""A node's probability is above 0 on the wire; a float32 softmax may underflow to 0."""


class GrowingForest:
    """The trees of one policy while they grow. Nodes are stored in the order in which they joined: layer by layer, tree
    by tree within a layer. Index 0 of a node column stands for all roots; node u has index 1 + u.

        Two trees. First layer: a and b of tree 0, c of tree 1; second layer: d below b.
        token_ids [0, a, b, c, d]   tree_of [0, 0, 0, 1, 0]   above [0, 0, 0, 0, 2]
    """

    def __init__(self, roots: list[Root], places: list[int], source: Source) -> None:
        """`places`: indices of these trees among all of the step; at least one."""
        self.places = np.asarray(places, np.intp)
        self._policy = roots[0].policy
        self._source = int(source)
        self._limits = np.asarray([root.sequence.max_nodes for root in roots])
        self._max_depths = np.asarray([root.max_depth for root in roots])
        self._weights = np.asarray([root.sequence.weight for root in roots], np.float32)
        self._sampled = np.asarray([not root.sequence.sampling.greedy for root in roots])
        self._penalised = any(root.sequence.sampling.penalises for root in roots)
        self._depth = 0
        # By tree: its nodes, those with children, the sum of their path probabilities.
        self._sizes, self._inner = np.zeros(len(roots), np.intp), np.zeros(len(roots), np.intp)
        self._path_probs_sums = np.zeros(len(roots))
        # By node.
        self._scores = self._path_probs = self._probs = np.ones(1, np.float32)
        self._tree_of = self._above = np.zeros(1, np.intp)
        self._token_ids = np.zeros(1, np.int32)
        # The last frontier: each entry's node and tree.
        self._asked_trees = self._max_depths.nonzero()[0]
        self._asked = np.zeros(len(self._asked_trees), np.intp)
        self._decision: tuple[Layer, NDArray[np.bool_]] | None = None

    @property
    def max_children(self) -> int:
        return self._policy.max_children

    @property
    def first(self) -> Frontier:
        """The roots of all trees that may grow."""
        zeros = np.zeros(len(self._asked), np.intp)
        paths: list[list[int]] | None = [[] for _ in zeros] if self._penalised else None
        return Frontier(0, self.places[self._asked_trees], zeros.astype(np.int32), zeros, paths)

    def add_layer(self, new: Children, plan: Plan, batch: int) -> None:
        """Let the policy choose among the children of the last frontier. `batch`: trees that grow together."""
        self._depth += 1
        self._decision = None
        if not len(new.above):
            return
        above, tree_of = self._asked[new.above], self._asked_trees[new.above]
        acceptance = accepts(plan.calibration, self._source, self._depth, new.probs, self._sampled[tree_of])
        layer = Layer(
            depth=self._depth,
            tree_of=tree_of,
            scores=self._scores[above] * np.minimum(acceptance, 1),
            path_probs=self._path_probs[above] * new.probs,
            ranks=new.ranks,
            sizes=self._sizes,
            paths=np.maximum(1, self._sizes - self._inner),
            path_probs_so_far=self._path_probs_sums,
            weights=self._weights,
            sampled=self._sampled,
            batch=batch,
        )
        kept = self._policy.keep(layer, plan)
        if np.count_nonzero(self._sizes + self._count(tree_of[kept]) > self._limits):
            kept = kept & self._within_limits(layer, kept)
        self._join(layer, new, above, kept)
        self._decision = (layer, kept)

    def next(self, plan: Plan) -> tuple[Frontier, list[PricedFrontier]]:
        """The next frontier, chosen by the policy from the last layer, and the prices of its nodes tree by tree.

        In a full tree only nodes better than its worst can have children that stay.
        """
        if self._decision is None:
            nodes = np.zeros(0, np.intp)
        else:
            layer, kept = self._decision
            first = len(self._scores) - np.count_nonzero(kept)
            nodes = first - 1 + kept.cumsum()[self._policy.expand(layer, kept, plan)]
            nodes = nodes[self._depth < self._max_depths[self._tree_of[nodes]]]
            full = self._sizes >= self._limits
            if np.count_nonzero(full):
                nodes = nodes[self._scores[nodes] > self._least_that_stays(full)[self._tree_of[nodes]]]
        before, trees = self._asked, self._tree_of[nodes]
        self._asked, self._asked_trees = nodes, trees
        acceptance = np.bincount(trees, self._scores[nodes], len(self._sizes)).tolist()
        priced = [
            PricedFrontier(self._policy, weight, count, acceptance[tree], self._depth, sampled)
            for tree, (count, weight, sampled) in enumerate(
                zip(self._count(trees).tolist(), self._weights.tolist(), self._sampled.tolist(), strict=True)
            )
            if count
        ]
        # A parent is found in the last frontier by its node. Roots all have node 0: they are found by their tree.
        if self._depth == 1:
            above = self._max_depths.nonzero()[0].searchsorted(trees)
        else:
            above = before.searchsorted(self._above[nodes])
        paths = [self._path(node) for node in nodes.tolist()] if self._penalised else None
        return Frontier(self._depth, self.places[trees], self._token_ids[nodes], above, paths), priced

    def finish(self) -> Forest:
        """The trees, after the policy's final selection."""
        scores, tree_of = self._scores[1:], self._tree_of[1:]
        if not len(scores):
            return Forest.empty(len(self._sizes))
        stays = self._policy.finish(scores, tree_of)
        if np.count_nonzero(self._sizes > self._limits):
            stays = stays & (places_by_score(scores, tree_of) < self._limits[tree_of])
        nodes = stays.nonzero()[0]
        nodes = 1 + nodes[np.argsort(tree_of[nodes], kind="stable")]
        trees = self._tree_of[nodes]
        sizes = self._count(trees)
        indices = np.full(len(self._scores), ROOT - 1, np.int32)  # by node; a parent that was cut would be invalid
        indices[0] = ROOT
        indices[nodes] = np.arange(len(nodes)) - (sizes.cumsum() - sizes)[trees]
        return Forest(
            sizes,
            self._token_ids[nodes],
            indices[self._above[nodes]],
            np.minimum(np.maximum(self._probs[nodes], MIN_PROB), 1),  # np.clip takes several times as long
            np.full(len(nodes), self._source, np.uint8),
        )

    def _count(self, tree_of: NDArray[np.intp]) -> NDArray[np.intp]:
        """intp [trees]: nodes of each."""
        return np.bincount(tree_of, minlength=len(self._sizes))

    def _join(self, layer: Layer, new: Children, above: NDArray[np.intp], kept: NDArray[np.bool_]) -> None:
        above, tree_of, path_probs = above[kept], layer.tree_of[kept], layer.path_probs[kept]
        if self._depth > 1:
            self._inner = self._inner + self._count(self._tree_of[np.bincount(above).nonzero()[0]])
        self._sizes = self._sizes + self._count(tree_of)
        self._path_probs_sums = self._path_probs_sums + np.bincount(tree_of, path_probs, len(self._sizes))
        self._scores = np.concatenate([self._scores, layer.scores[kept]])
        self._path_probs = np.concatenate([self._path_probs, path_probs])
        self._tree_of = np.concatenate([self._tree_of, tree_of])
        self._above = np.concatenate([self._above, above])
        self._token_ids = np.concatenate([self._token_ids, new.token_ids[kept]])
        self._probs = np.concatenate([self._probs, new.probs[kept]])

    def _path(self, node: int) -> list[int]:
        """Tokens from a child of the root down to `node`."""
        tokens = []
        while node:
            tokens.append(self._token_ids.item(node))
            node = self._above.item(node)
        return tokens[::-1]

    def _within_limits(self, layer: Layer, kept: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """The candidates among their tree's best `max_nodes` so far; others cannot be among them in the end."""
        scores = np.concatenate([self._scores[1:], np.where(kept, layer.scores, np.float32(-1))])
        tree_of = np.concatenate([self._tree_of[1:], layer.tree_of])
        return (places_by_score(scores, tree_of) < self._limits[tree_of])[len(self._scores) - 1 :]

    def _least_that_stays(self, full: NDArray[np.bool_]) -> NDArray[np.float32]:
        """float32 [trees]: the score of the worst node that fits into each `full` tree; below all scores elsewhere."""
        scores, tree_of = self._scores[1:], self._tree_of[1:]
        last = (places_by_score(scores, tree_of) == self._limits[tree_of] - 1) & full[tree_of]
        least = np.full(len(full), -1, np.float32)
        least[tree_of[last]] = scores[last]
        return least


def grow(roots: list[Root], plan: Plan, proposer: Proposer) -> Forest:
    """Grow all trees of a step until no policy wants more, or another layer does not pay for the batch."""
    of_policies: dict[str, list[int]] = {}
    for place, root in enumerate(roots):
        of_policies.setdefault(root.policy.spec, []).append(place)
    forests = [GrowingForest([roots[p] for p in places], places, proposer.source) for places in of_policies.values()]
    frontiers, bounds = [forest.first for forest in forests], [0] * (len(forests) + 1)
    while any(len(frontier.tree_of) for frontier in frontiers):
        children = proposer.propose(roots, _joined(frontiers, bounds))
        bounds = [0, *accumulate(len(frontier.tree_of) for frontier in frontiers)]
        priced: list[PricedFrontier] = []
        for index, (forest, (start, end)) in enumerate(zip(forests, pairwise(bounds), strict=True)):
            own = children if len(forests) == 1 else _between(children, start, end, forest.max_children)
            forest.add_layer(own, plan, len(roots))
            frontiers[index], worth = forest.next(plan)
            priced += worth
        if not another_layer(priced, plan):
            break
    return _in_order(forests, len(roots))


def _joined(frontiers: list[Frontier], bounds: list[int]) -> Frontier:
    """One frontier for all policies. `bounds`: where each policy's last frontier began in the joined one."""
    if len(frontiers) == 1:
        return frontiers[0]
    paths = [path for f in frontiers for path in (f.paths or [[]] * len(f.tree_of))]
    return Frontier(
        max(f.depth for f in frontiers),
        np.concatenate([f.tree_of for f in frontiers]),
        np.concatenate([f.token_ids for f in frontiers]),
        np.concatenate([f.above + start for f, start in zip(frontiers, bounds, strict=False)]),
        paths if any(f.paths is not None for f in frontiers) else None,
    )


def _between(children: Children, start: int, end: int, most: int) -> Children:
    """The `most` best children of each of the frontier's nodes `start` to `end`, with parents counted from `start`."""
    kept = (children.above >= start) & (children.above < end) & (children.ranks < most)
    return Children(
        children.above[kept] - start, children.token_ids[kept], children.probs[kept], children.ranks[kept]
    )  # fmt: skip


def _in_order(forests: list[GrowingForest], trees: int) -> Forest:
    """The trees of all policies, in the order of the step."""
    if len(forests) == 1:
        return forests[0].finish()
    if not forests:
        return Forest.empty(trees)
    joined = Forest.join([forest.finish() for forest in forests])
    places = np.concatenate([forest.places for forest in forests])
    order = np.argsort(places[joined.tree_of], kind="stable")
    columns = (getattr(joined, name)[order] for name in COLUMNS)
    return Forest(joined.sizes[np.argsort(places)], *columns)
