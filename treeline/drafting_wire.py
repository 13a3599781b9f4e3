"""Draft messages to and from their wire form; both ends of the stream use it."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from treeline.drafting import NO_FEATURES, DraftReply, DraftRequest, DraftSequence, DraftStats
from treeline.plan import Plan
from treeline.plan_wire import plan_from_proto, plan_to_proto
from treeline.sampling import SamplingParams
from treeline.tree import DraftTree
from treeline.v1 import drafting_pb2 as pb


def request_to_proto(request: DraftRequest, sent: Plan | None = None) -> pb.DraftRequest:
    """The message for `request`. `sent`: the plan that this stream carried last; the same one is not sent again."""
    return pb.DraftRequest(
        step_id=request.step_id,
        sequences=[_sequence_to_proto(sequence) for sequence in request.sequences],
        released=request.released,
        plan=None if request.plan is sent else plan_to_proto(request.plan),
    )


def request_from_proto(message: pb.DraftRequest, plan: Plan | None = None) -> DraftRequest:
    """The request in `message`. `plan`: of the stream's previous request; it holds until another one is sent.

    Raises:
        ValueError: there is no plan, a session occurs twice, a sequence has no tokens, or sampling parameters or
            features have no meaning.
    """
    sequences = [_sequence_from_proto(sequence) for sequence in message.sequences]
    if len({sequence.session_id for sequence in sequences}) != len(sequences):
        raise ValueError("a session occurs twice in one step")
    if message.HasField("plan"):
        plan = plan_from_proto(message.plan)
    if plan is None:
        raise ValueError("a stream's first request carries no plan")
    return DraftRequest(message.step_id, plan, sequences, list(message.released))


def reply_to_proto(reply: DraftReply) -> pb.DraftResponse:
    stats = reply.stats
    return pb.DraftResponse(
        step_id=reply.step_id,
        trees=[_tree_to_proto(session_id, tree) for session_id, tree in reply.trees.items()],
        held=[pb.HeldTokens(session_id=session_id, tokens=tokens) for session_id, tokens in reply.held.items()],
        draft_s=stats.draft_s,
        layer_nodes=stats.layer_nodes,
        catch_up_tokens=stats.catch_up_tokens,
        layer_s=stats.layer_s,
    )


def reply_from_proto(message: pb.DraftResponse) -> DraftReply:
    """The reply in `message`. Its trees are as they came: `DraftTree.check` them before use."""
    return DraftReply(
        step_id=message.step_id,
        trees={tree.session_id: _tree_from_proto(tree) for tree in message.trees},
        held={held.session_id: held.tokens for held in message.held},
        stats=DraftStats(
            draft_s=message.draft_s,
            layer_nodes=tuple(message.layer_nodes),
            catch_up_tokens=message.catch_up_tokens,
            layer_s=tuple(message.layer_s),
        ),
    )


def map_sessions(request: DraftRequest, offset: int) -> DraftRequest:
    """The same request with `offset` added to every session id."""
    sequences = [replace(sequence, session_id=sequence.session_id + offset) for sequence in request.sequences]
    return DraftRequest(
        request.step_id, request.plan, sequences, [session_id + offset for session_id in request.released]
    )


def unmap_sessions(reply: DraftReply, offset: int) -> DraftReply:
    """The reply to a request that `map_sessions` made, with the caller's own session ids."""
    return replace(
        reply,
        trees={session_id - offset: tree for session_id, tree in reply.trees.items()},
        held={session_id - offset: tokens for session_id, tokens in reply.held.items()},
    )


def _sequence_to_proto(sequence: DraftSequence) -> pb.DraftSequence:
    sampling = sequence.sampling
    return pb.DraftSequence(
        session_id=sequence.session_id,
        start=sequence.start,
        token_ids=sequence.token_ids,
        sampling=pb.DraftSampling(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            repetition_penalty=sampling.repetition_penalty,
            seed=sampling.seed,
        ),
        policy=sequence.policy,
        max_nodes=sequence.max_nodes,
        max_depth=sequence.max_depth,
        max_layers=sequence.max_layers,
        weight=sequence.weight,
        feature_rows=len(sequence.features),
        features=sequence.features.astype("<u2").tobytes(),
    )


def _sequence_from_proto(message: pb.DraftSequence) -> DraftSequence:
    if not message.token_ids:
        raise ValueError(f"session {message.session_id}: no tokens")
    given = message.sampling
    if (
        not (0 <= given.temperature < math.inf and 0 < given.top_p <= 1 and 0 < given.repetition_penalty < math.inf)
        or not 0 <= message.weight < math.inf
    ):
        raise ValueError(f"session {message.session_id}: a sampling parameter or the weight is out of range")
    return DraftSequence(
        session_id=message.session_id,
        start=message.start,
        token_ids=list(message.token_ids),
        sampling=SamplingParams(given.temperature, given.top_p, given.top_k, given.repetition_penalty, given.seed),
        policy=message.policy,
        max_nodes=message.max_nodes,
        max_depth=message.max_depth,
        max_layers=message.max_layers,
        weight=message.weight,
        features=_features_from_proto(message),
    )


def _features_from_proto(message: pb.DraftSequence) -> NDArray[np.uint16]:
    rows = message.feature_rows
    if not rows:
        return NO_FEATURES
    width, left_over = divmod(len(message.features), 2 * rows)
    # The sequence's first token has none before it.
    if left_over or not width or rows >= message.start + len(message.token_ids):
        raise ValueError(
            f"session {message.session_id}: {len(message.features)} bytes are not features of {rows} tokens"
        )
    return np.frombuffer(message.features, "<u2").reshape(rows, width)


def _tree_to_proto(session_id: int, tree: DraftTree) -> pb.Tree:
    return pb.Tree(
        session_id=session_id,
        token_ids=tree.token_ids.tolist(),
        parents=tree.parents.tolist(),
        draft_probs=tree.draft_probs.tolist(),
        ranks=tree.ranks.tobytes(),
        sources=tree.sources.tobytes(),
    )


def _tree_from_proto(message: pb.Tree) -> DraftTree:
    # int64 first: an id that does not fit in int32 must fail the tree's check, not wrap into a valid one.
    token_ids = np.asarray(message.token_ids, np.int64)
    return DraftTree(
        np.minimum(token_ids, np.iinfo(np.int32).max).astype(np.int32),
        np.asarray(message.parents, np.int32),
        np.asarray(message.draft_probs, np.float32),
        np.frombuffer(message.ranks, np.uint8),
        np.frombuffer(message.sources, np.uint8),
    )
