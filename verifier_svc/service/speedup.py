"""What speculation brings now: the time of recent steps beside the time that plain decoding would have taken."""

from __future__ import annotations

from collections import deque

from planner.fast.cost import as_decoded, pass_s
from treeline.plan import CostModel
from treeline.step_record import StepRecord

WINDOW_S = 5.0
"""As long as the window of the rates in `Load`."""


class Speedup:
    """Estimated speed-up over plain decoding, by the plan's own costs, over the last WINDOW_S of steps."""

    def __init__(self) -> None:
        self._steps: deque[tuple[float, float, float]] = deque()  # (Unix time, plain seconds, seconds) of each

    def observe(self, record: StepRecord, cost: CostModel) -> float:
        """The ratio with this step: the sum of plain seconds over the sum of steps' seconds.

        A step that gave its B sequences e tokens behind their first ones stands for e / B plain steps, each of
        C(B) seconds. The first of them would have run the same prompt tokens. 3 sequences, 6 tokens, C(3) = 20 ms,
        done in 30 ms: 2 x 20 / 30 = 1.33.
        """
        self._steps.append((record.unix_s, _plain_s(record, cost), record.step_s))
        while self._steps[0][0] < record.unix_s - WINDOW_S:
            self._steps.popleft()
        return sum(plain for _, plain, _ in self._steps) / sum(spent for _, _, spent in self._steps)


def _plain_s(record: StepRecord, cost: CostModel) -> float:
    decoding, prompt = record.sequences, record.prefill_tokens
    context_tokens = record.context_tokens // max(1, record.running)
    first = pass_s(cost, max(1, decoding), context_tokens, decoding + as_decoded(cost, prompt))
    if not decoding:
        return first + cost.step_overhead_s
    steps = (record.emitted_tokens - len(record.first_token_s)) / decoding
    more = (steps - 1) * (pass_s(cost, decoding, context_tokens, decoding) + cost.step_overhead_s)
    return first + cost.step_overhead_s + more
