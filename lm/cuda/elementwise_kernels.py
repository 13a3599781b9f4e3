"""Operations of a decoder layer besides products and attention, in Triton: one launch each, float32 inside.

They round where torch's separate operations round, so that both write the same numbers.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _normed(row, weight_ptr, places, inside, epsilon, SIZE):
    """RMS norm of a row of SIZE numbers, in their own type."""
    wide = row.to(tl.float32)
    scale = 1 / tl.sqrt(tl.sum(wide * wide, 0) / SIZE + epsilon)
    weight = tl.load(weight_ptr + places, mask=inside, other=0.0).to(tl.float32)
    return (wide * scale * weight).to(row.dtype)


@triton.jit
def _store_rounded(row, numbers, out_ptr, scales_ptr, places, inside):
    """Store a row over its scale as e4m3 numbers, whose largest is 448."""
    wide = numbers.to(tl.float32)
    scale = tl.maximum(tl.max(tl.abs(wide), 0), 1e-12) / 448.0
    tl.store(scales_ptr + row, scale)
    tl.store(out_ptr + places, (wide / scale).to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def norm_rows(
    hidden_ptr, added_ptr, total_ptr, post_weight_ptr, weight_ptr, out_ptr, scales_ptr, epsilon, SIZE: tl.constexpr,
    PAD: tl.constexpr, ADDS: tl.constexpr, POST: tl.constexpr, NORMS: tl.constexpr, ROUNDS: tl.constexpr,
):  # fmt: skip
    """Grid [rows]: RMS norm of each row (NORMS), or of its sum with an added row (ADDS), which goes to `total`. The
    added row may be normed first (POST). If ROUNDS, the norm is stored as by `round_rows`."""
    index, columns = tl.program_id(0), tl.arange(0, PAD)
    places, inside = index.to(tl.int64) * SIZE + columns, columns < SIZE
    row = tl.load(hidden_ptr + places, mask=inside, other=0.0)
    if ADDS:
        added = tl.load(added_ptr + places, mask=inside, other=0.0)
        if POST:
            added = _normed(added, post_weight_ptr, columns, inside, epsilon, SIZE)
        row = (row.to(tl.float32) + added.to(tl.float32)).to(row.dtype)
        tl.store(total_ptr + places, row, mask=inside)
    if NORMS:
        normed = _normed(row, weight_ptr, columns, inside, epsilon, SIZE)
        if ROUNDS:
            _store_rounded(index, normed, out_ptr, scales_ptr, places, inside)
        else:
            tl.store(out_ptr + places, normed, mask=inside)


@triton.jit
def gate_rows(gate_up_ptr, out_ptr, SIZE: tl.constexpr, BLOCK: tl.constexpr, GELU: tl.constexpr):
    """Grid [rows, blocks of a row]: SiLU, or tanh GELU, of the first half of each row, times the second."""
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row, inside = tl.program_id(0).to(tl.int64), columns < SIZE
    gate = tl.load(gate_up_ptr + row * 2 * SIZE + columns, mask=inside, other=0.0)
    up = tl.load(gate_up_ptr + row * 2 * SIZE + SIZE + columns, mask=inside, other=0.0)
    wide = gate.to(tl.float32)
    # x / 2 * (1 + tanh(y)) is x * sigmoid(2 y): GELU differs from SiLU only in the sigmoid's argument.
    bent = 1.5957691216057308 * (wide + 0.044715 * wide * wide * wide) if GELU else wide
    active = (wide / (1 + tl.exp(-bent))).to(gate.dtype)
    tl.store(out_ptr + row * SIZE + columns, (active.to(tl.float32) * up.to(tl.float32)).to(gate.dtype), mask=inside)


@triton.jit
def rotate_and_store(
    heads_ptr, turns_ptr, slots_ptr, keys_ptr, values_ptr, query_norm_ptr, key_norm_ptr, epsilon, token_stride,
    key_stride, value_stride, QUERIES: tl.constexpr, KEYS: tl.constexpr, DIM: tl.constexpr, PAD: tl.constexpr,
    NORMS: tl.constexpr,
):  # fmt: skip
    """Grid [tokens, heads]: rotate the adjacent pairs of query heads in place; write rotated key heads, and value
    heads as they are, to the KV cache. If NORMS, queries and keys are normed first."""
    token, head = tl.program_id(0), tl.program_id(1)
    pairs = tl.arange(0, PAD)
    inside = pairs < DIM // 2
    source = heads_ptr + token * token_stride + head * DIM + 2 * pairs
    first, second = tl.load(source, mask=inside, other=0.0), tl.load(source + 1, mask=inside, other=0.0)
    slot = tl.load(slots_ptr + token).to(tl.int64)
    target = source
    if head < QUERIES + KEYS:
        if NORMS:
            norm_ptr = query_norm_ptr if head < QUERIES else key_norm_ptr
            x, y = first.to(tl.float32), second.to(tl.float32)
            scale = 1 / tl.sqrt(tl.sum(x * x + y * y, 0) / DIM + epsilon)
            left, right = tl.load(norm_ptr + 2 * pairs, mask=inside), tl.load(norm_ptr + 2 * pairs + 1, mask=inside)
            first = (x * scale * left.to(tl.float32)).to(first.dtype)
            second = (y * scale * right.to(tl.float32)).to(second.dtype)
        turn = turns_ptr + token * DIM + 2 * pairs
        cos, sin = tl.load(turn, mask=inside, other=0.0), tl.load(turn + 1, mask=inside, other=0.0)
        x, y = first.to(tl.float32), second.to(tl.float32)
        first, second = (x * cos - y * sin).to(first.dtype), (x * sin + y * cos).to(second.dtype)
        if head >= QUERIES:
            target = keys_ptr + slot * key_stride + (head - QUERIES) * DIM + 2 * pairs
    else:
        target = values_ptr + slot * value_stride + (head - QUERIES - KEYS) * DIM + 2 * pairs
    tl.store(target, first, mask=inside)
    tl.store(target + 1, second, mask=inside)


@triton.jit
def round_rows(rows_ptr, out_ptr, scales_ptr, SIZE: tl.constexpr, PAD: tl.constexpr):
    """Grid [rows]: each row as e4m3 numbers and its scale."""
    row, columns = tl.program_id(0), tl.arange(0, PAD)
    places, inside = row.to(tl.int64) * SIZE + columns, columns < SIZE
    _store_rounded(row, tl.load(rows_ptr + places, mask=inside, other=0.0), out_ptr, scales_ptr, places, inside)


@triton.jit
def copy_entries(
    store_ptr, aside_ptr, slots_ptr, count, tensor_stride, SIZE: tl.constexpr, BLOCK: tl.constexpr, BACK: tl.constexpr
):  # fmt: skip
    """Grid [count, tensors, blocks of an entry]: copy some slots of each tensor of the store to a temporary buffer
    [tensors, count, SIZE], or BACK from there."""
    index, tensor = tl.program_id(0), tl.program_id(1).to(tl.int64)
    columns = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < SIZE
    stored = store_ptr + tensor * tensor_stride + tl.load(slots_ptr + index) * SIZE + columns
    aside = aside_ptr + (tensor * count + index) * SIZE + columns
    if BACK:
        tl.store(stored, tl.load(aside, mask=inside), mask=inside)
    else:
        tl.store(aside, tl.load(stored, mask=inside), mask=inside)
