"""Recursive least squares with forgetting, robust to single outliers."""

from __future__ import annotations

from collections import deque
from statistics import median

import numpy as np
from numpy.typing import NDArray

SPREAD_STEPS = 15
"""Recent innovations (observed minus predicted) whose median is the ordinary size. Once eight are large, the change
counts as lasting."""
MAX_SPREADS = 3.0
"""An innovation beyond this many medians counts as an outlier. So does 4 % of Gaussian noise, damped a little."""


class RecursiveLeastSquares:
    """Tracks theta in y = x . theta + noise; theta drifts slowly, and back to its prior mean while unobserved.

    The Kalman filter of an Ornstein-Uhlenbeck prior, which is recursive least squares with forgetting whose covariance
    cannot grow without bound. An innovation beyond MAX_SPREADS ordinary ones counts as a noisier observation.

    Args:
        mean: float64 [k]; prior mean of theta.
        covariance: float64 [k, k]; prior covariance of theta.
        noise: standard deviation of y around x . theta.
        memory: share of the distance to the mean, and of the information, kept per step; just below 1.
    """

    def __init__(self, mean: NDArray[np.float64], covariance: NDArray[np.float64], noise: float, memory: float) -> None:
        self.theta = mean.astype(np.float64)
        self._mean = self.theta.copy()
        self._covariance = covariance
        self._noise, self._memory = noise, memory
        self._regained = (1 - memory**2) * covariance  # variance that returns with each step
        # Zeros at first, so that the first large ones (first calls, for instance) are outliers too.
        self._innovations: deque[float] = deque([0.0] * SPREAD_STEPS, maxlen=SPREAD_STEPS)

    @property
    def variances(self) -> NDArray[np.float64]:
        """float64 [k]: variance of each entry of theta."""
        return np.diag(self._covariance)

    def update(self, x: NDArray[np.float64], innovation: float) -> None:
        """Learn from one observation. `innovation`: observed minus predicted, x being the prediction's gradient."""
        self._innovations.append(abs(innovation))
        spread = max(self._noise, median(self._innovations))
        # An outlier counts as a noisier observation: it moves theta less, and the variance stays larger.
        damping = max(1.0, abs(innovation) / (MAX_SPREADS * spread))
        covariance = self._memory**2 * self._covariance
        covariance += self._regained
        theta = self._mean + self._memory * (self.theta - self._mean)
        against = covariance @ x
        gain = against / ((float(x @ against) + self._noise**2) * damping)
        self.theta = theta + gain * innovation
        covariance -= gain[:, None] * against
        self._covariance = covariance
