"""What a policy is: it decides which candidates join a tree, and what the verifier may still drop."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from treeline.plan import Plan

MAX_DEPTH = 32
MAX_CHILDREN = 16
MAX_NODES = 256


@dataclass(frozen=True)
class Layer:
    """Candidates for the next layer of a batch's trees, one row each, tree by tree; and the trees that they would join.

    Attributes:
        depth: 1 for children of the root.
        tree_of: intp [m]; whose candidate it is.
        scores: float32 [m]; calibrated path acceptance, never above the parent's.
        path_probs: float32 [m]; product of the drafter's probabilities over the whole path, this candidate included.
        ranks: uint8 [m]; 0 for the first choice below this parent.
        path_ranks: uint64 [m]; ranks along the path, four bits each, the candidate's own in the lowest.
        scores_so_far: float32 [n]; calibrated path acceptance of the nodes of all trees.
        tree_of_so_far: intp [n]; whose node it is.
        sizes: intp [trees]; nodes of each tree.
        paths: intp [trees]; paths of each; the bare root is one path.
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
    path_ranks: NDArray[np.uint64]
    scores_so_far: NDArray[np.float32]
    tree_of_so_far: NDArray[np.intp]
    sizes: NDArray[np.intp]
    paths: NDArray[np.intp]
    path_probs_so_far: NDArray[np.float64]
    weights: NDArray[np.float32]
    sampled: NDArray[np.bool_]
    batch: int


class Policy(Protocol):
    """The drafter calls `keep`, `expand` and `finish` on all trees of the policy; the verifier asks for `layers`.

    Attributes:
        spec: canonical spelling.
        max_depth: no layer beyond it; 0 never drafts.
        max_children: children to propose under each expanded node.
        prunes: the verifier chooses among its nodes over the whole batch (`planner.fast.rule.prune_batch`).
        prices_drafting: whether to draft at all, and how deep, is left to the rule.
    """

    @property
    def spec(self) -> str: ...

    @property
    def max_depth(self) -> int: ...

    @property
    def max_children(self) -> int: ...

    @property
    def prunes(self) -> bool: ...

    @property
    def prices_drafting(self) -> bool: ...

    def layers(self, plan: Plan, batch: int, sampled: bool) -> int:
        """The most layers worth asking for in a step of `batch` requests, 0 to max_depth; 0 drafts nothing."""
        ...

    def keep(self, layer: Layer, plan: Plan) -> NDArray[np.bool_]:
        """bool [m]: which candidates join their trees."""
        ...

    def expand(self, layer: Layer, kept: NDArray[np.bool_], plan: Plan) -> NDArray[np.intp]:
        """Indices of kept candidates to run through the draft model next, should another layer be run."""
        ...

    def finish(self, scores: NDArray[np.float32], tree_of: NDArray[np.intp]) -> NDArray[np.bool_]:
        """bool [n], closed under parents: the last cut of each finished tree by path acceptance."""
        ...


class Growth(ABC):
    """What most policies share: draft to the full depth, expand all that was kept, cut nothing at the end."""

    prunes = False
    prices_drafting = False

    @property
    @abstractmethod
    def max_depth(self) -> int: ...

    def layers(self, plan: Plan, batch: int, sampled: bool) -> int:
        return self.max_depth

    def expand(self, layer: Layer, kept: NDArray[np.bool_], plan: Plan) -> NDArray[np.intp]:
        return np.flatnonzero(kept)

    def finish(self, scores: NDArray[np.float32], tree_of: NDArray[np.intp]) -> NDArray[np.bool_]:
        return np.ones(len(scores), np.bool_)


def places_by_score(scores: NDArray[np.float32], tree_of: NDArray[np.intp]) -> NDArray[np.intp]:
    """intp [n]: how many of its tree have a higher score; of equals the earlier goes first, parents before children."""
    order = np.lexsort((-scores, tree_of))
    trees = tree_of[order]
    places = np.empty(len(scores), np.intp)
    places[order] = np.arange(len(scores)) - trees.searchsorted(trees)
    return places
