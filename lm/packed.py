"""One forward pass's work: ragged sequences side by side, each with its own tree mask. No padding anywhere."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from lm.kv_cache import SequenceCache


@dataclass(frozen=True)
class PackedSequence:
    """One sequence's new tokens.

    Attributes:
        cache: where its keys and values live.
        token_ids: the n new tokens, n >= 1; they become scratch.
        parents: None for a causal run behind the committed tokens (only with no scratch). Otherwise int32
            [scratch + n]: for each scratch entry and new token the index, in that numbering, of its parent; -1 follows
            the committed tokens.
        logits: which of the new tokens get a row of logits.
    """

    cache: SequenceCache
    token_ids: list[int]
    parents: NDArray[np.int32] | None = None
    logits: Literal["all", "last", "none"] = "all"


@dataclass(frozen=True)
class Span:
    """What attention needs to know of one sequence.

    Attributes:
        start, end: its rows in the packed pass.
        runs: (first slot, count) of each contiguous stretch of its live entries, new ones included.
        live: entries it may read: committed, scratch and new.
        visible: bool [n, live], or None if every new token sees every entry.
        query_positions: int64 [n].
        key_positions: int64 [live].
    """

    start: int
    end: int
    runs: list[tuple[int, int]]
    live: int
    visible: NDArray[np.bool_] | None
    query_positions: NDArray[np.int64]
    key_positions: NDArray[np.int64]


@dataclass
class PackedPass:
    """Everything of one forward pass over N tokens that does not depend on the layer.

    Attributes:
        token_ids, positions, slots: int64 [N].
        rows: int64 [rows]; packed index of each token that gets logits.
        spans: one per sequence.
        biases: additive masks by sliding window, made when a layer first asks for one.
    """

    token_ids: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor
    rows: torch.Tensor
    spans: list[Span]
    biases: dict[int | None, list[torch.Tensor | None]]


def pack(sequences: list[PackedSequence], device: torch.device) -> PackedPass:
    """Lay the sequences out one behind the other.

    Raises:
        ValueError: a sequence has no new token, does not fit its reservation, or its parents are malformed.
    """
    token_ids: list[int] = []
    positions, slots, rows, spans = [], [], [], []
    for sequence in sequences:
        span = _span(sequence, start=len(token_ids))
        cache = sequence.cache
        first = cache.length + cache.scratch
        token_ids += sequence.token_ids
        positions.append(span.query_positions)
        slots.append(cache.slots[first : span.live])
        spans.append(span)
        if sequence.logits != "none":
            rows += range(span.start if sequence.logits == "all" else span.end - 1, span.end)
    return PackedPass(
        token_ids=torch.tensor(token_ids, dtype=torch.int64, device=device),
        positions=torch.from_numpy(np.concatenate(positions)).to(device),
        slots=torch.from_numpy(np.concatenate(slots)).to(device),
        rows=torch.tensor(rows, dtype=torch.int64, device=device),
        spans=spans,
        biases={},
    )


def _span(sequence: PackedSequence, start: int) -> Span:
    cache, n = sequence.cache, len(sequence.token_ids)
    live = cache.length + cache.scratch + n
    if n == 0 or live > cache.capacity:
        raise ValueError(f"{n} new tokens do not fit: {live} entries of {cache.capacity} reserved")
    if sequence.parents is None:
        if cache.scratch:
            raise ValueError("a causal run cannot follow scratch entries")
        depths = np.arange(n)
        seen = np.tri(n, dtype=np.bool_)
    else:
        if len(sequence.parents) != cache.scratch + n:
            raise ValueError("parents must cover scratch and new tokens")
        depths, seen = _ancestors(sequence.parents)
    tail_positions = cache.length + depths
    visible = seen[-n:]
    if not visible.all():
        visible = np.concatenate([np.ones((n, cache.length), np.bool_), visible], axis=1)
    return Span(
        start=start,
        end=start + n,
        runs=_live_runs(cache.runs, live),
        live=live,
        visible=None if visible.all() else visible,
        query_positions=tail_positions[-n:].astype(np.int64),
        key_positions=np.concatenate([np.arange(cache.length), tail_positions]).astype(np.int64),
    )


def _ancestors(parents: NDArray[np.int32]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """(depths [m], seen [m, m]): 0-based depth of each entry, and whom it sees: its ancestors and itself."""
    m = len(parents)
    depths = np.zeros(m, np.int64)
    seen = np.eye(m, dtype=np.bool_)
    for entry, parent in enumerate(parents.tolist()):
        if parent >= entry or parent < -1:
            raise ValueError("a parent must come before its child")
        if parent >= 0:
            depths[entry] = depths[parent] + 1
            seen[entry, :entry] |= seen[parent, :entry]
    return depths, seen


def _live_runs(runs: list[tuple[int, int]], live: int) -> list[tuple[int, int]]:
    """The first `live` entries of a block table's runs."""
    cut = []
    for first, count in runs:
        cut.append((first, min(count, live)))
        live -= count
        if live <= 0:
            break
    return cut
