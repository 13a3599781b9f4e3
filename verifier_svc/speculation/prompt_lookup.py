"""Prompt lookup: where a text repeats an earlier part of itself, draft the earlier continuation.

The continuations are grafted into the draft model's trees: below the root, and below every node whose path ends in an
n-gram seen earlier in the text. Tokens that a grammar forces are drafted in the same way.
"""

from __future__ import annotations

from itertools import accumulate
from operator import mul
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from planner.fast.acceptance import accepts
from treeline.forest import ROOT, Forest, Source
from treeline.plan import DEPTHS, Calibration

GRAM = 2
"""Tokens that must repeat: after one repeated token alone the continuation is right at odds of 1 : 4 only (`_ODDS`)."""
MAX_AGREED = 16
"""Most repeated tokens that are counted: the odds are 16 : 1 by then."""
_ODDS = np.minimum(np.arange(MAX_AGREED + 1), MAX_AGREED) ** 1.5 / 4
PROBS: list[float] = (_ODDS / (1 + _ODDS)).tolist()
"""P(a text continues as before), by the number of repeated tokens m: odds m^1.5 / 4, measured (docs/decisions.md)."""


class Allowance(NamedTuple):
    """What may be grafted into one tree: at most `nodes` new nodes, none deeper than `max_depth`."""

    session_id: int
    sampled: bool
    nodes: int
    max_depth: int


class PromptLookup:
    """An index of every request's text. A step takes two dictionary look-ups per new token and one per draft node."""

    def __init__(self) -> None:
        self._texts: dict[int, _Text] = {}
        self._calibration: Calibration | None = None
        self._accepts: list[list[list[float]]] = []

    def read(self, session_id: int, token_ids: list[int], forced: list[int] | None = None) -> None:
        """Read the new tokens; `token_ids` may only have grown since the last call. A grammar forces `forced` next."""
        text = self._texts.setdefault(session_id, _Text())
        text.read(token_ids)
        text.forced = forced or []

    def forget(self, session_id: int) -> None:
        self._texts.pop(session_id, None)

    def worth(self, allowance: Allowance, calibration: Calibration) -> list[float]:
        """Upper bounds of the path acceptances of the nodes that `graft` would add to an empty tree."""
        text, table = self._texts[allowance.session_id], self._table(calibration)[allowance.sampled]
        most = min(allowance.nodes, allowance.max_depth)
        worth = _chain_worth(table, MAX_AGREED, min(most, len(text.forced)))
        return worth if text.follows is None else worth + _chain_worth(table, text.agreed, most)

    def graft(self, forest: Forest, allowances: list[Allowance], calibration: Calibration) -> Forest:
        """The forest with the continuations of the texts as they were read last. `allowances`: one per tree.

        If draft model and text propose the same node, it keeps the source with the higher calibrated acceptance.
        """
        own = np.asarray([allowance.sampled for allowance in allowances], np.bool_)[forest.tree_of]
        worth = accepts(calibration, forest.sources, forest.depths, forest.draft_probs, own).tolist()
        table = self._table(calibration)
        grafts = []
        for tree, (allowance, first) in enumerate(zip(allowances, forest.starts.tolist(), strict=True)):
            if min(allowance.nodes, allowance.max_depth) > 0:
                nodes = slice(first, first + forest.sizes.item(tree))
                text = self._texts[allowance.session_id]
                grafts.append(_Graft(tree, forest, nodes, worth[nodes], text, allowance, table[allowance.sampled]))
        grafts = [graft for graft in grafts if graft.grow()]
        if not grafts:
            return forest
        probs, sources = forest.draft_probs.copy(), forest.sources.copy()
        for graft in grafts:
            for node, prob in graft.overruled.items():
                probs[graft.first + node], sources[graft.first + node] = prob, Source.NGRAM
        # New nodes follow their tree's own: a, b of tree 0, c of tree 1 and a new x of tree 0 become a, b, x, c.
        of_new = np.repeat([graft.tree for graft in grafts], [len(graft.token_ids) for graft in grafts])
        trees = np.concatenate([forest.tree_of, of_new])
        order = np.argsort(trees, kind="stable")
        own_columns: tuple[NDArray, ...] = (forest.token_ids, forest.parents, probs, sources)
        columns = (
            np.concatenate([own, np.asarray([value for column in new for value in column], own.dtype)])[order]
            for own, new in zip(own_columns, zip(*(graft.columns for graft in grafts), strict=True), strict=True)
        )
        return Forest(np.bincount(trees, minlength=len(forest.sizes)), *columns)

    def _table(self, calibration: Calibration) -> list[list[list[float]]]:
        """[sampled][depth][agreed]: calibrated acceptance of a looked-up node; the last depth is for deeper ones."""
        if calibration is not self._calibration:
            sampled, depths, probs = np.meshgrid([False, True], np.arange(DEPTHS + 1), PROBS, indexing="ij")
            worth = accepts(calibration, Source.NGRAM, np.maximum(depths, 1), probs.astype(np.float32), sampled)
            self._calibration, self._accepts = calibration, worth.tolist()
        return self._accepts


class _Text:
    """One text, up to where it was read.

    Attributes:
        token_ids: the text itself.
        newest: for each n-gram, the index of the token after its last occurrence.
        follows: index of the token after the earlier occurrence of the text's end; None if the end is new.
        agreed: how many tokens before it are repeated.
        forced: tokens that a grammar forces after the text.
    """

    def __init__(self) -> None:
        self.token_ids: list[int] = []
        self.newest: dict[tuple[int, int], int] = {}
        self.follows: int | None = None
        self.agreed = 0
        self.forced: list[int] = []
        self._read = 0

    def read(self, token_ids: list[int]) -> None:
        for index in range(self._read, len(token_ids)):
            if self.follows is not None and token_ids[self.follows] == token_ids[index]:
                self.follows, self.agreed = self.follows + 1, self.agreed + 1
            else:
                self.follows, self.agreed = None, 0
            if index == 0:
                continue
            gram = token_ids[index - 1], token_ids[index]
            if self.follows is None and gram in self.newest:
                self.follows, self.agreed = self.newest[gram], GRAM
            self.newest[gram] = index + 1
        self._read, self.token_ids = len(token_ids), token_ids


def _chain_worth(accepts: list[list[float]], agreed: int, nodes: int) -> list[float]:
    """Path acceptances of a chain below the root, where the last `agreed` tokens of the text repeat earlier ones."""
    rates = [accepts[min(1 + i, DEPTHS)][min(agreed + i, MAX_AGREED)] for i in range(nodes)]
    return list(accumulate(rates, mul))


class _Graft:
    """What one text adds to one tree.

    Attributes:
        token_ids, parents, draft_probs: columns of the new nodes.
        overruled: new probability by node, for nodes of the tree to which the text gives a higher acceptance.
    """

    def __init__(
        self,
        tree: int,
        forest: Forest,
        nodes: slice,
        worth: list[float],
        text: _Text,
        allowance: Allowance,
        accepts: list[list[float]],
    ) -> None:
        """`worth`: calibrated acceptance of the tree's own `nodes`. `accepts`: see `PromptLookup._table`."""
        self.tree, self.first = tree, nodes.start
        self.token_ids, self.parents, self.draft_probs = list[int](), list[int](), list[float]()
        self.overruled: dict[int, float] = {}
        self._text, self._allowance, self._worth, self._accepts = text, allowance, worth, accepts
        self._tokens, self._above = forest.token_ids[nodes].tolist(), forest.parents[nodes].tolist()
        self._depths = forest.depths[nodes].tolist()
        self._child = dict(zip(zip(self._above, self._tokens, strict=True), range(len(self._tokens)), strict=True))

    @property
    def columns(self) -> tuple[list[int], list[int], list[float], list[int]]:
        """Columns of the new nodes, in the order of the forest's columns."""
        return self.token_ids, self.parents, self.draft_probs, [Source.NGRAM] * len(self.token_ids)

    def grow(self) -> bool:
        """Add the text's continuations; returns whether there were any."""
        text, newest = self._text, self._text.newest
        node: int | None = ROOT
        for depth, token in enumerate(text.forced[: self._allowance.max_depth], start=1):
            if node is not None:
                node = self._add(node, depth, token, MAX_AGREED)
        if text.follows is not None:
            self._offer(ROOT, 0, text.follows, text.agreed)
        last = text.token_ids[-1]
        for node, (token, parent) in enumerate(zip(self._tokens, self._above, strict=True)):
            follows = newest.get((last if parent == ROOT else self._tokens[parent], token))
            if follows is not None and follows < len(text.token_ids):  # else the path repeats the text's end
                self._offer(node, self._depths[node], follows, self._agreed(node, follows))
        return bool(self.token_ids or self.overruled)

    def _offer(self, node: int, depth: int, follows: int, agreed: int) -> None:
        """Continue below `node` with the text from `follows` on; past its end the text repeats from `follows`."""
        text = self._text.token_ids
        period = len(text) - follows
        for step in range(self._allowance.max_depth - depth):
            agreed = min(agreed + (step > 0), MAX_AGREED)
            added = self._add(node, depth + step + 1, text[follows + step % period], agreed)
            if added is None:
                return
            node = added

    def _add(self, node: int, depth: int, token: int, agreed: int) -> int | None:
        """The child of `node` that carries `token`, new if there was none; None if there is no room for it."""
        own = len(self._tokens)
        at = self._child.get((node, token))
        if at is None:
            if len(self.token_ids) == self._allowance.nodes:
                return None
            at = own + len(self.token_ids)
            self._child[node, token] = at
            self.token_ids.append(token)
            self.parents.append(node)
            self.draft_probs.append(PROBS[agreed])
        elif at < own:
            worth = self._accepts[min(depth, DEPTHS)][agreed]
            if worth > self._worth[at]:
                self._worth[at], self.overruled[at] = worth, PROBS[agreed]
        return at

    def _agreed(self, node: int, follows: int) -> int:
        """How many tokens before `follows` equal the last ones of the text followed by the path to `node`."""
        text = self._text.token_ids
        agreed, back = 0, follows - 1
        while node != ROOT and back >= 0 and agreed < MAX_AGREED and text[back] == self._tokens[node]:
            node, back, agreed = self._above[node], back - 1, agreed + 1
        if node != ROOT:
            return agreed
        end = len(text) - 1
        while back >= 0 and agreed < MAX_AGREED and text[back] == text[end]:
            back, end, agreed = back - 1, end - 1, agreed + 1
        return agreed
