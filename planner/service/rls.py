"""Recursive least squares that forgets, and that no single outlier can move far."""

from __future__ import annotations

from collections import deque
from statistics import median

import numpy as np
from numpy.typing import NDArray

SPREAD_STEPS = 15
"""Innovations (observed minus predicted) are judged against the median of this many: when most are large, the world has
changed, and it takes eight steps to see that."""
MAX_SPREADS = 3.0
"""An innovation beyond this many medians is an outlier: of normal noise 4 % are, and they lose little."""


class RecursiveLeastSquares:
    """Tracks theta in y = x . theta + noise, theta drifting slowly and, unobserved, back to where it began.

    The Kalman filter of an Ornstein-Uhlenbeck prior, which is recursive least squares with forgetting whose covariance
    cannot wind up. An innovation counts up to three typical recent ones: a pause moves nothing much, and a lasting
    change is let through as soon as it is the rule.

    Args:
        mean: float64 [k]; theta before anything was seen.
        covariance: float64 [k, k]; how far the entries may lie from their means, and which of them move together.
        noise: standard deviation of y around x . theta.
        memory: share of the distance to the mean, and of what was learnt, that is kept each step; just below 1.
    """

    def __init__(self, mean: NDArray[np.float64], covariance: NDArray[np.float64], noise: float, memory: float) -> None:
        self.theta = mean.astype(np.float64)
        self._mean = self.theta.copy()
        self._covariance = covariance
        self._noise, self._memory = noise, memory
        self._regained = (1 - memory**2) * covariance  # doubt that comes back with each step
        # Nothing has been seen yet, so the first large ones are outliers too, first calls for instance.
        self._innovations: deque[float] = deque([0.0] * SPREAD_STEPS, maxlen=SPREAD_STEPS)

    @property
    def variances(self) -> NDArray[np.float64]:
        """float64 [k]: how uncertain each entry of theta is."""
        return np.diag(self._covariance)

    def update(self, x: NDArray[np.float64], innovation: float) -> None:
        """Learn from one observation. `innovation`: observed minus predicted, x being the prediction's gradient."""
        self._innovations.append(abs(innovation))
        spread = max(self._noise, median(self._innovations))
        # What is beyond belief counts as an observation of more noise: it moves less, and leaves more doubt.
        disbelief = max(1.0, abs(innovation) / (MAX_SPREADS * spread))
        covariance = self._memory**2 * self._covariance
        covariance += self._regained
        theta = self._mean + self._memory * (self.theta - self._mean)
        against = covariance @ x
        gain = against / ((float(x @ against) + self._noise**2) * disbelief)
        self.theta = theta + gain * innovation
        covariance -= gain[:, None] * against
        self._covariance = covariance
