"""The speed-up of speculation now: recent steps against the time that plain decoding would have taken."""

from __future__ import annotations

from collections import deque

import numpy as np
from numpy.typing import NDArray

from planner.fast.cost import as_decoded, pass_s
from treeline.plan import CostModel
from treeline.step_record import StepRecord

WINDOW_S = 5.0
"""As long as the window of the rates in `Load`."""


class Speedup:
    """Estimated speed-up over plain decoding, over the last WINDOW_S of steps."""

    def __init__(self) -> None:
        self._steps: deque[tuple[float, NDArray[np.float64]]] = deque()  # (Unix time, `_seconds`) of each
        self._sums = np.zeros(5)  # running sums: a step costs the same, however many the window holds

    def observe(self, record: StepRecord, cost: CostModel) -> float:
        """The ratio with this step; 1 while nothing is drafted.

        A step that emits e tokens for B sequences, first tokens aside, replaces k = e / B plain steps, of which the
        first would have run the same prompt tokens. The plan's curve gives the ratio of pass times; the device's
        present speed, neighbours included, is measured. Example: 3 sequences got 6 tokens. The curve predicts 27 ms
        for the pass with its nodes and 18 ms without. Measured: 54 ms for the pass, 4 ms around it, 10 ms of
        drafting. Plain: 2 x (18 x 54 / 27 + 4) = 80 ms; speed-up: 80 / 68.
        """
        seconds = _seconds(record, cost)
        self._steps.append((record.unix_s, seconds))
        self._sums += seconds
        while self._steps[0][0] < record.unix_s - WINDOW_S:
            self._sums -= self._steps.popleft()[1]
        plain_s, predicted_s, verify_s, around_s, step_s = self._sums
        return float((plain_s * verify_s / predicted_s + around_s) / step_s)


def _seconds(record: StepRecord, cost: CostModel) -> NDArray[np.float64]:
    """Predicted: k plain passes; the pass with its nodes. Measured: that pass; k times the time around it; the step."""
    prompt, context_tokens = as_decoded(cost, record.prefill_tokens), record.context_tokens // max(1, record.running)

    def predicted_s(tokens: int) -> float:
        return pass_s(cost, max(1, record.sequences), context_tokens, record.sequences + tokens)

    later_steps = 0.0
    if record.sequences:
        later_steps = (record.emitted_tokens - len(record.first_token_s)) / record.sequences - 1
    plain_s = predicted_s(prompt) + later_steps * predicted_s(0)
    around_s = (1 + later_steps) * max(0.0, record.step_s - record.draft_s - record.verify_s)
    return np.array((plain_s, predicted_s(prompt + record.verified_nodes), record.verify_s, around_s, record.step_s))
