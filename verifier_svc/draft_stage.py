"""The drafting half of a step: is it worth it, ask the drafter, keep the nodes that are worth verifying."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from planner.rule import BatchState, Candidate, Pruning, prune_batch, worth_drafting
from treeline.config import LimitsConfig
from treeline.drafting import DraftLink, DraftReply, DraftRequest, DraftSequence, DraftStats
from treeline.plan import Plan
from treeline.tree import DraftTree
from verifier_svc.scheduler import Batch, Scheduler
from verifier_svc.sequence import Sequence

PROBE_INTERVAL_STEPS = 32
"""While drafting does not pay, it is tried this often, so that the planner can see when it pays again."""


@dataclass(frozen=True)
class Drafts:
    """The pruned trees of one step, by session id.

    Attributes:
        drafted_nodes: nodes grown for each session, before pruning.
        pruning: None if nothing was drafted.
        draft_s: seconds waited for the drafter.
        refusal: why nothing was drafted, for people; empty if something was.
    """

    trees: dict[int, DraftTree] = field(default_factory=dict)
    drafted_nodes: dict[int, int] = field(default_factory=dict)
    pruning: Pruning | None = None
    stats: DraftStats = field(default_factory=DraftStats)
    draft_s: float = 0.0
    refusal: str = ""

    def tree(self, sequence: Sequence) -> DraftTree:
        return self.trees.get(sequence.session_id, DraftTree.empty())


class DraftStage:
    """Owns the link to the drafter, and knows which ended sessions it has still to be told of."""

    def __init__(self, link: DraftLink | None, scheduler: Scheduler, limits: LimitsConfig, timeout_s: float) -> None:
        self.link = link
        self.unreleased: list[int] = []
        self._scheduler = scheduler
        self._limits = limits
        self._timeout_s = timeout_s
        self._step_id = 0
        self._steps_undrafted = 0

    @property
    def ready(self) -> bool:
        return self.link is not None and self.link.ready

    def run(self, batch: Batch, plan: Plan) -> Drafts:
        """The trees to verify in this step; without any if drafting is off, away, late or not worth it."""
        wanting = [s for s in batch.decoding if self._allowance(s, plan)[0] > 0]
        refusal = self._refusal(wanting, batch, plan)
        if refusal:
            self.release()
            return Drafts(refusal=refusal)
        started_s = time.perf_counter()
        reply = self._exchange([self._message(s, plan) for s in wanting])
        draft_s = time.perf_counter() - started_s
        if reply is None:
            return Drafts(draft_s=draft_s, refusal="the drafter did not answer in time")
        for sequence in wanting:
            sequence.drafter_tokens = reply.held.get(sequence.session_id, len(sequence.token_ids))
        return self._prune(wanting, reply, batch, plan, draft_s)

    def forget(self, sequence: Sequence) -> None:
        """The request has ended: its session is to be released."""
        if sequence.drafter_tokens:
            self.unreleased.append(sequence.session_id)

    def release(self) -> None:
        """Tell the drafter which requests have ended, when nothing else is to be said."""
        if not self.ready:
            self.unreleased = []  # a drafter that is away has lost its sessions with the stream
        elif self.unreleased:
            self._exchange([])

    def _refusal(self, wanting: list[Sequence], batch: Batch, plan: Plan) -> str:
        """Why not to draft now, or nothing."""
        if not wanting:
            return "no request of this step may draft"
        if not self.ready:
            return "no drafter"
        policies, weights = [s.policy for s in wanting], [s.request.weight for s in wanting]
        pays = worth_drafting(policies, weights, self._state(batch, 0.0), plan)
        self._steps_undrafted = 0 if pays else self._steps_undrafted + 1
        if pays or self._steps_undrafted % PROBE_INTERVAL_STEPS == 0:
            return ""
        return "drafting does not pay at this load"

    def _allowance(self, sequence: Sequence, plan: Plan) -> tuple[int, int]:
        """(nodes, depth) this request may use now. The last token to come needs no draft: it is the bonus token."""
        request, policy = sequence.request, sequence.policy
        depth = min(policy.max_depth, self._limits.max_tree_depth, sequence.remaining_tokens - 1)
        nodes = self._scheduler.tree_nodes(sequence.request)
        if policy.prunes:
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

    def _message(self, sequence: Sequence, plan: Plan) -> DraftSequence:
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
            weight=sequence.request.weight,
        )

    def _exchange(self, sequences: list[DraftSequence]) -> DraftReply | None:
        assert self.link is not None
        self._step_id += 1
        reply = self.link.draft(DraftRequest(self._step_id, sequences, self.unreleased), self._timeout_s)
        if reply is not None:
            self.unreleased = []
        return reply

    def _prune(self, wanting: list[Sequence], reply: DraftReply, batch: Batch, plan: Plan, draft_s: float) -> Drafts:
        candidates = []
        for sequence in wanting:
            tree = reply.trees.get(sequence.session_id, DraftTree.empty())
            max_nodes, max_depth = self._allowance(sequence, plan)
            if len(tree) > max_nodes or (len(tree) and int(tree.depths.max()) > max_depth):
                tree = DraftTree.empty()  # more than was allowed: not to be trusted with our memory
            sampled = not sequence.request.sampling.greedy
            candidates.append(Candidate(tree, sequence.policy, sequence.request.weight, sampled))
        pruning = prune_batch(candidates, self._state(batch, draft_s), plan)
        kept = [candidate.tree.select(keep) for candidate, keep in zip(candidates, pruning.keep, strict=True)]
        sessions = [s.session_id for s in wanting]
        return Drafts(
            trees=dict(zip(sessions, kept, strict=True)),
            drafted_nodes=dict(zip(sessions, (len(c.tree) for c in candidates), strict=True)),
            pruning=pruning,
            stats=reply.stats,
            draft_s=draft_s,
        )
