"""Who asks, and when."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from treeline.errors import ConfigError

KINDS = ("closed", "poisson", "bursty", "diurnal")
BURST_S, PAUSE_S, BURST_FACTOR = 2.0, 6.0, 3.0
"""A burst brings BURST_FACTOR times the mean rate; between bursts it is as low as keeps the mean."""
DAY_S, SWING = 120.0, 0.8
"""A simulated day is short; its rate swings by this share around the mean."""


@dataclass(frozen=True)
class Load:
    """closed: `amount` streams per replica, each asking again at once. Others: arrivals at `amount` times what plain
    decoding can serve with all slots full.
    """

    kind: str
    amount: float

    @property
    def spec(self) -> str:
        return f"{self.amount:g}" if self.kind == "closed" else f"{self.kind}:{self.amount:g}"

    @property
    def closed(self) -> bool:
        return self.kind == "closed"


def parse_load(spec: str) -> Load:
    """'8' is a closed loop of 8 streams per replica, 'poisson:0.7' open arrivals at 0.7 of plain capacity.

    Raises:
        ConfigError: it is neither.
    """
    kind, colon, amount = spec.rpartition(":")
    try:
        load = Load(kind if colon else "closed", float(amount))
    except ValueError:
        load = Load("", 0.0)
    whole = not load.closed or load.amount == int(load.amount)
    if load.kind not in KINDS or not 0 < load.amount <= 4096 or not whole:
        raise ConfigError(f"load '{spec}': a number of streams, or poisson:, bursty: or diurnal:SHARE")
    return load


def arrivals(load: Load, mean_per_s: float, random: np.random.Generator) -> Iterator[float]:
    """Times of an inhomogeneous Poisson process with this mean rate, without end; by thinning."""
    peak = {"poisson": 1.0, "bursty": BURST_FACTOR, "diurnal": 1 + SWING}[load.kind]
    now_s = 0.0
    while True:
        for gap_s, chance in zip(random.exponential(1 / (peak * mean_per_s), 256), random.random(256), strict=True):
            now_s += float(gap_s)
            if chance * peak < _rate(load, now_s):
                yield now_s


def _rate(load: Load, now_s: float) -> float:
    """The rate at this time as a share of its mean."""
    if load.kind == "bursty":
        low = (1 - BURST_FACTOR * BURST_S / (BURST_S + PAUSE_S)) * (BURST_S + PAUSE_S) / PAUSE_S
        return BURST_FACTOR if now_s % (BURST_S + PAUSE_S) < BURST_S else low
    if load.kind == "diurnal":
        return 1 + SWING * math.sin(2 * math.pi * now_s / DAY_S)
    return 1.0
