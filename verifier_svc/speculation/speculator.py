"""The drafting half of a step: does drafting pay, ask the drafter or look the text up, keep the nodes that pay."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from planner.fast.acceptance import accepts
from planner.fast.cost import catches_up
from planner.fast.gate import Decision, DraftGate, Offer
from planner.fast.rule import Pruning, Requests, prune_batch
from treeline.config import LimitsConfig
from treeline.drafting import DraftLink, DraftReply, DraftRequest, DraftSequence, DraftStats
from treeline.forest import Forest, Source
from treeline.plan import Plan
from verifier_svc.engine.scheduler import Batch, Scheduler
from verifier_svc.engine.sequence import Sequence, weights_of
from verifier_svc.speculation.hidden_states import HiddenStates
from verifier_svc.speculation.prompt_lookup import Allowance, PromptLookup

PATIENCE, PATIENCE_FLOOR_S = 4.0, 0.01
"""A draft is waited for four times as long as predicted, and 10 ms. The prediction scatters by 15 % (the cost tracker's
noise), so only a drafter that is stuck is given up; a step without a draft loses no more than its gain."""
LOOKUP_MARGIN = 0.02
"""Share of plain decoding's tokens that looked-up nodes must bring: to walk and commit trees takes 0.3 to 0.7 ms of a
step (docs/decisions.md), 1 to 2 % of a CPU's."""


@dataclass(frozen=True)
class Drafts:
    """The trees of one step and how they came about; without trees, why.

    Attributes:
        kept: the trees of all decoding requests as they are verified.
        forest: the same before pruning.
        sessions: drafted requests, perhaps with an empty tree.
        pruning: None if nothing was drafted.
        stats: the drafter's own account; empty if it was not asked.
        draft_s: seconds that drafting took: messages, waiting for the drafter, pruning.
        predicted_verify_s: of the pass to come, by the plan.
        refusal: why nothing was drafted; empty if something was.
    """

    kept: Forest
    forest: Forest
    sessions: frozenset[int]
    pruning: Pruning | None
    stats: DraftStats
    draft_s: float
    predicted_verify_s: float
    refusal: str = ""


class Asked(NamedTuple):
    """A request that wants a draft, and how deep."""

    sequence: Sequence
    max_depth: int


class Speculator:
    """Owns the link to the drafter, the gate before it, and which sessions the drafter must still be told to drop."""

    def __init__(
        self,
        link: DraftLink | None,
        hidden_states: HiddenStates,
        scheduler: Scheduler,
        limits: LimitsConfig,
        timeout_s: float,
        looks_up: bool,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """
        Args:
            timeout_s: longest wait for a draft.
            looks_up: graft continuations from each request's own text into its tree.
        """
        self.link = link
        self.hidden_states = hidden_states
        self.gate = DraftGate()
        self._lookup = PromptLookup() if looks_up else None
        self._scheduler = scheduler
        self._limits = limits
        self._timeout_s = timeout_s
        self._clock = clock
        self._told: set[int] = set()  # sessions the drafter may hold, for all we know after a late draft
        self._unreleased: list[int] = []
        self._step_id = 0

    @property
    def ready(self) -> bool:
        return self.link is not None and self.link.ready

    @property
    def owes_release(self) -> bool:
        """Whether the drafter can be told now of requests that have ended."""
        return bool(self._unreleased) and self.ready

    def run(self, batch: Batch, plan: Plan) -> Drafts:
        """The trees to verify in this step; none if drafting is off, away, late or not worth it."""
        started_s = self._clock()
        self.hidden_states.follow(self.link.features if self.link else None)
        weights = weights_of(batch.decoding, started_s)
        asked, decision = self._choose(batch, plan)
        if not asked:
            self.release(plan)
            return self._looked_up(batch, weights, plan, decision.reason)
        messages = self._messages(asked, weights, plan)
        # Catching up a model that was not asked for long costs about a node's price a token.
        behind_tokens = sum([max(len(message.token_ids), len(message.features)) for message in messages])
        decision = decision._replace(expected_s=decision.expected_s + plan.cost.draft_node_s * behind_tokens)
        wait_s = PATIENCE_FLOOR_S + PATIENCE * 2**self.gate.lates * decision.expected_s
        reply = self._exchange(plan, messages, min(self._timeout_s, wait_s))
        if reply is None:
            late_s = self._clock() - started_s
            self.gate.late(late_s, self._clock())
            drafts = self._looked_up(batch, weights, plan, "the drafter did not answer in time")
            return replace(drafts, draft_s=late_s)
        self._note_held(messages, asked, reply)
        sessions = frozenset(message.session_id for message in messages)
        places = [place for place, s in enumerate(batch.decoding) if s.session_id in sessions]
        forest = reply.forest.spread(places, len(batch.decoding))
        if self._lookup is not None:
            for sequence in batch.decoding:
                self._lookup.read(sequence.session_id, sequence.token_ids)
            forest = self._grafted(self._lookup, batch.decoding, forest, plan)
        draft_s = self._clock() - started_s
        drafts = self._pruned(batch, forest, sessions, weights, plan, draft_s, reply.stats)
        drafts = replace(drafts, draft_s=self._clock() - started_s)  # pruning is part of what drafting takes
        if decision.requests:
            self._note_offer(batch, drafts, decision)
        return drafts

    def release(self, plan: Plan) -> None:
        """Tell the drafter which requests have ended, when there is nothing else to say."""
        if self.owes_release:
            self._exchange(plan, [], self._timeout_s)

    def forget(self, sequence: Sequence) -> None:
        """The request has ended: its session is to be released."""
        self.hidden_states.forget(sequence)
        if self._lookup is not None:
            self._lookup.forget(sequence.session_id)
        if sequence.session_id in self._told:
            self._told.remove(sequence.session_id)
            self._unreleased.append(sequence.session_id)

    def _choose(self, batch: Batch, plan: Plan) -> tuple[list[Asked], Decision]:
        """The requests to draft for: those of fixed policies always, the priced ones if the gate says so."""
        wanting = [Asked(s, depth) for s in batch.decoding if (depth := self._depth(s, plan)) > 0]
        if not wanting:
            return [], Decision(0, "no request of this step may draft")
        if not self.ready:
            return [], Decision(0, "no drafter")
        asked = [one for one in wanting if not one.sequence.policy.priced]
        priced = [one for one in wanting if one.sequence.policy.priced]
        if not priced:
            return asked, Decision(0)
        behind_tokens = sum([one.sequence.behind_tokens for one in priced])
        decision = self.gate.decide(len(priced), batch.prices, plan.cost, self._clock(), behind_tokens)
        if decision.requests < len(priced):
            # A probe is cheapest with the requests that have the least to catch up.
            priced.sort(key=lambda one: one.sequence.behind_tokens)
        chosen = {one.sequence.session_id for one in asked + priced[: decision.requests]}
        return [one for one in wanting if one.sequence.session_id in chosen], decision

    def _depth(self, sequence: Sequence, plan: Plan) -> int:
        """The deepest tree that is of use now. The last token to come needs no draft: it is the bonus token."""
        request, policy = sequence.request, sequence.policy
        if not self._scheduler.tree_nodes(sequence):
            return 0
        wanted = policy.layers(plan, len(self._scheduler.running), not request.sampling.greedy)
        depth = min(wanted, self._limits.max_tree_depth, sequence.remaining_tokens - 1)
        if policy.priced:
            depth = min(depth, plan.max_depth)
        return depth if request.max_depth is None else min(depth, request.max_depth)

    def _nodes(self, sequence: Sequence, plan: Plan) -> int:
        nodes = self._scheduler.tree_nodes(sequence)
        return min(nodes, plan.max_nodes) if sequence.policy.priced else nodes

    def _messages(self, asked: list[Asked], weights: dict[int, float], plan: Plan) -> list[DraftSequence]:
        features = self.hidden_states.unsent([one.sequence for one in asked])
        messages = []
        for (sequence, max_depth), unsent in zip(asked, features, strict=True):
            session_id, start = sequence.session_id, min(sequence.drafter_tokens, len(sequence.token_ids) - 1)
            self._told.add(session_id)
            messages.append(
                DraftSequence(
                    session_id=session_id,
                    start=start,
                    token_ids=sequence.token_ids[start:],
                    sampling=sequence.request.sampling,
                    policy=sequence.policy.spec,
                    max_nodes=self._nodes(sequence, plan),
                    max_depth=max_depth,
                    weight=weights[session_id],
                    features=unsent,
                    prompt_tokens=sequence.prompt_tokens,
                )
            )
        return messages

    def _exchange(self, plan: Plan, sequences: list[DraftSequence], timeout_s: float) -> DraftReply | None:
        assert self.link is not None
        self._step_id += 1
        # A late message arrives all the same, and a broken stream takes its sessions with it.
        released, self._unreleased = self._unreleased, []
        return self.link.draft(DraftRequest(self._step_id, plan, sequences, released), timeout_s)

    def _note_held(self, messages: list[DraftSequence], asked: list[Asked], reply: DraftReply) -> None:
        """What the drafter holds of each request now."""
        for message, (sequence, _) in zip(messages, asked, strict=True):
            held = reply.held.get(sequence.session_id)
            sequence.drafter_tokens = len(sequence.token_ids) if held is None else held
            if held is not None:
                self.hidden_states.lost(sequence)
            elif len(message.features):
                self.hidden_states.sent(sequence)

    def _pruned(
        self,
        batch: Batch,
        forest: Forest,
        sessions: frozenset[int],
        weights: dict[int, float],
        plan: Plan,
        draft_s: float,
        stats: DraftStats,
    ) -> Drafts:
        """What the rule keeps of the trees of all decoding requests. `sessions`: those that were drafted for."""
        requests = Requests(
            np.asarray([weights[s.session_id] for s in batch.decoding], np.float32),
            np.asarray([not s.request.sampling.greedy for s in batch.decoding]),
            np.asarray([s.policy.priced for s in batch.decoding]),
        )
        forest = _obeying(batch.decoding, forest)
        pruning = prune_batch(forest, requests, plan.calibration, batch.prices, draft_s)
        return Drafts(
            kept=forest.select(pruning.chosen),
            forest=forest,
            sessions=sessions,
            pruning=pruning,
            stats=stats,
            draft_s=draft_s,
            predicted_verify_s=pruning.predicted_verify_s,
        )

    def _note_offer(self, batch: Batch, drafts: Drafts, decision: Decision) -> None:
        """Tell the gate what drafting offered the priced requests, and what it took."""
        forest, pruning, stats = drafts.forest, drafts.pruning, drafts.stats
        assert pruning is not None
        priced = np.asarray([s.policy.priced for s in batch.decoding])[forest.tree_of]
        gains = pruning.gains[priced & (forest.sources != Source.NGRAM)]
        offer = Offer(decision.requests, gains, stats.layer_nodes)
        caught_up = catches_up(stats.catch_up_tokens, len(drafts.sessions))
        self.gate.drafted(offer, min(drafts.draft_s, decision.expected_s), caught_up)

    def _grafted(self, lookup: PromptLookup, decoding: list[Sequence], forest: Forest, plan: Plan) -> Forest:
        """The forest with continuations from the requests' own texts.

        The rule weighs them against the drafter's nodes. A fixed policy gets them only where it got no tree.
        """
        allowances = []
        for sequence, size in zip(decoding, forest.sizes.tolist(), strict=True):
            fits = sequence.policy.priced or not size
            nodes = self._scheduler.tree_nodes(sequence) - size if fits else 0
            sampled, depth = not sequence.request.sampling.greedy, self._depth(sequence, plan)
            allowances.append(Allowance(sequence.session_id, sampled, nodes, depth))
        return lookup.graft(forest, allowances, plan.calibration)

    def _looked_up(self, batch: Batch, weights: dict[int, float], plan: Plan, refusal: str) -> Drafts:
        """Continuations from the requests' own texts, if they pay: they need neither message nor model."""
        prices, decoding = batch.prices, batch.decoding
        empty = Forest.empty(len(decoding))
        none = Drafts(empty, empty, frozenset(), None, DraftStats(), 0.0, prices.undrafted_s, refusal)
        wanting = [s for s in decoding if self._depth(s, plan) > 0]
        if self._lookup is None or not wanting:
            return none
        probs = np.asarray([self._lookup.read(s.session_id, s.token_ids) for s in wanting], np.float32)
        if not probs.any():
            return none
        must_pay, margin = all(s.policy.priced for s in wanting), LOOKUP_MARGIN * len(decoding)
        if must_pay:
            sampled = np.asarray([not s.request.sampling.greedy for s in wanting])
            sources = np.full(len(wanting), Source.NGRAM, np.uint8)
            first = accepts(plan.calibration, sources, np.asarray(1), probs, sampled) * (probs > 0)
            if (first * [weights[s.session_id] for s in wanting]).max() < prices.least_gain(margin):
                return none
        for sequence in decoding:
            self._lookup.read(sequence.session_id, sequence.token_ids)
        forest = self._grafted(self._lookup, decoding, empty, plan)
        found = frozenset(s.session_id for s, size in zip(decoding, forest.sizes.tolist(), strict=True) if size)
        drafts = self._pruned(batch, forest, found, weights, plan, 0.0, DraftStats())
        assert drafts.pruning is not None
        gain = drafts.pruning.expected_tokens - len(decoding)
        pays = gain - drafts.pruning.price * (drafts.predicted_verify_s - prices.undrafted_s) > margin
        return drafts if pays or not must_pay else none


def _obeying(sequences: list[Sequence], forest: Forest) -> Forest:
    """The forest without what a request's grammar forbids: it could not be accepted."""
    if all(sequence.grammar is None for sequence in sequences):
        return forest
    trees = zip(sequences, forest.paths(), strict=True)
    keep = [s.grammar is None or s.grammar.allows(path) for s, paths in trees for path in paths]
    return forest.select(np.asarray(keep, np.bool_))
