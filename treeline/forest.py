"""The draft trees of a batch as one set of columns, from the drafter over the wire to rule and walk; with its codec."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from treeline.v1 import drafting_pb2 as pb

ROOT = -1
"""Parent index of a node that continues the last committed token."""


class Source(IntEnum):
    """Who proposed a node. Acceptance is calibrated per source."""

    MODEL = 0
    NGRAM = 1


@dataclass(frozen=True)
class Forest:
    """Trees one after the other, n nodes in total; in each tree parents come before children.

    The root, a request's last committed token, is not a node. Siblings have distinct tokens.

        Tree 0: a, and b below a. Tree 1: none. Tree 2: c.
        token_ids [a, b, c]   parents [-1, 0, -1]   sizes [2, 0, 1]
        tree_of   [0, 0, 2]   depths  [1, 2, 1]     starts [0, 2, 2]   jumps[0] [0, 0, 1, 0] (index 0: all roots)

    Attributes:
        sizes: intp [trees]; nodes of each tree.
        token_ids: int32 [n].
        parents: int32 [n]; index of the parent within the same tree, or ROOT.
        draft_probs: float32 [n]; the drafter's own probability of the node given its parent, in (0, 1]. For a sampled
            request this is the softmax of the noise-perturbed logits.
        sources: uint8 [n]; values of Source.
    """

    sizes: NDArray[np.intp]
    token_ids: NDArray[np.int32]
    parents: NDArray[np.int32]
    draft_probs: NDArray[np.float32]
    sources: NDArray[np.uint8]

    def __len__(self) -> int:
        """Number of nodes."""
        return len(self.token_ids)

    @staticmethod
    def empty(trees: int) -> Forest:
        """Trees without nodes."""
        return Forest(np.zeros(trees, np.intp), *(np.zeros(0, dtype) for dtype in COLUMNS.values()))

    @staticmethod
    def join(forests: Sequence[Forest]) -> Forest:
        """The trees of all these forests, in order."""
        if len(forests) == 1:
            return forests[0]
        return Forest(*(np.concatenate([getattr(f, name) for f in forests]) for name in ("sizes", *COLUMNS)))

    @cached_property
    def starts(self) -> NDArray[np.intp]:
        """intp [trees]; index of the first node of each tree."""
        return self.sizes.cumsum() - self.sizes

    @cached_property
    def tree_of(self) -> NDArray[np.intp]:
        """intp [n]; index of each node's tree."""
        return np.arange(len(self.sizes)).repeat(self.sizes)

    @cached_property
    def jumps(self) -> list[NDArray[np.intp]]:
        """intp [1 + n] each; every node's ancestor 1, 2, 4, ... steps up.

        Node u has index 1 + u. Index 0 stands for all roots, and is its own ancestor. In the last array all are 0.
        """
        jump = np.zeros(len(self.parents) + 1, np.intp)
        np.multiply(self.parents + (1 + self.starts)[self.tree_of], self.parents != ROOT, out=jump[1:])
        jumps = [jump]
        while np.count_nonzero(jump):
            jump = jump[jump]
            jumps.append(jump)
        return jumps

    @cached_property
    def depths(self) -> NDArray[np.intp]:
        """intp [n]; 1 for children of a root."""
        depths = np.ones(len(self.parents) + 1, np.intp)
        depths[0] = 0
        for jump in self.jumps[:-1]:  # every round doubles the distance covered
            depths += depths[jump]
        return depths[1:]

    def paths(self) -> Iterator[list[list[int]]]:
        """For each tree, the token ids down to each of its nodes, itself included."""
        nodes = zip(self.token_ids.tolist(), self.parents.tolist(), strict=True)
        for size in self.sizes.tolist():
            paths: list[list[int]] = []
            for token, parent in islice(nodes, size):
                paths.append([*(paths[parent] if parent != ROOT else []), token])
            yield paths

    def path_products(self, factors: NDArray[np.float32]) -> NDArray[np.float32]:
        """float32 [n]: the product of `factors` [n] over each node's path, itself included."""
        products = np.ones(len(factors) + 1, np.float32)
        products[1:] = factors
        for jump in self.jumps[:-1]:
            products *= products[jump]
        return products[1:]

    def tree(self, index: int) -> Forest:
        """One tree alone."""
        first = self.starts.item(index)
        nodes = slice(first, first + self.sizes.item(index))
        return Forest(self.sizes[index : index + 1], *(getattr(self, name)[nodes] for name in COLUMNS))

    def spread(self, places: Sequence[int], trees: int) -> Forest:
        """A forest of `trees` trees: these at the increasing indices `places`, the others empty."""
        if trees == len(self.sizes):
            return self
        sizes = np.zeros(trees, np.intp)
        sizes[np.asarray(places, np.intp)] = self.sizes
        return Forest(sizes, *(getattr(self, name) for name in COLUMNS))

    def select(self, keep: NDArray[np.bool_]) -> Forest:
        """The forest of the kept nodes. `keep` [n] must be closed under parents.

        Raises:
            ValueError: a kept node's parent is not kept.
        """
        kept = keep.nonzero()[0]
        if len(kept) == len(keep):
            return self
        rooted = np.ones(len(keep) + 1, np.bool_)
        rooted[1:] = keep
        above, tree_of = self.jumps[0][1:][kept], self.tree_of[kept]
        if np.count_nonzero(rooted[above]) < len(kept):
            raise ValueError("a kept node's parent was dropped")
        sizes = np.bincount(tree_of, minlength=len(self.sizes))
        # The root and kept nodes up to the parent, less earlier trees' nodes: 2 + its new index; at most 1 for a root.
        places = rooted.cumsum()[above] - (sizes.cumsum() - sizes)[tree_of]
        parents = np.maximum(places - 2, ROOT).astype(np.int32)
        columns = (getattr(self, name)[kept] for name in ("draft_probs", "sources"))
        return Forest(sizes, self.token_ids[kept], parents, *columns)

    def without(self, bad: NDArray[np.bool_]) -> tuple[Forest, int]:
        """The forest with each tree that has a `bad` [n] node emptied, and the number of these trees."""
        trees = np.zeros(len(self.sizes), np.bool_)
        trees[self.tree_of[bad]] = True
        good = ~trees[self.tree_of]
        columns = (getattr(self, name)[good] for name in COLUMNS)
        return Forest(np.where(trees, 0, self.sizes), *columns), int(np.count_nonzero(trees))


COLUMNS: dict[str, type] = {
    "token_ids": np.int32,
    "parents": np.int32,
    "draft_probs": np.float32,
    "sources": np.uint8,
}


def forest_to_proto(forest: Forest) -> pb.Forest:
    columns = {name: getattr(forest, name).astype(_on_wire(dtype)).tobytes() for name, dtype in COLUMNS.items()}
    return pb.Forest(sizes=forest.sizes.tolist(), **columns)


def forest_from_proto(message: pb.Forest) -> Forest:
    """The forest in `message`, not yet `checked`.

    Raises:
        ValueError: columns differ in length.
    """
    columns: list[NDArray] = [
        np.frombuffer(getattr(message, name), _on_wire(dtype)).astype(dtype) for name, dtype in COLUMNS.items()
    ]
    forest = Forest(np.asarray(message.sizes, np.intp), *columns)
    if any(len(column) != forest.sizes.sum() for column in columns):
        raise ValueError("columns of a forest differ in length")
    return forest


def checked(
    forest: Forest, max_nodes: NDArray[np.intp], max_depths: NDArray[np.intp], vocab_size: int
) -> tuple[Forest, int]:
    """A forest from another process with malformed and oversized trees emptied, and the number of these trees.

    Args:
        max_nodes, max_depths: [trees]; the limits of each tree.
    """
    tree_of, indices = forest.tree_of, np.arange(len(forest.tree_of)) - forest.starts[forest.tree_of]
    bad = (forest.sizes > max_nodes)[tree_of]
    bad |= (forest.token_ids < 0) | (forest.token_ids >= vocab_size)
    bad |= (forest.parents < ROOT) | (forest.parents >= indices)
    bad |= ~((forest.draft_probs > 0) & (forest.draft_probs <= 1))  # NaN is neither
    bad |= forest.sources > max(Source)
    forest, refused = forest.without(bad)
    bad = forest.depths > max_depths[forest.tree_of]
    # Twins have the same token and the same parent. Sorted, they are neighbours.
    above = np.where(forest.parents == ROOT, -1 - forest.tree_of, forest.jumps[0][1:])
    order = np.lexsort((forest.token_ids, above))
    twins = (np.diff(above[order]) == 0) & (np.diff(forest.token_ids[order]) == 0)
    bad[order[1:][twins]] = True
    if not np.count_nonzero(bad):
        return forest, refused
    forest, more = forest.without(bad)
    return forest, refused + more


def _on_wire(dtype: type) -> np.dtype:
    return np.dtype(dtype).newbyteorder("<")
