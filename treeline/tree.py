"""What every part of a draft tree refers to: the root, and who proposed a node."""

from __future__ import annotations

from enum import IntEnum

ROOT = -1
"""Parent index of a node that continues the last committed token."""


class Source(IntEnum):
    """Who proposed a node. Acceptance is calibrated per source."""

    MODEL = 0
    NGRAM = 1
    SYNTHETIC = 2
