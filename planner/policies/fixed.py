"""Trees that are the same in every step: none, a chain, a fixed shape."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from planner.policies.base import Growth, Layer, places_by_score
from treeline.plan import Plan


@dataclass(frozen=True)
class Off(Growth):
    """Plain autoregressive decoding."""

    spec = "off"
    max_depth = 0
    max_children = 0

    def keep(self, layer: Layer, plan: Plan) -> NDArray[np.bool_]:
        return np.zeros(len(layer.ranks), np.bool_)


@dataclass(frozen=True)
class Chain(Growth):
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
class Static(Growth):
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
