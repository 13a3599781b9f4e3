"""Passes on tensors that stay where they are, padded to a few numbers of tokens, so that they can be captured.

A padding token writes its key and value into the store's trash slot and sees that alone: what it computes is finite
and nobody reads it. All indices of a pass go to the device in one copy.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lm.attention import AttentionContext
from lm.cuda.flex_attention import FAR, WORD_BITS, FlexTreeAttention, TreeMask, flex_for
from lm.cuda.graphs import Graphs, Outputs
from lm.device import upload
from lm.kv_cache import TILE_SLOTS, KVCache
from lm.packed import PackedBatch

BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
"""Numbers of tokens to which passes are padded."""
MOST_SEQUENCES = 256
WORDS = BUCKETS[-1] // WORD_BITS
"""Enough for a token to see a whole pass of its own sequence."""
LOGITS_OF_ALL = 64
"""Up to so many tokens the logits of all are computed where few are wanted: weights are read once either way."""

_COLUMNS = 6
"""Of each token: id, position, slot, sequence, committed length, entries in all."""


Body = Callable[[Tensor, Tensor, Tensor | None, Tensor | None, AttentionContext], Outputs]
"""A model's pass over tokens on the device: (token_ids [tokens], positions [tokens], states [tokens, width] if the
model has such an input, rows, context). It gives the logits [rows, vocab] of the tokens `rows`, of all if it is None;
then anything else by token."""


class StaticPasses:
    """One model's padded passes over one cache.

    Attributes:
        graphs: the captured ones.
    """

    def __init__(self, cache: KVCache, windows: set[int | None], states: Tensor | None = None) -> None:
        """`windows`: of the model's layers; `states` [BUCKETS[-1], width]: buffer of the extra input, if it has one."""
        device = cache.keys[0].device
        self.graphs = Graphs(device)
        self._device, self._states = device, states
        self._windows = sorted(windows, key=lambda window: window or 0)
        self._keys, self._values = cache.keys, cache.values
        self._trash_slot, self._block_tokens = cache.trash_slot, cache.block_tokens
        width = _COLUMNS + WORDS * len(windows)
        self._rows = torch.zeros(BUCKETS[-1], width, dtype=torch.int32, device=device)
        blocks = len(cache.keys[0]) // cache.block_tokens
        self._entries = torch.full((MOST_SEQUENCES + 1, blocks), FAR, dtype=torch.int32, device=device)
        self._entries[MOST_SEQUENCES, cache.trash_slot // cache.block_tokens] = 0
        self._flex = flex_for(device)

    @staticmethod
    def serve(cache: KVCache) -> bool:
        """Whether such passes can run over `cache`: its blocks have to fill tiles."""
        return TILE_SLOTS % cache.block_tokens == 0

    @staticmethod
    def fit(batch: PackedBatch) -> bool:
        """Whether a batch is small enough."""
        return (
            len(batch.token_ids) <= BUCKETS[-1]
            and len(batch.spans) <= MOST_SEQUENCES
            and all(len(span.depths) <= WORDS * WORD_BITS for span in batch.spans)
        )

    def run(self, body: Body, batch: PackedBatch, states: Tensor | None = None) -> Outputs:
        """What the body gives for `batch`, as tensors of their own: logits of its rows, the rest by token."""
        tokens = len(batch.token_ids)
        size = bucket(tokens)
        self._fill(batch, size)
        if states is not None and self._states is not None:
            self._states[:tokens] = states
        all_wanted = len(batch.rows) == tokens
        rows = None if all_wanted else upload(batch.rows, self._device)
        if all_wanted or size <= LOGITS_OF_ALL:
            logits, *others = self.graphs.run(size, lambda: self._pass(body, size, None))
            logits = logits[:tokens].clone() if rows is None else logits[rows]
        else:
            logits, *others = self._pass(body, size, rows)
        return logits, *(other[:tokens].clone() for other in others)

    def _pass(self, body: Body, size: int, rows: Tensor | None) -> Outputs:
        columns = self._rows[:size, :_COLUMNS].T.contiguous()
        token_ids, positions, slots, sequences, lengths, ends = columns
        words = self._rows[:size, _COLUMNS:].unflatten(1, (-1, WORDS)).transpose(0, 1).contiguous()
        by_window = dict(zip(self._windows, words, strict=True))
        mask = TreeMask(sequences, positions, lengths, ends, by_window, self._entries, self._block_tokens)
        context = FlexTreeAttention(mask, slots.long(), self._keys, self._values, self._flex)
        states = None if self._states is None else self._states[:size]
        return body(token_ids.long(), positions.long(), states, rows, context)

    def _fill(self, batch: PackedBatch, size: int) -> None:
        """Put a batch's indices in place, the rest being padding: one copy to the device, small ones on it."""
        rows = self._token_rows(batch, size)
        blocks, firsts = [], []
        for index, span in enumerate(batch.spans):
            used = -(-(span.cache.length + len(span.depths)) // self._block_tokens)
            blocks.append(index * self._entries.shape[1] + np.asarray(span.cache.blocks[:used]))
            firsts.append(np.arange(used) * self._block_tokens)
        sent = upload(
            np.concatenate([rows.ravel(), *blocks, *firsts], dtype=np.int32, casting="same_kind"), self._device
        )
        count = (len(sent) - rows.size) // 2
        own, places, entries = sent.split((rows.size, count, count))
        self._rows[:size] = own.view(size, -1)
        self._entries[: len(batch.spans)] = FAR
        self._entries.view(-1).index_copy_(0, places.long(), entries)

    def _token_rows(self, batch: PackedBatch, size: int) -> NDArray[np.int32]:
        """int32 [size, columns and words]."""
        tokens, counts = len(batch.token_ids), [span.stop - span.start for span in batch.spans]
        lengths = np.asarray([span.cache.length for span in batch.spans])
        ends = lengths + [len(span.depths) for span in batch.spans]
        rows = np.zeros((size, self._rows.shape[1]), np.int32)
        rows[:, :_COLUMNS] = (0, 0, self._trash_slot, MOST_SEQUENCES, 0, 1)
        owners = np.repeat(np.arange(len(batch.spans)), counts)
        rows[:tokens, :_COLUMNS] = np.stack(
            (batch.token_ids, batch.positions, batch.slots, owners, lengths[owners], ends[owners]), axis=1
        )
        for place, window in enumerate(self._windows):
            first = _COLUMNS + place * WORDS
            rows[:, first : first + WORDS] = _words(batch, size, window)
        return rows


def bucket(tokens: int) -> int:
    """The number of tokens to which a pass is padded."""
    return next(size for size in BUCKETS if size >= tokens)


def _words(batch: PackedBatch, size: int, window: int | None) -> NDArray[np.int32]:
    """int32 [size, WORDS]: bit i is set if the token sees its sequence's i-th entry behind the committed ones."""
    seen = np.zeros((size, WORDS * WORD_BITS), np.bool_)
    seen[len(batch.token_ids) :, 0] = True
    for span in batch.spans:
        new, entries = span.visible.shape
        near = span.visible
        if window is not None:
            near = near & (span.depths > span.depths[entries - new :, None] - window)
        seen[span.start : span.stop, :entries] = near
    return np.packbits(seen, axis=1, bitorder="little").view("<i4")
