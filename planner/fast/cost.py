"""Seconds of passes, interpolated from the profile's curves for any batch."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from treeline.plan import CostCurve, CostModel, CurveReading, PaperFit

MAX_PAPER_EXPONENT = 50.0
"""Keeps exp() finite. The paper's rule refuses a tree long before it costs e^50 times its first node."""
NODES_AHEAD = 64
"""Tokens that `cheapest_slopes_s` looks ahead: one tile of a GPU's matrix product, the widest step of a curve."""
STEPS_AHEAD = np.arange(1, NODES_AHEAD + 1)
ORDINARY_CATCH_UP_TOKENS = 4
"""Committed tokens per request that a drafter runs in an ordinary step: the end of the accepted path and its
prompt-lookup nodes. Accepted lengths are 1.3 to 2.5 (bench/REPORT.md): more than 4 means a prompt, or a gap."""


def verify_seconds(cost: CostModel, sequences: int, context_tokens: int, max_tokens: int) -> NDArray[np.float64]:
    """float64 [max_tokens + 1]: seconds of a verification pass over 0..max_tokens tokens, non-decreasing.

    The curve passes through the measured points, steps included. It is linear between them and continues at the mean
    slope beyond the last one. Between regions it is linear in sequences. Longer context adds, per sequence, what it
    added in the profile for that sequence's share of the tokens.
    """
    short, seconds, per_context_token = _reading(cost, sequences, max_tokens)
    beyond = max(0, context_tokens - short)
    return per_context_token[: max_tokens + 1] * beyond + seconds[: max_tokens + 1]


def pass_s(cost: CostModel, sequences: int, context_tokens: int, tokens: int) -> float:
    """`verify_seconds` at one token count."""
    short, seconds, per_context_token = _reading(cost, sequences, tokens)
    return float(seconds[tokens]) + max(0, context_tokens - short) * float(per_context_token[tokens])


def is_catching_up(catch_up_tokens: int, requests: int) -> bool:
    """Whether a draft ran so many committed tokens that its seconds do not predict the next draft's."""
    return catch_up_tokens > ORDINARY_CATCH_UP_TOKENS * requests


def as_decoded(cost: CostModel, prompt_tokens: int) -> int:
    """How many decoded tokens cost as much as these prompt tokens."""
    return round(cost.prompt_ratio * prompt_tokens)


def context_token_s(cost: CostModel, sequences: int, tokens: int) -> float:
    """Seconds that each context token per sequence beyond the profile's shortest context adds to a pass."""
    return float(_reading(cost, sequences, tokens)[2][tokens])


def plain_decode_s(cost: CostModel) -> float:
    """Seconds of one token of one sequence, undrafted: the paper's c_T."""
    return pass_s(cost, 1, 0, 1)


def cheapest_slopes_s(
    cost: CostModel, sequences: int, context_tokens: int, tokens: NDArray[np.intp]
) -> NDArray[np.float64]:
    """float64 [n]: least seconds per added node, starting from passes of these token counts: the smallest secants."""
    short, seconds, per_context_token = _reading(cost, sequences, int(tokens.max()))
    ahead = tokens[:, None] + STEPS_AHEAD
    seconds = seconds + max(0, context_tokens - short) * per_context_token
    return ((seconds[ahead] - seconds[tokens, None]) / STEPS_AHEAD).min(1)


def paper_layer_s(fit: PaperFit, nodes: NDArray[np.intp]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(C_spec, dC_spec) of the paper (arXiv 2604.09731) for trees of `nodes`: the total, and its slope."""
    exponents = np.minimum(fit.delta * nodes**fit.rho, MAX_PAPER_EXPONENT)
    spent_s = fit.lambda_s * nodes + fit.gamma_s * np.expm1(exponents)
    slope_s = fit.gamma_s * fit.delta * fit.rho * nodes ** (fit.rho - 1) * np.exp(exponents)
    return spent_s, fit.lambda_s + slope_s


def curve_weights(curves: tuple[CostCurve, ...], sequences: int) -> list[tuple[int, float]]:
    """(index, share) of the one or two short-context curves between which a batch of `sequences` lies."""
    short = _shortest_context(curves)
    places = sorted((c.sequences, index) for index, c in enumerate(curves) if c.context_tokens == short)
    above = next((place for place, (count, _) in enumerate(places) if count >= sequences), len(places) - 1)
    low, high = places[max(0, above - 1)], places[above]
    if low is high or sequences >= high[0]:
        return [(high[1], 1.0)]
    if sequences <= low[0]:
        return [(low[1], 1.0)]
    share = (sequences - low[0]) / (high[0] - low[0])
    return [(low[1], 1 - share), (high[1], share)]


def _context_seconds(curves: tuple[CostCurve, ...], sequences: int, tokens: NDArray[np.int64]) -> NDArray[np.float64]:
    """float64 [n]: `context_token_s` of these token counts, from two curves that differ in context alone."""
    short = _shortest_context(curves)
    for base in curves:
        longer = [c for c in curves if c.sequences == base.sequences and c.context_tokens > short]
        if base.context_tokens == short and longer:
            far = max(longer, key=lambda curve: curve.context_tokens)
            batches = sequences / base.sequences
            far_tokens, far_s = far.points
            added = np.maximum(0.0, far_s - np.interp(far_tokens, *base.points))
            share = np.interp(tokens / batches, far_tokens, added)
            return np.maximum.accumulate(share) * batches / (far.context_tokens - short)
    return np.zeros(len(tokens))


def curve_seconds(curve: CostCurve, tokens: NDArray[np.int64]) -> NDArray[np.float64]:
    """float64 [n]: the curve at these token counts."""
    seconds = np.interp(tokens, *curve.points)
    return seconds + np.maximum(0, tokens - curve.tokens[-1]) * _mean_slope(curve)


def _reading(cost: CostModel, sequences: int, max_tokens: int) -> CurveReading:
    """The curves at 0 to at least `max_tokens` tokens, interpolated once per plan."""
    # Rounded up to a power of two, so that steps of other sizes, and those that look ahead, find it in the cache.
    size = 1 << max(8, (max_tokens + NODES_AHEAD).bit_length())
    reading = cost.readings.get((sequences, size))
    if reading is None:
        reading = cost.readings[sequences, size] = _read(cost, sequences, np.arange(size))
    return reading


def _read(cost: CostModel, sequences: int, tokens: NDArray[np.intp]) -> CurveReading:
    parts = [share * _curve(cost, index, tokens) for index, share in curve_weights(cost.verify, sequences)]
    seconds = parts[0] if len(parts) == 1 else parts[0] + parts[1]
    per_context_token = _context_seconds(cost.verify, sequences, tokens)
    short = _shortest_context(cost.verify)
    return short, cost.verify_scale * np.maximum.accumulate(seconds), cost.verify_scale * per_context_token


def _curve(cost: CostModel, index: int, tokens: NDArray[np.intp]) -> NDArray[np.float64]:
    """One curve at 0, 1, 2, ... tokens."""
    seconds = cost.curve_readings.get((index, len(tokens)))
    if seconds is None:
        seconds = cost.curve_readings[index, len(tokens)] = curve_seconds(cost.verify[index], tokens)
    return seconds


def _mean_slope(curve: CostCurve) -> float:
    if len(curve.tokens) < 2:
        return curve.seconds[-1] / curve.tokens[-1]
    return (curve.seconds[-1] - curve.seconds[0]) / (curve.tokens[-1] - curve.tokens[0])


def _shortest_context(curves: tuple[CostCurve, ...]) -> int:
    return min(curve.context_tokens for curve in curves)
