"""Layout of a padded pass: the sizes it is padded to, and where its indices are stored."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from itertools import accumulate

import numpy as np

BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
"""Numbers of tokens to which passes are padded."""
MOST_SEQUENCES = 256
QUERY_TOKENS = 4
"""Tokens of a query block, all of one sequence. With a group of 4 they fill the 16 rows of the smallest product of a
GPU's tensor cores."""
WORD_BITS = 32
WORDS = BUCKETS[-1] // WORD_BITS
"""Enough for a token to see a whole pass of its own sequence."""
FEW_ROWS = 64
"""If a larger pass wants fewer rows of logits, it computes this many: weights are read once either way."""


@dataclass(frozen=True)
class Layout:
    """Layout of the indices of a pass over `size` tokens: shapes of the consecutive sections.

    Attributes:
        columns: each token's id, position, slot; then the tokens whose logits are wanted, padded with 0.
        words: by window and token; bit i is set if the token sees its sequence's i-th entry after the committed ones.
        sequences: of each, committed tokens and the index of its first block in the table.
        queries: of each query block, first token, number of tokens, sequence, end of what its last token may see. The
            sequences' block tables, concatenated, follow.
    """

    columns: tuple[int, ...]
    words: tuple[int, ...]
    sequences: tuple[int, ...]
    queries: tuple[int, ...]

    @classmethod
    @functools.cache
    def of(cls, size: int, windows: int) -> Layout:
        # No sequence has less than one token; each but its last query block is full, and so are those of the padding.
        queries = min(size, MOST_SEQUENCES + 1 + size // QUERY_TOKENS)
        return cls((4, size), (windows, size, WORDS), (min(size, MOST_SEQUENCES), 2), (queries, 4))

    @functools.cached_property
    def ends(self) -> list[int]:
        """Where each section ends, in an array that holds all of them."""
        sections = (self.columns, self.words, self.sequences, self.queries)
        return list(accumulate(int(np.prod(shape)) for shape in sections))


def bucket(tokens: int) -> int:
    """The number of tokens to which a pass is padded."""
    return next(size for size in BUCKETS if size >= tokens)


def row_counts(size: int) -> tuple[int, ...]:
    """Numbers of logits rows to which a pass over `size` tokens may be padded."""
    return (FEW_ROWS, size) if size > FEW_ROWS else (size,)
