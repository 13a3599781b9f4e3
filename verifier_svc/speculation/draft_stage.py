"""The drafting half of a step: is it worth it, ask the drafter, keep the nodes that are worth verifying."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from planner.fast.cost import as_decoded, pass_s
from planner.fast.draft_costs import catches_up
from planner.fast.gate import Decision, DraftGate
from planner.fast.rule import BatchState
from treeline.config import LimitsConfig
from treeline.drafting import ALL_LAYERS, DraftLink, DraftReply, DraftRequest, DraftSequence
from treeline.forest import Forest
from treeline.plan import Plan
from treeline.tree import DraftTree
from verifier_svc.engine.scheduler import Batch, Scheduler
from verifier_svc.engine.sequence import Sequence, weights_of
from verifier_svc.engine.walk import Walk
from verifier_svc.speculation.copy_stage import CopyStage
from verifier_svc.speculation.drafts import Drafts, pruned
from verifier_svc.speculation.hidden_states import HiddenStates
from verifier_svc.speculation.patience import Patience


class Asked(NamedTuple):
    """A request that wants a draft, and how deep."""

    sequence: Sequence
    max_depth: int


class DraftStage:
    """Owns the link to the drafter, the gate before it, and what the drafter has still to hear."""

    def __init__(
        self,
        link: DraftLink | None,
        hidden_states: HiddenStates,
        scheduler: Scheduler,
        limits: LimitsConfig,
        timeout_s: float,
        copies: bool,
        clock: Callable[[], float] = time.perf_counter,
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
        self._idle_s = self._ended_s = 0.0
        self._gate = DraftGate()
        self._copies = CopyStage() if copies else None

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
        if self._ended_s:
            self._idle_s += started_s - self._ended_s
        self.hidden_states.follow(self.link.features if self.link else None)
        state = BatchState(
            base_tokens=len(batch.decoding) + as_decoded(plan.cost, batch.prefill_tokens),
            context_tokens=batch.context_tokens // max(1, batch.sequences),
            draft_s=0.0,
            waiting_startable=self._scheduler.free_slots,
            prompts_go_on=batch.prompts_go_on,
        )
        asked, decision = self._choose(batch.decoding, state, plan)
        if not asked:
            self.release(plan)
            return self._undrafted(batch.decoding, state, plan, decision.reason)
        weights = weights_of(batch.decoding, started_s)
        messages = self._messages(asked, weights, decision, plan)
        # A model that was not asked for long has much to catch up with, at about a node's price a token.
        told = sum([max(len(message.token_ids), len(message.features)) for message in messages])
        expected_s = decision.expected_s + plan.cost.draft_node_s * told
        reply = self._exchange(plan, messages, self._patience.limit_s(expected_s))
        draft_s = self._clock() - started_s
        if reply is None:
            self._patience.late()
            self._gate.late(draft_s, self._worked_s())
            late = state._replace(draft_s=draft_s)
            return self._undrafted(batch.decoding, late, plan, "the drafter did not answer in time")
        self._patience.came()
        self._note_held(messages, asked, reply)
        forest = _forest(batch.decoding, messages, reply)
        drafted = {one.sequence.session_id for one in asked}
        state = state._replace(draft_s=draft_s)
        drafts = pruned(batch.decoding, forest, drafted, weights, state, plan, reply.stats)
        drafts = replace(drafts, draft_s=self._clock() - started_s)  # pruning is part of what drafting takes
        if decision.requests:
            requests = sum([one.sequence.policy.priced for one in asked])
            self._note_offered(batch.decoding, drafts, Decision(requests, "", decision.layers, expected_s))
        return drafts

    def _undrafted(self, decoding: list[Sequence], state: BatchState, plan: Plan, refusal: str) -> Drafts:
        """What can be had without the drafter."""
        if self._copies is not None:
            running = len(self._scheduler.running)

            def longest(sequence: Sequence) -> int:
                return min(self._nodes(sequence, plan), self._depth(sequence, running, plan))

            copied = self._copies.run(decoding, longest, state, plan, self._clock())
            if copied is not None:
                return copied
        verify_s = pass_s(plan.cost, max(1, len(decoding)), state.context_tokens, state.base_tokens)
        return Drafts(draft_s=state.draft_s, predicted_verify_s=verify_s, refusal=refusal)

    def learn(self, sequences: list[Sequence], drafts: Drafts, walks: list[Walk]) -> None:
        """What became of each sequence's tree in this step; one walk per sequence, in order."""
        self._ended_s = self._clock()
        if drafts.pruning is None:
            return
        for sequence, expected, walk in zip(sequences, drafts.pruning.expected_nodes, walks, strict=True):
            if sequence.session_id in drafts.trees:
                sequence.acceptance = sequence.acceptance.after(expected, len(walk.accepted))

    def forget(self, sequence: Sequence) -> None:
        """The request has ended: its session is to be released."""
        self.hidden_states.forget(sequence)
        if self._copies is not None:
            self._copies.forget(sequence)
        if sequence.session_id in self._told:
            self._told.remove(sequence.session_id)
            self._unreleased.append(sequence.session_id)

    def release(self, plan: Plan) -> None:
        """Tell the drafter which requests have ended, when nothing else is to be said."""
        if self.owes_release:
            self._exchange(plan, [], self._patience.limit_s(math.inf))

    def _worked_s(self) -> float:
        """Seconds, those between steps left out: what probes may take is a share of work, not of waiting for it."""
        return self._clock() - self._idle_s

    def _choose(self, decoding: list[Sequence], state: BatchState, plan: Plan) -> tuple[list[Asked], Decision]:
        """The requests to draft for in this step, and what was decided of those whose drafting has a price.

        Fixed policies always want their trees; for the others the gate decides.
        """
        running = len(self._scheduler.running)
        wanting = [Asked(s, depth) for s in decoding if (depth := self._depth(s, running, plan)) > 0]
        if not wanting:
            return [], Decision(0, "no request of this step may draft")
        if not self.ready:
            return [], Decision(0, "no drafter")
        asked = [one for one in wanting if not one.sequence.policy.priced]
        smart = [one for one in wanting if one.sequence.policy.priced]
        if not smart:
            return asked, Decision(0)
        behind = sum([one.sequence.behind_tokens for one in smart])
        now_s, connected = self._worked_s(), bool(asked)
        decision = self._gate.decide(len(smart), len(decoding), state, plan, connected, now_s, behind)
        if decision.requests < len(smart):
            # A probe is cheapest with those whom the drafter has followed furthest.
            smart.sort(key=lambda one: one.sequence.behind_tokens)
        return asked + smart[: decision.requests], decision

    def _depth(self, sequence: Sequence, running: int, plan: Plan) -> int:
        """The deepest tree that is of use now. The last token to come needs no draft: it is the bonus token."""
        request, policy = sequence.request, sequence.policy
        wanted = policy.layers(plan, running, not request.sampling.greedy)
        depth = min(wanted, self._limits.max_tree_depth, sequence.remaining_tokens - 1)
        if policy.priced:
            depth = min(depth, plan.max_depth)
        return depth if request.max_depth is None else min(depth, request.max_depth)

    def _nodes(self, sequence: Sequence, plan: Plan) -> int:
        nodes = self._scheduler.tree_nodes(sequence.request)
        return min(nodes, plan.max_nodes) if sequence.policy.priced else nodes

    def _messages(
        self, asked: list[Asked], weights: dict[int, float], decision: Decision, plan: Plan
    ) -> list[DraftSequence]:
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
                    max_layers=decision.layers if sequence.policy.priced else ALL_LAYERS,
                    weight=weights[session_id] * sequence.acceptance.ratio,
                    features=unsent,
                )
            )
        return messages

    def _exchange(self, plan: Plan, sequences: list[DraftSequence], limit_s: float) -> DraftReply | None:
        assert self.link is not None
        self._step_id += 1
        # A late message arrives all the same, and a broken stream takes its sessions with it.
        released, self._unreleased = self._unreleased, []
        return self.link.draft(DraftRequest(self._step_id, plan, sequences, released), limit_s)

    def _note_held(self, messages: list[DraftSequence], asked: list[Asked], reply: DraftReply) -> None:
        """What the drafter has of each request it was asked for."""
        for message, (sequence, _) in zip(messages, asked, strict=True):
            held = reply.held.get(sequence.session_id)
            sequence.drafter_tokens = len(sequence.token_ids) if held is None else held
            if held is not None:
                self.hidden_states.lost(sequence)
            elif len(message.features):
                self.hidden_states.sent(sequence)

    def _note_offered(self, decoding: list[Sequence], drafts: Drafts, decision: Decision) -> None:
        """What drafting offered those whose nodes could be pruned, and what it took."""
        forest, pruning, stats = drafts.forest, drafts.pruning, drafts.stats
        assert forest is not None
        assert pruning is not None
        layers, gains = forest.model_layers()[pruning.prunable], pruning.gains
        behind = catches_up(stats.catch_up_tokens, len(drafts.trees))
        self._gate.drafted(decision, gains, layers, stats.layer_nodes, drafts.draft_s, self._worked_s(), behind)


def _forest(decoding: list[Sequence], messages: list[DraftSequence], reply: DraftReply) -> Forest:
    """The trees of all that decode; one larger than was allowed is not to be trusted with our memory."""
    trees = dict.fromkeys([s.session_id for s in decoding], DraftTree.empty())
    depths = dict.fromkeys(trees, 0)
    for message in messages:
        tree = reply.trees.get(message.session_id, DraftTree.empty())
        if len(tree) <= message.max_nodes:
            trees[message.session_id], depths[message.session_id] = tree, message.max_depth
    forest = Forest.of(list(trees.values()))
    too_deep = (forest.depths > np.asarray(list(depths.values()))[forest.tree_of]).nonzero()[0]
    if not len(too_deep):
        return forest
    cut = {*forest.tree_of[too_deep].tolist()}
    return Forest.of([DraftTree.empty() if index in cut else tree for index, tree in enumerate(forest.trees)])
