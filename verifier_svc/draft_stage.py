"""The drafting half of a step: is it worth it, ask the drafter, keep the nodes that are worth verifying."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from planner.cost import verify_seconds
from planner.draft_costs import catches_up
from planner.gate import Decision, DraftGate
from planner.rule import BatchState, Candidate, Pruning, prune_batch
from treeline.config import LimitsConfig
from treeline.drafting import ALL_LAYERS, NO_FEATURES, DraftLink, DraftReply, DraftRequest, DraftSequence, DraftStats
from treeline.plan import Plan
from treeline.tree import ROOT, DraftTree, Source
from verifier_svc.draft_history import LookupGains, Patience
from verifier_svc.hidden_states import HiddenStates
from verifier_svc.scheduler import Batch, Scheduler
from verifier_svc.sequence import Sequence
from verifier_svc.walk import Walk


@dataclass(frozen=True)
class Drafts:
    """The pruned trees of one step, by session id.

    Attributes:
        drafted_nodes: nodes grown for each session, before pruning.
        pruning: None if nothing was drafted.
        draft_s: seconds that drafting took: messages, waiting for the drafter, pruning; 0 if nobody was asked.
        predicted_verify_s: of the pass to come, by the plan's cost model.
        refusal: why nothing was drafted, for people; empty if something was.
    """

    trees: dict[int, DraftTree] = field(default_factory=dict)
    drafted_nodes: dict[int, int] = field(default_factory=dict)
    pruning: Pruning | None = None
    stats: DraftStats = field(default_factory=DraftStats)
    draft_s: float = 0.0
    predicted_verify_s: float = 0.0
    refusal: str = ""

    def tree(self, sequence: Sequence) -> DraftTree:
        return self.trees.get(sequence.session_id, DraftTree.empty())


class DraftStage:
    """Owns the link to the drafter and the gate before it, and what the drafter has still to hear: ended sessions, the
    target's features."""

    def __init__(
        self,
        link: DraftLink | None,
        hidden_states: HiddenStates,
        scheduler: Scheduler,
        limits: LimitsConfig,
        timeout_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.link = link
        self.hidden_states = hidden_states
        self._told: set[int] = set()  # sessions the drafter may hold, for all we know after a late draft
        self._unreleased: list[int] = []
        self._scheduler = scheduler
        self._limits = limits
        self._patience = Patience(timeout_s)
        self._clock = clock
        self._step_id = 0
        self._gate = DraftGate()
        self._lookups = LookupGains()

    @property
    def ready(self) -> bool:
        return self.link is not None and self.link.ready

    @property
    def owes_release(self) -> bool:
        """Whether the drafter can be told now of requests that have ended."""
        return bool(self._unreleased) and self.ready

    def run(self, batch: Batch, plan: Plan) -> Drafts:
        """The trees to verify in this step; without any if drafting is off, away, late or not worth it."""
        started_s = self._clock()
        self.hidden_states.follow(self.link.features if self.link else None)
        weights = _weights(batch.decoding, started_s)
        asked, decision = self._choose(batch, plan, started_s)
        if not asked:
            self.release()
            return Drafts(predicted_verify_s=self._plain_verify_s(batch, plan), refusal=decision.reason)
        modelled = [s for s in asked if _layers(s, decision)]
        features = {s.session_id: f for s, f in zip(modelled, self.hidden_states.unsent(modelled), strict=True)}
        messages = [
            self._message(s, weights[s.session_id], features.get(s.session_id, NO_FEATURES), _layers(s, decision), plan)
            for s in asked
        ]
        # A model that was not asked for long has much to catch up with, at about a node's price a token.
        told = sum(max(len(message.token_ids), len(message.features)) for message in messages if message.max_layers)
        decision = replace(decision, expected_s=decision.expected_s + plan.cost.draft_node_s * told)
        self._told.update(s.session_id for s in asked)
        reply = self._exchange(messages, self._patience.limit_s(decision.expected_s))
        draft_s = self._clock() - started_s
        if reply is None:
            self._patience.late()
            self._gate.late(draft_s, self._clock())
            predicted_s = self._plain_verify_s(batch, plan)
            return Drafts(draft_s=draft_s, predicted_verify_s=predicted_s, refusal="the drafter did not answer in time")
        self._patience.came()
        for sequence in asked:
            sequence.drafter_tokens = reply.held.get(sequence.session_id, len(sequence.token_ids))
            if sequence.session_id in reply.held:
                self.hidden_states.lost(sequence)
            elif len(features.get(sequence.session_id, ())):
                self.hidden_states.sent(sequence)
        drafts, offered = self._prune(batch, asked, weights, reply, plan, draft_s)
        now_s = self._clock()
        # Pruning is part of what drafting takes.
        drafts = replace(drafts, draft_s=now_s - started_s)
        if decision.requests and drafts.pruning:
            learnt = replace(decision, requests=sum(s.policy.prunes for s in asked))
            layers, gains = _node_layers(offered), drafts.pruning.gains
            stats, behind = drafts.stats, catches_up(drafts.stats.catch_up_tokens, len(asked))
            self._gate.drafted(learnt, gains, layers, stats.layer_nodes, drafts.draft_s, now_s, behind)
            tree_of = np.repeat(np.arange(len(offered)), [len(tree) for tree in offered])
            found = np.bincount(tree_of, gains * (layers == 0), len(offered)).tolist()
            pruned = [s.session_id for s in batch.decoding if s.policy.prunes]
            self._lookups.observe({i: gain for i, gain in zip(pruned, found, strict=True) if i in drafts.trees})
        return drafts

    def learn(self, sequences: list[Sequence], drafts: Drafts, walks: list[Walk]) -> None:
        """What became of each sequence's tree in this step; one walk per sequence, in order."""
        if drafts.pruning is None:
            return
        for sequence, expected, walk in zip(sequences, drafts.pruning.expected_nodes, walks, strict=True):
            if sequence.session_id in drafts.trees:
                sequence.acceptance = sequence.acceptance.after(expected, len(walk.accepted))

    def forget(self, sequence: Sequence) -> None:
        """The request has ended: its session is to be released."""
        self.hidden_states.forget(sequence)
        self._lookups.forget(sequence.session_id)
        if sequence.session_id in self._told:
            self._told.remove(sequence.session_id)
            self._unreleased.append(sequence.session_id)

    def release(self) -> None:
        """Tell the drafter which requests have ended, when nothing else is to be said."""
        if self.owes_release:
            self._exchange([], self._patience.limit_s(math.inf))

    def _choose(self, batch: Batch, plan: Plan, now_s: float) -> tuple[list[Sequence], Decision]:
        """The requests to draft for in this step, and what was decided of those whose drafting has a price.

        Fixed policies always want their trees; for the others the gate decides.
        """
        wanting = [s for s in batch.decoding if self._allowance(s, plan)[0] > 0]
        if not wanting:
            return [], Decision(0, "no request of this step may draft")
        if not self.ready:
            return [], Decision(0, "no drafter")
        asked = [s for s in wanting if not s.policy.prices_drafting]
        smart = [s for s in wanting if s.policy.prices_drafting]
        if not smart:
            return asked, Decision(0)
        state, sequences = self._state(batch, 0.0), len(batch.decoding)
        lookups = self._lookups.ratio([s.session_id for s in smart], self._gate.lookup_gain)
        decision = self._gate.decide(len(smart), sequences, state, plan, bool(asked), now_s, lookups)
        # A probe is cheapest with those whom the drafter has followed furthest.
        smart.sort(key=lambda s: len(s.token_ids) - s.drafter_tokens)
        return asked + smart[: decision.requests], decision

    def _allowance(self, sequence: Sequence, plan: Plan) -> tuple[int, int]:
        """(nodes, depth) this request may use now. The last token to come needs no draft: it is the bonus token."""
        request, policy = sequence.request, sequence.policy
        wanted = policy.layers(plan, len(self._scheduler.running), not request.sampling.greedy)
        depth = min(wanted, self._limits.max_tree_depth, sequence.remaining_tokens - 1)
        nodes = self._scheduler.tree_nodes(sequence.request)
        if policy.prices_drafting:
            depth, nodes = min(depth, plan.max_depth), min(nodes, plan.max_nodes)
        if request.max_depth is not None:
            depth = min(depth, request.max_depth)
        return (nodes, depth) if depth > 0 else (0, 0)

    def _state(self, batch: Batch, draft_s: float) -> BatchState:
        return BatchState(
            base_tokens=len(batch.decoding) + batch.prefill_tokens,
            context_tokens=batch.context_tokens // max(1, batch.sequences),
            draft_s=draft_s,
            waiting_startable=self._scheduler.free_slots,
        )

    def _plain_verify_s(self, batch: Batch, plan: Plan) -> float:
        state = self._state(batch, 0.0)
        tokens, sequences = state.base_tokens, max(1, len(batch.decoding))
        return float(verify_seconds(plan.cost, sequences, state.context_tokens, tokens)[tokens])

    def _message(
        self, sequence: Sequence, weight: float, features: NDArray[np.uint16], max_layers: int, plan: Plan
    ) -> DraftSequence:
        max_nodes, max_depth = self._allowance(sequence, plan)
        start = min(sequence.drafter_tokens, len(sequence.token_ids) - 1)
        return DraftSequence(
            session_id=sequence.session_id,
            start=start,
            token_ids=sequence.token_ids[start:],
            sampling=sequence.request.sampling,
            policy=sequence.policy.spec,
            max_nodes=max_nodes,
            max_depth=max_depth,
            max_layers=max_layers,
            weight=weight * sequence.acceptance.ratio,
            features=features,
        )

    def _exchange(self, sequences: list[DraftSequence], limit_s: float) -> DraftReply | None:
        assert self.link is not None
        self._step_id += 1
        # A late message arrives all the same, and a broken stream takes its sessions with it.
        released, self._unreleased = self._unreleased, []
        return self.link.draft(DraftRequest(self._step_id, sequences, released), limit_s)

    def _prune(
        self,
        batch: Batch,
        asked: list[Sequence],
        weights: dict[int, float],
        reply: DraftReply,
        plan: Plan,
        draft_s: float,
    ) -> tuple[Drafts, list[DraftTree]]:
        """What to verify, and the trees that could have been pruned."""
        allowed = {s.session_id: self._allowance(s, plan) for s in asked}
        candidates = []
        for sequence in batch.decoding:
            tree = reply.trees.get(sequence.session_id, DraftTree.empty())
            max_nodes, max_depth = allowed.get(sequence.session_id, (0, 0))
            if len(tree) > max_nodes or (len(tree) > max_depth and int(tree.depths.max()) > max_depth):
                tree = DraftTree.empty()  # more than was allowed: not to be trusted with our memory
            sampled = not sequence.request.sampling.greedy
            weight, ratio = weights[sequence.session_id], sequence.acceptance.ratio
            candidates.append(Candidate(tree, sequence.policy, weight, sampled, ratio))
        pruning = prune_batch(candidates, self._state(batch, draft_s), plan)
        kept = [candidate.tree.select(keep) for candidate, keep in zip(candidates, pruning.keep, strict=True)]
        sessions = [s.session_id for s in batch.decoding]
        drafts = Drafts(
            trees={session: tree for session, tree in zip(sessions, kept, strict=True) if session in allowed},
            drafted_nodes={s: len(c.tree) for s, c in zip(sessions, candidates, strict=True) if s in allowed},
            pruning=pruning,
            stats=reply.stats,
            predicted_verify_s=pruning.predicted_verify_s,
        )
        return drafts, [candidate.tree for candidate in candidates if candidate.policy.prunes]


def _layers(sequence: Sequence, decision: Decision) -> int:
    """Layers of the draft model that may be run for a request."""
    return decision.layers if sequence.policy.prices_drafting else ALL_LAYERS


def _node_layers(trees: list[DraftTree]) -> NDArray[np.intp]:
    """intp [nodes]: layers of the draft model that each node took: the depth of the last model's node on its path."""
    sizes = [len(tree) for tree in trees]
    total, first = sum(sizes), np.repeat(np.cumsum(sizes) - sizes, sizes)
    parents = np.concatenate([tree.parents for tree in trees])
    parents = np.where(parents == ROOT, total, parents + first)
    layers = np.zeros(total + 1, np.intp)
    for_lookups = np.concatenate([tree.sources for tree in trees]) == Source.NGRAM
    layers[:-1] = np.where(for_lookups, 0, np.concatenate([tree.depths for tree in trees]))
    while not np.array_equal(layers[:-1], below := np.maximum(layers[:-1], layers[parents])):
        layers[:-1] = below
    return layers[:-1]


def _weights(sequences: list[Sequence], now_s: float) -> dict[int, float]:
    """What a token of each request is worth, by session. 1 on average: weights shift nodes, and leave goodput as is."""
    weights = [sequence.weight(now_s) for sequence in sequences]
    total = sum(weights)
    return {s.session_id: w * len(sequences) / total for s, w in zip(sequences, weights, strict=True)}
