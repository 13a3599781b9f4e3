"""What is counted of a simulation."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from bench.simulator.replica import Step


@dataclass(frozen=True)
class Result:
    """One policy under one load. Tokens per second of all replicas; latencies in seconds, NaN where there were none.

    Attributes:
        targets_met: share of the requests with a target for their time per token that met it; NaN if none has one.
        prediction_error: median of |predicted - true| / true seconds of the passes.
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
        self.steps = self.sequences = self.nodes = self.tokens = 0
        self._ttft_s: list[float] = []
        self._waits_s: list[float] = []
        self._token_counts: list[int] = []
        self._errors: list[float] = []
        self._targeted = self._met = 0

    def add(self, step: Step) -> None:
        self.steps += 1
        self.sequences += len(step.tokens)
        self.nodes += step.nodes
        self._ttft_s += step.first_token_s
        self._errors.append(abs(step.predicted_s / step.verify_s - 1))
        for tokens, count in enumerate(np.bincount(step.tokens).tolist()):
            if count:
                self.tokens += tokens * count
                self._waits_s.append(step.wait_s / tokens)
                self._token_counts.append(tokens * count)
        if step.finished is not None:
            targeted = step.finished.target_s < math.inf
            self._targeted += int(targeted.sum())
            self._met += int((step.finished.itl_s <= step.finished.target_s)[targeted].sum())

    def result(self, policy: str, load: str, seconds: float, cpu_s: float) -> Result:
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


def _weighted_quantiles(values: list[float], weights: list[int], q: list[float]) -> list[float]:
    if not values:
        return [math.nan] * len(q)
    order = np.argsort(values)
    cumulative = np.cumsum(np.asarray(weights)[order])
    places = np.searchsorted(cumulative, np.asarray(q) * cumulative[-1])
    return np.asarray(values)[order][places].tolist()
