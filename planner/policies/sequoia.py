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
RANK_BITS = 4


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
        return self._of_shape(layer, plan, 0)

    def expand(self, layer: Layer, kept: NDArray[np.bool_], plan: Plan) -> NDArray[np.intp]:
        return np.flatnonzero(kept & self._of_shape(layer, plan, 1))

    def _of_shape(self, layer: Layer, plan: Plan, below: int) -> NDArray[np.bool_]:
        """bool [m]: which candidates belong to the shape and have nodes of it so many layers `below` them."""
        member = np.zeros(len(layer.ranks), np.bool_)
        for sampled in {*layer.sampled.tolist()}:
            # Rounded: noise in what was measured must not change the tree all the time.
            acceptance = tuple(np.round(plan.calibration.by_rank[int(sampled)].astype(float), 2).tolist())
            shape = optimal_shape(acceptance, self.nodes, self.depth)
            if layer.depth + below <= len(shape):
                paths = shape[layer.depth + below - 1] >> np.uint64(RANK_BITS * below)
                member |= (layer.sampled == sampled)[layer.tree_of] & np.isin(layer.path_ranks, paths)
        return member


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
