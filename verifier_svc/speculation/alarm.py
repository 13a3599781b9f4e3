"""Alarm for a misconfigured drafter: it drafts, and the target hardly ever accepts."""

from __future__ import annotations

import logging

import numpy as np

from treeline.forest import Source
from treeline.step_record import NodeOutcomes

logger = logging.getLogger(__name__)

MIN_NODES = 100.0
"""First choices to verify before the alarm can be raised. At a true rate of 0.3, fewer than 5 of 100 are accepted once
in 10^10 times."""
DECAY = 0.998
"""Share of the counts kept per first choice: their half-life is 350."""
LOW_ACCEPTANCE, FAR_BELOW = 0.05, 0.25
"""The alarm is raised below this acceptance rate, or below this share of the drafter's confidence. Of heads with a
wrong layer or flag the target accepts 1 to 10 %, while their confidence stays high."""


class AcceptanceAlarm:
    """Compares the acceptance of a draft model's or head's first choices with the drafter's confidence in them.

    Attributes:
        problem: one line that says what to check; empty without an alarm.
    """

    def __init__(self) -> None:
        self.problem = ""
        self._nodes = self._accepted = self._confidence = 0.0

    def observe(self, outcomes: NodeOutcomes) -> None:
        """Learn from the nodes that one step verified."""
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
                f"the target accepts {accepted:.0%} of the drafter's first choices, "
                f"whose mean probability is {confidence:.0%}: "
                "was it made for this target, and are its config.json and drafter.head_layers right?"
            )
        if bool(before) != bool(self.problem):
            logger.warning("%s", self.problem or "the target accepts the drafter's first choices again")
