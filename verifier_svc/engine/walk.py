"""The one verifier: the target walk.

At each node reached the target's own token is taken; if a child carries it the walk goes there, else the token is
emitted and the walk ends. Lossless for any tree, because which tokens were drafted never changes the target's token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from treeline.forest import Forest
from treeline.plan import NodeOutcomes
from treeline.tree import ROOT, DraftTree


@dataclass(frozen=True)
class Walk:
    """Result of verifying one tree.

    Attributes:
        accepted: node indices of the accepted path, root first.
        tokens: tokens emitted: those of `accepted`, then the bonus token.
    """

    accepted: list[int]
    tokens: list[int]


def target_walk(tree: DraftTree, own_tokens: Sequence[int]) -> Walk:
    """Walk down `tree`. `own_tokens` [1 + n]: the target's own next token at the root, then at each node."""
    if not len(tree):
        return Walk([], [own_tokens[0]])
    child = dict(zip(zip(tree.parents.tolist(), tree.token_ids.tolist(), strict=True), range(len(tree)), strict=True))
    accepted: list[int] = []
    token = own_tokens[0]
    tokens = [token]
    node = child.get((ROOT, token))
    while node is not None:
        accepted.append(node)
        token = own_tokens[1 + node]
        tokens.append(token)
        node = child.get((node, token))
    return Walk(accepted, tokens)


def observed(tree: DraftTree, walk: Walk, sampled: bool) -> NodeOutcomes:
    """The outcomes that the walk has shown: of every child of every node it reached."""
    return all_observed(Forest.of([tree]), np.ones(len(tree), np.bool_), [walk], [sampled])


def all_observed(forest: Forest, chosen: NDArray[np.bool_], walks: list[Walk], sampled: list[bool]) -> NodeOutcomes:
    """`observed` of a batch.

    Args:
        chosen: bool [nodes] of the forest; the trees that were walked have only these.
        walks, sampled: per tree, its walk, and whether its request is sampled.
    """
    kept = chosen.nonzero()[0]
    ends = accumulate(np.bincount(forest.tree_of[kept], minlength=len(walks)).tolist(), initial=0)
    places = [first + node for first, walk in zip(ends, walks, strict=False) for node in walk.accepted]
    accepted = np.zeros(1 + len(chosen), np.bool_)  # roots first, as in `forest.jumps`
    accepted[0] = True
    accepted[1 + kept[np.asarray(places, np.intp)]] = True
    reached = (chosen & accepted[forest.jumps[0][1:]]).nonzero()[0]
    return NodeOutcomes(
        sources=forest.sources[reached],
        depths=forest.depths[reached].astype(np.uint8),
        ranks=forest.ranks[reached],
        sampled=np.asarray(sampled, np.bool_)[forest.tree_of[reached]],
        draft_probs=forest.draft_probs[reached],
        accepted=accepted[1:][reached],
    )


def concatenate(outcomes: list[NodeOutcomes]) -> NodeOutcomes:
    if not outcomes:
        return NodeOutcomes.empty()
    names = ("sources", "depths", "ranks", "sampled", "draft_probs", "accepted")
    return NodeOutcomes(*(np.concatenate([getattr(o, name) for o in outcomes]) for name in names))
