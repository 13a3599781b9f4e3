"""A ragged batch packed into one row of tokens: no padding, every sequence with its own tree."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from lm.kv_cache import SequenceCache


@dataclass
class PackedSequence:
    """New tokens of one sequence in one forward pass; they are appended to its scratch.

    A token sees the committed context, its ancestors and itself. Its position is the committed length plus its depth.

    Attributes:
        token_ids: the n >= 1 new tokens.
        parents: None for a causal run, which needs an empty scratch. Otherwise int32 [scratch + n]: for every scratch
            entry and each new token the index, in that same numbering, of its parent; -1 follows the committed context.
        logits: which of the new tokens get a row of logits.
    """

    cache: SequenceCache
    token_ids: list[int]
    parents: NDArray[np.int32] | None = None
    logits: Literal["all", "last", "none"] = "all"


@dataclass(frozen=True)
class Span:
    """Where one sequence's new tokens are in the packed row, and what they see.

    Attributes:
        start, stop: their place in the packed row.
        cache: where their sequence's KV is; `length` and `scratch` are those before this pass.
        depths: int64 [scratch + n], 0-based.
        visible: bool [n, scratch + n]: which scratch entries and new tokens each new token sees.
    """

    start: int
    stop: int
    cache: SequenceCache
    depths: NDArray[np.int64]
    visible: NDArray[np.bool_]


@dataclass(frozen=True)
class PackedBatch:
    """All sequences' new tokens.

    Attributes:
        token_ids, positions, slots: int64 [tokens]; slots are where their KV goes.
        rows: int64 [rows]: indices of the tokens whose logits are wanted.
    """

    spans: list[Span]
    token_ids: NDArray[np.int64]
    positions: NDArray[np.int64]
    slots: NDArray[np.int64]
    rows: NDArray[np.int64]


def pack(sequences: list[PackedSequence]) -> PackedBatch:
    """Lay the sequences' new tokens one behind the other.

    Raises:
        ValueError: a sequence has no new token, no room for them, or parents that are not a tree.
    """
    spans, positions, slots, rows = [], [], [], []
    start = 0
    for sequence in sequences:
        span = _span(sequence, start)
        cache, first = span.cache, span.cache.length + span.cache.scratch
        spans.append(span)
        positions.append(cache.length + span.depths[cache.scratch :])
        slots.append(cache.slots(first, first + span.stop - start))
        wanted = {"all": start, "last": span.stop - 1, "none": span.stop}[sequence.logits]
        rows.append(np.arange(wanted, span.stop))
        start = span.stop
    token_ids = [token for sequence in sequences for token in sequence.token_ids]
    columns = (np.concatenate(column) for column in (positions, slots, rows))
    return PackedBatch(spans, np.asarray(token_ids, np.int64), *columns)


def _span(sequence: PackedSequence, start: int) -> Span:
    new, scratch = len(sequence.token_ids), sequence.cache.scratch
    if new == 0:
        raise ValueError("a sequence without new tokens")
    if sequence.parents is None:
        if scratch:
            raise ValueError(f"a causal run behind {scratch} scratch entries")
        depths, visible = _causal(new)
    else:
        if len(sequence.parents) != scratch + new:
            raise ValueError(f"{len(sequence.parents)} parents for {scratch} scratch entries and {new} new tokens")
        depths, visible = ancestry(sequence.parents)
        visible = visible[scratch:]
    return Span(start, start + new, sequence.cache, depths, visible)


@functools.lru_cache(maxsize=64)  # Most runs are one token long; none of the arrays is written.
def _causal(new: int) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    return np.arange(new), np.tri(new, dtype=np.bool_)


def ancestry(parents: NDArray[np.integer]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Depths int64 [m], 0-based, and ancestors bool [m, m] (row: node, column: ancestor or itself).

    Raises:
        ValueError: a parent does not come before its child.
    """
    size = len(parents)
    paths: list[int] = []  # A row of bits each: trees are small, and arrays would take several operations a layer.
    for node, parent in enumerate(parents.tolist()):
        if not -1 <= parent < node:
            raise ValueError("a parent does not come before its child")
        paths.append(1 << node | (paths[parent] if parent >= 0 else 0))
    depths = np.asarray([path.bit_count() - 1 for path in paths], np.int64)
    row_bytes = -(-size // 8)
    rows = np.frombuffer(b"".join([path.to_bytes(row_bytes, "little") for path in paths]), np.uint8)
    visible = np.unpackbits(rows.reshape(size, row_bytes), axis=1, count=size, bitorder="little")
    return depths, visible.view(np.bool_)
