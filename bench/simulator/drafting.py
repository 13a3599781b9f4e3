"""The drafting half of a simulated step, as `verifier_svc.draft_stage` does it: real decisions about drawn trees."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from bench.simulator.devices import Device
from bench.simulator.tables import Cut, Table, Tables
from bench.simulator.worlds import MAX_DEPTH, OUTCOMES
from planner.gate import Decision, DraftGate
from planner.policies import Policy
from planner.rule import Batch, BatchState, Candidate, Frontier, Pruning, another_layer, best_size
from treeline.plan import NodeOutcomes, Plan

DRAWN = 4096
"""Random numbers are drawn this many at a time."""


@dataclass(frozen=True)
class Drawn:
    """The world and the outcome that each request meets.

    Attributes:
        cut: the trees of all worlds.
        fates: int64 [requests]; world * OUTCOMES + outcome.
    """

    cut: Cut
    fates: NDArray[np.int64]

    @cached_property
    def tree_of(self) -> NDArray[np.intp]:
        """intp [nodes]: whose node it is, the requests' trees one behind the other."""
        return np.arange(len(self.fates)).repeat(self.cut.sizes[self.fates // OUTCOMES])

    @cached_property
    def nodes(self) -> NDArray[np.intp]:
        """intp [nodes]: place of each node among those of all worlds."""
        worlds = self.fates // OUTCOMES
        sizes = self.cut.sizes[worlds]
        before = self.cut.firsts[worlds] - (np.cumsum(sizes, dtype=np.intp) - sizes)
        return before[self.tree_of] + np.arange(len(self.tree_of))

    def accepted(self, chosen: NDArray[np.bool_]) -> NDArray[np.int64]:
        """int64 [requests]: accepted nodes of each where only `chosen` [nodes] are verified."""
        accepted = self.cut.on_path[(self.fates % OUTCOMES)[self.tree_of], self.nodes] & chosen
        return np.bincount(self.tree_of[accepted], minlength=len(self.fates))

    def observed(self, chosen: NDArray[np.bool_] | None) -> NodeOutcomes:
        """What the target's walks have shown of every chosen child of every node they reached. None: all are chosen."""
        outcomes, forest = (self.fates % OUTCOMES)[self.tree_of], self.cut.forest
        reached = self.cut.reached[outcomes, self.nodes]
        seen = (reached if chosen is None else reached & chosen).nonzero()[0]
        nodes = self.nodes[seen]
        return NodeOutcomes(
            sources=forest.sources[nodes],
            depths=forest.depths[nodes].astype(np.uint8),
            ranks=forest.ranks[nodes],
            sampled=np.zeros(len(nodes), np.bool_),
            draft_probs=forest.draft_probs[nodes],
            accepted=self.cut.on_path[outcomes[seen], nodes],
        )


@dataclass(frozen=True)
class Drafted:
    """What speculation brought to a step.

    Attributes:
        nodes: verified ones.
        accepted: int64 [requests]; accepted nodes of those that were drafted, the first of the batch.
        layer_nodes: nodes that the draft model was run on, layer by layer.
        pruning: None unless the policy prunes.
    """

    nodes: int
    accepted: NDArray[np.int64]
    draft_s: float
    layer_nodes: tuple[int, ...]
    drawn: Drawn
    pruning: Pruning | None = None

    def observed(self) -> NodeOutcomes:
        return self.drawn.observed(None if self.pruning is None else self.pruning.chosen)


class Drafting:
    """One verifier's gate and what it asks of its drafter."""

    def __init__(self, device: Device, policy: Policy, tables: Tables, random: np.random.Generator) -> None:
        self._device, self._policy, self._tables, self._random = device, policy, tables, random
        self._gate = DraftGate()
        self._candidate = Candidate(policy, 1.0, False)
        self._fates = np.zeros(0, np.int64)

    def run(
        self, sequences: int, running: int, weights: NDArray[np.float64] | None, state: BatchState, plan: Plan,
        now_s: float, hidden_s: float,
    ) -> Drafted | None:  # fmt: skip
        """What becomes of a step of so many decoding requests; None if nothing is drafted.

        Args:
            weights: None if all are 1.
            hidden_s: so much of drafting delays nothing, as the other half of the batch is verified meanwhile.
        """
        decision, layers = Decision(sequences), min(MAX_DEPTH, self._policy.layers(plan, running, False))
        if layers and self._policy.prices_drafting:
            layers = min(layers, plan.max_depth)
            decision = self._gate.decide(sequences, sequences, state, plan, False, now_s)
        if not layers or not decision.requests:
            return None
        table = self._tables.table(plan, decision.requests, layers)
        fates = self._draw(len(table.layer_nodes), decision.requests)
        if not self._policy.prunes:
            return self._whole(table, fates)
        layers = max(1, min(layers, decision.layers))
        drafted = self._pruned(table, fates, sequences, weights, layers, state, plan, hidden_s)
        if self._policy.prices_drafting and drafted.pruning is not None:  # only then is the gate asked
            node_layers = drafted.drawn.cut.forest.depths[drafted.drawn.nodes]
            gains, draft_s = drafted.pruning.gains, drafted.draft_s
            self._gate.drafted(decision, gains, node_layers, drafted.layer_nodes, draft_s, now_s + draft_s)
        return drafted

    def _draw(self, worlds: int, requests: int) -> NDArray[np.int64]:
        if len(self._fates) < requests:
            self._fates = self._random.integers(worlds * OUTCOMES, size=DRAWN)
        fates, self._fates = self._fates[:requests], self._fates[requests:]
        return fates

    def _whole(self, table: Table, fates: NDArray[np.int64]) -> Drafted:
        *per_layer, nodes = table.run_and_grown[fates // OUTCOMES].sum(0).tolist()
        layer_nodes = tuple([n for n in per_layer if n])
        cut = table.cut(MAX_DEPTH)
        return Drafted(nodes, cut.accepted[fates], self._draft_s(layer_nodes), layer_nodes, Drawn(cut, fates))

    def _pruned(
        self, table: Table, fates: NDArray[np.int64], sequences: int, weights: NDArray[np.float64] | None, layers: int,
        state: BatchState, plan: Plan, hidden_s: float,
    ) -> Drafted:  # fmt: skip
        layer_nodes = self._layers(table, fates // OUTCOMES, weights, layers, plan)
        draft_s = self._draft_s(layer_nodes)
        drawn = Drawn(table.cut(len(layer_nodes)), fates)
        candidates = [self._candidate] * sequences
        if weights is not None:
            candidates = [self._candidate._replace(weight=weight) for weight in weights.tolist()]
        scores = drawn.cut.scores(plan.calibration)[drawn.nodes]
        beside = state._replace(draft_s=max(0.0, draft_s - hidden_s))
        pruning = best_size(drawn.tree_of, scores, Batch.of(candidates), beside, plan)
        accepted = drawn.accepted(pruning.chosen)
        return Drafted(pruning.kept, accepted, draft_s, layer_nodes, drawn, pruning)

    def _layers(
        self, table: Table, worlds: NDArray[np.int64], weights: NDArray[np.float64] | None, most: int, plan: Plan
    ) -> tuple[int, ...]:
        """Nodes run through the draft model for each layer, as long as the rule wants another one."""
        acceptance = table.layer_acceptance[worlds]
        if weights is not None:
            acceptance = acceptance * weights[: len(worlds), None]
        per_layer = zip(table.layer_nodes[worlds].sum(0).tolist(), acceptance.sum(0).tolist(), strict=True)
        layer_nodes = [next(per_layer)[0]]
        for depth, (nodes, accepted) in enumerate(per_layer, start=1):
            # The rule is a sum over nodes, so the whole batch may go in as one request.
            frontier = Frontier(self._policy, 1.0, nodes, accepted, depth, False)
            if depth == most or not nodes or not another_layer([frontier], plan):
                break
            layer_nodes.append(nodes)
        return tuple(layer_nodes)

    def _draft_s(self, layer_nodes: tuple[int, ...]) -> float:
        profile = self._device.profile
        model_s = len(layer_nodes) * profile.draft_layer_s + sum(layer_nodes) * profile.draft_node_s
        return self._device.draft_round_trip_s + model_s
