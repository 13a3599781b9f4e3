"""The cost model, corrected online from step records."""

from __future__ import annotations

from collections import deque
from dataclasses import replace

import numpy as np
from scipy.optimize import least_squares

from planner.cost import verify_seconds
from treeline.plan import CostCurve, CostModel, PaperFit, StepRecord, VerifierProfile

WINDOW_STEPS = 15
"""The correction follows the median of this many steps: an outlier or a pause moves nothing, a lasting change does."""
LEARNING_RATE = 0.2
MAX_SCALE = 20.0
ERROR_STEPS = 200
FORGETTING = 0.98


class CostTracker:
    """Learns one verifier's costs, starting from its profile."""

    def __init__(self, profile: VerifierProfile) -> None:
        base = profile.verify[0]
        self._cost = CostModel(
            verify=profile.verify,
            draft_layer_s=profile.draft_layer_s,
            draft_node_s=profile.draft_node_s,
            paper=fit_paper(base, profile.draft_node_s),
        )
        self._ratios: deque[float] = deque(maxlen=WINDOW_STEPS)
        self._round_trips: deque[float] = deque(maxlen=WINDOW_STEPS)
        self._overheads: deque[float] = deque(maxlen=WINDOW_STEPS)
        self._errors: deque[float] = deque(maxlen=ERROR_STEPS)
        # Normal equations of drafter_s ~ layers * d0 + nodes * d1, with the profile as a weak prior.
        self._gram = np.diag([1.0, 16.0])
        self._moment = self._gram @ [profile.draft_layer_s, profile.draft_node_s]

    def observe(self, record: StepRecord) -> None:
        """Learn from one step. Steps that run prompts are ignored: they say nothing of verification."""
        if record.prefill_tokens or not record.sequences:
            return
        self._observe_verification(record)
        self._overheads.append(max(0.0, record.step_s - record.draft_s - record.verify_s))
        if record.draft_s:
            self._round_trips.append(max(0.0, record.draft_s - record.drafter_s))
        if record.draft_layer_nodes:
            self._observe_layers(record)

    def model(self) -> CostModel:
        """The cost model as it is now."""
        return replace(
            self._cost,
            draft_round_trip_s=float(np.median(self._round_trips)) if self._round_trips else 0.0,
            step_overhead_s=float(np.median(self._overheads)) if self._overheads else 0.0,
        )

    def error(self) -> tuple[float, float]:
        """(median, 95th percentile) of recent |predicted - measured| / measured verification seconds."""
        if not self._errors:
            return 0.0, 0.0
        p50, p95 = np.quantile(self._errors, [0.5, 0.95])
        return float(p50), float(p95)

    def rescale(self, ratio: float) -> None:
        """Correct all verification costs at once: `ratio` is measured / predicted."""
        scale = float(np.clip(self._cost.verify_scale * ratio, 1 / MAX_SCALE, MAX_SCALE))
        self._cost = replace(self._cost, verify_scale=scale)

    def _observe_verification(self, record: StepRecord) -> None:
        context_tokens = record.context_tokens // record.sequences
        curve = verify_seconds(self._cost, record.sequences, context_tokens, record.tokens)
        predicted_s = float(curve[record.tokens])
        self._errors.append(abs(predicted_s - record.verify_s) / record.verify_s)
        unscaled = record.verify_s / predicted_s * self._cost.verify_scale
        self._ratios.append(unscaled)
        wanted = float(np.median(self._ratios))
        self.rescale((wanted / self._cost.verify_scale) ** LEARNING_RATE)

    def _observe_layers(self, record: StepRecord) -> None:
        x = np.asarray([len(record.draft_layer_nodes), sum(record.draft_layer_nodes)], np.float64)
        self._gram = FORGETTING * self._gram + np.outer(x, x)
        self._moment = FORGETTING * self._moment + x * record.drafter_s
        layer_s, node_s = np.maximum(np.linalg.lstsq(self._gram, self._moment, rcond=None)[0], 0.0)
        self._cost = replace(self._cost, draft_layer_s=float(layer_s), draft_node_s=float(node_s))


def fit_paper(curve: CostCurve, draft_node_s: float) -> PaperFit:
    """The paper's own fit of one curve: verify = gamma * (exp(delta * n^rho) - 1), zero at n = 0, by least squares."""
    tokens, seconds = np.asarray(curve.tokens, np.float64), np.asarray(curve.seconds, np.float64)

    def residuals(logs: np.ndarray) -> np.ndarray:
        gamma, delta, rho = np.exp(np.clip(logs, -20, 5))
        return np.log(gamma * np.expm1(np.minimum(delta * tokens**rho, 50.0)) + 1e-12) - np.log(seconds)

    start = np.log([max(seconds[0], 1e-6), 0.5, 0.5])
    gamma, delta, rho = np.exp(np.clip(least_squares(residuals, start, max_nfev=200).x, -20, 5))
    return PaperFit(lambda_s=draft_node_s, gamma_s=float(gamma), delta=float(delta), rho=float(rho))
