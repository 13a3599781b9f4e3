"""What is counted of a simulation."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bench.simulator.replica import Step

FOLDED_STEPS = 512


@dataclass(frozen=True)
class Result:
    """One policy under one load. Tokens per second of all replicas; latencies in seconds, NaN where there were none.

    Attributes:
        targets_met: share of the requests with a target for their time per token that met it; NaN if none has one.
        prediction_error: median of |predicted - true| / true seconds of the passes that the planner saw.
        cpu_s: processor seconds that the simulation itself took.
    """

    policy: str
    load: str
    tokens_per_s: float
    steps: int
    mean_batch: float
    tree_nodes: float
    accepted_length: float
    ttft_s_p50: float
    ttft_s_p95: float
    itl_s_p50: float
    itl_s_p95: float
    targets_met: float
    prediction_error: float
    cpu_s: float


class Counts:
    """What is counted of the steps after the warm-up."""

    def __init__(self) -> None:
        self.steps = self.nodes = self.sequences = self.tokens = 0
        self._ttft_s: list[float] = []
        self._steps: list[Step] = []  # whose tokens are not counted yet: that is done for many at once
        self._waits_s: list[NDArray[np.float64]] = []
        self._token_counts: list[NDArray[np.int64]] = []
        self._errors: list[float] = []
        self._targeted = self._met = 0

    def add(self, step: Step) -> None:
        self.steps += 1
        self.nodes += step.nodes
        self._ttft_s += step.first_token_s
        if step.predicted_s is not None:
            self._errors.append(abs(step.predicted_s / step.verify_s - 1))
        if step.finished is not None:
            for target_s, itl_s in zip(*step.finished, strict=True):
                self._targeted += target_s < math.inf
                self._met += itl_s <= target_s < math.inf
        self._steps.append(step)
        if len(self._steps) == FOLDED_STEPS:
            self._fold()

    def _fold(self) -> None:
        """Count tokens and the time that each has taken: a request that got several in a step waited less for each."""
        if not self._steps:
            return
        per_step = [step.tokens for step in self._steps]
        tokens = np.concatenate(per_step)
        step_of = np.arange(len(per_step)).repeat([len(one) for one in per_step])
        width = int(tokens.max(initial=0)) + 1
        requests = np.bincount(step_of * width + tokens, minlength=len(per_step) * width).reshape(-1, width)
        steps, got = requests[:, 1:].nonzero()
        self._waits_s.append(np.asarray([step.wait_s for step in self._steps])[steps] / (got + 1))
        self._token_counts.append((got + 1) * requests[steps, got + 1])
        self.sequences += len(tokens)
        self.tokens += int(tokens.sum())
        self._steps = []

    def result(self, policy: str, load: str, seconds: float, cpu_s: float) -> Result:
        self._fold()
        ttft_p50, ttft_p95 = (
            map(float, np.quantile(self._ttft_s, [0.5, 0.95])) if self._ttft_s else (math.nan, math.nan)
        )
        itl_p50, itl_p95 = _weighted_quantiles(self._waits_s, self._token_counts, [0.5, 0.95])
        sequences = max(1, self.sequences)
        return Result(
            policy, load, (self.tokens + len(self._ttft_s)) / seconds if seconds else 0.0, self.steps,
            self.sequences / max(1, self.steps), self.nodes / sequences, self.tokens / sequences,
            ttft_p50, ttft_p95, itl_p50, itl_p95,
            self._met / self._targeted if self._targeted else math.nan,
            float(np.median(self._errors)) if self._errors else math.nan, cpu_s,
        )  # fmt: skip


def _weighted_quantiles(
    parts: list[NDArray[np.float64]], weights: list[NDArray[np.int64]], q: list[float]
) -> list[float]:
    values = np.concatenate([np.zeros(0), *parts])
    if not len(values):
        return [math.nan] * len(q)
    order = np.argsort(values)
    cumulative = np.cumsum(np.concatenate(weights)[order])
    places = np.searchsorted(cumulative, np.asarray(q) * cumulative[-1])
    return values[order][places].tolist()
