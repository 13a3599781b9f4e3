"""Sequoia (arXiv 2402.12374): the static tree that is best for the measured acceptance of each rank."""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from planner.policies.base import Growth, Layer
from treeline.plan import RANKS, Plan

MAX_SEQUOIA_DEPTH = 15
RANK_BITS = np.uint64(4)


@dataclass(frozen=True)
class Sequoia(Growth):
    """At most `nodes` nodes and `depth` layers; the same for all requests until measured acceptance has changed."""

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
        return np.isin(layer.path_ranks, self._shape(layer, plan)[layer.depth - 1])

    def expand(self, layer: Layer, kept: NDArray[np.bool_], plan: Plan) -> NDArray[np.intp]:
        shape = self._shape(layer, plan)
        below = shape[layer.depth] if layer.depth < len(shape) else np.zeros(0, np.uint64)
        return np.flatnonzero(kept & np.isin(layer.path_ranks, below >> RANK_BITS))

    def _shape(self, layer: Layer, plan: Plan) -> tuple[NDArray[np.uint64], ...]:
        # Rounded: noise in what was measured must not change the tree all the time.
        acceptance = tuple(np.round(plan.calibration.by_rank[int(layer.sampled)].astype(float), 2).tolist())
        return optimal_shape(acceptance, self.nodes, self.depth)


@lru_cache(maxsize=64)
def optimal_shape(acceptance: tuple[float, ...], nodes: int, depth: int) -> tuple[NDArray[np.uint64], ...]:
    """The tree with most expected tokens if a node's i-th child is accepted with probability `acceptance[i]`.

    A node is worth the product of acceptance over its ranks. That never grows towards children, nor towards later
    siblings once acceptance is made non-increasing; so the nodes of most worth form a tree, and no other one is worth
    more: what the paper finds by dynamic programming (section 3.1).

    Returns:
        For each depth from 1 on, the nodes as `Layer.path_ranks` spells them.
    """
    falling = np.minimum.accumulate(acceptance).tolist()
    levels: list[list[int]] = [[] for _ in range(depth)]
    heap = [(-falling[0], 1, 0, 1.0)]  # (-worth, depth, path ranks, worth of the parent)
    for _ in range(nodes):
        if not heap:
            break
        worth, level, path, parent_worth = heapq.heappop(heap)
        levels[level - 1].append(path)
        rank = path & 15
        if rank + 1 < len(falling):
            heapq.heappush(heap, (-parent_worth * falling[rank + 1], level, path + 1, parent_worth))
        if level < depth:
            heapq.heappush(heap, (worth * falling[0], level + 1, path << 4, -worth))
    return tuple(np.asarray(level, np.uint64) for level in levels)
