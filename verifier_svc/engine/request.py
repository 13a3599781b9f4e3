"""What goes into the engine and what comes out of it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, StrEnum
from typing import NamedTuple

from treeline.sampling import SamplingParams
from verifier_svc.engine.grammar import Grammar


@dataclass(frozen=True)
class GenerationRequest:
    """A checked, tokenised request.

    Attributes:
        max_tokens: output tokens at most; prompt and output together fit the context.
        stop: the text ends before the first of these, or behind it if it is to be included.
        min_tokens: so many tokens come before any that ends the answer, and before stop strings are looked for.
        include_stop: the text holds the stop string or stop token that ended it.
        skip_special_tokens: special tokens are no part of the text.
        grammar: what the whole answer must match.
        logprobs: None for no log-probabilities, else how many top tokens to give beside the chosen one.
        explain, explain_tree: add to each chunk why it came as it did; with every node of its tree.
        policy: spelling understood by `planner.policies.parse_policy`.
        max_nodes, max_depth: the request's own tree limits; None leaves the deployment's.
        priority: -4 to 4; higher is admitted first and its tokens weigh more.
        target_ms: time per output token that was asked for; None for as fast as it goes.
        delivered_token_ids: the answer's tokens that another verifier has delivered already.
        elapsed_s: since the first arrival of a resumed request.
        time_to_first_token_s: from that arrival to its first token.
        client, client_weight: whose request it is, and what the client's share weighs among those of others.
    """

    request_id: str
    prompt_token_ids: list[int]
    sampling: SamplingParams
    max_tokens: int
    stop: tuple[str, ...] = ()
    stop_token_ids: frozenset[int] = frozenset()
    ignore_eos: bool = False
    min_tokens: int = 0
    include_stop: bool = False
    skip_special_tokens: bool = True
    grammar: Grammar | None = None
    logprobs: int | None = None
    explain: bool = False
    explain_tree: bool = False
    policy: str = "smart"
    max_nodes: int | None = None
    max_depth: int | None = None
    priority: int = 0
    target_ms: float | None = None
    delivered_token_ids: tuple[int, ...] = ()
    elapsed_s: float = 0.0
    time_to_first_token_s: float = 0.0
    client: str = ""
    client_weight: float = 1.0

    @property
    def target_s(self) -> float | None:
        """`target_ms` in seconds."""
        return None if self.target_ms is None else self.target_ms / 1000

    @property
    def weight(self) -> float:
        """Value of one of this request's tokens: doubles with every two steps of priority."""
        return 2.0 ** (self.priority / 2)


class FinishReason(StrEnum):
    STOP = "stop"
    LENGTH = "length"
    ABORTED = "aborted"
    FAILED = "failed"  # processing this sequence raised; the log has the exception under its request id


@dataclass(frozen=True)
class TokenLogprobs:
    """Log-probability of the chosen token under the raw distribution, and of the top tokens as (id, logprob)."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


class NodeFate(Enum):
    """What became of a draft node."""

    PRUNED = "pruned"
    REJECTED = "rejected"
    ACCEPTED = "accepted"


class ExplainedNode(NamedTuple):
    """A node of a step's draft tree. `parent`: its index in the same tree, or ROOT. `gain`: w a(u), in tokens."""

    token_id: int
    parent: int
    probability: float
    gain: float
    fate: NodeFate


@dataclass(frozen=True)
class StepExplanation:
    """Why one step's tokens came as they did. Counts and nodes are this request's, the rest is the batch's."""

    drafted_nodes: int
    verified_nodes: int
    accepted_nodes: int
    price: float
    plan_version: int
    batch_sequences: int
    batch_tokens: int
    draft_s: float
    verify_s: float
    step_s: float
    reason: str
    nodes: tuple[ExplainedNode, ...] = ()


@dataclass(frozen=True)
class Chunk:
    """All tokens of one step.

    Attributes:
        text: may lag behind `token_ids`: half a character, or half a stop string, waits.
        waited_s: seconds since the request's previous tokens, or since its arrival.
        first: whether these are the request's first tokens.
    """

    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprobs]
    explanation: StepExplanation | None = None
    waited_s: float = 0.0
    first: bool = False


@dataclass(frozen=True)
class SpeculationTotals:
    """Over a request's verification steps."""

    steps: int = 0
    drafted_nodes: int = 0
    verified_nodes: int = 0
    accepted_nodes: int = 0

    @property
    def mean_accepted_length(self) -> float:
        """Tokens per verification step, bonus token included."""
        return 1 + self.accepted_nodes / self.steps if self.steps else 0.0

    @property
    def mean_tree_nodes(self) -> float:
        return self.verified_nodes / self.steps if self.steps else 0.0


@dataclass(frozen=True)
class Completion:
    """The last output of a request.

    Attributes:
        matched_stop: the stop token id or the stop string, if one ended it.
        target_met: whether its mean time per output token was the one asked for; None if none was, or for one token.
        cached_tokens: of the prompt, that were taken from the prefix cache.
    """

    finish_reason: FinishReason
    matched_stop: int | str | None
    prompt_tokens: int
    completion_tokens: int
    queue_s: float
    time_to_first_token_s: float
    total_s: float
    speculation: SpeculationTotals
    target_met: bool | None = None
    cached_tokens: int = 0


@dataclass(frozen=True)
class Load:
    """How busy an engine is. Rates are over the last seconds; the problem is that of `AcceptanceAlarm`."""

    num_requests_running: int
    num_requests_waiting: int
    kv_blocks_used: int
    kv_blocks_total: int
    tokens_per_s: float
    mean_accepted_length: float
    mean_tree_nodes: float
    plan_version: int
    price: float
    drafter_ready: bool
    drafter_problem: str = ""
