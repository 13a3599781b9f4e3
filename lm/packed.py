"""A ragged batch packed into one row of tokens: no padding, every sequence with its own tree."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

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


class Span(NamedTuple):
    """Where one sequence's new tokens are in the packed row, and what they see.

    Attributes:
        start, stop: their place in the packed row.
        cache: where their sequence's KV is; `length` and `scratch` are those before this pass.
        depths: int64 [scratch + n], 0-based.
        paths: of each new token; bit i is set if it sees the i-th of the scratch entries and new tokens.
    """

    start: int
    stop: int
    cache: SequenceCache
    depths: NDArray[np.int64]
    paths: Sequence[int]

    @property
    def visible(self) -> NDArray[np.bool_]:
        """bool [n, scratch + n]: the bits of `paths`."""
        return _bits(self.paths, len(self.depths))


@dataclass(frozen=True)
class PackedBatch:
    """All sequences' new tokens.

    Attributes:
        shapes: int64 [sequences, 4]: of each, its first token's place, its new tokens, committed tokens, and scratch
            entries and new tokens together.
        token_ids, positions, slots: int64 [tokens]; slots are where their KV goes.
        rows: int64 [rows]: indices of the tokens whose logits are wanted.
    """

    spans: list[Span]
    shapes: NDArray[np.int64]
    token_ids: NDArray[np.int64]
    positions: NDArray[np.int64]
    slots: NDArray[np.int64]
    rows: NDArray[np.int64]


def pack(sequences: list[PackedSequence]) -> PackedBatch:
    """Lay the sequences' new tokens one behind the other.

    Raises:
        ValueError: a sequence has no new token, no room for them, or parents that are not a tree.
    """
    spans: list[Span] = []
    token_ids: list[int] = []
    rows: list[int] = []
    start = 0
    for sequence in sequences:
        span = _span(sequence, start)
        spans.append(span)
        token_ids += sequence.token_ids
        if sequence.logits != "none":
            rows += range(start if sequence.logits == "all" else span.stop - 1, span.stop)
        start = span.stop
    places = [(span.start, span.stop - span.start, span.cache.length, len(span.depths)) for span in spans]
    shapes = np.array(places, np.int64)
    starts, new, lengths, entries = shapes.T
    depths = np.concatenate([span.depths[span.start - span.stop :] for span in spans])
    # A token's entry is its place among all that its sequence holds; blocks of all tables lie one behind the other.
    own = np.repeat(lengths + entries - new - starts, new) + np.arange(start)
    block_tokens, tables = spans[0].cache.block_tokens, [span.cache.table for span in spans]
    sizes = np.fromiter(map(len, tables), np.int64, len(tables))
    if ((lengths + entries) > sizes * block_tokens).any():
        raise ValueError("KV entries exceed the sequence's capacity")
    blocks = np.concatenate(tables)[np.repeat(np.cumsum(sizes) - sizes, new) + own // block_tokens]
    return PackedBatch(
        spans,
        shapes,
        np.array(token_ids, np.int64),
        positions=depths + np.repeat(lengths, new),
        slots=blocks.astype(np.int64) * block_tokens + own % block_tokens,
        rows=np.array(rows, np.int64),
    )


def _span(sequence: PackedSequence, start: int) -> Span:
    new, scratch = len(sequence.token_ids), sequence.cache.scratch
    if new == 0:
        raise ValueError("a sequence without new tokens")
    if sequence.parents is None:
        if scratch:
            raise ValueError(f"a causal run behind {scratch} scratch entries")
        depths, paths = _causal(new)
    else:
        if len(sequence.parents) != scratch + new:
            raise ValueError(f"{len(sequence.parents)} parents for {scratch} scratch entries and {new} new tokens")
        depths, paths = _ancestry_of(np.asarray(sequence.parents, np.int32).tobytes())
        paths = paths[scratch:]
    return Span(start, start + new, sequence.cache, depths, paths)


@functools.lru_cache(maxsize=64)  # Most runs are one token long.
def _causal(new: int) -> tuple[NDArray[np.int64], Sequence[int]]:
    return np.arange(new), [(2 << token) - 1 for token in range(new)]


@functools.lru_cache(maxsize=1024)  # Small trees have few shapes, and come again step after step.
def _ancestry_of(parents: bytes) -> tuple[NDArray[np.int64], list[int]]:
    return ancestry(np.frombuffer(parents, np.int32))


def ancestry(parents: NDArray[np.integer]) -> tuple[NDArray[np.int64], list[int]]:
    """Depths int64 [m], 0-based, and paths: bit i of a node's is set if node i is its ancestor or the node itself.

    Bits of numbers, as arrays would take several operations a layer.

    Raises:
        ValueError: a parent does not come before its child.
    """
    paths: list[int] = []
    for node, parent in enumerate(parents.tolist()):
        if not -1 <= parent < node:
            raise ValueError("a parent does not come before its child")
        paths.append(1 << node | (paths[parent] if parent >= 0 else 0))
    return np.array([path.bit_count() - 1 for path in paths], np.int64), paths


def _bits(paths: Sequence[int], size: int) -> NDArray[np.bool_]:
    """bool [paths, size]."""
    row_bytes = -(-size // 8)
    rows = np.frombuffer(b"".join([path.to_bytes(row_bytes, "little") for path in paths]), np.uint8)
    return np.unpackbits(rows.reshape(-1, row_bytes), axis=1, count=size, bitorder="little").view(np.bool_)
