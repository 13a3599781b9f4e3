"""The cost model, corrected online from step records."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import deque
from collections.abc import Container
from functools import lru_cache
from statistics import median

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import isotonic_regression, least_squares

from planner.fast.cost import context_token_s, curve_seconds, curve_weights, is_catching_up
from planner.service.rls import RecursiveLeastSquares
from treeline.plan import CostCurve, CostModel, PaperFit, VerifierProfile
from treeline.step_record import StepRecord

OVERHEAD_STEPS = 15
"""Steps of each kind whose median is the overhead: up to seven pauses among them do not move it."""
PLAIN, LOOKED_UP, DRAFTED = range(3)
"""Kinds of steps: without trees, with trees of prompt lookup alone, and drafted for. Walking and committing trees takes
time beside the pass: on one Xeon core, lookups for 7 streams took 1.5 ms more than a step of 18 ms without."""
LOOKUP_S = 5e-4
"""Prior of the overhead that prompt lookup adds: the least that was measured."""
ERROR_STEPS = 200
"""Steps whose prediction errors are reported: the 95th percentile then rests on ten of them."""
NOISE, MEMORY = 0.05, 0.9995
"""Verification: relative scatter of equal steps, and the share of the corrections kept per step. With them a change of
the whole device's speed is learnt soon: two busy loops made real steps on two cores take 2.1 times as long, and on
another CPU 4.1 times. The median error of predictions was within 15 % again after 12 and after 18 steps."""
SCALE_DEVIATION, POINT_DEVIATION, CONTEXT_DEVIATION, PROMPT_DEVIATION = 0.5, 0.15, 0.5, 0.25
"""Prior standard deviations, in logarithms of ratios, of the device's speed, one point of the profile, the share of the
context and the cost of a prompt token. A busy neighbour halves the speed (0.7) and hardly changes the curve's shape; a
prompt token costs 0.6 to 1.0 of a decoded one (docs/decisions.md)."""
MAX_LOG_SCALE = 3.0
"""A correction beyond e^3 = 20 times means a broken clock or profile."""
SCALE, CONTEXT, PROMPTS, POINTS = range(4)
"""Indices of the tracked parameters; the points come last."""
DRAFT_COSTS_S = (1e-3, 3e-4, 3e-3, 2e-4)
"""Prior means of r, s, d0 and d1: guesses for a drafter on the same machine. It measures d0 and d1 itself if it can."""
DRAFT_COMMON_DEVIATION, DRAFT_OWN_DEVIATIONS = 0.5, (1.0, 0.7, 0.3, 0.5)
"""Prior standard deviations, in logarithms: shared by all four, and of each alone, least where the drafter measures."""
DRAFT_NOISE, DRAFT_MEMORY = 0.15, 0.999
"""NOISE and MEMORY of drafting: a second process must wake up, so the scatter is three times that of passes."""


class CostTracker:
    """Learns one verifier's costs, starting from its profile.

    The parameters are logarithms of corrections: one for each point of the profile's short-context curves, one for the
    whole device, one for what context adds and one for the cost of a prompt token. A step updates the points that it
    lies between and the device's scale, so that sizes which have not run yet follow the device's speed.
    """

    def __init__(self, profile: VerifierProfile) -> None:
        self._profile = profile
        self._measured = CostModel(profile.verify)
        self._short = min(curve.context_tokens for curve in profile.verify)
        self._offsets = _offsets(profile.verify, self._short)
        self._far = _far(profile.verify, self._offsets)
        drift = _drift([profile.verify[index] for index in self._offsets])
        self._verify = RecursiveLeastSquares(np.zeros(len(drift)), drift, NOISE, MEMORY)
        self._draft = DraftCosts(profile.draft_layer_s, profile.draft_node_s)
        self._paper = fit_paper(profile.verify[0], profile.draft_node_s)
        self._overheads = [deque[float](maxlen=OVERHEAD_STEPS) for _ in (PLAIN, LOOKED_UP, DRAFTED)]
        self._errors: deque[float] = deque(maxlen=ERROR_STEPS)
        self._model: CostModel | None = None

    def observe(self, record: StepRecord) -> None:
        """Learn from one step in which requests decoded, drafted or not."""
        self._draft.observe(record)
        self._model = None
        if not record.sequences or record.verify_s <= 0:
            return
        self._observe_verification(record)
        if record.prefill_tokens:
            return
        if record.predicted_verify_s and record.plan_version:
            self._errors.append(abs(record.predicted_verify_s / record.verify_s - 1))
        kind = DRAFTED if record.drafter_s else LOOKED_UP if record.verified_nodes else PLAIN
        self._overheads[kind].append(max(0.0, record.step_s - record.draft_s - record.verify_s))

    def model(self) -> CostModel:
        """The cost model as it is now."""
        if self._model is None:
            self._model = self._corrected()
        return self._model

    def error(self) -> tuple[float, float]:
        """(median, 95th percentile) of recent |predicted - measured| / measured verification seconds.

        The prediction is the verifier's, by the plan it had before the step ran.
        """
        if not self._errors:
            return 0.0, 0.0
        p50, p95 = np.quantile(self._errors, [0.5, 0.95])
        return float(p50), float(p95)

    def rescale(self, ratio: float) -> None:
        """Correct all verification costs at once: `ratio` is measured / predicted."""
        self._verify.theta[SCALE] += math.log(ratio)
        self._model = None

    def _observe_verification(self, record: StepRecord) -> None:
        decoded, prompt = record.tokens - record.prefill_tokens, record.prefill_tokens
        contexts = max(record.sequences, record.running) if prompt else record.sequences
        context_tokens = record.context_tokens // contexts
        predicted_s, x = self._predict(record.sequences, context_tokens, decoded + self._prompt_ratio * prompt)
        if prompt:
            x[PROMPTS] = 1 - self._predict(record.sequences, context_tokens, decoded)[0] / predicted_s
        self._verify.update(x, math.log(record.verify_s / predicted_s))

    @property
    def _prompt_ratio(self) -> float:
        return math.exp(np.clip(self._verify.theta[PROMPTS], -MAX_LOG_SCALE, MAX_LOG_SCALE))

    def _predict(self, sequences: int, context_tokens: int, tokens: float) -> tuple[float, NDArray[np.float64]]:
        """Corrected verification seconds, and the gradient of their logarithm by the parameters."""
        theta, curves = self._verify.theta, self._profile.verify
        x = np.zeros(len(theta))
        beyond_tokens = max(0, context_tokens - self._short)
        added_s = beyond_tokens * context_token_s(self._measured, sequences, round(tokens))
        x[CONTEXT] = math.exp(theta[CONTEXT]) * added_s
        for index, share in curve_weights(curves, sequences):
            curve, first = curves[index], self._offsets[index]
            place = _place(curve.tokens, tokens)
            # Beyond the last point the curve keeps its slope, scaled by that point's correction.
            beyond = 1.0
            if tokens > curve.tokens[-1]:
                beyond = float(curve_seconds(curve, np.asarray([tokens]))[0]) / curve.seconds[-1]
            for point, weight in ((int(place), 1 - place % 1), (int(place) + 1, place % 1)):
                if weight:
                    x[first + point] += share * weight * beyond * curve.seconds[point] * math.exp(theta[first + point])
        total = float(x.sum())
        x /= total
        x[SCALE] = 1.0
        return total * math.exp(theta[SCALE]), x

    def _corrected(self) -> CostModel:
        theta = np.clip(self._verify.theta, -MAX_LOG_SCALE, MAX_LOG_SCALE)
        corrections, certainty = np.exp(theta), 1 / self._verify.variances
        short: dict[int, CostCurve] = {}
        for index, first in self._offsets.items():
            curve = self._profile.verify[index]
            place = slice(first, first + len(curve.tokens))
            seconds = isotonic_regression(curve.points[1] * corrections[place], weights=certainty[place]).x
            short[index] = CostCurve(curve.sequences, curve.context_tokens, curve.tokens, tuple(seconds.tolist()))
        round_trip_s, sequence_s, layer_s, node_s = self._draft.seconds.tolist()
        plain, looked_up, drafted = self._overheads
        overhead_s = median(plain or looked_up or drafted or [0.0])
        return CostModel(
            verify=tuple(
                short[index] if index in short else self._moved(index, short, float(corrections[CONTEXT]))
                for index in range(len(self._profile.verify))
            ),
            verify_scale=float(corrections[SCALE]),
            draft_round_trip_s=round_trip_s + max(0.0, median(drafted or [overhead_s]) - overhead_s),
            draft_sequence_s=sequence_s,
            draft_layer_s=layer_s,
            draft_node_s=node_s,
            step_overhead_s=overhead_s,
            lookup_s=max(0.0, median(looked_up) - overhead_s) if looked_up else LOOKUP_S,
            prompt_ratio=self._prompt_ratio,
            paper=self._paper,
        )

    def _moved(self, index: int, short: dict[int, CostCurve], scale: float) -> CostCurve:
        """A curve of longer context, shifted with the short one of its batch size."""
        far = self._profile.verify[index]
        if index not in self._far:
            return far
        base, context_s = self._far[index]
        now = np.interp(far.points[0], *short[base].points)
        seconds = np.maximum.accumulate(now + scale * context_s)
        return CostCurve(far.sequences, far.context_tokens, far.tokens, tuple(seconds.tolist()))


class DraftCosts:
    """Tracks r, s, d0 and d1 in draft seconds = r + s * requests + d0 * layers + d1 * nodes.

    Their logarithms are fitted to relative errors. So a draft that took ten times as long moves nothing far, a device
    that slows down raises all four at once, and none can become negative.
    """

    def __init__(self, layer_s: float, node_s: float) -> None:
        """`layer_s`, `node_s`: the drafter's measurement; 0 if it has none."""
        costs_s = (*DRAFT_COSTS_S[:2], layer_s or DRAFT_COSTS_S[2], node_s or DRAFT_COSTS_S[3])
        spread = DRAFT_COMMON_DEVIATION**2 + np.diag(np.square(DRAFT_OWN_DEVIATIONS))
        self._logs = RecursiveLeastSquares(np.log(costs_s), spread, DRAFT_NOISE, DRAFT_MEMORY)

    @property
    def seconds(self) -> NDArray[np.float64]:
        """float64 [4]: r, s, d0 and d1."""
        return np.exp(self._logs.theta)

    def observe(self, record: StepRecord) -> None:
        """Learn from a step in which the drafter worked, unless it had much to catch up with."""
        if not record.drafter_s or is_catching_up(record.catch_up_tokens, record.drafted_requests):
            return
        layers = record.draft_layer_nodes
        parts_s = self.seconds * [1.0, record.drafted_requests, len(layers), sum(layers)]
        predicted_s = float(parts_s.sum())
        self._logs.update(parts_s / predicted_s, float(np.log(record.draft_s / predicted_s)))


def _place(measured: tuple[int, ...], tokens: float) -> float:
    """Fractional index of `tokens` among the points, clipped to both ends."""
    after = bisect_right(measured, tokens)
    if after in (0, len(measured)):
        return float(max(0, after - 1))
    low, high = measured[after - 1 : after + 1]
    return after - 1 + (tokens - low) / (high - low)


def _offsets(curves: tuple[CostCurve, ...], short: int) -> dict[int, int]:
    """First parameter of each short curve's points, by the curve's index."""
    offsets, first = {}, POINTS
    for index, curve in enumerate(curves):
        if curve.context_tokens == short:
            offsets[index] = first
            first += len(curve.tokens)
    return offsets


def _far(curves: tuple[CostCurve, ...], short: Container[int]) -> dict[int, tuple[int, NDArray[np.float64]]]:
    """For each curve of longer context: the short one of its batch size, if any, and the seconds its context adds."""
    found = {}
    for index, far in enumerate(curves):
        base = next((i for i, c in enumerate(curves) if i in short and c.sequences == far.sequences), None)
        if index not in short and base is not None:
            tokens, seconds = far.points
            found[index] = base, np.maximum(0.0, seconds - np.interp(tokens, *curves[base].points))
    return found


def _drift(curves: list[CostCurve]) -> NDArray[np.float64]:
    """float64 [3 + points, 3 + points]: prior covariance of the scale, context and prompts, and all points of `curves`.

    Similar points drift together: the correlation falls by 1/e per two doublings of tokens or batch, a guess.
    """
    places = np.log2([(n, curve.sequences) for curve in curves for n in curve.tokens])
    apart = np.abs(places[:, None] - places[None]).sum(-1)
    scales = [SCALE_DEVIATION, CONTEXT_DEVIATION, PROMPT_DEVIATION]
    covariance = np.diag(np.square(scales + [0.0] * len(places)))
    covariance[POINTS:, POINTS:] = POINT_DEVIATION**2 * np.exp(-apart / 2)
    return covariance


@lru_cache
def fit_paper(curve: CostCurve, draft_node_s: float) -> PaperFit:
    """The paper's least-squares fit of one curve: verify = gamma * (exp(delta * n^rho) - 1), zero at n = 0."""
    tokens, seconds = np.asarray(curve.tokens, np.float64), np.asarray(curve.seconds, np.float64)

    def residuals(logs: NDArray[np.float64]) -> NDArray[np.float64]:
        gamma, delta, rho = np.exp(np.clip(logs, -20, 5))
        return np.log(gamma * np.expm1(np.minimum(delta * tokens**rho, 50.0)) + 1e-12) - np.log(seconds)

    start = np.log([max(seconds[0], 1e-6), 0.5, 0.5])
    gamma, delta, rho = np.exp(np.clip(least_squares(residuals, start, max_nfev=200).x, -20, 5))
    return PaperFit(lambda_s=draft_node_s, gamma_s=float(gamma), delta=float(delta), rho=float(rho))
