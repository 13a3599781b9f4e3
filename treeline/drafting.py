"""What verifier and drafter say to each other, once per step for the whole batch.

The verifier owns a request's tokens; the drafter owns only a cache that it can always rebuild from tokens. A message
names the tokens from `start` on; a drafter that holds fewer than `start` of them answers with what it does hold, and
the verifier sends the rest in the next step. Nothing here is ever waited for without a time-out.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from treeline.plan import Plan
from treeline.sampling import SamplingParams
from treeline.tree import DraftTree

ALL_LAYERS = 255
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
        start: index in the whole sequence (prompt and output) of `token_ids[0]`.
        token_ids: committed tokens from `start` to the end of the sequence, the last one being the tree's root. A
            drafter that holds `start` tokens or more drops what it holds from `start` on and appends these.
        sampling: lets the drafter propose under the same position-keyed noise as the target.
        policy: spelling understood by `planner.policies.parse_policy`.
        max_nodes: most draft nodes this request may still use in this step; 0 means only bring the cache up to date.
        max_depth: deepest node wanted.
        weight: value of this request's tokens relative to others (priority).
        features: uint16 [k, width], the bits of bfloat16: what the target made of the tokens just before the last k of
            the whole sequence. Only tokens whose features were not sent before need to have theirs among them.
        max_layers: most layers of the draft model to run for it. Beyond them lookups go on alone; with 0 they do so
            from the root on, and the model is not even brought up to date.
    """

    session_id: int
    start: int
    token_ids: list[int]
    sampling: SamplingParams
    policy: str
    max_nodes: int
    max_depth: int
    weight: float = 1.0
    features: NDArray[np.uint16] = field(default_factory=lambda: NO_FEATURES)
    max_layers: int = ALL_LAYERS

    @property
    def length(self) -> int:
        """Tokens of the whole sequence, root included."""
        return self.start + len(self.token_ids)


@dataclass(frozen=True)
class DraftRequest:
    """One batched draft step.

    Attributes:
        plan: the verifier's plan: its prices and calibration decide how these trees grow. Over a stream it is sent only
            when it has changed.
        released: sessions whose state the drafter may drop.
    """

    step_id: int
    plan: Plan
    sequences: list[DraftSequence]
    released: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class DraftStats:
    """What the drafting of one step cost on the drafter's clock.

    Attributes:
        draft_s: seconds spent on this step.
        layer_nodes: nodes run through the draft model, one entry per tree layer.
        catch_up_tokens: committed tokens run through the draft model to bring its cache up to date.
        layer_s: seconds of each tree layer, one per entry of layer_nodes (empty if not timed).
    """

    draft_s: float = 0.0
    layer_nodes: tuple[int, ...] = ()
    catch_up_tokens: int = 0
    layer_s: tuple[float, ...] = ()


@dataclass(frozen=True)
class DraftReply:
    """Trees by session id. `held` gives, for each session that could not be drafted, how many tokens it does hold."""

    step_id: int
    trees: dict[int, DraftTree]
    held: dict[int, int] = field(default_factory=dict)
    stats: DraftStats = DraftStats()


class Drafter(Protocol):
    """Anything that grows trees: a language model, a draft head, n-gram lookup, or two of them merged."""

    @property
    def features(self) -> FeatureSpec | None:
        """What it reads of the target's passes; None if nothing."""
        ...

    def draft(self, request: DraftRequest) -> DraftReply:
        """Release, catch up and draft. Called from one thread at a time."""
        ...

    def close(self) -> None: ...


class DraftLink(Protocol):
    """The verifier's end of the way to its drafter: in this process, or over one gRPC stream."""

    def draft(self, request: DraftRequest, timeout_s: float) -> DraftReply | None:
        """The reply to `request`, or None if there is none in time (the step then goes on unspeculated)."""
        ...

    @property
    def ready(self) -> bool:
        """False while the drafter is known to be away; drafting is then not even tried."""
        ...

    @property
    def features(self) -> FeatureSpec | None:
        """What the drafter wants to see of the target's passes; None if nothing, or while it is away."""
        ...

    def close(self) -> None: ...
