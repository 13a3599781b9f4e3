"""Verification: the target walk.

At each node reached, the walk emits the target's own token. If a child carries that token the walk continues there,
else it ends. This is lossless for any tree: the drafted tokens never change the target's token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from treeline.forest import Forest
from treeline.step_record import NodeOutcomes


@dataclass(frozen=True)
class Walk:
    """Result of verifying one tree.

    Attributes:
        accepted: node indices within the tree of the accepted path, root first.
        tokens: emitted tokens: those of `accepted`, then the bonus token.
    """

    accepted: list[int]
    tokens: list[int]


class Verified(NamedTuple):
    """The result of a verification pass.

    Attributes:
        walks: one per decoding sequence, then one per finished prompt.
        logits: float32 [rows, vocab]; for each walk, its root's row and then its nodes'.
        verify_s: seconds of the pass and the walks.
        pass_how: see `StepRecord`.
    """

    walks: list[Walk]
    logits: Tensor
    verify_s: float
    pass_how: str


def target_walks(forest: Forest, own_tokens: list[int]) -> list[Walk]:
    """Walk down every tree.

    Args:
        own_tokens: [trees + n]; the target's own next token at each row of the pass: each tree's root, then its nodes.
    """
    # Trees of 2, 0 and 1 nodes have these rows: root 0, nodes 1 and 2; root 3; root 4, node 5.
    # first_rows is [0, 3, 4]; a node's parent has row first_row + 1 + parent, which is the root's for ROOT = -1.
    first_rows = forest.starts + np.arange(len(forest.sizes))
    tree_of = forest.tree_of
    parent_rows = (first_rows[tree_of] + 1 + forest.parents).tolist()
    rows = (tree_of + np.arange(1, 1 + len(tree_of))).tolist()  # A root comes before the nodes of its tree.
    child = dict(zip(zip(parent_rows, forest.token_ids.tolist(), strict=True), rows, strict=True))
    walks = []
    for first in first_rows.tolist():
        token = own_tokens[first]
        accepted, tokens = [], [token]
        row = child.get((first, token))
        while row is not None:
            accepted.append(row - first - 1)
            token = own_tokens[row]
            tokens.append(token)
            row = child.get((row, token))
        walks.append(Walk(accepted, tokens))
    return walks


def observed(forest: Forest, chosen: NDArray[np.bool_], walks: list[Walk], sampled: list[bool]) -> NodeOutcomes:
    """The outcomes of the walks: one for every verified child of every node reached.

    Args:
        chosen: bool [n]; the nodes of the forest that were verified.
        walks, sampled: for each tree its walk, and whether its request is sampled.
    """
    kept = chosen.nonzero()[0]
    sizes = np.bincount(forest.tree_of[kept], minlength=len(walks))
    starts = (sizes.cumsum() - sizes).tolist()
    places = [first + node for first, walk in zip(starts, walks, strict=False) for node in walk.accepted]
    accepted = np.zeros(1 + len(chosen), np.bool_)  # roots first, as in `forest.jumps`
    accepted[0] = True
    accepted[1 + kept[np.asarray(places, np.intp)]] = True
    above = forest.jumps[0][1:]
    reached = (chosen & accepted[above]).nonzero()[0]
    parents = np.where(above[reached] > 0, above[reached], -1 - forest.tree_of[reached])  # roots differ by tree
    first = np.zeros(len(reached), np.bool_)
    first[np.unique(parents, return_index=True)[1]] = True
    return NodeOutcomes(
        sources=forest.sources[reached],
        depths=forest.depths[reached].astype(np.uint8),
        first=first,
        sampled=np.asarray(sampled, np.bool_)[forest.tree_of[reached]],
        draft_probs=forest.draft_probs[reached],
        accepted=accepted[1:][reached],
    )
