"""Tree attention of one padded pass: two launches per layer, with grids set by the padded number of tokens alone."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import triton
from torch import Tensor

from lm.attention import AttentionOptions
from lm.cuda.attention_kernels import attend_split, combine_splits
from lm.cuda.elementwise import TritonElementwise, store_rotated
from lm.cuda.layout import QUERY_TOKENS, WORDS

LEAST_ROWS = 16
SPLITS = 16
"""Most splits of a context: for one sequence, with 8 key/value heads, they fill the 132 multiprocessors of an H100."""
LEAST_TILES = 4
"""Fewest tiles of a split: the second stage reads one result per split, which must be small in comparison."""
TILE_BYTES = 16 << 10
"""Size of a tile's keys."""
MANY_BYTES = 16 << 10
"""Larger query blocks use twice as many warps, to keep their sums in registers."""
NO_WINDOW = 1 << 30


@dataclass(frozen=True)
class PaddedBatch:
    """Inputs of attention in a padded pass: int32 tensors on the device.

    Attributes:
        positions: [tokens].
        slots: int64 [tokens], where the new keys and values go.
        words: by window, [tokens, words]: bit i is set if the token sees entry `length + i` of its sequence.
        sequences: [sequences, 2]: committed tokens, and the index of its first block in `table`.
        table: the sequences' block tables, concatenated.
        queries: [query blocks, 4]: first token, number of tokens, sequence, and entries that its last token may see (0
            for padding).
    """

    positions: Tensor
    slots: Tensor
    words: dict[int | None, Tensor]
    sequences: Tensor
    table: Tensor
    queries: Tensor


class PaddedAttention:
    """The `AttentionContext` of one padded pass.

    Attributes:
        batch: the pass's inputs.
        work: operations of fused layers besides products and attention.
    """

    work: ClassVar[TritonElementwise | None] = TritonElementwise()

    def __init__(self, batch: PaddedBatch, keys: list[Tensor], values: list[Tensor], block_tokens: int) -> None:
        """`keys` and `values`: the KV cache, by layer, each [slots, kv_heads, dim]."""
        self.batch, self._keys, self._values, self._block_tokens = batch, keys, values, block_tokens

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, options: AttentionOptions) -> Tensor:
        keys, values = self._keys[layer], self._values[layer]
        keys.index_copy_(0, self.batch.slots, key)
        values.index_copy_(0, self.batch.slots, value)
        return attend(self.batch, query, keys, values, self._block_tokens, options)

    def rotate_and_attend(
        self, layer: int, heads: Tensor, counts: list[int], turns: Tensor, options: AttentionOptions, norms: Any
    ) -> Tensor:
        """As `attend` after rotary embedding; `heads`, `counts`, `turns` and `norms` as `store_rotated`."""
        keys, values = self._keys[layer], self._values[layer]
        store_rotated(heads, counts, turns, self.batch.slots, keys, values, norms)
        return attend(self.batch, heads[:, : counts[0]], keys, values, self._block_tokens, options)


def attend(
    batch: PaddedBatch, query: Tensor, keys: Tensor, values: Tensor, block_tokens: int, options: AttentionOptions
) -> Tensor:
    """query [tokens, heads, key_dim], keys and values [slots, kv_heads, dim] -> [tokens, heads, value_dim]."""
    if query.stride(2) != 1:
        query = query.contiguous()
    tokens, heads, key_dim = query.shape
    kv_heads, value_dim = values.shape[1:]
    words, window = batch.words[options.window], options.window or NO_WINDOW
    constants = kernel_constants(
        heads // kv_heads, key_dim, value_dim, query.element_size(), block_tokens, options.softcap is not None
    )
    mixed = torch.empty(tokens, heads, SPLITS, value_dim, dtype=torch.float32, device=query.device)
    sums = torch.empty(tokens, heads, SPLITS, 2, dtype=torch.float32, device=query.device)
    out = query.new_empty(tokens, heads, value_dim)
    blocks = len(batch.queries)
    attend_split[(blocks, kv_heads, SPLITS)](
        query, keys, values, words, batch.positions, batch.table, batch.sequences, batch.queries, mixed, sums,
        query.stride(0), query.stride(1), keys.stride(0), values.stride(0), heads, window, options.scale,
        options.softcap or 0.0, **_taken(attend_split, constants),
    )  # fmt: skip
    combine_splits[(blocks * QUERY_TOKENS, heads)](
        mixed, sums, out, batch.positions, batch.sequences, batch.queries, heads, window,
        **_taken(combine_splits, constants),
    )  # fmt: skip
    return out


@functools.cache
def kernel_constants(
    group: int, key_dim: int, value_dim: int, element_bytes: int, block_tokens: int, capped: bool
) -> dict[str, int]:
    """Compile-time constants and launch options of the kernels."""
    rows, key_pad, value_pad = (
        max(LEAST_ROWS, triton.next_power_of_2(size)) for size in (QUERY_TOKENS * group, key_dim, value_dim)
    )
    row_bytes = max(key_pad, value_pad) * element_bytes
    return {
        "GROUP": group,
        "ROWS": rows,
        "KEY_DIM": key_dim,
        "VALUE_DIM": value_dim,
        "KEY_PAD": key_pad,
        "VALUE_PAD": value_pad,
        "BLOCK_TOKENS": block_tokens,
        # Two stages of keys and values then fit the 99 KiB of shared memory that every GPU since sm_80 has.
        "TILE": max(16, min(64, TILE_BYTES // row_bytes)),
        "SPLITS": SPLITS,
        "LEAST_TILES": LEAST_TILES,
        "QUERY_TOKENS": QUERY_TOKENS,
        "WORDS": WORDS,
        "CAPPED": capped,
        # Products of float32 keep their factors in registers too.
        "num_warps": 8 if rows * row_bytes > MANY_BYTES or element_bytes == 4 else 4,
        "num_stages": 2,
    }


def _taken(kernel: Any, constants: dict[str, int]) -> dict[str, int]:
    """The constants that `kernel` takes."""
    return {name: value for name, value in constants.items() if name in kernel.arg_names or name.startswith("num_")}
