"""The engine's input and output: requests, chunks, completions, load."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum, StrEnum
from typing import NamedTuple

from treeline.sampling import SamplingParams
from verifier_svc.engine.grammar import Grammar


@dataclass(frozen=True)
class GenerationRequest:
    """A checked, tokenised request.

    Attributes:
        max_tokens: most output tokens, 0 to run prefill alone; prompt and output together fit the context.
        stop: the text ends before the first of these, or after it with `include_stop`.
        min_tokens: until this many tokens, no token ends the answer and stop strings are ignored.
        include_stop: keep the stop string or stop token that ends the text.
        skip_special_tokens: leave special tokens out of the text.
        grammar: the grammar of the whole answer.
        logprobs: number of top tokens to report in addition to the chosen one; None for no log-probabilities.
        prompt_logprobs: the same for the tokens of the prompt.
        explain, explain_tree: explain each chunk, without or with every node of its tree.
        policy: spelling understood by `planner.policies.parse_policy`.
        max_nodes, max_depth: the request's own tree limits; None for the deployment's.
        priority: -4 to 4; higher is admitted first and its tokens weigh more.
        target_ms: requested time per output token; None for no target.
        delivered_token_ids: tokens of the answer that another verifier has delivered.
        elapsed_s: seconds since the first arrival of a resumed request.
        time_to_first_token_s: from that arrival to its first token.
        client, client_weight: whose request it is, and the weight of that client's fair share.
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
    prompt_logprobs: int | None = None
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
    def public_id(self) -> str:
        """The id that its client knows; the engine's own starts with the client's name."""
        return self.request_id.removeprefix(f"{self.client}/")

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
    """The fate of a draft node."""

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
    """How one step made its tokens. Counts and nodes are this request's, all else is the batch's."""

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
        text: may lag behind `token_ids`: part of a character, or of a stop string, is held back.
        waited_s: seconds since the request's previous tokens, or since its arrival.
        first: whether these are the request's first tokens.
        prompt_logprobs: with the first tokens, if asked for: one for each token of the prompt.
        priority: the request's.
    """

    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprobs]
    explanation: StepExplanation | None = None
    waited_s: float = 0.0
    first: bool = False
    prompt_logprobs: Sequence[TokenLogprobs] = ()
    priority: int = 0


@dataclass(frozen=True)
class SpeculationTotals:
    """Sums over a request's verification steps."""

    steps: int = 0
    drafted_nodes: int = 0
    verified_nodes: int = 0
    accepted_nodes: int = 0
    price_sum: float = 0.0

    @property
    def mean_accepted_length(self) -> float:
        """Tokens per verification step, bonus token included."""
        return 1 + self.accepted_nodes / self.steps if self.steps else 0.0

    @property
    def mean_tree_nodes(self) -> float:
        return self.verified_nodes / self.steps if self.steps else 0.0

    @property
    def mean_price(self) -> float:
        """Tokens that a node had to gain per second of its cost; steps without drafts count as 0."""
        return self.price_sum / self.steps if self.steps else 0.0


@dataclass(frozen=True)
class Completion:
    """The last output of a request.

    Attributes:
        matched_stop: the stop token id or stop string that ended the request, if any.
        target_met: whether the mean time per output token met the target; None without a target, or for one token.
        cached_tokens: prompt tokens taken from the prefix cache.
        preemptions: how often it was preempted and recomputed.
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
    preemptions: int = 0


@dataclass(frozen=True)
class Load:
    """The load of an engine. Rates are over the last seconds; `drafter_problem` is `AcceptanceAlarm.problem`."""

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
