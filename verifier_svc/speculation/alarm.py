"""Notices a drafter that is loaded wrong: it drafts, and the target hardly ever agrees."""

from __future__ import annotations

import logging

import numpy as np

from treeline.forest import Source
from treeline.step_record import NodeOutcomes

logger = logging.getLogger(__name__)

MIN_NODES = 100.0
"""First choices to be seen first. At a true rate of 0.3, fewer than 5 of 100 are accepted once in 10^10 times."""
DECAY = 0.998
"""Of the evidence, per first choice: half of it is 350 old."""
LOW_ACCEPTANCE = 0.05
FAR_BELOW = 0.25
"""Of its confidence: heads with a wrong layer or flag have 1 to 10 % accepted, and are as sure as ever."""


class AcceptanceAlarm:
    """Compares how often the target takes a draft model's or head's first choice with how sure the drafter was of it.

    Attributes:
        problem: one line that says what to check; empty if all is well.
    """

    def __init__(self) -> None:
        self.problem = ""
        self._nodes = self._accepted = self._confidence = 0.0

    def observe(self, outcomes: NodeOutcomes) -> None:
        """The nodes that one step verified."""
        first = (outcomes.sources == Source.MODEL) & outcomes.first
        count = int(first.sum())
        if not count:
            return
        kept = DECAY**count
        self._nodes = kept * self._nodes + count
        self._accepted = kept * self._accepted + int(outcomes.accepted[first].sum())
        self._confidence = kept * self._confidence + float(outcomes.draft_probs[first].sum(dtype=np.float64))
        if self._nodes < MIN_NODES:
            return
        accepted, confidence = self._accepted / self._nodes, self._confidence / self._nodes
        before = self.problem
        if accepted >= max(LOW_ACCEPTANCE, FAR_BELOW * confidence):
            self.problem = ""
        else:
            self.problem = (
                f"the target takes {accepted:.0%} of the drafter's first choices, which is sure of {confidence:.0%}: "
                "was it made for this target, and are its config.json and drafter.head_layers right?"
            )
        if bool(before) != bool(self.problem):
            logger.warning("%s", self.problem or "the target takes the drafter's first choices again")
