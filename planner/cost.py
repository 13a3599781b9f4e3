"""What passes cost: curves of the profile read off for any batch."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from treeline.plan import CostCurve, CostModel, PaperFit

TYPICAL_TOKENS = 64
MAX_PAPER_EXPONENT = 50.0


def verify_seconds(cost: CostModel, sequences: int, context_tokens: int, max_tokens: int) -> NDArray[np.float64]:
    """float64 [max_tokens + 1]: seconds of a verification pass over 0..max_tokens tokens, non-decreasing.

    Measured points are kept as they are (steps included); between them the curve is linear, beyond the last one it
    goes on at the mean slope. Between regions it is linear in sequences; longer context adds, per sequence, what it
    added in the profile for that sequence's share of the tokens.
    """
    return cost.verify_scale * _verify_seconds(cost.verify, sequences, context_tokens, max_tokens)


def plain_decode_s(cost: CostModel) -> float:
    """Seconds of one token of one sequence, undrafted: the paper's c_T."""
    return float(verify_seconds(cost, 1, _shortest(cost.verify)[0].context_tokens, 1)[1])


def cheapest_node_s(cost: CostModel) -> float:
    """The least that one more verified node can cost: the smallest secant slope of any curve.

    A drafter that drops only what is not worth even this never drops what the verifier would keep.
    """
    return cost.verify_scale * min(_smallest_slope(curve) for curve in cost.verify)


def paper_layer_s(fit: PaperFit, nodes: int) -> tuple[float, float]:
    """(C_spec, dC_spec) of the paper for a tree of `nodes` (arXiv 2604.09731): total, and of one node more."""
    exponent = min(fit.delta * nodes**fit.rho, MAX_PAPER_EXPONENT)
    spent_s = fit.lambda_s * nodes + fit.gamma_s * math.expm1(exponent)
    slope_s = fit.gamma_s * fit.delta * fit.rho * nodes ** (fit.rho - 1) * math.exp(exponent)
    return spent_s, fit.lambda_s + slope_s


@lru_cache(maxsize=512)
def _verify_seconds(
    curves: tuple[CostCurve, ...], sequences: int, context_tokens: int, max_tokens: int
) -> NDArray[np.float64]:
    tokens = np.arange(max_tokens + 1)
    short = sorted(_shortest(curves), key=lambda curve: curve.sequences)
    counts = [curve.sequences for curve in short]
    place = int(np.searchsorted(counts, sequences))
    low, high = short[max(0, place - 1)], short[min(place, len(short) - 1)]
    share = 0.0 if low is high else (sequences - low.sequences) / (high.sequences - low.sequences)
    seconds = (1 - share) * _read(low, tokens) + share * _read(high, tokens)
    seconds = seconds + _context_seconds(curves, sequences, context_tokens, tokens)
    return np.maximum.accumulate(seconds)


def _context_seconds(
    curves: tuple[CostCurve, ...], sequences: int, context_tokens: int, tokens: NDArray[np.int64]
) -> NDArray[np.float64]:
    """What context beyond the profile's shortest adds, from two curves of one batch size that differ in context."""
    for base in _shortest(curves):
        longer = [c for c in curves if c.sequences == base.sequences and c.context_tokens > base.context_tokens]
        if longer:
            far = max(longer, key=lambda curve: curve.context_tokens)
            batches = sequences / base.sequences
            share = tokens / batches
            added = np.maximum(0.0, _read(far, share) - _read(base, share)) * batches
            return added * max(0, context_tokens - base.context_tokens) / (far.context_tokens - base.context_tokens)
    return np.zeros(len(tokens))


def _read(curve: CostCurve, tokens: NDArray) -> NDArray[np.float64]:
    seconds = np.interp(tokens, curve.tokens, curve.seconds)
    return seconds + np.maximum(0, tokens - curve.tokens[-1]) * _mean_slope(curve)


def _mean_slope(curve: CostCurve) -> float:
    if len(curve.tokens) < 2:
        return curve.seconds[-1] / curve.tokens[-1]
    return (curve.seconds[-1] - curve.seconds[0]) / (curve.tokens[-1] - curve.tokens[0])


def _smallest_slope(curve: CostCurve) -> float:
    """Smallest seconds per added token over all secants that start at the first point: the cheapest way to grow."""
    rise, run = np.subtract(curve.seconds[1:], curve.seconds[0]), np.subtract(curve.tokens[1:], curve.tokens[0])
    return float((rise / run).min()) if len(run) else 0.0


def _shortest(curves: tuple[CostCurve, ...]) -> list[CostCurve]:
    context_tokens = min(curve.context_tokens for curve in curves)
    return [curve for curve in curves if curve.context_tokens == context_tokens]
