"""The one verifier: the target walk.

At each node reached the target's own token is taken; if a child carries it the walk goes there, else the token is
emitted and the walk ends. Lossless for any tree, because which tokens were drafted never changes the target's token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

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
    reached = np.isin(tree.parents, [ROOT, *walk.accepted])
    accepted = np.zeros(len(tree), np.bool_)
    accepted[walk.accepted] = True
    return NodeOutcomes(
        sources=tree.sources[reached],
        depths=tree.depths[reached].astype(np.uint8),
        ranks=tree.ranks[reached],
        sampled=np.full(int(reached.sum()), sampled),
        draft_probs=tree.draft_probs[reached],
        accepted=accepted[reached],
    )


def concatenate(outcomes: list[NodeOutcomes]) -> NodeOutcomes:
    if not outcomes:
        return NodeOutcomes.empty()
    names = ("sources", "depths", "ranks", "sampled", "draft_probs", "accepted")
    return NodeOutcomes(*(np.concatenate([getattr(o, name) for o in outcomes]) for name in names))
