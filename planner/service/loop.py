"""The slow loop: from one verifier's step records and latency to its plan, a few times per second."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import count

import numpy as np
from numpy.typing import NDArray

from planner.fast.acceptance import Calibrator
from planner.fast.cost import cheapest_slopes_s, verify_seconds
from planner.fast.step_prices import waiting_cost
from planner.service.latency import Latency, StepQuantiles, of_class
from planner.service.objectives import Control, Seen, classes, goals, regulate, tightest
from planner.service.tracker import CostTracker
from treeline.config import LimitsConfig, PlannerConfig
from treeline.plan import CostModel, Plan, Signal, VerifierProfile
from treeline.step_record import StepRecord

GOODPUT_MEMORY_S = 0.4
"""Time constant of the goodput: an earlier load counts 1 % after 2 s."""
OLDEST_S = math.log(100) * GOODPUT_MEMORY_S
"""Older records, whose weight is below a hundredth, are left out."""
QUIET_S = 2.0
"""After this long without a step record while requests run, measured latency corrects the cost model: 8 plans."""


class VerifierState:
    """What the planner knows of one verifier."""

    def __init__(self, profile: VerifierProfile, metrics_url: str, clock: Callable[[], float] = time.monotonic) -> None:
        self.tracker = CostTracker(profile)
        self.calibrator = Calibrator()
        self.metrics_url = metrics_url
        self.latency = Latency()
        self.control = Control()
        self.controls: dict[int | None, Control] = {}
        self.planned_s = clock()
        self.clock = clock
        self._steps = StepQuantiles()
        self.last_heard_s = time.monotonic()
        self.last: StepRecord | None = None
        self._work: deque[StepRecord] = deque(maxlen=256)

    def observe(self, record: StepRecord) -> None:
        """Learn from one step."""
        self._steps.observe(record, self.clock())
        self.tracker.observe(record)
        self.calibrator.update(record.outcomes)
        if record.sequences:
            self.last = record
            if not record.prefill_tokens:
                self._work.append(record)

    def measure(self, priorities: Iterable[int]) -> None:
        """Update the latency with the quantiles of recent step records, of all requests and of each of `priorities`."""
        self.latency.update("steps", self._steps.quantiles(self.clock(), priorities))

    @property
    def busy(self) -> bool:
        """Whether tokens have flowed long enough that Prometheus must have seen them."""
        return self._steps.busy(self.clock())

    def goodput(self) -> float:
        """Recent tokens per second of step time, the realised R; 0 before the first step."""
        records, weights = self._recent()
        if not records:
            return 0.0
        return float(weights @ [r.emitted_tokens for r in records] / (weights @ [r.step_s for r in records]))

    def node_s(self, cost: CostModel) -> float:
        """The recent threshold of a node, in seconds at the price.

        It is the gain of the best node that the verifier left out. A step that left none out would have taken more: it
        counts the cheapest cost of growing its pass. With that cost for all steps, smart is 3, 5 and 10 % slower at 8,
        32 and 64 streams of a simulated H100.
        """
        records, weights = self._recent()
        if not records:
            return float(cheapest_slopes_s(cost, 1, 0, np.asarray([1]))[0])
        node_s = np.asarray([r.node_s for r in records])
        batches, tokens = np.asarray([(r.sequences, r.tokens) for r in records]).T
        for batch in {*batches[node_s == 0].tolist()}:
            grown = ((batches == batch) & (node_s == 0)).nonzero()[0]
            context_tokens = records[grown[0]].context_tokens // batch
            node_s[grown] = cheapest_slopes_s(cost, batch, context_tokens, tokens[grown])
        return float(weights @ node_s / weights.sum())

    def _recent(self) -> tuple[list[StepRecord], NDArray[np.float64]]:
        """The recent steps without prompts, and their weights."""
        records: list[StepRecord] = []
        for record in reversed(self._work):
            if self._work[-1].unix_s - record.unix_s >= OLDEST_S:
                break
            records.append(record)
        records.reverse()
        ages_s = np.asarray([max(0.0, records[-1].unix_s - record.unix_s) for record in records])
        return records, np.exp(ages_s / -GOODPUT_MEMORY_S)


class PlanMaker:
    """Makes plans; one version counter serves all verifiers."""

    def __init__(self, limits: LimitsConfig, config: PlannerConfig) -> None:
        self._limits, self._config = limits, config
        self._versions = count(1)

    def make(self, state: VerifierState) -> Plan:
        """The plan for one verifier, as of now."""
        state.measure(self._config.objectives_by_priority)
        signals = self._signals(state)
        _use_latency(state, self._config.signal_max_age_s)
        cost, last = state.tracker.model(), state.last
        sequences = last.sequences if last else 1
        context_tokens = last.context_tokens // sequences if last else 0
        plain_s = float(verify_seconds(cost, sequences, context_tokens, sequences)[sequences]) + cost.step_overhead_s
        # R is at least plain decoding's goodput, which this batch can always reach.
        goodput = max(state.goodput(), sequences / plain_s)
        startable = last.startable if last else 0
        prompts = max(0, last.running - sequences - startable) if last else 0
        delayed = prompts + startable + last.waiting if last else 0
        control = self._regulate(state, signals, plain_s, delayed)
        price = goodput * (1 + waiting_cost(control.wait_factor, startable, prompts) / sequences)
        published = replace(cost, node_s=state.node_s(cost))
        published.readings.update(cost.readings)  # of the same curves
        published.curve_readings.update(cost.curve_readings)
        return Plan(
            version=next(self._versions),
            created_unix_s=time.time(),
            lifetime_s=self._config.plan_lifetime_s,
            cost=published,
            calibration=state.calibrator.calibration(),
            price=price,
            max_nodes=self._limits.max_tree_nodes,
            max_depth=self._limits.max_tree_depth,
            reason="; ".join(
                [_reason(price, goodput, sequences, last, delayed), *_latency_reasons(control, signals, plain_s)]
            ),
            step_budget_s=control.step_budget_s,
            wait_factor=control.wait_factor,
            signals=signals,
        )

    def _signals(self, state: VerifierState) -> tuple[Signal, ...]:
        """The measured quantiles with their objectives; a value that is too old is None."""
        found = []
        for name, objective_ms in (goal for one in classes(self._config) for goal in goals(*one)):
            reading = state.latency.newest(name, state.clock(), self._config.signal_max_age_s)
            objective_s = None if objective_ms is None else objective_ms / 1000
            found.append(Signal(name, reading.value, objective_s, reading.age_s, reading.source))
        return tuple(found)

    def _regulate(self, state: VerifierState, signals: tuple[Signal, ...], plain_s: float, delayed: int) -> Control:
        now_s, max_age_s = state.clock(), self._config.signal_max_age_s
        # After a pause of the planner the controls move by at most one second's change.
        elapsed_s, state.planned_s = min(1.0, now_s - state.planned_s), now_s
        values, controls = {signal.name: signal.value_s for signal in signals}, []
        for priority, objectives in classes(self._config):
            itl_p95_s, ttft_p95_s = (values[name] for name, _ in goals(priority, objectives))
            step = state.latency.newest(of_class("step_p95", priority), now_s, max_age_s)
            seen = Seen(itl_p95_s, ttft_p95_s, step.value, plain_s, delayed)
            control = regulate(objectives, seen, state.controls.get(priority, Control()), elapsed_s)
            state.controls[priority] = control
            lost = tuple(of_class(name, priority) for name in control.unreachable)
            controls.append(replace(control, unreachable=lost))
        state.control = tightest(controls)
        return state.control


def _use_latency(state: VerifierState, max_age_s: float) -> None:
    """Correct the cost model by measured verification latency while requests run and no step records come.

    Each plan goes a tenth of the way, since the quantile's window of 5 s spans 20 plans. More than twice the prediction
    is a stuck pass rather than a slow device.
    """
    now_s, last = state.clock(), state.last
    measured_s = state.latency.newest("verify_p50", now_s, max_age_s).value
    if measured_s is None or last is None or time.time() - last.unix_s < QUIET_S:
        return
    if state.latency.newest("running", now_s, max_age_s).value and last.predicted_verify_s:
        state.tracker.rescale(max(0.5, min(2.0, measured_s / last.predicted_verify_s)) ** 0.1)


def _reason(price: float, goodput: float, sequences: int, last: StepRecord | None, delayed: int) -> str:
    if last is None:
        return f"from the device profile alone: {goodput:.0f} tok/s plain"
    said = f"{goodput:.0f} tok/s lately at batch {sequences}"
    if delayed and price > goodput:
        said += f", {delayed} waiting raise the price to {price:.0f}"
    return said


def _latency_reasons(control: Control, signals: tuple[Signal, ...], plain_s: float) -> list[str]:
    """How the objectives move the plan, one phrase for each that is set."""
    said = []
    for signal in signals:
        if signal.objective_s is None:
            continue
        what = f"{signal.name.replace('_', ' ')} of {1000 * signal.objective_s:.0f} ms"
        if signal.value_s is None:
            said.append(f"{what} asked for, nothing fresh measured")
        elif signal.name in control.unreachable:
            said.append(f"{what} out of reach: {1000 * signal.value_s:.0f} ms, a plain step {1000 * plain_s:.0f} ms")
        else:
            said.append(f"{what} asked for, {1000 * signal.value_s:.0f} ms by {signal.source}")
    if control.step_budget_s < math.inf:
        said.append(f"steps up to {1000 * control.step_budget_s:.0f} ms")
    if control.wait_factor > 1:
        said.append(f"waiting costs {control.wait_factor:.1f}-fold")
    return said
