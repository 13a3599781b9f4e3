"""Trees of a size fixed beforehand: none, a chain, a static shape, EAGLE-2's dynamic tree."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from planner.policies.base import Layer, Policy, places_by_score
from treeline.plan import Plan


@dataclass(frozen=True)
class Off(Policy):
    """Plain autoregressive decoding."""

    spec = "off"
    max_depth = 0
    max_children = 0

    def keep(self, layer: Layer, plan: Plan) -> NDArray[np.bool_]:
        return np.zeros(len(layer.ranks), np.bool_)


@dataclass(frozen=True)
class Chain(Policy):
    """The most probable token, `length` times."""

    length: int
    max_children = 1

    @property
    def spec(self) -> str:
        return f"chain:{self.length}"

    @property
    def max_depth(self) -> int:
        return self.length

    def keep(self, layer: Layer, plan: Plan) -> NDArray[np.bool_]:
        return places_by_score(layer.scores, layer.tree_of) < 1


@dataclass(frozen=True)
class Static(Policy):
    """The same shape in every step: `branching[d]` children under each node of depth d."""

    branching: tuple[int, ...]

    @property
    def spec(self) -> str:
        return "static:" + "-".join(map(str, self.branching))

    @property
    def max_depth(self) -> int:
        return len(self.branching)

    @property
    def max_children(self) -> int:
        return max(self.branching)

    def keep(self, layer: Layer, plan: Plan) -> NDArray[np.bool_]:
        return layer.ranks < self.branching[layer.depth - 1]


@dataclass(frozen=True)
class Eagle2(Policy):
    """EAGLE-2 (arXiv 2406.16858): expand the `topk` best of each layer, then keep the `nodes` best of all.

    Nodes are ranked by calibrated path acceptance; the paper ranks by the product of raw confidences.
    """

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
