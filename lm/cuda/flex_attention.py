"""Tree attention over the paged store in one kernel, of shapes that only the padded number of tokens decides.

torch's FlexAttention (Dong et al., arXiv 2412.05496) runs over the whole store of a layer. Which slots a token sees is
looked up in small tensors while the kernel runs, and per block of queries a list of tiles says where there is anything
to see at all. Query heads that share a key/value head are folded into the query length: row `token * group + member`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import gcd
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from lm.attention import AttentionOptions
from lm.kv_cache import TILE_SLOTS

FAR = 1 << 30
"""Stands for the index, in a sequence, of a block that is not the sequence's."""
WORD_BITS = 32
LEAST_ROWS = 16
"""Rows of the smallest product that a GPU's matrix units make."""
MANY_TOKENS = 128
"""From so many tokens on a block of queries has four times as many rows."""

FlexAttention = Callable[..., Any]


@dataclass(frozen=True)
class TreeMask:
    """What each token of a padded pass sees, on the device.

    Attributes:
        sequences: int32 [tokens], row of `entries`.
        positions: int32 [tokens].
        lengths: int32 [tokens], committed entries of the token's sequence.
        ends: int32 [tokens], its committed, scratch and new entries.
        words: by window, int32 [tokens, words]: bit i is set if the token sees entry `length + i`.
        entries: int32 [sequences, blocks]: index in the sequence of a block's first entry; FAR if not its block.
        block_tokens: divides TILE_SLOTS.
    """

    sequences: Tensor
    positions: Tensor
    lengths: Tensor
    ends: Tensor
    words: dict[int | None, Tensor]
    entries: Tensor
    block_tokens: int


class FlexTreeAttention:
    """Attention of one padded pass. Block masks are made once and serve all layers of a kind."""

    def __init__(
        self, mask: TreeMask, slots: Tensor, keys: list[Tensor], values: list[Tensor], flex: FlexAttention
    ) -> None:
        """`slots`: int64 [tokens], where the new keys and values go; `keys` and `values`: the store, by layer."""
        self._mask, self._slots, self._keys, self._values, self._flex = mask, slots, keys, values, flex
        self._block_masks: dict[tuple[int | None, int], BlockMask] = {}

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, options: AttentionOptions) -> Tensor:
        keys, values = self._keys[layer], self._values[layer]
        keys.index_copy_(0, self._slots, key)
        values.index_copy_(0, self._slots, value)
        tokens, heads, key_dim = query.shape
        kv_heads, group = key.shape[1], heads // key.shape[1]
        block_mask = self._block_masks.get((options.window, group))
        if block_mask is None:
            block_mask = _block_mask(self._mask, options.window, group, len(keys))
            self._block_masks[options.window, group] = block_mask
        folded = query.view(tokens, kv_heads, group, key_dim).transpose(0, 1).reshape(1, kv_heads, -1, key_dim)
        mixed = self._flex(
            folded,
            keys.transpose(0, 1)[None],
            values.transpose(0, 1)[None],
            score_mod=None if options.softcap is None else _capped(options.softcap),
            block_mask=block_mask,
            scale=options.scale,
            kernel_options=_kernel_options(tokens, key_dim * key.element_size()),
        )
        return mixed.reshape(kv_heads, tokens, group, -1).transpose(0, 1).reshape(tokens, heads, -1)


def flex_for(device: torch.device) -> FlexAttention:
    """The kernel, compiled once for every shape; on the CPU the same in plain operations."""
    if device.type != "cuda":
        return flex_attention
    return torch.compile(  # type: ignore[call-overload]  # its overloads lack the last two
        flex_attention, dynamic=False, fullgraph=True, recompile_limit=256, isolate_recompiles=True
    )


def visible(mask: TreeMask, window: int | None, group: int) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """FlexAttention's `mask_mod`: whether a row of folded queries sees a slot of the store."""
    words, most = mask.words[window], mask.words[window].shape[1] * WORD_BITS
    sequences, positions, lengths, entries = mask.sequences, mask.positions, mask.lengths, mask.entries
    block_tokens = mask.block_tokens

    def sees(batch: Tensor, head: Tensor, row: Tensor, slot: Tensor) -> Tensor:
        token = row // group
        entry = entries[sequences[token], slot // block_tokens] + slot % block_tokens
        behind = entry - lengths[token]
        word = words[token, torch.clamp(behind, 0, most - 1) // WORD_BITS]
        in_tree = (behind >= 0) & (behind < most) & (((word >> (behind % WORD_BITS)) & 1) == 1)
        committed = behind < 0
        if window is not None:
            committed = committed & (entry > positions[token] - window)
        return committed | in_tree

    return sees


def tiles(mask: TreeMask, window: int | None, block_queries: int) -> tuple[Tensor, Tensor]:
    """Where each block of that many tokens has anything to see: in which tiles of the store.

    Returns:
        Number of tiles int32 [blocks], and their indices int32 [blocks, all tiles], increasing; the rest is filler.
    """
    near = mask.entries[mask.sequences]
    seen = near < mask.ends[:, None]
    if window is not None:
        seen &= near + mask.block_tokens > mask.positions[:, None] - window + 1
    hit = seen.unflatten(1, (-1, TILE_SLOTS // mask.block_tokens)).any(-1)
    hit = F.pad(hit, (0, 0, 0, -len(hit) % block_queries)).unflatten(0, (-1, block_queries)).any(1)
    blocks, count = hit.shape
    # Each hit goes to the place that its number among the row's hits gives it, all else to a last, dropped column.
    places = torch.where(hit, hit.cumsum(1) - 1, count)
    every = torch.arange(count, dtype=torch.int32, device=hit.device).expand(blocks, count)
    listed = torch.zeros(blocks, count + 1, dtype=torch.int32, device=hit.device).scatter_(1, places, every)
    return hit.sum(1, dtype=torch.int32), listed[:, :count].contiguous()


def _block_mask(mask: TreeMask, window: int | None, group: int, slots: int) -> BlockMask:
    block_queries = _block_queries(len(mask.sequences), group)
    counts, indices = tiles(mask, window, block_queries)
    return BlockMask.from_kv_blocks(
        counts[None, None],
        indices[None, None],
        BLOCK_SIZE=(block_queries * group, TILE_SLOTS),
        mask_mod=visible(mask, window, group),
        seq_lengths=(len(mask.sequences) * group, slots),
        compute_q_blocks=False,
    )


def _rows(tokens: int) -> int:
    return 4 * LEAST_ROWS if tokens >= MANY_TOKENS else LEAST_ROWS


def _block_queries(tokens: int, group: int) -> int:
    """Tokens of a block of queries: the fewest whose rows are whole products."""
    return _rows(tokens) // gcd(_rows(tokens), group)


def _kernel_options(tokens: int, row_bytes: int) -> dict[str, int]:
    """Tiles of the kernel, small enough for the shared memory of any GPU."""
    return {"BLOCK_M": _rows(tokens), "BLOCK_N": 64 if row_bytes <= 256 else 32, "num_warps": 4, "num_stages": 2}


def _capped(softcap: float) -> Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]:
    def cap(score: Tensor, batch: Tensor, head: Tensor, row: Tensor, slot: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    return cap
