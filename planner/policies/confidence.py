"""Trees grown from the drafter's confidence to a size that is fixed beforehand: EAGLE-2 and OPT-Tree.

Both rank nodes by the product of confidences along the path; here it is the calibrated one.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from planner.policies.base import MAX_CHILDREN, Growth, Layer, top
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
        return np.flatnonzero(top(np.where(kept, layer.scores, -1.0), self.topk) & kept)

    def finish(self, scores: NDArray[np.float32], parents: NDArray[np.int32]) -> NDArray[np.bool_]:
        return top(scores, self.nodes)


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
        return top(layer.scores, self.nodes)

    def expand(self, layer: Layer, kept: NDArray[np.bool_], plan: Plan) -> NDArray[np.intp]:
        before, both = layer.scores_so_far, np.concatenate([layer.scores_so_far, layer.scores[kept]])
        added = both[top(both, self.nodes)].sum() - before[top(before, self.nodes)].sum()
        return np.flatnonzero(kept) if added > self.threshold else np.zeros(0, np.intp)

    def finish(self, scores: NDArray[np.float32], parents: NDArray[np.int32]) -> NDArray[np.bool_]:
        return top(scores, self.nodes)
