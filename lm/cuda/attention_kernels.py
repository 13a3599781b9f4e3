"""Tree attention over block tables, in Triton: every program attends for a few tokens of one sequence over one split of
its context, and a second kernel combines the splits (flash decoding, https://pytorch.org/blog/flash-decoding).

A sequence's entries are its committed tokens, then its scratch and new ones (the tail). Tiles are counted in entries,
not in slots, and splits depend on the sequence's own length alone. So a token's bits depend neither on where blocks
are stored nor on the rest of the pass.

    entries   0 ............ length | tail ....... end        length 150, end 153, tile 64:
    tiles     [ no mask ][ no mask ][ mask: bit words ]       tiles 0, 1 without a mask, tile 2 with one
"""

from __future__ import annotations

import triton
import triton.language as tl

WORD_BITS = tl.constexpr(32)
QUERY_FIELDS = tl.constexpr(4)
"""Of each query block: first token, number of tokens, sequence, end of what its last token may see."""
SEQUENCE_FIELDS = tl.constexpr(2)
"""Of each sequence: committed tokens, place of its first block in the block table."""
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _tiles_of(first, count, length, end, positions_ptr, window, GROUP, ROWS: tl.constexpr, TILE, SPLITS, LEAST_TILES):
    """What a query block reads: its first tile, one past its last tile, tiles per split, and the first tile from which
    all of its tokens see the committed entries."""
    rows = tl.arange(0, ROWS)
    live = rows < count * GROUP
    positions = tl.load(positions_ptr + first + rows // GROUP, mask=live, other=0)
    earliest = tl.min(tl.where(live, positions, 1 << 30), 0)
    latest = tl.max(tl.where(live, positions, 0), 0)
    low = tl.minimum(tl.maximum(earliest - window + 1, 0), length) // TILE
    whole = tl.cdiv(tl.minimum(tl.maximum(latest - window + 1, 0), length), TILE)
    high = tl.cdiv(end, TILE)
    return low, high, tl.maximum(tl.cdiv(high - low, SPLITS), LEAST_TILES), whole


@triton.jit
def _add_tile(
    tile, query, peak, total, mixed, tokens, live, head, keys_ptr, values_ptr, key_stride, value_stride, table_ptr,
    words_ptr, positions_ptr, length, end, window, scale, softcap, KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    KEY_PAD: tl.constexpr, VALUE_PAD: tl.constexpr, BLOCK_TOKENS: tl.constexpr, TILE: tl.constexpr, WORDS: tl.constexpr,
    CAPPED: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Online softmax: the running sums after one more tile."""
    entries = tile * TILE + tl.arange(0, TILE)
    if BLOCK_TOKENS % TILE == 0:
        block = tl.load(table_ptr + tile * TILE // BLOCK_TOKENS).to(tl.int64)
        slots = block * BLOCK_TOKENS + entries % BLOCK_TOKENS
    else:
        blocks = tl.load(table_ptr + entries // BLOCK_TOKENS, mask=entries < end, other=0).to(tl.int64)
        slots = blocks * BLOCK_TOKENS + entries % BLOCK_TOKENS
    key_dims, value_dims = tl.arange(0, KEY_PAD), tl.arange(0, VALUE_PAD)
    readable = entries < end if MASKED else entries >= 0  # Beyond the end is garbage, even NaN.
    keys = tl.load(
        keys_ptr + slots[None, :] * key_stride + head * KEY_DIM + key_dims[:, None],
        mask=readable[None, :] & (key_dims < KEY_DIM)[:, None],
        other=0.0,
    )
    score = tl.dot(query, keys, input_precision="ieee") * scale
    if CAPPED:
        score = softcap * (2 * tl.sigmoid(2 * score / softcap) - 1)
    score *= LOG2_E
    if MASKED:
        behind = entries - length
        word = tl.load(
            words_ptr + tokens[:, None] * WORDS + tl.maximum(behind, 0)[None, :] // WORD_BITS,
            mask=live[:, None] & ((behind >= 0) & readable)[None, :],
            other=0,
        )
        positions = tl.load(positions_ptr + tokens, mask=live, other=0)
        committed = (behind < 0)[None, :] & (entries[None, :] > positions[:, None] - window)
        score = tl.where(committed | ((word >> (behind & 31)[None, :]) & 1 == 1), score, float("-inf"))
    higher = tl.maximum(peak, tl.max(score, 1))
    base = tl.where(higher == float("-inf"), 0.0, higher)
    weight = tl.exp2(score - base[:, None])
    fade = tl.exp2(peak - base)
    values = tl.load(
        values_ptr + slots[:, None] * value_stride + head * VALUE_DIM + value_dims[None, :],
        mask=readable[:, None] & (value_dims < VALUE_DIM)[None, :],
        other=0.0,
    )
    mixed = mixed * fade[:, None] + tl.dot(weight.to(values.dtype), values, input_precision="ieee")
    return higher, total * fade + tl.sum(weight, 1), mixed


@triton.jit(do_not_specialize=["window"])
def attend_split(
    query_ptr, keys_ptr, values_ptr, words_ptr, positions_ptr, table_ptr, sequences_ptr, queries_ptr, mixed_ptr,
    sums_ptr, token_stride, head_stride, key_stride, value_stride, heads, window, scale, softcap, GROUP: tl.constexpr,
    ROWS: tl.constexpr, KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, KEY_PAD: tl.constexpr, VALUE_PAD: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr, TILE: tl.constexpr, SPLITS: tl.constexpr, LEAST_TILES: tl.constexpr,
    WORDS: tl.constexpr, CAPPED: tl.constexpr,
):  # fmt: skip
    """Grid [query blocks, kv heads, SPLITS]. A row of the products is one query head of one token.

    Writes float32 sums of one split: `mixed` [tokens, heads, SPLITS, VALUE_DIM] and `sums` [tokens, heads, SPLITS, 2],
    the largest score (in log2 units) and the sum of weights relative to it.
    """
    about = queries_ptr + tl.program_id(0) * QUERY_FIELDS
    head, split = tl.program_id(1), tl.program_id(2)
    first, count, end = tl.load(about), tl.load(about + 1), tl.load(about + 3)
    sequence = sequences_ptr + tl.load(about + 2) * SEQUENCE_FIELDS
    length, table_ptr = tl.load(sequence), table_ptr + tl.load(sequence + 1)
    low, high, tiles, whole = _tiles_of(
        first, count, length, end, positions_ptr, window, GROUP, ROWS, TILE, SPLITS, LEAST_TILES
    )
    start = low + split * tiles
    stop = tl.minimum(start + tiles, high)
    if start >= stop:
        return
    rows, key_dims, value_dims = tl.arange(0, ROWS), tl.arange(0, KEY_PAD), tl.arange(0, VALUE_PAD)
    live, tokens, own = rows < count * GROUP, first + rows // GROUP, head * GROUP + rows % GROUP
    query = tl.load(
        query_ptr + (tokens * token_stride + own * head_stride)[:, None] + key_dims[None, :],
        mask=live[:, None] & (key_dims < KEY_DIM)[None, :],
        other=0.0,
    )
    peak = tl.full([ROWS], float("-inf"), tl.float32)
    total, mixed = tl.zeros([ROWS], tl.float32), tl.zeros([ROWS, VALUE_PAD], tl.float32)
    unmasked = tl.minimum(tl.maximum(whole, start), stop)
    masked = tl.minimum(tl.maximum(length // TILE, unmasked), stop)
    for tile in range(unmasked, masked):
        peak, total, mixed = _add_tile(
            tile, query, peak, total, mixed, tokens, live, head, keys_ptr, values_ptr, key_stride, value_stride,
            table_ptr, words_ptr, positions_ptr, length, end, window, scale, softcap, KEY_DIM, VALUE_DIM, KEY_PAD,
            VALUE_PAD, BLOCK_TOKENS, TILE, WORDS, CAPPED, False,
        )  # fmt: skip
    for place in range(start, stop - (masked - unmasked)):  # The window's edge, then the tail.
        tile = tl.where(place < unmasked, place, place + masked - unmasked)
        peak, total, mixed = _add_tile(
            tile, query, peak, total, mixed, tokens, live, head, keys_ptr, values_ptr, key_stride, value_stride,
            table_ptr, words_ptr, positions_ptr, length, end, window, scale, softcap, KEY_DIM, VALUE_DIM, KEY_PAD,
            VALUE_PAD, BLOCK_TOKENS, TILE, WORDS, CAPPED, True,
        )  # fmt: skip
    place = (tokens * heads + own).to(tl.int64) * SPLITS + split
    tl.store(sums_ptr + place * 2, peak, mask=live)
    tl.store(sums_ptr + place * 2 + 1, total, mask=live)
    kept = live[:, None] & (value_dims < VALUE_DIM)[None, :]
    tl.store(mixed_ptr + place[:, None] * VALUE_DIM + value_dims[None, :], mixed, mask=kept)


@triton.jit(do_not_specialize=["window"])
def combine_splits(
    mixed_ptr, sums_ptr, out_ptr, positions_ptr, sequences_ptr, queries_ptr, heads, window, GROUP: tl.constexpr,
    ROWS: tl.constexpr, VALUE_DIM: tl.constexpr, VALUE_PAD: tl.constexpr, TILE: tl.constexpr, SPLITS: tl.constexpr,
    LEAST_TILES: tl.constexpr, QUERY_TOKENS: tl.constexpr,
):  # fmt: skip
    """Grid [query blocks * QUERY_TOKENS, heads]: `out` [tokens, heads, VALUE_DIM]; 0 for a token that sees nothing."""
    about = queries_ptr + tl.program_id(0) // QUERY_TOKENS * QUERY_FIELDS
    index, head = tl.program_id(0) % QUERY_TOKENS, tl.program_id(1)
    first, count, end = tl.load(about), tl.load(about + 1), tl.load(about + 3)
    if index >= count:
        return
    length = tl.load(sequences_ptr + tl.load(about + 2) * SEQUENCE_FIELDS)
    low, high, tiles, _ = _tiles_of(
        first, count, length, end, positions_ptr, window, GROUP, ROWS, TILE, SPLITS, LEAST_TILES
    )
    splits, dims = tl.arange(0, SPLITS), tl.arange(0, VALUE_PAD)
    place = ((first + index) * heads + head).to(tl.int64) * SPLITS + splits
    filled = splits < tl.cdiv(high - low, tiles)
    peaks = tl.load(sums_ptr + place * 2, mask=filled, other=float("-inf"))
    peak = tl.max(peaks, 0)
    weights = tl.exp2(peaks - tl.where(peak == float("-inf"), 0.0, peak))
    total = tl.sum(weights * tl.load(sums_ptr + place * 2 + 1, mask=filled, other=0.0), 0)
    inside = dims < VALUE_DIM
    mixed = tl.load(
        mixed_ptr + place[:, None] * VALUE_DIM + dims[None, :], mask=filled[:, None] & inside[None, :], other=0.0
    )
    out = tl.sum(weights[:, None] * mixed, 0) / tl.where(total == 0.0, 1.0, total)
    to = out_ptr + ((first + index) * heads + head).to(tl.int64) * VALUE_DIM + dims
    tl.store(to, out.to(out_ptr.dtype.element_ty), mask=inside)
