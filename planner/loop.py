"""The slow loop: from one verifier's records and signals to its plan, a few times a second."""

from __future__ import annotations

import time
from collections import deque
from itertools import count

from planner.calibration import Calibrator
from planner.cost import plain_decode_s
from planner.signals import Signals
from planner.tracker import CostTracker
from treeline.config import LimitsConfig, PlannerConfig
from treeline.plan import Plan, StepRecord, VerifierProfile

GOODPUT_WINDOW_S = 2.0
MAX_NODES = 32
MAX_DEPTH = 8
QUIET_S = 2.0
"""Without a step record for this long while requests run, measured latency stands in for them."""


class VerifierState:
    """All that the planner knows of one verifier."""

    def __init__(self, profile: VerifierProfile, metrics_url: str) -> None:
        self.tracker = CostTracker(profile)
        self.calibrator = Calibrator()
        self.metrics_url = metrics_url
        self.last_heard_s = time.monotonic()
        self.steps = 0
        self.recent: deque[StepRecord] = deque(maxlen=1024)

    def observe(self, record: StepRecord) -> None:
        """Learn from one step."""
        self.tracker.observe(record)
        self.calibrator.update(record.outcomes)
        self.recent.append(record)
        self.steps += 1

    def goodput(self) -> float:
        """Tokens per second of step time over the last seconds of work: R as it was realised."""
        if not self.recent:
            return 0.0
        since = self.recent[-1].unix_s - GOODPUT_WINDOW_S
        steps = [r for r in self.recent if r.unix_s >= since and not r.prefill_tokens]
        seconds = sum(r.step_s for r in steps)
        return sum(r.emitted_tokens for r in steps) / seconds if seconds else 0.0


class PlanMaker:
    """Makes plans; versions grow over all verifiers."""

    def __init__(self, limits: LimitsConfig, config: PlannerConfig) -> None:
        self._limits, self._config = limits, config
        self._versions = count(1)

    def make(self, state: VerifierState, signals: Signals) -> Plan:
        """The plan for one verifier, as of now."""
        self._use_latency(state, signals)
        cost = state.tracker.model()
        plain = 1 / (plain_decode_s(cost) + cost.step_overhead_s)
        goodput = max(state.goodput(), plain)
        last = state.recent[-1] if state.recent else None
        sequences = max(1, last.sequences) if last else 1
        startable = min(last.waiting, last.free_slots) if last else 0
        price = goodput * (1 + startable / sequences)
        return Plan(
            version=next(self._versions),
            created_unix_s=time.time(),
            lifetime_s=self._config.plan_lifetime_s,
            cost=cost,
            calibration=state.calibrator.calibration(),
            price=price,
            max_nodes=min(MAX_NODES, self._limits.max_tree_nodes),
            max_depth=min(MAX_DEPTH, self._limits.max_tree_depth),
            reason=_reason(price, goodput, sequences, last, signals),
        )

    def _use_latency(self, state: VerifierState, signals: Signals) -> None:
        """Requests run, but no records come: let the measured verification latency correct the cost model."""
        measured_s = signals.get("verify_p50_s")
        last = state.recent[-1] if state.recent else None
        if measured_s is None or last is None or not last.sequences or time.time() - last.unix_s < QUIET_S:
            return
        if signals.get("running") and last.predicted_verify_s:
            state.tracker.rescale(max(0.5, min(2.0, measured_s / last.predicted_verify_s)) ** 0.1)


def _reason(price: float, goodput: float, sequences: int, last: StepRecord | None, signals: Signals) -> str:
    if last is None:
        return f"from the device profile alone: {goodput:.0f} tok/s plain"
    parts = [f"{goodput:.0f} tok/s over the last {GOODPUT_WINDOW_S:.0f} s at batch {sequences}"]
    if price > goodput:
        parts.append(f"{last.waiting} waiting raise the price to {price:.0f}")
    latency = signals.get("itl_p95_s")
    if latency is not None:
        parts.append(f"inter-token p95 {1000 * latency:.0f} ms")
    return ", ".join(parts)
