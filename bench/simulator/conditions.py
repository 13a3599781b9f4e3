"""What disturbs a simulation: the conditions that all policies meet alike."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from treeline.errors import ConfigError

NOISY_PERIOD_S = 4.0
NOISY_SHARE = 0.25
NOISY_FACTOR = 2.0
DRIFT_FACTOR = 1.6
HOG_FACTOR = 2.0
TARGET_SHARE = 0.5
TARGET_OF_PLAIN = 0.45


@dataclass(frozen=True)
class Conditions:
    """Steady, but for what is set.

    Attributes:
        noisy_factor: a neighbour slows each replica's passes by this for NOISY_SHARE of every NOISY_PERIOD_S.
        drift_factor: passes cost this much more at the end than at the start.
        hog_factor: something else on the processor slows all passes by this in the second half.
        target_share: share of requests that ask for a time per output token, TARGET_OF_PLAIN of a plain pass over one.
        overlap: the drafter works on one half of the batch while the verifier works on the other, so that a step costs
            the longer of the two. A batch of one has no halves.
    """

    noisy_factor: float = 1.0
    drift_factor: float = 1.0
    hog_factor: float = 1.0
    target_share: float = 0.0
    overlap: bool = False

    @cached_property
    def steady(self) -> bool:
        """Whether passes cost the same all the time."""
        return self.noisy_factor == self.drift_factor == self.hog_factor == 1.0

    def slowdown(self, now_s: float, replica: int, progress: float) -> float:
        """By how much passes are slowed; `progress` is the share of the simulation that is done."""
        if self.steady:
            return 1.0
        drift = 1 + (self.drift_factor - 1) * progress
        offset_s = replica * NOISY_PERIOD_S * 0.618  # neighbours of different replicas are noisy at different times
        noisy = (now_s + offset_s) % NOISY_PERIOD_S < NOISY_SHARE * NOISY_PERIOD_S
        return drift * (self.noisy_factor if noisy else 1.0) * (self.hog_factor if progress >= 0.5 else 1.0)


STEADY = Conditions()
CONDITIONS = {
    "steady": STEADY,
    "noisy-neighbour": Conditions(noisy_factor=NOISY_FACTOR),
    "drifting-costs": Conditions(drift_factor=DRIFT_FACTOR),
    "hog": Conditions(hog_factor=HOG_FACTOR),
    "mixed-targets": Conditions(target_share=TARGET_SHARE),
    "overlapped": Conditions(overlap=True),
}


def parse_conditions(name: str) -> Conditions:
    """Raises ConfigError if there are no such conditions."""
    if name not in CONDITIONS:
        raise ConfigError(f"conditions '{name}': one of {', '.join(CONDITIONS)}")
    return CONDITIONS[name]
