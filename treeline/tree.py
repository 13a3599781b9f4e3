"""The draft tree: the one data type that drafters build, policies prune and verifiers check."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

ROOT = -1
"""Parent index of a node that continues the last committed token."""


class Source(IntEnum):
    """Who proposed a node. Acceptance is calibrated per source."""

    MODEL = 0
    NGRAM = 1
    SYNTHETIC = 2


@dataclass(frozen=True)
class DraftTree:
    """Draft tokens below one request's last committed token, parents always before children.

    The root (the last committed token) is not a node. Siblings carry distinct tokens.

    Attributes:
        token_ids: int32 [n].
        parents: int32 [n]; index of the parent node, or ROOT.
        draft_probs: float32 [n]; the drafter's own probability of the node given its parent, in (0, 1].
            For a sampled request this is the softmax of the noise-perturbed logits.
        ranks: uint8 [n]; 0 for the drafter's first choice under this parent.
        sources: uint8 [n]; values of Source.
    """

    token_ids: NDArray[np.int32]
    parents: NDArray[np.int32]
    draft_probs: NDArray[np.float32]
    ranks: NDArray[np.uint8]
    sources: NDArray[np.uint8]

    def __len__(self) -> int:
        return len(self.token_ids)

    @staticmethod
    def empty() -> DraftTree:
        return EMPTY_TREE

    @staticmethod
    def build(
        token_ids: list[int],
        parents: list[int],
        draft_probs: list[float] | None = None,
        ranks: list[int] | None = None,
        source: Source = Source.MODEL,
    ) -> DraftTree:
        """A tree from plain lists; probabilities default to 1, ranks to 0."""
        n = len(token_ids)
        return DraftTree(
            np.asarray(token_ids, np.int32),
            np.asarray(parents, np.int32),
            np.ones(n, np.float32) if draft_probs is None else np.asarray(draft_probs, np.float32),
            np.zeros(n, np.uint8) if ranks is None else np.asarray(ranks, np.uint8),
            np.full(n, source, np.uint8),
        )

    @cached_property
    def depths(self) -> NDArray[np.int32]:
        """int32 [n]; 1 for children of the root."""
        depths = [0] * (len(self) + 1)  # the last one stands for the root, whose index is -1
        for node, parent in enumerate(self.parents.tolist()):
            depths[node] = depths[parent] + 1
        return np.asarray(depths[:-1], np.int32)

    def path_products(self, edge_values: NDArray[np.float32]) -> NDArray[np.float32]:
        """float32 [n]: product of `edge_values` over each node's path, itself included."""
        products = np.array(edge_values, np.float32)
        for node, parent in enumerate(self.parents.tolist()):
            if parent != ROOT:
                products[node] *= products[parent]
        return products

    def select(self, keep: NDArray[np.bool_]) -> DraftTree:
        """The tree of the kept nodes. `keep` [n] must be closed under parents.

        Raises:
            ValueError: a kept node's parent is not kept.
        """
        kept = keep.nonzero()[0]
        if len(kept) == len(self):
            return self
        if not len(kept):
            return EMPTY_TREE
        # Trees are small: a dictionary renumbers them faster than arrays.
        places = {ROOT: ROOT, **{node: place for place, node in enumerate(kept.tolist())}}
        try:
            parents = np.asarray([places[parent] for parent in self.parents[kept].tolist()], np.int32)
        except KeyError:
            raise ValueError("a kept node's parent was dropped") from None
        return DraftTree(self.token_ids[kept], parents, self.draft_probs[kept], self.ranks[kept], self.sources[kept])

    def check(self, vocab_size: int) -> None:
        """Raise ValueError unless this is a tree that may be verified (what arrives over a network need not be)."""
        n = len(self)
        if any(len(column) != n for column in (self.parents, self.draft_probs, self.ranks, self.sources)):
            raise ValueError("tree columns differ in length")
        if n == 0:
            return
        if self.token_ids.min() < 0 or self.token_ids.max() >= vocab_size:
            raise ValueError("token id outside the vocabulary")
        if self.parents.min() < ROOT or (self.parents >= np.arange(n)).any():
            raise ValueError("a parent does not come before its child")
        if not (np.isfinite(self.draft_probs).all() and (self.draft_probs > 0).all() and (self.draft_probs <= 1).all()):
            raise ValueError("draft probability outside (0, 1]")
        if len({*zip(self.parents.tolist(), self.token_ids.tolist(), strict=True)}) != n:
            raise ValueError("two siblings carry the same token")


EMPTY_TREE = DraftTree.build([], [])
