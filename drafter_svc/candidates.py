"""What was proposed for the next layer of a batch's trees, as columns."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from drafter_svc.proposer import Children
from planner.fast.acceptance import accepts
from treeline.plan import Calibration
from treeline.tree import Source

TOKEN_BITS = 32


@dataclass(frozen=True)
class Candidates:
    """Children that might join, columns [m]: tree by tree, grouped under parents, and there by rank.

    Attributes:
        tree_of: whose child it is.
        parents: index of the parent in its tree, or ROOT.
        above: place of the parent among the nodes of all trees, counted from 1 on; 0 for a root.
        accepts: calibrated acceptance given the parent.
    """

    tree_of: NDArray[np.intp]
    parents: NDArray[np.int32]
    above: NDArray[np.intp]
    token_ids: NDArray[np.int32]
    probs: NDArray[np.float32]
    ranks: NDArray[np.uint8]
    sources: NDArray[np.uint8]
    accepts: NDArray[np.float32]

    def take(self, chosen: NDArray[np.intp] | NDArray[np.bool_]) -> Candidates:
        return Candidates(
            self.tree_of[chosen],
            self.parents[chosen],
            self.above[chosen],
            self.token_ids[chosen],
            self.probs[chosen],
            self.ranks[chosen],
            self.sources[chosen],
            self.accepts[chosen],
        )


def merge(
    proposed: list[tuple[int, Source, Children]],
    above: NDArray[np.intp],
    depth: int,
    sampled: NDArray[np.bool_],
    calibration: Calibration,
) -> Candidates:
    """All proposed children of a batch's trees as one layer.

    Of a child that two sources propose, the one with the higher calibrated acceptance stays. Where a tree's children
    come from several sources, siblings are ranked anew by acceptance; a single source's ranks stay as they are.

    Args:
        proposed: at least one (tree, source, children), trees in rising order.
        above: intp [trees]; what to add to a parent's index to get its place in `Candidates.above`.
        sampled: bool [trees].
    """
    trees, counts = [tree for tree, _, _ in proposed], [len(children.parents) for _, _, children in proposed]
    tree_of = np.asarray(trees).repeat(counts)
    sources = np.asarray([source for _, source, _ in proposed], np.uint8).repeat(counts)
    parents = _column([children.parents for _, _, children in proposed], np.int32)
    probs = _column([children.probs for _, _, children in proposed], np.float32)
    candidates = Candidates(
        tree_of,
        parents,
        parents + above[tree_of],
        _column([children.token_ids for _, _, children in proposed], np.int32),
        probs,
        _column([children.ranks for _, _, children in proposed], np.uint8),
        sources,
        accepts(calibration, sources, np.asarray(depth), probs, sampled[tree_of]),
    )
    if len(trees) == len({*trees}):
        return candidates
    return _ranked_anew(candidates, np.bincount(trees, minlength=len(sampled)) > 1)


def _ranked_anew(found: Candidates, several: NDArray[np.bool_]) -> Candidates:
    """Each child once, by acceptance in the trees [trees] that have `several` sources."""
    anew = several[found.tree_of]
    parents = found.above + found.tree_of  # the roots share one place; so they are apart, and all in the trees' order
    order = np.lexsort((found.sources, found.ranks, np.where(anew, -found.accepts, 0), parents))
    children = (parents[order] << TOKEN_BITS) + found.token_ids[order]
    order = order[np.sort(np.unique(children, return_index=True)[1])]
    distinct, parents = found.take(order), parents[order]
    places = np.arange(len(order)) - parents.searchsorted(parents)
    np.copyto(distinct.ranks, places, where=anew[order], casting="unsafe")
    return distinct


def _column(columns: list[list[Any]], dtype: type) -> NDArray[Any]:
    return np.asarray(columns[0] if len(columns) == 1 else list(chain.from_iterable(columns)), dtype)
