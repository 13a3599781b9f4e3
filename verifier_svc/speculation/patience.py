"""How long a verifier waits for drafts."""

from __future__ import annotations

PATIENCE = 4.0
"""A draft is waited for this many times as long as predicted; in comparison, going on without it is cheap."""
PATIENCE_FLOOR_S = 0.01
PATIENCE_MEMORY = 0.9
"""After a late draft the next one is given twice the time, and with each that comes this share of it is kept."""


class Patience:
    """How long drafts are waited for: a few times as long as predicted; longer while predictions prove wrong."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s, self._times = timeout_s, PATIENCE

    def limit_s(self, expected_s: float) -> float:
        """Of a draft predicted to take so long; the time-out for one of which nothing is known (infinite)."""
        return min(self._timeout_s, PATIENCE_FLOOR_S + self._times * expected_s)

    def came(self) -> None:
        self._times = max(PATIENCE, PATIENCE_MEMORY * self._times)

    def late(self) -> None:
        self._times *= 2
