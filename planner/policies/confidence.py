"""Trees grown from the drafter's confidence to a size that is fixed beforehand: EAGLE-2 and OPT-Tree.

Both rank nodes by the product of confidences along the path; here it is the calibrated one.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from planner.policies.base import MAX_CHILDREN, Growth, Layer, places_by_score
from treeline.plan import Plan

OPT_TREE_THRESHOLD = 0.5
"""What the authors run with."""


@dataclass(frozen=True)
class Eagle2(Growth):
    """EAGLE-2 (arXiv 2406.16858): expand the `topk` best of each layer, then keep the `nodes` best of all."""

    depth: int
    topk: int
    nodes: int

    @property
    def spec(self) -> str:
        return f"eagle2:{self.depth},{self.topk},{self.nodes}"

    @property
    def max_depth(self) -> int:
        return self.depth

    @property
    def max_children(self) -> int:
        return self.topk

    def keep(self, layer: Layer, plan: Plan) -> NDArray[np.bool_]:
        return layer.ranks < self.topk

    def expand(self, layer: Layer, kept: NDArray[np.bool_], plan: Plan) -> NDArray[np.intp]:
        best = places_by_score(np.where(kept, layer.scores, np.float32(-1)), layer.tree_of) < self.topk
        return np.flatnonzero(kept & best)

    def finish(self, scores: NDArray[np.float32], tree_of: NDArray[np.intp]) -> NDArray[np.bool_]:
        return places_by_score(scores, tree_of) < self.nodes


@dataclass(frozen=True)
class OptTree(Growth):
    """OPT-Tree (arXiv 2406.17276): the `nodes` best of each layer go on, the `nodes` best of all are kept.

    Drafting stops at the first layer that adds no more than `threshold` to the expected length, the sum over those
    kept.
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
        before, trees = self._worth(layer.scores_so_far, layer.tree_of_so_far, layer), layer.tree_of
        scores = np.concatenate([layer.scores_so_far, layer.scores[kept]])
        added = self._worth(scores, np.concatenate([layer.tree_of_so_far, trees[kept]]), layer) - before
        return np.flatnonzero(kept & (added > self.threshold)[trees])

    def finish(self, scores: NDArray[np.float32], tree_of: NDArray[np.intp]) -> NDArray[np.bool_]:
        return places_by_score(scores, tree_of) < self.nodes

    def _worth(self, scores: NDArray[np.float32], tree_of: NDArray[np.intp], layer: Layer) -> NDArray[np.float64]:
        """float64 [trees]: the sum over the best `nodes` of each tree."""
        best = places_by_score(scores, tree_of) < self.nodes
        return np.asarray(np.bincount(tree_of, scores * best, len(layer.sizes)), np.float64)
