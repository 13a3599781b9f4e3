"""One simulated verifier with its drafter and planner: real decisions, simulated passes."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from bench.simulator.devices import Device
from bench.simulator.tables import MAX_DEPTH, Cut, Table, Tables
from bench.simulator.worlds import OUTCOMES
from planner.cost import verify_seconds
from planner.gate import Decision, DraftGate
from planner.loop import PlanMaker, VerifierState
from planner.policies import Policy
from planner.rule import BatchState, Frontier, another_layer, prune_batch
from planner.signals import Signals
from treeline.config import Config
from treeline.plan import CostModel, Plan, StepRecord
from verifier_svc.walk import Walk, concatenate, observed

PREFILL_CHUNK_TOKENS = 512
NOISE = 0.02
"""Passes scatter by about this share."""


class Request(NamedTuple):
    arrived_s: float
    prompt_tokens: int
    output_tokens: int
    weight: float


@dataclass
class Running:
    """A request in a slot."""

    request: Request
    left: int
    prompt_left: int
    first_s: float = 0.0
    weight: float = 1.0

    @property
    def context_tokens(self) -> int:
        return self.request.prompt_tokens + self.request.output_tokens - self.left


class Verified(NamedTuple):
    """One request's tree, which of its nodes were verified, and which of the world's outcomes came."""

    cut: Cut
    keep: NDArray[np.bool_]
    outcome: int


class Drafted(NamedTuple):
    """What speculation brought to a step: verified nodes, accepted nodes per request, and seconds of drafting."""

    nodes: int
    accepted: NDArray[np.int64]
    draft_s: float
    layer_nodes: tuple[int, ...] = ()
    predicted_s: float = 0.0
    node_s: float = 0.0
    requests: int = 0
    verified: Callable[[], list[Verified]] = list


class Step(NamedTuple):
    """One step: when it ends, how long it takes, verified nodes, tokens of each decoding request, who is done."""

    end_s: float
    step_s: float
    nodes: int
    tokens: NDArray[np.int64]
    first_token_s: list[float]
    finished: list[Running]


class Replica:
    """A verifier's queue and slots, stepped by the simulation.

    Attributes:
        waiting, running: its requests.
        slowdown: multiplies the cost of verification; the planner has to find out.
    """

    def __init__(
        self, device: Device, policy: Policy, tables: Tables, slots: int, maker: PlanMaker, random: np.random.Generator
    ) -> None:
        self.waiting: deque[Request] = deque()
        self.running: list[Running] = []
        self.slowdown = 1.0
        self._device, self._policy, self._tables, self._slots = device, policy, tables, slots
        self._truth = CostModel(device.profile.verify)
        self._random, self._maker, self._config = random, maker, Config()
        self._state, self._signals, self._gate = VerifierState(device.profile, ""), Signals(1.0), DraftGate()
        self._plan: Plan = self._planned(0.0)
        self._interval = [0, 0.0]  # tokens and seconds since the last plan

    @property
    def requests(self) -> int:
        return len(self.waiting) + len(self.running)

    def step(self, now_s: float) -> Step | None:
        """Run the next step from `now_s` on; None if there is nothing to do."""
        while self.waiting and len(self.running) < self._slots:
            request = self.waiting.popleft()
            self.running.append(Running(request, request.output_tokens, request.prompt_tokens, weight=request.weight))
        if not self.running:
            return None
        decoding = [r for r in self.running if not r.prompt_left]
        prefill_tokens, begun = self._prefill()
        context_tokens = sum(r.context_tokens for r in self.running) // len(self.running)
        state = BatchState(len(decoding) + prefill_tokens, context_tokens, 0.0, min(len(self.waiting), self._free))
        drafted = self._draft(decoding, state, now_s) if decoding else Drafted(0, np.zeros(0, np.int64), 0.0)
        tokens = state.base_tokens + drafted.nodes
        verify_s = self._verify_s(len(decoding), context_tokens, tokens)
        step_s = drafted.draft_s + verify_s + self._device.step_overhead_s
        emitted = np.minimum(drafted.accepted + 1, [r.left for r in decoding]) if decoding else drafted.accepted
        for running, count in zip(decoding, emitted.tolist(), strict=True):
            running.left -= count
        end_s = now_s + step_s
        for running in begun:
            running.left -= 1
            running.first_s = end_s
        finished = [r for r in self.running if not r.left]
        if finished:
            self.running = [r for r in self.running if r.left]
        total = int(emitted.sum()) + len(begun)
        self._learn(state, decoding, drafted, tokens, prefill_tokens, verify_s, end_s, step_s, total)
        waited = [end_s - r.request.arrived_s for r in begun]
        return Step(end_s, step_s, drafted.nodes, emitted, waited, finished)

    @property
    def _free(self) -> int:
        return self._slots - len(self.running)

    def _prefill(self) -> tuple[int, list[Running]]:
        """Prompt tokens of this step, and the requests whose prompt ends with it."""
        budget, begun = PREFILL_CHUNK_TOKENS, []
        for running in self.running:
            if running.prompt_left and budget:
                taken = min(budget, running.prompt_left)
                running.prompt_left -= taken
                budget -= taken
                if not running.prompt_left:
                    begun.append(running)
        return PREFILL_CHUNK_TOKENS - budget, begun

    def _draft(self, decoding: list[Running], state: BatchState, now_s: float) -> Drafted:
        """As `verifier_svc.draft_stage` does it."""
        plan, sequences = self._plan, len(decoding)
        none = Drafted(0, np.zeros(sequences, np.int64), 0.0)
        layers = min(MAX_DEPTH, self._policy.layers(plan, len(self.running), False))
        if not layers:
            return none
        if not self._policy.prices_drafting:
            return self._draft_for(decoding, Decision(sequences), layers, state)
        decision = self._gate.decide(sequences, sequences, state, plan, False, now_s)
        if not decision.requests:
            return none
        return self._draft_for(decoding, decision, min(layers, plan.max_depth), state, now_s)

    def _draft_for(
        self, decoding: list[Running], decision: Decision, layers: int, state: BatchState, now_s: float = 0.0
    ) -> Drafted:
        asked = decision.requests
        table = self._tables.table(self._plan, asked, layers)
        worlds = self._random.integers(len(table.trees), size=asked)
        outcomes = self._random.integers(OUTCOMES, size=asked)
        accepted = np.zeros(len(decoding), np.int64)
        if not self._policy.prunes:
            layer_nodes = tuple(n for n in table.layer_nodes[worlds].sum(0).tolist() if n)
            accepted[:asked] = table.accepted[worlds, outcomes]
            nodes, draft_s = int(table.nodes[worlds].sum()), self._draft_s(layer_nodes)
            whole = partial(_whole, table, worlds, outcomes)
            return Drafted(nodes, accepted, draft_s, layer_nodes, requests=asked, verified=whole)
        trees = [table.trees[w] for w in worlds.tolist()]
        weights = _weights(decoding)
        layer_nodes = self._layers([tree.frontiers for tree in trees], weights, min(layers, decision.layers))
        cuts = [tree.cut(len(layer_nodes)) for tree in trees]
        draft_s = self._draft_s(layer_nodes)
        candidates = [cut.candidate for cut in cuts]
        if weights is not None:
            candidates = [replace(c, weight=w) for c, w in zip(candidates, weights, strict=False)]
        pruning = prune_batch(candidates, replace(state, draft_s=draft_s), self._plan)
        verified = list(map(Verified, cuts, pruning.keep, outcomes.tolist()))
        accepted[:asked] = [int((cut.on_path[outcome] & keep).sum()) for cut, keep, outcome in verified]
        if self._policy.prices_drafting:  # only then is the gate asked
            node_layers = np.concatenate([cut.candidate.tree.depths for cut in cuts])
            self._gate.drafted(decision, pruning.gains, node_layers, layer_nodes, draft_s, now_s + draft_s)
        nodes = sum(int(keep.sum()) for keep in pruning.keep)
        return Drafted(
            nodes, accepted, draft_s, layer_nodes, pruning.predicted_verify_s, pruning.node_s, asked, lambda: verified
        )

    def _layers(
        self, frontiers: list[list[NDArray[np.float32]]], weights: list[float] | None, most: int
    ) -> tuple[int, ...]:
        """Nodes run through the draft model for each layer, as long as the rule wants another one."""
        layer_nodes = [len(frontiers)]
        for depth in range(1, most):
            below = [(f[depth - 1], i) for i, f in enumerate(frontiers) if len(f) >= depth]
            if not below:
                break
            # The rule is a sum over nodes, so the whole batch may go in as one request.
            scores = np.concatenate([s if weights is None else weights[i] * s for s, i in below])
            if not another_layer([Frontier(self._policy, 1.0, scores, depth, False)], self._plan):
                break
            layer_nodes.append(len(scores))
        return tuple(layer_nodes)

    def _draft_s(self, layer_nodes: tuple[int, ...]) -> float:
        profile = self._device.profile
        model_s = len(layer_nodes) * profile.draft_layer_s + sum(layer_nodes) * profile.draft_node_s
        return self._device.draft_round_trip_s + model_s

    def _verify_s(self, sequences: int, context_tokens: int, tokens: int) -> float:
        seconds = float(verify_seconds(self._truth, max(1, sequences), context_tokens, tokens)[tokens])
        return seconds * self.slowdown * (1 + NOISE * self._random.standard_normal())

    def _learn(
        self,
        state: BatchState,
        decoding: list[Running],
        drafted: Drafted,
        tokens: int,
        prefill_tokens: int,
        verify_s: float,
        end_s: float,
        step_s: float,
        emitted: int,
    ) -> None:
        """Once an interval the planner sees a step, its tokens being the interval's mean, and makes a plan."""
        if not prefill_tokens:
            self._interval[0] += emitted
            self._interval[1] += step_s
        if end_s < self._next_plan_s or prefill_tokens or not decoding:
            return
        outcomes = [
            observed(cut.candidate.tree.select(keep), Walk(_path(cut.on_path[k][keep]), []), False)
            for cut, keep, k in drafted.verified()
            if keep.any()
        ]
        record = StepRecord(
            step_id=1, unix_s=end_s, plan_version=self._plan.version, sequences=len(decoding), tokens=tokens,
            prefill_tokens=0, context_tokens=state.context_tokens * len(decoding), drafted_nodes=drafted.nodes,
            verified_nodes=drafted.nodes, accepted_nodes=int(drafted.accepted.sum()),
            emitted_tokens=round(self._interval[0] / self._interval[1] * step_s), running=len(decoding),
            waiting=len(self.waiting), free_slots=max(0, self._free), draft_s=drafted.draft_s,
            drafter_s=max(0.0, drafted.draft_s - self._device.draft_round_trip_s), drafted_requests=drafted.requests,
            draft_layer_nodes=drafted.layer_nodes, verify_s=verify_s, predicted_verify_s=drafted.predicted_s,
            step_s=step_s, goodput=0.0, price=0.0, node_s=drafted.node_s, outcomes=concatenate(outcomes),
        )  # fmt: skip
        self._state.observe(record)
        self._plan = self._planned(end_s)
        self._interval = [0, 0.0]

    def _planned(self, now_s: float) -> Plan:
        self._next_plan_s = now_s + self._config.planner.interval_s
        return self._maker.make(self._state, self._signals)


def _weights(decoding: list[Running]) -> list[float] | None:
    """1 on average over the batch, as the verifier does it; None if all are equal."""
    weights = [r.weight for r in decoding]
    if min(weights) == max(weights):
        return None
    total = sum(weights)
    return [w * len(weights) / total for w in weights]


def _whole(table: Table, worlds: NDArray[np.int64], outcomes: NDArray[np.int64]) -> list[Verified]:
    cuts = [table.trees[world].cuts[-1] for world in worlds.tolist()]
    return [Verified(cut, np.ones(len(cut.candidate.tree), np.bool_), k) for cut, k in zip(cuts, outcomes, strict=True)]


def _path(on_path: NDArray[np.bool_]) -> list[int]:
    return np.flatnonzero(on_path).tolist()
