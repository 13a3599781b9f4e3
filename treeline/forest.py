"""The trees of a whole batch as one set of columns: a step takes a few array operations, however many trees it has."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from treeline.tree import ROOT, DraftTree, Source

_NGRAM = np.uint8(Source.NGRAM)
"""Typed, since comparing with a member of an enumeration takes several times as long."""


@dataclass(frozen=True)
class Forest:
    """Trees one behind the other, n nodes in all. Nodes are counted through; the roots are one more node before them.

    Attributes:
        trees: as they were given.
        sizes: nodes of each tree.
        tree_of: intp [n]; whose node it is.
        depths: intp [n]; 1 for children of a root.
        jumps: intp [1 + n] each; where every node's path leads in 1, 2, 4, ... steps up. Counted with the roots, which
            are 0 and lead to themselves; node u is 1 + u. The last one leads all nodes there.
        draft_probs, ranks, sources: as in a tree.
    """

    trees: list[DraftTree]
    sizes: list[int]
    tree_of: NDArray[np.intp]
    depths: NDArray[np.intp]
    jumps: list[NDArray[np.intp]]
    draft_probs: NDArray[np.float32]
    ranks: NDArray[np.uint8]
    sources: NDArray[np.uint8]

    @staticmethod
    def of(trees: list[DraftTree]) -> Forest:
        """At least one tree; they may be empty."""
        sizes = [len(tree.token_ids) for tree in trees]
        tree_of = np.arange(len(sizes)).repeat(sizes)
        parents = _joined([tree.parents for tree in trees])
        jump = np.zeros(len(tree_of) + 1, np.intp)
        np.multiply(parents + np.asarray([*accumulate(sizes, initial=1)])[tree_of], parents != ROOT, out=jump[1:])
        jumps, depths = [jump], np.ones(len(jump), np.intp)
        depths[0] = 0
        while np.count_nonzero(jump):
            # Pointer jumping: every round doubles the distance that is looked up the path.
            depths += depths[jump]
            jump = jump[jump]
            jumps.append(jump)
        return Forest(
            trees,
            sizes,
            tree_of,
            depths[1:],
            jumps,
            _joined([tree.draft_probs for tree in trees]),
            _joined([tree.ranks for tree in trees]),
            _joined([tree.sources for tree in trees]),
        )

    def path_products(self, factors: NDArray[np.float32]) -> NDArray[np.float32]:
        """float32 [n]: the product of `factors` [n] over each node's path from its root."""
        products = np.ones(len(factors) + 1, np.float32)
        products[1:] = factors
        for jump in self.jumps[:-1]:
            products *= products[jump]
        return products[1:]

    def model_layers(self) -> NDArray[np.intp]:
        """intp [n]: layers of the draft model that each node took: the depth of the last model's node on its path."""
        looked_up = self.sources == _NGRAM
        if not np.count_nonzero(looked_up):
            return self.depths
        layers = np.zeros(len(self.tree_of) + 1, np.intp)
        layers[1:] = np.where(looked_up, 0, self.depths)
        for jump in self.jumps[:-1]:
            layers = np.maximum(layers, layers[jump])
        return layers[1:]

    def select(self, keep: NDArray[np.bool_]) -> list[DraftTree]:
        """`DraftTree.select` of every tree: those of the kept nodes. `keep` [n] must be closed under parents.

        Raises:
            ValueError: a kept node's parent is not kept.
        """
        kept = keep.nonzero()[0]
        if len(kept) == len(keep):
            return self.trees
        rooted = np.ones(len(keep) + 1, np.bool_)
        rooted[1:] = keep
        above, tree_of = self.jumps[0][1:][kept], self.tree_of[kept]
        if np.count_nonzero(rooted[above]) < len(kept):
            raise ValueError("a kept node's parent was dropped")
        ends = [0, *np.bincount(tree_of, minlength=len(self.sizes)).cumsum().tolist()]
        # In the cut tree, counted from 2 on; a root's is 1 at most.
        places = rooted.cumsum()[above] - np.asarray(ends)[tree_of]
        parents = np.maximum(places - 2, ROOT).astype(np.int32)
        token_ids = _joined([tree.token_ids for tree in self.trees])[kept]
        draft_probs, ranks, sources = self.draft_probs[kept], self.ranks[kept], self.sources[kept]
        return [
            DraftTree(token_ids[a:b], parents[a:b], draft_probs[a:b], ranks[a:b], sources[a:b])
            if a < b
            else DraftTree.empty()
            for a, b in pairwise(ends)
        ]


def _joined(columns: list[NDArray[Any]]) -> NDArray[Any]:
    return columns[0] if len(columns) == 1 else np.concatenate(columns)
