"""One request's state inside the engine's thread; no other thread reads or writes it."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from lm.kv_cache import SequenceCache
from lm.sampling import Row
from planner.policies import Policy
from verifier_svc.engine.detokenizer import Detokenizer
from verifier_svc.engine.grammar import GrammarState
from verifier_svc.engine.request import (
    Chunk,
    Completion,
    FinishReason,
    GenerationRequest,
    SpeculationTotals,
    TokenLogprobs,
)

TOKENS_PER_DOUBLING = 4.0
"""Tokens behind the latency target that double a request's weight: one drafted step makes up for about as many."""
MAX_URGENCY = 8.0
"""Largest factor, at 12 tokens behind: beyond it more nodes hardly help, and the other requests must progress."""


@dataclass
class Sequence:
    """A request that waits or runs.

    Attributes:
        session_id: names this request to the drafter.
        token_ids: prompt and output; when decoding, the last one is the root and has no KV yet.
        ending_token_ids: the end-of-sequence and stop tokens that end it.
        grammar: the answer's position in its grammar.
        cache: None while waiting.
        cached_tokens: prompt tokens taken from the prefix cache; no pass ran them, so their hidden states are unknown.
        admitted_tokens: length of `token_ids` when it was last admitted; all of these are prefilled.
        preemptions: how often it was preempted, and its tokens recomputed.
        is_remembered: the tokens it was admitted with are in the prefix cache.
        drafter_tokens: how many of `token_ids` the drafter is believed to hold.
    """

    request: GenerationRequest
    session_id: int
    policy: Policy
    detokenizer: Detokenizer
    token_ids: list[int]
    arrived_s: float
    ending_token_ids: frozenset[int] = frozenset()
    grammar: GrammarState | None = None
    cache: SequenceCache | None = None
    cached_tokens: int = 0
    admitted_tokens: int = 0
    preemptions: int = 0
    is_remembered: bool = False
    drafter_tokens: int = 0
    admitted_s: float | None = None
    first_token_s: float | None = None
    last_token_s: float | None = None
    totals: SpeculationTotals = field(default_factory=SpeculationTotals)
    finish_reason: FinishReason | None = None
    matched_stop: int | str | None = None
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Whether every token of the prompt must run once more for its log-probability."""
        return self.request.prompt_logprobs is not None and not self.output_tokens

    @property
    def prompt_tokens(self) -> int:
        return len(self.request.prompt_token_ids)

    @property
    def output_tokens(self) -> int:
        return len(self.token_ids) - self.prompt_tokens

    @property
    def is_prefilled(self) -> bool:
        """Whether all that it was admitted with (prompt, and answer so far) has run."""
        return len(self.token_ids) > self.admitted_tokens

    @property
    def remaining_tokens(self) -> int:
        return self.request.max_tokens - self.output_tokens

    @property
    def kv(self) -> SequenceCache:
        """The KV cache of a running sequence."""
        assert self.cache is not None, "the sequence is waiting"
        return self.cache

    @property
    def uncomputed_tokens(self) -> int:
        """Tokens without KV; 1 (the root) when decoding."""
        return len(self.token_ids) - self.kv.length

    @property
    def behind_tokens(self) -> int:
        """Tokens that the drafter has to catch up with before it can draft."""
        return len(self.token_ids) - self.drafter_tokens

    def urgency(self, now_s: float) -> float:
        """1 to MAX_URGENCY: the factor on its tokens' value, 2^(k / TOKENS_PER_DOUBLING) if k tokens are overdue."""
        target_s = self.request.target_s
        if target_s is None or self.first_token_s is None:
            return 1.0
        behind_tokens = (now_s - self.first_token_s) / target_s - (self.output_tokens - 1)
        return min(MAX_URGENCY, 2.0 ** max(0.0, min(behind_tokens, 1e3) / TOKENS_PER_DOUBLING))

    def weight(self, now_s: float) -> float:
        """Value of one of its tokens, before `weights_of` scales the batch's mean to 1."""
        return self.request.weight * self.urgency(now_s)

    def resume(self, now_s: float) -> None:
        """Append the tokens that were delivered before; the client has their text. Does nothing for a new request."""
        delivered = self.request.delivered_token_ids
        if delivered:
            self.first_token_s = self.arrived_s + self.request.time_to_first_token_s
            self.last_token_s = now_s
            self.accept(list(delivered))

    def receive(self, now_s: float) -> tuple[float, bool]:
        """Note that tokens arrive now.

        Returns:
            Seconds since the previous tokens, or since the request's arrival; whether these are the first.
        """
        first = self.first_token_s is None
        waited_s = now_s - (self.last_token_s or self.arrived_s)
        self.last_token_s = now_s
        if first:
            self.first_token_s = now_s
        return waited_s, first

    def accept(self, token_ids: list[int]) -> tuple[str, int]:
        """Append tokens until one of them ends the request.

        Returns:
            The text that is now certain, and how many tokens were appended.
        """
        request = self.request
        if not self.remaining_tokens:  # only its prompt is wanted
            self.finish_reason = FinishReason.LENGTH
            return "", 0
        text = ""
        for taken, token_id in enumerate(token_ids, start=1):
            self.token_ids.append(token_id)
            if token_id in self.ending_token_ids:
                if request.include_stop:
                    text += self.detokenizer.feed(token_id)
                self.finish_reason, self.matched_stop = FinishReason.STOP, token_id
            else:
                if self.grammar is not None:
                    self.grammar.take(token_id)
                text += self.detokenizer.feed(token_id)
                if self.detokenizer.matched_stop is not None:
                    self.finish_reason, self.matched_stop = FinishReason.STOP, self.detokenizer.matched_stop
                elif self.grammar is not None and self.grammar.ended:
                    self.finish_reason = FinishReason.STOP
                elif self.remaining_tokens == 0:
                    self.finish_reason = FinishReason.LENGTH
            if self.finish_reason is not None:
                return self._flushed(text), taken
        return text, len(token_ids)

    def _flushed(self, text: str) -> str:
        text += self.detokenizer.flush()
        if self.detokenizer.matched_stop is not None:
            self.finish_reason, self.matched_stop = FinishReason.STOP, self.detokenizer.matched_stop
        return text

    def count_step(self, drafted: int, verified: int, accepted: int, price: float) -> None:
        totals = self.totals
        self.totals = SpeculationTotals(
            steps=totals.steps + 1,
            drafted_nodes=totals.drafted_nodes + drafted,
            verified_nodes=totals.verified_nodes + verified,
            accepted_nodes=totals.accepted_nodes + accepted,
            price_sum=totals.price_sum + price,
        )

    def completion(self, now: float) -> Completion:
        """The end of the request. `now`: seconds of the engine's clock."""
        assert self.finish_reason is not None
        admitted_s = self.admitted_s if self.admitted_s is not None else now
        first_token_s = self.first_token_s if self.first_token_s is not None else now
        target_s, gaps = self.request.target_s, self.output_tokens - 1
        return Completion(
            finish_reason=self.finish_reason,
            matched_stop=self.matched_stop,
            prompt_tokens=self.prompt_tokens,
            cached_tokens=min(self.cached_tokens, self.prompt_tokens),
            completion_tokens=self.output_tokens,
            queue_s=admitted_s - self.arrived_s,
            time_to_first_token_s=first_token_s - self.arrived_s,
            total_s=now - self.arrived_s,
            speculation=self.totals,
            preemptions=self.preemptions,
            target_met=now - first_token_s <= target_s * gaps if target_s is not None and gaps > 0 else None,
        )

    @property
    def forced(self) -> list[int]:
        """The next tokens, as far as its grammar forces them."""
        return self.grammar.forced if self.grammar is not None else []

    @property
    def is_argmax(self) -> bool:
        """Whether its next tokens are the argmax of the unchanged logits."""
        is_free = self.grammar is None and self.output_tokens >= self.request.min_tokens
        return is_free and self.request.sampling.is_argmax

    def row(self, path: list[int]) -> Row:
        """How the token after the draft tokens `path` is drawn."""
        request, length = self.request, len(self.token_ids) + len(path)
        history = np.asarray(self.token_ids + path, np.int64) if request.sampling.penalises else None
        barred = self.ending_token_ids if length - self.prompt_tokens < request.min_tokens else ()
        allowed = None if self.grammar is None else self.grammar.allowed(path)
        return Row(request.sampling, length, history, self.prompt_tokens, barred, allowed)


@dataclass(frozen=True)
class Output:
    """A chunk or the completion of one request."""

    request_id: str
    item: Chunk | Completion


def weights_of(sequences: list[Sequence], now_s: float) -> list[float]:
    """Value of a token of each request, 1 on average: weights shift nodes without inflating goodput."""
    weights = [sequence.weight(now_s) for sequence in sequences]
    total = sum(weights)
    return [weight * len(sequences) / total for weight in weights]
