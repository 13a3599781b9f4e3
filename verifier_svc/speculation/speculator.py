"""The drafting half of a step: decide whether to draft, get trees from drafter and prompt lookup, choose the nodes."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np

from planner.fast.cost import is_catching_up
from planner.fast.gate import Decision, DraftGate, Offer
from planner.fast.rule import Pruning, Requests, prune_batch
from treeline.config import LimitsConfig
from treeline.drafting import DraftStats
from treeline.forest import Forest, Source
from treeline.plan import Plan
from verifier_svc.engine.scheduler import Batch, Scheduler
from verifier_svc.engine.sequence import Sequence, weights_of
from verifier_svc.speculation.exchange import Exchange
from verifier_svc.speculation.prompt_lookup import Allowance, PromptLookup

PATIENCE, PATIENCE_FLOOR_S = 4.0, 0.01
"""Longest wait for a draft: four times the predicted seconds, plus 10 ms to wake processes. Predictions scatter by 15 %
(the cost tracker's DRAFT_NOISE), so only a stuck drafter exceeds it."""


@dataclass(frozen=True)
class Drafts:
    """The trees of one step and how they were made, or why there are none.

    Attributes:
        kept: the trees to verify, one per decoding request.
        forest: the trees before pruning.
        pruning: None if nothing was drafted.
        predicted_verify_s: seconds of the coming pass, predicted by the plan.
        sessions: requests that were drafted for, perhaps with an empty tree.
        stats: the drafter's; empty if it was not asked.
        draft_s: seconds that drafting took: messages, waiting for the drafter, pruning. 0 for prompt lookup alone.
        refusal: why nothing was drafted; empty if something was.
    """

    kept: Forest
    forest: Forest
    pruning: Pruning | None
    predicted_verify_s: float
    sessions: frozenset[int] = frozenset()
    stats: DraftStats = field(default_factory=DraftStats)
    draft_s: float = 0.0
    refusal: str = ""

    def sizes(self, place: int) -> tuple[int, int]:
        """(drafted, verified) nodes of the request at `place` in the pass; 0 for a finished prompt."""
        if place >= len(self.kept.sizes):
            return 0, 0
        return self.forest.sizes.item(place), self.kept.sizes.item(place)


class Speculator:
    """Decides in each step whether to draft, for whom, and which nodes to verify."""

    def __init__(
        self,
        exchange: Exchange,
        scheduler: Scheduler,
        limits: LimitsConfig,
        looks_up: bool,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """
        Args:
            looks_up: graft continuations from each request's own text into its tree.
        """
        self.exchange = exchange
        self.gate = DraftGate()
        self._lookup = PromptLookup() if looks_up else None
        self._scheduler = scheduler
        self._limits = limits
        self._clock = clock

    def run(self, batch: Batch) -> Drafts:
        """The trees to verify in this step; none if drafting is off, late or not worth it."""
        started_s, plan = self._clock(), batch.plan
        self.exchange.follow_drafter()
        requests = Requests(
            np.asarray(weights_of(batch.decoding, started_s), np.float32),
            np.asarray([not s.request.sampling.greedy for s in batch.decoding], np.bool_),
            np.asarray([s.policy.priced for s in batch.decoding], np.bool_),
        )
        depths = [self._depth(sequence, batch) for sequence in batch.decoding]
        places, decision = self._choose(batch, depths)
        if not places:
            self.exchange.release(plan)
            return self._looked_up(batch, requests, depths, decision.reason)
        asked = [batch.decoding[place] for place in places]
        layers = batch.prices.layers_within_budget
        limits = [
            (self._nodes(s, plan), min(depths[place], layers) if s.policy.priced else depths[place])
            for place, s in zip(places, asked, strict=True)
        ]
        # Catching up on a token costs about as much as a draft node.
        behind_s = plan.cost.draft_node_s * sum([sequence.behind_tokens for sequence in asked])
        expected_s = decision.expected_s + behind_s
        wait_s = PATIENCE_FLOOR_S + PATIENCE * 2**self.gate.lates * expected_s
        reply = self.exchange.draft(asked, limits, requests.weights[places].tolist(), plan, wait_s)
        if reply is None:
            late_s = self._clock() - started_s
            self.gate.late(late_s, self._clock())
            drafts = self._looked_up(batch, requests, depths, "the drafter did not answer in time")
            return replace(drafts, draft_s=late_s)
        forest = reply.forest.spread(places, len(batch.decoding))
        if self._lookup is not None:
            forest = self._lookup.graft(forest, self._allowances(batch, forest, depths), plan.calibration)
        sessions = frozenset([sequence.session_id for sequence in asked])
        drafts = self._pruned(batch, forest, requests, self._clock() - started_s)
        drafts = replace(drafts, sessions=sessions, stats=reply.stats, draft_s=self._clock() - started_s)
        if decision.requests:
            self._note_offer(drafts, requests, decision.requests, expected_s)
        return drafts

    def forget(self, sequence: Sequence) -> None:
        """The request has ended."""
        self.exchange.forget(sequence)
        if self._lookup is not None:
            self._lookup.forget(sequence.session_id)

    def _choose(self, batch: Batch, depths: list[int]) -> tuple[list[int], Decision]:
        """Places of the requests to draft for: those of fixed policies always, the priced ones if the gate says so."""
        decoding = batch.decoding
        wanting = [place for place, depth in enumerate(depths) if depth > 0]
        if not wanting:
            return [], Decision(0, "no request of this step may draft")
        if not self.exchange.ready:
            return [], Decision(0, "no drafter")
        priced = [place for place in wanting if decoding[place].policy.priced]
        if not priced:
            return wanting, Decision(0)
        decision = self.gate.decide(len(priced), batch.prices, self._clock())
        if decision.requests < len(priced):
            # A probe is cheapest with the requests that have the least to catch up with.
            priced.sort(key=lambda place: decoding[place].behind_tokens)
        left_out = set(priced[decision.requests :])
        return [place for place in wanting if place not in left_out], decision

    def _depth(self, sequence: Sequence, batch: Batch) -> int:
        """The deepest useful tree. The last remaining token needs no draft: it is the bonus token."""
        request, policy, plan = sequence.request, sequence.policy, batch.plan
        if not self._scheduler.tree_nodes(sequence):
            return 0
        wanted = policy.layers(plan, batch.running, not request.sampling.greedy)
        depth = min(wanted, self._limits.max_tree_depth, sequence.remaining_tokens - 1)
        if policy.priced:
            depth = min(depth, plan.max_depth)
        return depth if request.max_depth is None else min(depth, request.max_depth)

    def _nodes(self, sequence: Sequence, plan: Plan) -> int:
        nodes = self._scheduler.tree_nodes(sequence)
        return min(nodes, plan.max_nodes) if sequence.policy.priced else nodes

    def _pruned(self, batch: Batch, forest: Forest, requests: Requests, draft_s: float) -> Drafts:
        """Apply the grammars, then the rule, to the trees of all decoding requests."""
        forest = _obeying(batch.decoding, forest)
        pruning = prune_batch(forest, requests, batch.plan.calibration, batch.prices, draft_s)
        return Drafts(forest.select(pruning.chosen), forest, pruning, pruning.predicted_verify_s)

    def _note_offer(self, drafts: Drafts, requests: Requests, asked: int, expected_s: float) -> None:
        """Report to the gate what drafting offered the `asked` priced requests, and its seconds."""
        forest, stats = drafts.forest, drafts.stats
        assert drafts.pruning is not None
        gains = drafts.pruning.gains[requests.priced[forest.tree_of] & (forest.sources != Source.NGRAM)]
        catching_up = is_catching_up(stats.catch_up_tokens, len(drafts.sessions))
        self.gate.drafted(Offer(asked, gains, stats.layer_nodes), min(drafts.draft_s, expected_s), catching_up)

    def _allowances(self, batch: Batch, forest: Forest, depths: list[int]) -> list[Allowance]:
        """What prompt lookup may graft into each tree, having read the texts up to this step.

        The rule weighs its nodes against the drafter's. A fixed policy gets them only if it has no tree.
        """
        assert self._lookup is not None
        allowances = []
        for sequence, size, depth in zip(batch.decoding, forest.sizes.tolist(), depths, strict=True):
            self._lookup.read(sequence.session_id, sequence.token_ids, sequence.forced)
            fits = sequence.policy.priced or not size
            nodes = self._scheduler.tree_nodes(sequence) - size if fits else 0
            allowances.append(Allowance(sequence.session_id, not sequence.request.sampling.greedy, nodes, depth))
        return allowances

    def _looked_up(self, batch: Batch, requests: Requests, depths: list[int], refusal: str) -> Drafts:
        """Trees of prompt lookup and grammars alone, if they pay."""
        prices, decoding, calibration = batch.prices, batch.decoding, batch.plan.calibration
        empty = Forest.empty(len(decoding))
        none = Drafts(empty, empty, None, prices.undrafted_s, refusal=refusal)
        if self._lookup is None or not any(depths):
            return none
        allowances = self._allowances(batch, empty, depths)
        worth = [self._lookup.worth(allowance, calibration) for allowance in allowances]
        gains = [
            weight * each for weight, nodes in zip(requests.weights.tolist(), worth, strict=True) for each in nodes
        ]
        must_pay = all(s.policy.priced for s, depth in zip(decoding, depths, strict=True) if depth)
        margin = prices.second * prices.cost.lookup_s
        if not gains or (must_pay and prices.surplus(sorted(gains, reverse=True)) <= margin):  # Most steps end here.
            return none
        forest = self._lookup.graft(empty, allowances, calibration)
        drafts = self._pruned(batch, forest, requests, 0.0)
        assert drafts.pruning is not None
        gain = drafts.pruning.expected_tokens - len(decoding)
        if must_pay and gain - drafts.pruning.price * (drafts.predicted_verify_s - prices.undrafted_s) <= margin:
            return none
        found = [s.session_id for s, size in zip(decoding, drafts.forest.sizes.tolist(), strict=True) if size]
        return replace(drafts, sessions=frozenset(found))


def _obeying(sequences: list[Sequence], forest: Forest) -> Forest:
    """The forest without nodes that a request's grammar forbids: they could not be accepted."""
    if all(sequence.grammar is None for sequence in sequences):
        return forest
    trees = zip(sequences, forest.paths(), strict=True)
    keep = [s.grammar is None or s.grammar.allows(path) for s, paths in trees for path in paths]
    return forest.select(np.asarray(keep, np.bool_))
