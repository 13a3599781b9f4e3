"""Draft trees made by hand."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from treeline.forest import COLUMNS, Forest, Source


def tree_of(
    token_ids: Sequence[int],
    parents: Sequence[int],
    draft_probs: Sequence[float] | None = None,
    source: Source = Source.MODEL,
) -> Forest:
    """A forest of one tree; probabilities default to 1."""
    n = len(token_ids)
    columns = (token_ids, parents, draft_probs or [1.0] * n, [source] * n)
    typed = (np.asarray(column, dtype) for column, dtype in zip(columns, COLUMNS.values(), strict=True))
    return Forest(np.asarray([n], np.intp), *typed)
