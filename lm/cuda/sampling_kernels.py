"""Sampling from rows of logits without sorting them, in Triton.

A cut is found by bisection over the bits of the scores, read as integers in the same order, so that it is exactly one
of the row's scores. Probabilities are summed as integers, so that the order does not matter.
"""

from __future__ import annotations

import triton
import triton.language as tl

FIELDS = tl.constexpr(4)
"""Of each row, float64: temperature, top p, logarithm of min p, and whether it is sampled."""
LEAST = tl.constexpr(-0x7F800001)
"""-inf as `_ordered`."""
SHARE = tl.constexpr(float(1 << 40))
"""The most likely token's weight as an integer; the sum over 2^20 tokens stays below 2^63."""
GAMMA = tl.constexpr(0x9E3779B97F4A7C15)
FIRST_FACTOR = tl.constexpr(0xBF58476D1CE4E5B9)
SECOND_FACTOR = tl.constexpr(0x94D049BB133111EB)


@triton.jit
def _ordered(numbers):
    """int32 in the order of these float32 numbers: -1.5 comes before -1.0, and -1.0 before 2.0."""
    bits = tl.where(numbers == 0.0, 0.0, numbers).to(tl.int32, bitcast=True)  # -0.0 equals 0.0.
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _scores(logits_ptr, columns, vocab_size, temperature):
    """Logits over the temperature; -inf beyond the vocabulary."""
    logits = tl.load(logits_ptr + columns, mask=columns < vocab_size, other=float("-inf"))
    return tl.div_rn(logits.to(tl.float32), temperature.to(tl.float32))


@triton.jit
def _share(scores, peak):
    """int64: probabilities, up to a factor of the row."""
    return (tl.exp(scores - peak) * SHARE).to(tl.int64)


@triton.jit
def _cut(logits_ptr, vocab_size, temperature, least, peak, wanted, SHARES: tl.constexpr, BLOCK: tl.constexpr):
    """The row's largest score, as `_ordered`, such that scores from it upwards reach `wanted`: a number of tokens, or a
    sum of weights exp(score - peak). Only scores from `least` upwards count."""
    lanes = tl.arange(0, BLOCK)
    low, high = least.to(tl.int64), _ordered(peak).to(tl.int64) + 1  # Enough from low upwards, too little from high.
    while low + 1 < high:
        middle = (low + high) >> 1
        found = tl.zeros([BLOCK], tl.int64)
        above, below = tl.full([BLOCK], 0x7FFFFFFF, tl.int32), tl.full([BLOCK], -0x80000000, tl.int32)
        for start in range(0, vocab_size, BLOCK):
            scores = _scores(logits_ptr, start + lanes, vocab_size, temperature)
            keys = _ordered(scores)
            reaches = keys >= middle.to(tl.int32)
            if SHARES:
                found += tl.where(reaches, _share(scores, peak), 0)
            else:
                found += reaches.to(tl.int64)
            above = tl.minimum(above, tl.where(reaches, keys, 0x7FFFFFFF))
            below = tl.maximum(below, tl.where(reaches, -0x80000000, keys))
        enough = tl.sum(found, 0) >= wanted
        # The row's next score above or below is as good as the middle, and closer.
        low = tl.where(enough, tl.min(above, 0).to(tl.int64), low)
        high = tl.where(enough, high, tl.max(below, 0).to(tl.int64) + 1)
    return low.to(tl.int32)


@triton.jit(do_not_specialize=["vocab_size"])
def find_cuts(logits_ptr, fields_ptr, top_ks_ptr, cuts_ptr, row_stride, vocab_size, BLOCK: tl.constexpr):
    """Grid [rows]: the least score that top k, top p and min p, in this order, leave in each row, as `_ordered`."""
    row, lanes = tl.program_id(0), tl.arange(0, BLOCK)
    logits_ptr, about = logits_ptr + row.to(tl.int64) * row_stride, fields_ptr + row * FIELDS
    temperature, top_p, log_min_p = tl.load(about), tl.load(about + 1), tl.load(about + 2)
    top_k = tl.load(top_ks_ptr + row)
    peaks = tl.full([BLOCK], float("-inf"), tl.float32)
    for start in range(0, vocab_size, BLOCK):
        peaks = tl.maximum(peaks, _scores(logits_ptr, start + lanes, vocab_size, temperature))
    peak = tl.max(peaks, 0)
    cut = _ordered(peak) * 0 + LEAST
    if top_k > 0:
        cut = _cut(logits_ptr, vocab_size, temperature, cut, peak, top_k.to(tl.int64), False, BLOCK)
    if top_p < 1.0:
        shares = tl.zeros([BLOCK], tl.int64)
        for start in range(0, vocab_size, BLOCK):
            scores = _scores(logits_ptr, start + lanes, vocab_size, temperature)
            shares += tl.where(_ordered(scores) >= cut, _share(scores, peak), 0)
        wanted = (tl.sum(shares, 0).to(tl.float64) * top_p).to(tl.int64)
        cut = _cut(logits_ptr, vocab_size, temperature, cut, peak, wanted, True, BLOCK)
    tl.store(cuts_ptr + row, tl.maximum(cut, _ordered(peak + log_min_p.to(tl.float32))))


@triton.jit(do_not_specialize=["vocab_size"])
def perturb_rows(
    logits_ptr, fields_ptr, seeds_ptr, cuts_ptr, out_ptr, row_stride, vocab_size, CUTS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid [rows, blocks of the vocabulary]: scores and the noise of `lm.noise` [rows, vocab]; -inf below the cut.

    A greedy row's logits come through as they are.
    """
    row, columns = tl.program_id(0), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    about = fields_ptr + row * FIELDS
    scores = _scores(logits_ptr + row.to(tl.int64) * row_stride, columns, vocab_size, tl.load(about))
    if tl.load(about + 3) > 0:
        if CUTS:
            scores = tl.where(_ordered(scores) >= tl.load(cuts_ptr + row), scores, float("-inf"))
        state = (columns + 1).to(tl.uint64) * GAMMA + tl.load(seeds_ptr + row).to(tl.uint64)
        state = (state ^ (state >> 30)) * FIRST_FACTOR
        state = (state ^ (state >> 27)) * SECOND_FACTOR
        bits = (state ^ (state >> 31)) >> 32
        # 1 - v has 33 bits: exact, as lm.noise's logarithm of 1 - v is.
        rest = 1.0 - (bits.to(tl.float64) + 0.5) * 2.3283064365386963e-10
        scores += (-tl.log(-tl.log(rest))).to(tl.float32)
    tl.store(out_ptr + row.to(tl.int64) * vocab_size + columns, scores, mask=columns < vocab_size)
