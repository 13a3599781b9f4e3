"""One simulated verifier with its drafter and planner: real decisions, simulated passes."""

from __future__ import annotations

from collections import deque
from copy import deepcopy
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from bench.simulator.dealing import DRAWN
from bench.simulator.devices import Device
from bench.simulator.drafting import Drafted, Drafting
from bench.simulator.slots import Finished, Request, Slots
from bench.simulator.tables import Tables
from planner.fast.cost import pass_s
from planner.fast.rule import BatchState
from planner.policies import Policy
from planner.service.loop import PlanMaker, VerifierState
from planner.service.signals import Signals
from treeline.config import Config
from treeline.plan import CostModel, NodeOutcomes, Plan, StepRecord

NOISE = 0.02
"""Passes scatter by about this share."""


class Step(NamedTuple):
    """One step: when it ends, verified nodes, and tokens of each decoding request.

    Attributes:
        wait_s: since those requests' last step: the step itself, and that of the other half of the batch, if halves
            take turns.
        verify_s, predicted_s: seconds of the pass, and what the plan said of them; None if the planner did not see it.
        prefill_tokens: of prompts, in the pass.
        first_token_s: how long those waited whose first token came.
    """

    end_s: float
    wait_s: float
    nodes: int
    tokens: NDArray[np.int64]
    verify_s: float
    predicted_s: float | None
    prefill_tokens: int
    first_token_s: list[float]
    finished: Finished | None


class Replica:
    """A verifier's queue and slots, stepped by the simulation.

    Attributes:
        waiting, slots: its requests.
        slowdown: multiplies the cost of verification; the planner has to find out.
    """

    def __init__(
        self, device: Device, policy: Policy, tables: Tables, slots: int, maker: PlanMaker, fresh: VerifierState,
        random: np.random.Generator, overlap: bool, weighted: bool, every_step: bool,
    ) -> None:  # fmt: skip
        self.waiting: deque[Request] = deque()
        self.slots = Slots(slots)
        self.slowdown = 1.0
        self._device, self._overlap, self._weighted, self._every_step = device, overlap, weighted, every_step
        self._truth = CostModel(device.profile.verify)
        self._drafting = Drafting(device, policy, tables, random)
        self._random, self._maker, self._interval_s = random, maker, Config().planner.interval_s
        self._state, self._signals = deepcopy(fresh), Signals(1.0)
        self._noise: list[float] = []
        self._half, self._last_s = 0, 0.0
        self._plan = self._planned(0.0)
        self._interval_tokens, self._interval_step_s = 0, 0.0  # since the last step that the planner saw
        self._ones = np.ones(slots, np.int64)

    @property
    def plan(self) -> Plan:
        return self._plan

    def step(self, now_s: float) -> Step | None:
        """Run the next step from `now_s` on; None if there is nothing to do."""
        slots = self.slots
        while self.waiting and slots.count < slots.slots:
            slots.admit(self.waiting.popleft())
        if not slots.count:
            return None
        part = self._part()
        left = slots.left[part]
        sequences = len(left)
        prefill_tokens, begun = slots.prefill() if slots.decoding < slots.count else (0, 0)
        context_tokens = slots.context_tokens // slots.count
        startable = min(len(self.waiting), slots.slots - slots.count)
        state = BatchState(sequences + prefill_tokens, context_tokens, 0.0, startable)
        drafted = self._draft(part, sequences, state, now_s) if sequences else None
        emitted, draft_s, nodes = self._ones[:sequences], 0.0, 0
        if drafted is not None:
            emitted, draft_s, nodes = np.minimum(drafted.tokens(sequences), left), drafted.draft_s, drafted.nodes
        tokens = state.base_tokens + nodes
        verify_s = self._verify_s(sequences, context_tokens, tokens)
        overlapped = sequences < slots.decoding
        if overlapped:
            draft_s = max(0.0, draft_s - verify_s)  # drafted while the other half was verified
        step_s = draft_s + verify_s + self._device.step_overhead_s
        count = slots.emit(left, emitted)
        end_s = now_s + step_s
        waited = slots.begin(begun, end_s) if begun else []
        if not prefill_tokens:
            self._interval_tokens += count
            self._interval_step_s += step_s
        # Every probe is seen: there are few, and they alone tell what drafting would cost.
        probe = drafted is not None and drafted.requests < sequences
        predicted_s = None
        if sequences and (probe or (not prefill_tokens and (self._every_step or end_s >= self._next_plan_s))):
            predicted_s = pass_s(self._plan.cost, sequences, context_tokens, tokens)
            self._learn(
                state, sequences, drafted, tokens, prefill_tokens, draft_s, verify_s, predicted_s, step_s, end_s
            )
        wait_s, self._last_s = step_s + overlapped * self._last_s, step_s
        finished = slots.finish(end_s)
        return Step(end_s, wait_s, nodes, emitted, verify_s, predicted_s, prefill_tokens, waited, finished)

    def _part(self) -> slice:
        """The decoding requests of this step: all, or every other one if drafting and verifying overlap."""
        decoding = self.slots.decoding
        if not self._overlap or decoding < 2:
            return slice(0, decoding)
        self._half = 1 - self._half
        return slice(self._half, decoding, 2)

    def _draft(self, part: slice, sequences: int, state: BatchState, now_s: float) -> Drafted | None:
        weights = self.slots.weights(part, now_s) if self._weighted else None
        hidden_s = 0.0
        if sequences < self.slots.decoding:
            hidden_s = pass_s(self._plan.cost, sequences, state.context_tokens, state.base_tokens)
        return self._drafting.run(sequences, self.slots.count, weights, state, self._plan, now_s, hidden_s)

    def _verify_s(self, sequences: int, context_tokens: int, tokens: int) -> float:
        if not self._noise:
            self._noise = (1 + NOISE * self._random.standard_normal(DRAWN)).tolist()
        return pass_s(self._truth, max(1, sequences), context_tokens, tokens) * self.slowdown * self._noise.pop()

    def _learn(
        self, state: BatchState, sequences: int, drafted: Drafted | None, tokens: int, prefill_tokens: int,
        draft_s: float, verify_s: float, predicted_s: float, step_s: float, end_s: float,
    ) -> None:  # fmt: skip
        """The planner sees a step, its tokens the mean of those it did not see, and makes a plan if it is time."""
        emitted = round(self._interval_tokens / max(self._interval_step_s, 1e-9) * step_s)
        record = StepRecord(
            step_id=1, unix_s=end_s, plan_version=self._plan.version, sequences=sequences, tokens=tokens,
            prefill_tokens=prefill_tokens,
            context_tokens=state.context_tokens * (self.slots.count if prefill_tokens else sequences),
            drafted_nodes=0, verified_nodes=0,
            accepted_nodes=0, emitted_tokens=emitted, running=self.slots.count, waiting=len(self.waiting),
            free_slots=self.slots.slots - self.slots.count, draft_s=draft_s,
            drafter_s=max(0.0, draft_s - self._device.draft_round_trip_s),
            draft_layer_nodes=drafted.layer_nodes if drafted else (), verify_s=verify_s,
            drafted_requests=drafted.requests if drafted else 0,
            predicted_verify_s=predicted_s, step_s=step_s, goodput=0.0, price=0.0,
            outcomes=drafted.observed() if drafted else NodeOutcomes.empty(),
            node_s=drafted.node_s if drafted else 0.0,
        )  # fmt: skip
        self._state.observe(record)
        self._interval_tokens, self._interval_step_s = 0, 0.0
        if end_s >= self._next_plan_s:
            self._plan = self._planned(end_s)

    def _planned(self, now_s: float) -> Plan:
        self._next_plan_s = now_s + self._interval_s
        return self._maker.make(self._state, self._signals)
