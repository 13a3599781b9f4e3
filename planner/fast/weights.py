"""What a request's tokens are worth beside those of others."""

from __future__ import annotations

MAX_URGENCY = 8.0
TOKENS_PER_DOUBLING = 4.0
"""A request that is this many tokens behind its target counts double."""


def urgency(behind_tokens: float) -> float:
    """1 to MAX_URGENCY: how much more a request's tokens count because it is behind its target.

    Behind by k tokens, those that are due since the first one less those that were emitted: 2^(k / 4).
    """
    return float(min(MAX_URGENCY, 2.0 ** max(0.0, min(behind_tokens, 1e3) / TOKENS_PER_DOUBLING)))
