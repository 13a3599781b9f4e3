"""The trees of one step, as they are verified, and how they came about."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from planner.fast.rule import BatchState, Candidate, Pruning, prune_batch
from treeline.drafting import DraftStats
from treeline.forest import Forest
from treeline.plan import Plan
from treeline.tree import DraftTree
from verifier_svc.engine.sequence import Sequence

NO_STATS = DraftStats()


@dataclass(frozen=True)
class Drafts:
    """The pruned trees of one step, by session id.

    Attributes:
        drafted_nodes: nodes grown for each session, before pruning.
        forest: the trees of all decoding sequences, before pruning; None if nothing was drafted, as `pruning` is.
        draft_s: seconds that drafting took: messages, waiting for the drafter, pruning; 0 if nobody was asked.
        predicted_verify_s: of the pass to come, by the plan's cost model.
        refusal: why nothing was drafted, for people; empty if something was.
    """

    trees: dict[int, DraftTree] = field(default_factory=dict)
    drafted_nodes: dict[int, int] = field(default_factory=dict)
    forest: Forest | None = None
    pruning: Pruning | None = None
    stats: DraftStats = NO_STATS
    draft_s: float = 0.0
    predicted_verify_s: float = 0.0
    refusal: str = ""

    def tree(self, sequence: Sequence) -> DraftTree:
        return self.trees.get(sequence.session_id, DraftTree.empty())


def pruned(
    decoding: list[Sequence],
    forest: Forest,
    drafted: Collection[int],
    weights: Mapping[int, float],
    state: BatchState,
    plan: Plan,
    stats: DraftStats = NO_STATS,
) -> Drafts:
    """What the rule keeps of the trees of all that decode. `drafted`: the sessions that were drafted for."""
    candidates = [
        Candidate(s.policy, weights[s.session_id], not s.request.sampling.greedy, s.acceptance.ratio) for s in decoding
    ]
    pruning = prune_batch(forest, candidates, state, plan)
    kept, sizes = forest.select(pruning.chosen), forest.sizes
    sessions = [s.session_id for s in decoding]
    return Drafts(
        trees={session: tree for session, tree in zip(sessions, kept, strict=True) if session in drafted},
        drafted_nodes={session: size for session, size in zip(sessions, sizes, strict=True) if session in drafted},
        forest=forest,
        pruning=pruning,
        stats=stats,
        draft_s=state.draft_s,
        predicted_verify_s=pruning.predicted_verify_s,
    )
