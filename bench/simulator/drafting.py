"""The drafting half of a simulated step, as the verifier's `draft_stage` does it: real decisions about drawn trees."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from bench.simulator.dealing import Dealer, Drawn, Hand
from bench.simulator.devices import Device
from bench.simulator.tables import Table, Tables
from bench.simulator.worlds import MAX_DEPTH
from planner.fast.gate import Decision, DraftGate
from planner.fast.rule import BatchState, Candidate, Candidates, Frontier, Pruning, another_layer, best_size
from planner.policies import Policy
from treeline.plan import NodeOutcomes, Plan


class Drafted(NamedTuple):
    """What speculation brought to a step.

    Attributes:
        nodes: verified ones.
        emitted: int64 [requests]; tokens of those that were drafted, the first of the batch.
        layer_nodes: nodes that the draft model was run on, layer by layer.
        hand: what these requests met.
        pruned: their trees, and what of these was verified; None unless the policy prunes.
    """

    nodes: int
    emitted: NDArray[np.int64]
    draft_s: float
    layer_nodes: tuple[int, ...]
    hand: Hand
    pruned: tuple[Drawn, Pruning] | None = None

    @property
    def requests(self) -> int:
        return len(self.emitted)

    @property
    def node_s(self) -> float:
        """What a node had to beat, as seconds at the price; 0 if all were verified."""
        return self.pruned[1].node_s if self.pruned else 0.0

    def tokens(self, sequences: int) -> NDArray[np.int64]:
        """int64 [sequences]: tokens that each of the batch gets, if its answer is long enough."""
        if self.requests == sequences:
            return self.emitted
        return np.concatenate([self.emitted, np.ones(sequences - self.requests, np.int64)])

    def observed(self) -> NodeOutcomes:
        if self.pruned is None:
            return self.hand.observed()
        drawn, pruning = self.pruned
        return drawn.observed(pruning.chosen)


class Drafting:
    """One verifier's gate and what it asks of its drafter."""

    def __init__(self, device: Device, policy: Policy, tables: Tables, random: np.random.Generator) -> None:
        self._device, self._policy, self._tables = device, policy, tables
        self._dealer, self._gate = Dealer(random), DraftGate()
        self._candidate = Candidate(policy, 1.0, False)
        self._candidates: dict[int, Candidates] = {}  # of so many requests that all weigh 1
        # Under this plan: layers that the policy wants, and trees; both are asked for once.
        self._plan: Plan | None = None
        self._wanted: dict[int, int] = {}
        self._met: dict[tuple[int, int], Table] = {}

    def run(
        self, sequences: int, running: int, weights: NDArray[np.float64] | None, state: BatchState, plan: Plan,
        now_s: float, hidden_s: float,
    ) -> Drafted | None:  # fmt: skip
        """What becomes of a step of so many decoding requests; None if nothing is drafted.

        Args:
            weights: None if all are 1.
            hidden_s: so much of drafting delays nothing, as the other half of the batch is verified meanwhile.
        """
        decision, layers = Decision(sequences), self._layers_wanted(plan, running)
        if layers and self._policy.priced:
            layers = min(layers, plan.max_depth)
            decision = self._gate.decide(sequences, sequences, state, plan, False, now_s)
        if not layers or not decision.requests:
            return None
        hand = self._hand(plan, decision.requests, layers)
        if not self._policy.priced:
            return self._whole(hand)
        layers = min(layers, decision.layers)
        drafted = self._pruned(hand, sequences, weights, layers, state, plan, hidden_s)
        if self._policy.priced and drafted.pruned is not None:  # only then is the gate asked
            (drawn, pruning), draft_s = drafted.pruned, drafted.draft_s
            self._gate.drafted(decision, pruning.gains, drawn.depths, drafted.layer_nodes, draft_s, now_s + draft_s)
        return drafted

    def _layers_wanted(self, plan: Plan, running: int) -> int:
        if plan is not self._plan:
            self._plan, self._wanted, self._met = plan, {}, {}
        if running not in self._wanted:
            self._wanted[running] = min(MAX_DEPTH, self._policy.layers(plan, running, False))
        return self._wanted[running]

    def _hand(self, plan: Plan, requests: int, layers: int) -> Hand:
        if (requests, layers) not in self._met:
            self._met[requests, layers] = self._tables.table(plan, requests, layers)
        return self._dealer.hand(self._met[requests, layers], requests)

    def _whole(self, hand: Hand) -> Drafted:
        *per_layer, nodes = hand.layer_nodes()
        layer_nodes = tuple([n for n in per_layer if n])
        return Drafted(nodes, hand.emitted, self._draft_s(layer_nodes), layer_nodes, hand)

    def _pruned(
        self, hand: Hand, sequences: int, weights: NDArray[np.float64] | None, layers: int, state: BatchState,
        plan: Plan, hidden_s: float,
    ) -> Drafted:  # fmt: skip
        layer_nodes = self._layers(hand, weights, layers, plan)
        draft_s = self._draft_s(layer_nodes)
        drawn = hand.drawn(len(layer_nodes))
        scores = drawn.table.scores(plan.calibration)[drawn.nodes]
        delays_s = max(0.0, draft_s - hidden_s)
        beside = BatchState(state.base_tokens, state.context_tokens, delays_s, state.waiting_startable)
        pruning = best_size(drawn.tree_of, scores, self._candidates_of(sequences, weights), beside, plan)
        emitted = drawn.accepted(pruning.chosen, hand.requests) + 1
        return Drafted(pruning.kept, emitted, draft_s, layer_nodes, hand, (drawn, pruning))

    def _candidates_of(self, sequences: int, weights: NDArray[np.float64] | None) -> Candidates:
        if weights is not None:
            return Candidates.of([self._candidate._replace(weight=weight) for weight in weights.tolist()])
        if sequences not in self._candidates:
            self._candidates[sequences] = Candidates.of([self._candidate] * sequences)
        return self._candidates[sequences]

    def _layers(self, hand: Hand, weights: NDArray[np.float64] | None, most: int, plan: Plan) -> tuple[int, ...]:
        """Nodes run through the draft model for each layer, as long as the rule wants another one."""
        per_layer = [nodes for nodes in hand.layer_nodes()[:most] if nodes]
        if self._policy.priced:
            acceptance = hand.layer_acceptance(weights)
            for depth in range(1, len(per_layer)):
                # The rule is a sum over nodes, so the whole batch may go in as one request.
                frontier = Frontier(self._policy, 1.0, per_layer[depth], acceptance[depth], depth, False)
                if not another_layer([frontier], plan):
                    return tuple(per_layer[:depth])
        return tuple(per_layer)

    def _draft_s(self, layer_nodes: tuple[int, ...]) -> float:
        profile = self._device.profile
        model_s = len(layer_nodes) * profile.draft_layer_s + sum(layer_nodes) * profile.draft_node_s
        return self._device.draft_round_trip_s + model_s
