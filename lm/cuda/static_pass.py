"""Passes on tensors at fixed addresses, padded to a few numbers of tokens, so that they can be captured.

All indices of a pass are in one int32 array, which goes to the device in one copy. A padding token writes its key and
value to the cache's trash slot and sees nothing: its results are finite and never read.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lm.attention import AttentionContext
from lm.cuda.graphs import Graphs, How, Outputs
from lm.cuda.layout import BUCKETS, MOST_SEQUENCES, QUERY_TOKENS, WORD_BITS, WORDS, Layout, bucket, row_counts
from lm.device import upload_into
from lm.kv_cache import KVCache
from lm.packed import PackedBatch

Body = Callable[[Tensor, Tensor, Tensor | None, Tensor | None, AttentionContext], Outputs]
"""A model's pass over tokens on the device: (token_ids [tokens], positions [tokens], states [tokens, width] if the
model has such an input, rows, context). It returns the logits [rows, vocab] of the tokens `rows`, of all if that is
None; then any other outputs per token."""


class StaticPasses:
    """One model's padded passes over one cache.

    Attributes:
        graphs: the captured ones.
    """

    def __init__(self, cache: KVCache, windows: set[int | None], states: Tensor | None = None) -> None:
        """`windows`: of the model's layers; `states` [BUCKETS[-1], width]: buffer of the extra input, if it has one."""
        device = cache.keys[0].device
        self.graphs = Graphs(device)
        self._states = states
        self._windows = sorted(windows, key=lambda window: window or 0)
        self._keys, self._values = cache.keys, cache.values
        self._trash_slot, self._block_tokens = cache.trash_slot, cache.block_tokens
        most = self._layout(BUCKETS[-1]).ends[-1] + MOST_SEQUENCES * cache.total_blocks
        self._indices = torch.zeros(most, dtype=torch.int32, device=device)

    @staticmethod
    def fit(batch: PackedBatch) -> bool:
        """Whether a batch is small enough."""
        return (
            len(batch.token_ids) <= BUCKETS[-1]
            and len(batch.spans) <= MOST_SEQUENCES
            and all(len(span.depths) <= WORDS * WORD_BITS for span in batch.spans)
        )

    def run(self, body: Body, batch: PackedBatch, states: Tensor | None = None) -> tuple[Outputs, Tensor, How]:
        """The body's outputs for `batch`, copied: logits of its rows, the rest by token; and the token of the largest
        logit of each row, int64 [rows], chosen within the captured pass."""
        tokens, wanted = len(batch.token_ids), len(batch.rows)
        size = bucket(tokens)
        rows = next(rows for rows in row_counts(size) if rows >= wanted)
        upload_into(self.fill(batch, size), self._indices)
        if states is not None and self._states is not None:
            self._states[:tokens] = states
        (largest, logits, *others), how = self.graphs.run((size, rows), lambda: self._pass(body, size, rows))
        outputs = logits[:wanted].clone(), *(other[:tokens].clone() for other in others)
        return outputs, largest[:wanted].clone(), how

    def fill(self, batch: PackedBatch, size: int) -> NDArray[np.int32]:
        """A batch's indices, padded: the sections of its `Layout`, then the table of blocks."""
        layout, spans, tokens = self._layout(size), batch.spans, len(batch.token_ids)
        starts, new, lengths, entries = batch.shapes.T
        used = -(-(lengths + entries) // self._block_tokens)
        tables = [span.cache.table[:count] for span, count in zip(spans, used.tolist(), strict=True)]
        filled = np.zeros(layout.ends[-1] + int(used.sum()), np.int32)
        parts = np.split(filled, layout.ends)
        columns, words, sequences, queries = (
            part.reshape(shape)
            for part, shape in zip(
                parts, (layout.columns, layout.words, layout.sequences, layout.queries), strict=False
            )
        )
        columns[:3, :tokens] = batch.token_ids, batch.positions, batch.slots
        columns[2, tokens:] = self._trash_slot
        columns[3, : len(batch.rows)] = batch.rows
        for section, window in zip(words, self._windows, strict=True):
            section[:tokens] = _words(batch, window)
        sequences[: len(spans), 0], sequences[1 : len(spans), 1] = lengths, np.cumsum(used[:-1])
        own = _query_blocks(starts, starts + new, lengths + entries)
        queries[: len(own)] = own
        padding = np.arange(tokens, size, QUERY_TOKENS)
        queries[len(own) : len(own) + len(padding), 0] = padding
        queries[len(own) : len(own) + len(padding), 1] = np.minimum(size - padding, QUERY_TOKENS)
        np.concatenate(tables, out=parts[4])
        return filled

    def _layout(self, size: int) -> Layout:
        return Layout.of(size, len(self._windows))

    def _pass(self, body: Body, size: int, rows: int) -> Outputs:
        from lm.cuda.attention import PaddedAttention, PaddedBatch  # Triton is not installed everywhere.

        layout = self._layout(size)
        sections = self._indices.tensor_split(layout.ends)
        columns, words, sequences, queries = (
            section.view(shape)
            for section, shape in zip(
                sections, (layout.columns, layout.words, layout.sequences, layout.queries), strict=False
            )
        )
        token_ids, positions, slots, wanted = columns.long()
        by_window = dict(zip(self._windows, words, strict=True))
        batch = PaddedBatch(columns[1], slots, by_window, sequences, sections[4], queries)
        context = PaddedAttention(batch, self._keys, self._values, self._block_tokens)
        states = None if self._states is None else self._states[:size]
        outputs = body(token_ids, positions, states, wanted[:rows], context)
        return outputs[0].argmax(dim=-1), *outputs


def _query_blocks(starts: NDArray[np.int64], stops: NDArray[np.int64], ends: NDArray[np.int64]) -> NDArray[np.int64]:
    """int64 [query blocks, 4] as `Layout.queries`, of sequences with these token ranges and total entries.

    Tokens 0 to 5 of a sequence with 100 committed ones: (0, 4, 0, 104) and (4, 2, 0, 106).
    """
    blocks = -(-(stops - starts) // QUERY_TOKENS)
    owners = np.repeat(np.arange(len(blocks)), blocks)
    place = np.arange(len(owners)) - np.repeat(np.cumsum(blocks) - blocks, blocks)
    first = starts[owners] + QUERY_TOKENS * place
    count = np.minimum(stops[owners] - first, QUERY_TOKENS)
    return np.stack((first, count, owners, ends[owners] - stops[owners] + first + count), axis=1)


def _words(batch: PackedBatch, window: int | None) -> NDArray[np.int32]:
    """int32 [tokens, WORDS]: the tree as bits."""
    if window is None or window >= batch.shapes[:, 3].max():  # A token's depth is below its number of entries.
        row_bytes = WORDS * WORD_BITS // 8
        rows = b"".join([path.to_bytes(row_bytes, "little") for span in batch.spans for path in span.paths])
        return np.frombuffer(rows, "<i4").reshape(-1, WORDS)
    seen = np.zeros((len(batch.token_ids), WORDS * WORD_BITS), np.bool_)
    for span in batch.spans:
        depths, new = span.depths, span.stop - span.start
        near = depths > depths[len(depths) - new :, None] - window
        seen[span.start : span.stop, : len(depths)] = span.visible & near
    return np.packbits(seen, axis=1, bitorder="little").view("<i4")
