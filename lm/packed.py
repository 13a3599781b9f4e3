"""A ragged batch packed into one row of tokens: no padding, every sequence with its own tree."""

from __future__ import annotations

import functools
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
        parents: None for a causal run, which needs an empty scratch. Otherwise int32 [scratch + n]: the parent's index
            in this same array, of every scratch entry and then every new token; -1 is the last committed token.
        logits: which of the new tokens get a row of logits.
    """

    cache: SequenceCache
    token_ids: list[int]
    parents: NDArray[np.int32] | None = None
    logits: Literal["all", "last", "none"] = "all"


class Ancestry:
    """Which of m entries after a context sees which.

    Attributes:
        depths: int64 [m], 0-based.
        paths: a bit mask per entry; bit i is set if it sees entry i.
    """

    def __init__(self, depths: NDArray[np.int64], paths: list[int]) -> None:
        self.depths, self.paths = depths, paths

    @functools.cached_property
    def visible(self) -> NDArray[np.bool_]:
        """bool [m, m]: the bits of `paths`."""
        return _bits(self.paths, len(self.paths))

    @functools.cached_property
    def addresses(self) -> tuple[int, int]:
        """Addresses of `depths` and `visible`."""
        return self.depths.ctypes.data, self.visible.ctypes.data


class Span(NamedTuple):
    """Where one sequence's new tokens are in the packed row, and what they see.

    Attributes:
        start, stop: their place in the packed row.
        cache: where their sequence's KV is; `length` and `scratch` are those before this pass.
        tree: of the scratch entries and the new tokens.
    """

    start: int
    stop: int
    cache: SequenceCache
    tree: Ancestry

    @property
    def depths(self) -> NDArray[np.int64]:
        """int64 [scratch + n], 0-based."""
        return self.tree.depths

    @property
    def paths(self) -> list[int]:
        """Those of the new tokens."""
        return self.tree.paths[self.start - self.stop :]

    @property
    def visible(self) -> NDArray[np.bool_]:
        """bool [n, scratch + n]: the bits of `paths`."""
        return self.tree.visible[self.start - self.stop :]


@dataclass(frozen=True)
class PackedBatch:
    """All sequences' new tokens.

    Attributes:
        shapes: int64 [sequences, 4]: index of its first token, number of its new tokens, of its committed tokens, and
            of scratch entries plus new tokens.
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
    """Concatenate the sequences' new tokens.

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
    places = [(span.start, span.stop - span.start, span.cache.length, len(span.tree.depths)) for span in spans]
    shapes = np.array(places, np.int64)
    _, new, lengths, entries = shapes.T
    depths = np.concatenate([span.tree.depths[span.start - span.stop :] for span in spans])
    ends = (lengths + entries).tolist()
    slots = [span.cache.slots(end + span.start - span.stop, end) for span, end in zip(spans, ends, strict=True)]
    return PackedBatch(
        spans,
        shapes,
        np.array(token_ids, np.int64),
        positions=depths + np.repeat(lengths, new),
        slots=np.concatenate(slots),
        rows=np.array(rows, np.int64),
    )


def _span(sequence: PackedSequence, start: int) -> Span:
    new, scratch = len(sequence.token_ids), sequence.cache.scratch
    if new == 0:
        raise ValueError("a sequence without new tokens")
    if sequence.parents is None:
        if scratch:
            raise ValueError(f"a causal run behind {scratch} scratch entries")
        tree = _causal(new)
    else:
        if len(sequence.parents) != scratch + new:
            raise ValueError(f"{len(sequence.parents)} parents for {scratch} scratch entries and {new} new tokens")
        tree = _ancestry_of(np.asarray(sequence.parents, np.int32).tobytes())
    return Span(start, start + new, sequence.cache, tree)


@functools.lru_cache(maxsize=8)  # Most runs are one token long; a prompt of 2,048 tokens takes 4 MB.
def _causal(new: int) -> Ancestry:
    return Ancestry(np.arange(new), [(2 << token) - 1 for token in range(new)])


@functools.lru_cache(maxsize=512)  # Small trees have few shapes, and come again step after step.
def _ancestry_of(parents: bytes) -> Ancestry:
    return Ancestry(*ancestry(np.frombuffer(parents, np.int32)))


def ancestry(parents: NDArray[np.integer]) -> tuple[NDArray[np.int64], list[int]]:
    """Depths int64 [m], 0-based, and paths: bit i of a node's is set if node i is its ancestor or the node itself.

    Paths are integers: arrays would take several operations per tree layer.

    Raises:
        ValueError: a parent does not come before its child.
    """
    paths: list[int] = []
    for node, parent in enumerate(parents.tolist()):
        if not -1 <= parent < node:
            raise ValueError("a parent does not come before its child")
        paths.append(1 << node | (paths[parent] if parent >= 0 else 0))
    return np.array([path.bit_count() - 1 for path in paths], np.int64), paths


def _bits(paths: list[int], size: int) -> NDArray[np.bool_]:
    """bool [paths, size]."""
    row_bytes = -(-size // 8)
    rows = np.frombuffer(b"".join([path.to_bytes(row_bytes, "little") for path in paths]), np.uint8)
    return np.unpackbits(rows.reshape(-1, row_bytes), axis=1, count=size, bitorder="little").view(np.bool_)
