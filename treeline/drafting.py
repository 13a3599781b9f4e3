"""The messages between verifier and drafter, one each way per step for the whole batch; with their codecs.

The verifier owns a request's tokens; the drafter owns a cache that it can always rebuild from tokens. A message carries
the tokens from `start` on. A drafter that holds fewer than `start` tokens answers with the number it holds, and the
verifier sends the rest in the next step. Every wait has a time-out.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from treeline.config import MAX_TREE_DEPTH
from treeline.forest import Forest, checked, forest_from_proto, forest_to_proto
from treeline.messages import check_numbers, from_message, to_message
from treeline.plan import Plan, plan_from_proto, plan_to_proto
from treeline.sampling import SamplingParams
from treeline.v1 import drafting_pb2 as pb

_EXPONENT = np.uint16(0x7F80)
"""Exponent bits of bfloat16; all ones mean infinity or NaN."""
MAX_SCALE = 1e6
"""Largest sampling parameter or weight, far beyond what a request may ask for (0.01 to 100). A product of two, or of
one and a count, stays finite in float32."""
MAX_DRAFT_MESSAGE_BYTES = 32 << 20
"""Half of it holds features: 9 tokens a step (the deepest default tree and the bonus token) for 64 requests to an 8B
target at 24 KiB a token (3 layers of 4,096 values in bfloat16), or for 32 requests to a 70B one."""
NO_FEATURES = np.zeros((0, 0), np.uint16)


@dataclass(frozen=True)
class FeatureSpec:
    """What a draft head reads of the target.

    Attributes:
        layers: 0-based decoder layers whose output it reads, in order, besides the final normed states.
        width: values per token.
    """

    layers: tuple[int, ...]
    width: int


@dataclass(frozen=True)
class DraftSequence:
    """One request's part of a draft step.

    Attributes:
        session_id: unique per request and verifier; lives until released.
        start: index of `token_ids[0]` in the sequence of prompt and output.
        token_ids: committed tokens from `start` to the end of the sequence; the last one is the tree's root. A drafter
            that holds more than `start` tokens replaces those from `start` on.
        sampling: lets the drafter propose under the target's own position-keyed noise.
        prompt_tokens: index at which the answer begins; penalties of the answer count from here.
        policy: spelling understood by `planner.policies.parse_policy`.
        max_nodes: most draft nodes of this tree; 0 only brings the cache up to date.
        max_depth: deepest layer of this tree.
        weight: value of this request's tokens, 1 on average.
        features: uint16 [k, width], bits of bfloat16: the target's hidden states of the tokens before the last k of the
            sequence. Those that were sent before may be left out.
    """

    session_id: int
    start: int
    token_ids: list[int]
    sampling: SamplingParams
    policy: str
    max_nodes: int
    max_depth: int
    weight: float = 1.0
    features: NDArray[np.uint16] = field(default_factory=lambda: NO_FEATURES, compare=False)
    prompt_tokens: int = 0

    @property
    def length(self) -> int:
        """Tokens of the whole sequence, root included."""
        return self.start + len(self.token_ids)


@dataclass(frozen=True)
class DraftRequest:
    """One batched draft step.

    Attributes:
        plan: the verifier's plan. Trees grow by its prices and calibration. A stream carries it only when it has
            changed.
        released: sessions whose state the drafter may drop.
    """

    step_id: int
    plan: Plan
    sequences: list[DraftSequence]
    released: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class DraftStats:
    """The cost of drafting one step, by the drafter's clock.

    Attributes:
        draft_s: seconds of the whole draft.
        layer_nodes: nodes run through the draft model, one entry per tree layer.
        catch_up_tokens: committed tokens run through the draft model to bring its cache up to date.
        layer_s: seconds of each tree layer, one per entry of layer_nodes; empty if not timed.
    """

    draft_s: float = 0.0
    layer_nodes: tuple[int, ...] = ()
    catch_up_tokens: int = 0
    layer_s: tuple[float, ...] = ()


@dataclass(frozen=True)
class DraftReply:
    """The answer to one request.

    Attributes:
        forest: one tree for each sequence of the request, in its order.
        held: for each session that could not be drafted, the number of tokens that the drafter holds.
        refused: malformed trees, which were emptied.
    """

    step_id: int
    forest: Forest
    held: dict[int, int] = field(default_factory=dict)
    stats: DraftStats = DraftStats()
    refused: int = 0


class Drafter(Protocol):
    """Anything that grows trees."""

    @property
    def features(self) -> FeatureSpec | None:
        """What it reads of the target's hidden states; None if nothing."""
        ...

    def draft(self, request: DraftRequest) -> DraftReply:
        """Release sessions, catch up with new tokens, and draft. Called from one thread at a time."""
        ...

    def close(self) -> None: ...


class DraftLink(Protocol):
    """The verifier's link to its drafter: in this process, or in another one. Used from the engine's thread."""

    def refresh(self) -> None:
        """Take a late reply if it has arrived. Called once per step."""
        ...

    def draft(self, request: DraftRequest, timeout_s: float) -> DraftReply | None:
        """The reply to `request`, or None if none arrives in time: the step then goes on without drafts."""
        ...

    @property
    def connected(self) -> bool:
        """False while the drafter is known to be away."""
        ...

    @property
    def ready(self) -> bool:
        """Whether it is connected and owes no reply. Otherwise nothing is sent to it."""
        ...

    @property
    def features(self) -> FeatureSpec | None:
        """What the drafter reads of the target's hidden states; None if nothing, or while it is away."""
        ...

    def close(self) -> None: ...


def request_to_proto(request: DraftRequest, sent: Plan | None = None) -> pb.DraftRequest:
    """The message for `request`. `sent`: the plan that the stream carried last, which is not sent again."""
    return pb.DraftRequest(
        step_id=request.step_id,
        sequences=[_sequence_to_proto(sequence) for sequence in request.sequences],
        released=request.released,
        plan=None if request.plan is sent else plan_to_proto(request.plan),
    )


def request_from_proto(message: pb.DraftRequest, plan: Plan | None = None) -> DraftRequest:
    """The request in `message`. `plan`: from the stream's previous request, in force until a new one arrives.

    Raises:
        ValueError: there is no plan, a session occurs twice, a sequence has no tokens, or sampling parameters or
            features are invalid.
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
    return to_message(
        reply.stats,
        pb.DraftResponse,
        step_id=reply.step_id,
        forest=forest_to_proto(reply.forest),
        held=[pb.HeldTokens(session_id=session_id, tokens=tokens) for session_id, tokens in reply.held.items()],
    )


def reply_from_proto(message: pb.DraftResponse, request: DraftRequest, vocab_size: int) -> DraftReply:
    """The answer to `request` in `message`, with malformed trees emptied.

    Raises:
        ValueError: the message does not answer `request` (number of trees, unknown sessions), columns differ in length,
            or statistics are out of range.
    """
    sequences = request.sequences
    forest = forest_from_proto(message.forest)
    if len(forest.sizes) != len(sequences):
        raise ValueError(f"{len(forest.sizes)} trees for {len(sequences)} sequences")
    max_nodes, max_depths = np.asarray([(s.max_nodes, s.max_depth) for s in sequences], np.intp).reshape(-1, 2).T
    forest, refused = checked(forest, max_nodes, max_depths, vocab_size)
    lengths = {sequence.session_id: sequence.length for sequence in sequences}
    held = {one.session_id: one.tokens for one in message.held}
    if any(tokens >= lengths.get(session_id, 0) for session_id, tokens in held.items()):
        raise ValueError("a session holds more tokens than it was sent, or is unknown")
    check_numbers(message, {})
    if max(len(message.layer_s), len(message.layer_nodes)) > MAX_TREE_DEPTH:
        raise ValueError("statistics of drafting out of range")
    return DraftReply(message.step_id, forest, held, from_message(message, DraftStats), refused)


def _sequence_to_proto(sequence: DraftSequence) -> pb.DraftSequence:
    return to_message(
        sequence,
        pb.DraftSequence,
        sampling=to_message(sequence.sampling, pb.DraftSampling),
        feature_rows=len(sequence.features),
        features=sequence.features.astype("<u2").tobytes(),
    )


def _sequence_from_proto(message: pb.DraftSequence) -> DraftSequence:
    if not message.token_ids:
        raise ValueError(f"session {message.session_id}: no tokens")
    given = message.sampling
    added = (given.presence_penalty, given.frequency_penalty, *given.logit_bias.values())
    scales = (given.temperature or 1.0, given.repetition_penalty, message.weight)
    if not (
        0 < given.top_p <= 1
        and 0 <= given.min_p <= 1
        and all(1 / MAX_SCALE <= scale <= MAX_SCALE for scale in scales)
        and all(-MAX_SCALE <= value <= MAX_SCALE for value in added)
    ):
        raise ValueError(f"session {message.session_id}: a sampling parameter or the weight is out of range")
    return from_message(
        message,
        DraftSequence,
        token_ids=list(message.token_ids),
        sampling=from_message(given, SamplingParams),
        features=_features_from_proto(message),
    )


def _features_from_proto(message: pb.DraftSequence) -> NDArray[np.uint16]:
    rows = message.feature_rows
    if not rows:
        return NO_FEATURES
    width, left_over = divmod(len(message.features), 2 * rows)
    # The sequence's first token has no token before it.
    if left_over or not width or rows >= message.start + len(message.token_ids):
        raise ValueError(
            f"session {message.session_id}: {len(message.features)} bytes are not features of {rows} tokens"
        )
    features = np.frombuffer(message.features, "<u2").reshape(rows, width)
    if ((features & _EXPONENT) == _EXPONENT).any():
        raise ValueError(f"session {message.session_id}: a feature is not finite")
    return features
