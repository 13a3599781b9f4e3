"""What a verifier remembers of its last drafts: whether they came in time, and for whom lookups found something."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

PATIENCE = 4.0
"""A draft is waited for this many times as long as predicted; in comparison, going on without it is cheap."""
PATIENCE_FLOOR_S = 0.01
PATIENCE_MEMORY = 0.9
"""After a late draft the next one is given twice the time, and with each that comes this share of it is kept."""
LOOKUP_MEMORY = 0.7
"""What lookups found for a request is averaged over its last few steps: a text that is copied ends at once."""


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


class LookupGains:
    """What lookups lately offered each request, in tokens; requests differ in it more than in anything else."""

    def __init__(self) -> None:
        self._gains: dict[int, float] = {}

    def observe(self, found: Mapping[int, float]) -> None:
        """One step's finds by session."""
        for session_id, gain in found.items():
            before = self._gains.get(session_id, gain)
            self._gains[session_id] = LOOKUP_MEMORY * before + (1 - LOOKUP_MEMORY) * gain

    def ratio(self, session_ids: Sequence[int], usual: float) -> float:
        """How much they find for these sessions, to what they find for all; one that is new counts as usual."""
        if not usual or not session_ids:
            return 1.0
        return sum(self._gains.get(session_id, usual) for session_id in session_ids) / (usual * len(session_ids))

    def forget(self, session_id: int) -> None:
        self._gains.pop(session_id, None)
