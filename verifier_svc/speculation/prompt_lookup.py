"""Drafts that cost nothing: where a text repeats what it held before, the verifier itself goes on with it."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from treeline.tree import DraftTree, Source

GRAM = 2
"""So many tokens must have stood together before."""
MAX_AGREED = 16
LONGEST = 256
"""Most nodes of a copy: no tree may have more (`limits.max_tree_nodes`)."""
NONE = -1


class Copying:
    """Where each request's text last held its present end. A step costs two dictionary look-ups per new token."""

    def __init__(self) -> None:
        self._texts: dict[int, _Text] = {}

    def read(self, session_id: int, token_ids: list[int]) -> float:
        """How sure `token_ids`, which may only have grown, go on as before; 0 if their end is new."""
        text = self._texts.setdefault(session_id, _Text())
        text.read(token_ids)
        return 0.0 if text.follows == NONE else _PROBS.item(min(text.agreed, MAX_AGREED))

    def chain(self, session_id: int, token_ids: list[int], max_nodes: int) -> DraftTree:
        """What followed then; empty if the end is new. `token_ids`: as they were read."""
        text, nodes = self._texts[session_id], min(max_nodes, LONGEST)
        if text.follows == NONE or nodes < 1:
            return DraftTree.empty()
        copied = token_ids[text.follows : text.follows + nodes]
        copied = (copied * -(-nodes // len(copied)))[:nodes]  # past its own end a text goes on with its draft
        first = min(text.agreed, MAX_AGREED)
        probs = _PROBS[first : first + nodes]
        return DraftTree(np.asarray(copied, np.int32), _PARENTS[:nodes], probs, _RANKS[:nodes], _SOURCES[:nodes])

    def forget(self, session_id: int) -> None:
        self._texts.pop(session_id, None)


class _Text:
    """One text as far as it was read: what follows each n-gram, and the earlier place that its end agrees with.

    Attributes:
        follows: index of the token that followed there, or NONE.
        agreed: how many tokens before it agree.
    """

    def __init__(self) -> None:
        self.follows, self.agreed = NONE, 0
        self._read = 0
        self._newest: dict[tuple[int, ...], int] = {}

    def read(self, token_ids: list[int]) -> None:
        for index in range(self._read, len(token_ids)):
            if self.follows != NONE and token_ids[self.follows] == token_ids[index]:
                self.follows, self.agreed = self.follows + 1, self.agreed + 1
            else:
                self.follows, self.agreed = NONE, 0
            gram = tuple(token_ids[max(0, index - GRAM + 1) : index + 1])
            if self.follows == NONE and gram in self._newest:
                self.follows, self.agreed = self._newest[gram], GRAM
            if len(gram) == GRAM:
                self._newest[gram] = index + 1
        self._read = len(token_ids)


def _probs() -> NDArray[np.float32]:
    """float32 [MAX_AGREED + LONGEST]: how surely a copy goes on that agrees in so many tokens.

    Measured odds of agreed^1.5 to 4, and no better from MAX_AGREED on.
    """
    odds = np.minimum(np.arange(MAX_AGREED + LONGEST), MAX_AGREED) ** 1.5 / 4
    return (odds / (1 + odds)).astype(np.float32)


# The columns of all copies, which only have to be cut to length.
_PARENTS, _PROBS = np.arange(-1, LONGEST - 1, dtype=np.int32), _probs()
_RANKS, _SOURCES = np.zeros(LONGEST, np.uint8), np.full(LONGEST, Source.NGRAM, np.uint8)
