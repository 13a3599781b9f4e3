"""The interface of policies: which candidates join a draft tree, and which nodes the draft model expands."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from treeline.plan import Plan

MAX_CHILDREN = 16
"""Most children that a policy may propose under one node: EAGLE-2, the widest published tree, proposes 10."""


@dataclass(frozen=True)
class Layer:
    """Candidates for the next layer of a batch's trees, one row each, tree by tree; and the trees so far.

    Attributes:
        depth: of the candidates; 1 for children of the root.
        tree_of: intp [m]; index of each candidate's tree.
        scores: float32 [m]; calibrated path acceptance, never above the parent's.
        path_probs: float32 [m]; product of the drafter's probabilities over the path, the candidate's included.
        ranks: uint8 [m]; 0 for the first choice below this parent.
        sizes: intp [trees]; nodes of each tree so far.
        paths: intp [trees]; root-to-leaf paths of each tree so far; the bare root is one path.
        path_probs_so_far: float64 [trees]; sum of path_probs over each tree's nodes.
        weights: float32 [trees]; value of each request's tokens.
        sampled: bool [trees]; sampled or greedy.
        batch: requests drafted together, those of other policies included.
    """

    depth: int
    tree_of: NDArray[np.intp]
    scores: NDArray[np.float32]
    path_probs: NDArray[np.float32]
    ranks: NDArray[np.uint8]
    sizes: NDArray[np.intp]
    paths: NDArray[np.intp]
    path_probs_so_far: NDArray[np.float64]
    weights: NDArray[np.float32]
    sampled: NDArray[np.bool_]
    batch: int


class Policy(ABC):
    """The drafter calls `keep`, `expand` and `finish` on all trees of the policy; the verifier asks for `layers`.

    By default every step drafts to the full depth, expands every kept node, and cuts nothing at the end.

    Attributes:
        priced: the rule decides whether to draft, how deep, and which nodes to verify (`planner.fast.rule`).
            Otherwise every step drafts, to the policy's own depth, and verifies the whole tree.
    """

    priced = False

    @property
    @abstractmethod
    def spec(self) -> str:
        """Canonical spelling."""

    @property
    @abstractmethod
    def max_depth(self) -> int:
        """No layer lies deeper; 0 never drafts."""

    @property
    @abstractmethod
    def max_children(self) -> int:
        """Children to propose under each expanded node."""

    @abstractmethod
    def keep(self, layer: Layer, plan: Plan) -> NDArray[np.bool_]:
        """bool [m]: the candidates that join their trees."""

    def layers(self, plan: Plan, batch: int, sampled: bool) -> int:
        """Most layers to draft in a step of `batch` requests, 0 to max_depth; 0 drafts nothing."""
        return self.max_depth

    def expand(self, layer: Layer, kept: NDArray[np.bool_], plan: Plan) -> NDArray[np.intp]:
        """Indices of the kept candidates to run through the draft model if there is another layer."""
        return kept.nonzero()[0]

    def finish(self, scores: NDArray[np.float32], tree_of: NDArray[np.intp]) -> NDArray[np.bool_]:
        """bool [n], closed under parents: the nodes of each finished tree that stay, by calibrated path acceptance."""
        return np.ones(len(scores), np.bool_)


def places_by_score(scores: NDArray[np.float32], tree_of: NDArray[np.intp]) -> NDArray[np.intp]:
    """intp [n]: each node's place within its tree by descending score; ties go to the earlier, so parents come first.

    Scores [.5, .9, .7, .2] of trees [0, 0, 1, 0] have places [1, 0, 0, 2].
    """
    order = np.lexsort((-scores, tree_of))
    trees = tree_of[order]
    places = np.empty(len(scores), np.intp)
    places[order] = np.arange(len(scores)) - trees.searchsorted(trees)
    return places
