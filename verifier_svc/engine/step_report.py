"""What a step reports: its record to the planner, log-probabilities and explanations to the streams."""

from __future__ import annotations

import math
import time

import torch

from lm.sampling import logprobs
from treeline.step_record import NodeOutcomes, StepRecord
from verifier_svc.engine.request import Chunk, ExplainedNode, NodeFate, StepExplanation, TokenLogprobs
from verifier_svc.engine.scheduler import Batch
from verifier_svc.engine.sequence import Sequence
from verifier_svc.engine.walk import Verified, Walk, observed
from verifier_svc.speculation.speculator import Drafts


def step_record(
    step_id: int, batch: Batch, drafts: Drafts, verified: Verified, chunks: list[Chunk], step_s: float
) -> StepRecord:
    """The record of a step that took `step_s` and brought `chunks`."""
    walks, pruning = verified.walks[: len(batch.decoding)], drafts.pruning
    firsts, later = [c for c in chunks if c.first], [c for c in chunks if not c.first and c.token_ids]
    outcomes = NodeOutcomes.empty()
    if pruning is not None:
        sampled = [not s.request.sampling.greedy for s in batch.decoding]
        outcomes = observed(drafts.forest, pruning.chosen, walks, sampled)
    return StepRecord(
        step_id=step_id,
        unix_s=time.time(),
        plan_version=batch.plan.version,
        sequences=len(batch.decoding),
        tokens=len(batch.decoding) + len(drafts.kept) + batch.prefill_tokens,
        prefill_tokens=batch.prefill_tokens,
        context_tokens=batch.context_tokens,
        drafted_nodes=len(drafts.forest),
        verified_nodes=len(drafts.kept),
        accepted_nodes=sum([len(walk.accepted) for walk in walks]),
        emitted_tokens=sum([len(walk.tokens) for walk in verified.walks]),
        running=batch.running,
        waiting=batch.waiting,
        startable=batch.prices.startable,
        draft_s=drafts.draft_s,
        drafter_s=drafts.stats.draft_s,
        draft_layer_nodes=drafts.stats.layer_nodes,
        verify_s=verified.verify_s,
        predicted_verify_s=drafts.predicted_verify_s,
        step_s=step_s,
        goodput=pruning.goodput if pruning else 0.0,
        price=pruning.price if pruning else 0.0,
        node_s=pruning.node_s if pruning else 0.0,
        outcomes=outcomes,
        catch_up_tokens=drafts.stats.catch_up_tokens,
        drafted_requests=len(drafts.sessions),
        pass_how=verified.pass_how,
        gaps=tuple([(c.waited_s, len(c.token_ids)) for c in later]),
        gap_priority=tuple([c.priority for c in later]),
        first_token_s=tuple([c.waited_s for c in firsts]),
        first_token_priority=tuple([c.priority for c in firsts]),
        preempted=len(batch.preempted),
    )


def explanation(sequence: Sequence, place: int, drafts: Drafts, walk: Walk, record: StepRecord) -> StepExplanation:
    """Explains this step's tokens. `place`: index of the sequence and its `walk` in the pass."""
    drafted, kept = drafts.sizes(place)
    return StepExplanation(
        drafted_nodes=drafted,
        verified_nodes=kept,
        accepted_nodes=len(walk.accepted),
        price=record.price,
        plan_version=record.plan_version,
        batch_sequences=record.sequences,
        batch_tokens=record.tokens,
        draft_s=record.draft_s,
        verify_s=record.verify_s,
        step_s=record.step_s,
        reason=_reason(sequence, drafts),
        nodes=_explained_nodes(drafts, place, walk) if sequence.request.explain_tree and drafted else (),
    )


def _explained_nodes(drafts: Drafts, place: int, walk: Walk) -> tuple[ExplainedNode, ...]:
    """All drafted nodes of the decoding request at `place`, with their fates.

    The walk indexes kept nodes only: if nodes 0 and 2 are kept, its node 1 is the tree's node 2.
    """
    assert drafts.pruning is not None
    tree, first = drafts.forest.tree(place), drafts.forest.starts.item(place)
    nodes = slice(first, first + len(tree))
    chosen = drafts.pruning.chosen[nodes]
    fates = [NodeFate.REJECTED if kept else NodeFate.PRUNED for kept in chosen.tolist()]
    for node in chosen.nonzero()[0][walk.accepted].tolist():
        fates[node] = NodeFate.ACCEPTED
    gains = drafts.pruning.gains[nodes]
    columns = [column.tolist() for column in (tree.token_ids, tree.parents, tree.draft_probs, gains)]
    return tuple(ExplainedNode(*node) for node in zip(*columns, fates, strict=True))


def _reason(sequence: Sequence, drafts: Drafts) -> str:
    if len(sequence.token_ids) <= 1 + sequence.admitted_tokens:
        if sequence.preemptions:
            return "preempted: prompt and answer were recomputed"
        return "first token, from the prompt's own pass"
    if sequence.policy.max_depth == 0:
        return "policy off"
    if drafts.pruning is not None and sequence.session_id in drafts.sessions:
        return drafts.pruning.reason + _target(sequence)
    return drafts.refusal or "only the last token is left"


def _target(sequence: Sequence) -> str:
    """Whether the request meets its latency target, if it has one."""
    target_s, since_s, now_s = sequence.request.target_s, sequence.first_token_s, sequence.last_token_s
    if target_s is None or since_s is None or now_s is None:
        return ""
    mean_ms, urgency = 1e3 * (now_s - since_s) / (sequence.output_tokens - 1), sequence.urgency(now_s)
    standing = "met" if mean_ms <= 1e3 * target_s else f"missed, its tokens count {urgency:.1f}-fold"
    return f"; {mean_ms:.1f} ms a token, target {1e3 * target_s:.1f}: {standing}"


def token_logprobs(
    sequence: Sequence, walk: Walk, taken: int, logits: torch.Tensor, first_row: int
) -> list[TokenLogprobs]:
    """Log-probabilities of the first `taken` tokens of `walk`, whose root has row `first_row` of `logits`."""
    top = sequence.request.logprobs
    if top is None or not taken:
        return []
    rows = [first_row, *(first_row + 1 + node for node in walk.accepted)][:taken]
    return _logprobs(logits[rows], walk.tokens[:taken], top)


def note_prompt_logprobs(sequence: Sequence, logits: torch.Tensor) -> None:
    """Note the log-probabilities of the prompt tokens predicted by `logits`, the next rows of its pass."""
    start, top = sequence.kv.length, sequence.request.prompt_logprobs
    assert top is not None
    if start == 0:  # Also after a preemption.
        sequence.prompt_logprobs = [TokenLogprobs(sequence.token_ids[0], math.nan, ())]
    predicted = sequence.token_ids[start + 1 : start + 1 + len(logits)]
    sequence.prompt_logprobs += _logprobs(logits[: len(predicted)], predicted, top)


def _logprobs(logits: torch.Tensor, tokens: list[int], top: int) -> list[TokenLogprobs]:
    """Log-probabilities of each row's token, and of its `top` most likely ones."""
    chosen, top_ids, top_values = logprobs(logits, tokens, top)
    return [
        TokenLogprobs(token, value, tuple(zip(ids, values, strict=True)))
        for token, value, ids, values in zip(
            tokens, chosen.tolist(), top_ids.tolist(), top_values.tolist(), strict=True
        )
    ]
