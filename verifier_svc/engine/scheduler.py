"""Who runs: continuous batching over slots and KV blocks."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from lm.kv_cache import KVCache
from planner.fast.step_prices import StepPrices
from planner.policies import parse_policy
from treeline.config import LimitsConfig
from treeline.plan import Plan
from verifier_svc.engine.request import FinishReason, GenerationRequest
from verifier_svc.engine.sequence import Sequence

MAX_STRETCH = 2.25
"""A pass with prompt chunks may take this many times as long as one without: the decoding requests wait for it. Their
gaps are to stay below three usual ones, and single passes take up to a third longer than the curve says. Where
more prompts wait than requests decode, the pass may be longer in proportion."""
AGEING_S = 5.0
"""A request that has waited this long counts as one priority higher: nobody who comes 8 * 5 = 40 s later, of whatever
priority (-4 to 4), is admitted before it. Ten times the usual start of an answer, so that priorities keep their use."""
LEAST_CHUNK_TOKENS = 8
"""A prompt advances by at least this many tokens a step, however much they cost: on a CPU a pass over 8 tokens takes
little longer than over 1 (bench step)."""


@dataclass(frozen=True)
class Batch:
    """One step's work.

    Attributes:
        decoding: sequences whose root is to be verified, with a tree or without.
        prefilling: (sequence, tokens) chunks of prompts.
        finished_prompts: those of `prefilling` whose prompt ends with this chunk; they get their first token.
        prices: what this step costs.
    """

    decoding: list[Sequence]
    prefilling: list[tuple[Sequence, int]]
    finished_prompts: list[Sequence]
    prices: StepPrices

    @property
    def sequences(self) -> int:
        return len(self.decoding) + len(self.prefilling)

    @property
    def prefill_tokens(self) -> int:
        return sum(tokens for _, tokens in self.prefilling)

    @property
    def context_tokens(self) -> int:
        """Committed tokens of all sequences together."""
        return sum(s.kv.length for s in self.decoding) + sum(s.kv.length for s, _ in self.prefilling)


class Scheduler:
    """The one registry of the engine's open sequences, waiting and running; owns the reservation of KV blocks.

    A request's blocks are reserved whole when it is admitted, so that a running request never has to be preempted. With
    prefix caching, what an earlier prompt and its answer left in the cache is not computed again.
    """

    def __init__(
        self,
        cache: KVCache,
        limits: LimitsConfig,
        prefill_chunk_tokens: int,
        prefix_caching: bool = True,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self._cache = cache
        self._limits = limits
        self._prefill_chunk_tokens = prefill_chunk_tokens
        self._prefix_caching = prefix_caching
        self._clock = clock

    def add(self, sequence: Sequence) -> None:
        """Queue by priority and time waited; a resumed request, which has waited before, goes before its equals."""

        def rank(one: Sequence) -> float:
            # All who wait rise at the same pace, so that their order never changes.
            request, queued_s = one.request, one.arrived_s + one.request.elapsed_s
            return request.priority + 0.5 * bool(request.delivered_token_ids) - queued_s / AGEING_S

        place = len(self.waiting)
        while place and rank(self.waiting[place - 1]) < rank(sequence):
            place -= 1
        self.waiting.insert(place, sequence)

    def find(self, request_ids: Iterable[str]) -> list[Sequence]:
        """The open sequences among these ids."""
        wanted = set(request_ids)
        return [s for s in (*self.running, *self.waiting) if s.request.request_id in wanted]

    def reservation_tokens(self, request: GenerationRequest) -> int:
        """KV entries the request may need at most: all its tokens, and the largest tree behind them."""
        return len(request.prompt_token_ids) + request.max_tokens + self.tree_nodes(request)

    def tree_nodes(self, request: GenerationRequest) -> int:
        """The most draft nodes any step of this request may verify."""
        if parse_policy(request.policy).max_depth == 0:
            return 0
        limit = self._limits.max_tree_nodes
        return limit if request.max_nodes is None else min(request.max_nodes, limit)

    def schedule(self, plan: Plan) -> Batch:
        """Admit what fits, then take every decoding sequence and prompt chunks up to the chunk budget."""
        self._remember_prompts()
        self._admit()
        decoding = [s for s in self.running if s.is_prefilled]
        prompts = [s for s in self.running if not s.is_prefilled]
        budget = self._prompt_budget(decoding, prompts, plan) if prompts else 0
        prefilling, finished_prompts = [], []
        for sequence in prompts:
            tokens = min(sequence.uncomputed_tokens, budget)
            if tokens:
                prefilling.append((sequence, tokens))
                budget -= tokens
                if tokens == sequence.uncomputed_tokens:
                    finished_prompts.append(sequence)
        sequences = [*decoding, *(sequence for sequence, _ in prefilling)]
        prices = StepPrices.of(
            plan,
            len(decoding),
            context_tokens=sum([s.kv.length for s in sequences]) // max(1, len(sequences)),
            waiting=self.free_slots,
            max_nodes=len(decoding) * self._limits.max_tree_nodes,
            prompt_tokens=sum([tokens for _, tokens in prefilling]),
            prompts=len(prefilling),
        )
        return Batch(decoding, prefilling, finished_prompts, prices)

    def _prompt_budget(self, decoding: list[Sequence], prompts: list[Sequence], plan: Plan) -> int:
        """Most prompt tokens of this step: what MAX_STRETCH and the step budget allow by the plan's costs.

        The whole chunk where nothing decodes, and under the built-in plan, whose costs are a guess.
        """
        most = self._prefill_chunk_tokens
        if not decoding or plan.version == 0:
            return most
        roots, context_tokens = len(decoding), sum([s.kv.length for s in decoding]) // len(decoding)
        plain = StepPrices.of(plan, roots, context_tokens, waiting=0, max_nodes=0)
        # Most tokens of the pass are the first prompt's, and see as much context as it has by now.
        beside_prompt = StepPrices.of(plan, roots, max(context_tokens, prompts[0].kv.length), 0, 0, most)
        longest_s = MAX_STRETCH * max(1.0, len(prompts) / roots) * plan.wait_factor * plain.undrafted_s
        longest_s = min(longest_s, plan.step_budget_s - plan.cost.step_overhead_s)
        fitting = int(np.searchsorted(beside_prompt.seconds[roots:], longest_s, side="right")) - 1
        return min(most, max(int(fitting / plan.cost.prompt_ratio), LEAST_CHUNK_TOKENS))

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out, waiting or running, and free its blocks."""
        if sequence.cache is None:
            self.waiting.remove(sequence)
        else:
            self.running.remove(sequence)
            # The tokens of a failed sequence may be fewer than its cache holds.
            if self._prefix_caching and sequence.finish_reason is not FinishReason.FAILED:
                self._cache.remember(sequence.cache, sequence.token_ids)
            self._cache.free(sequence.cache)
            sequence.cache = None

    @property
    def free_slots(self) -> int:
        """How many of the waiting requests could start now, slots and blocks considered."""
        if not self.waiting:
            return 0
        slots = self._limits.max_running_requests - len(self.running)
        blocks = self._cache.free_blocks
        startable = 0
        for sequence in self.waiting[:slots]:
            blocks -= -(-self.reservation_tokens(sequence.request) // self._cache.block_tokens)
            if blocks < 0:
                break
            startable += 1
        return startable

    def _remember_prompts(self) -> None:
        """Prompts that the last step finished can be shared while their requests still run."""
        if self._prefix_caching:
            for sequence in self.running:
                if sequence.is_prefilled and not sequence.is_remembered:
                    self._cache.remember(sequence.kv, sequence.request.prompt_token_ids)
                    sequence.is_remembered = True

    def _admit(self) -> None:
        # In order: a large request at the head is not starved by small ones behind it.
        while self.waiting and len(self.running) < self._limits.max_running_requests:
            sequence = self.waiting[0]
            # The last token is always run: its logits give the next one.
            prefix = sequence.token_ids[:-1] if self._prefix_caching else []
            cache = self._cache.allocate(self.reservation_tokens(sequence.request), prefix)
            if cache is None:
                return
            sequence.cache, sequence.cached_tokens = cache, cache.length
            sequence.admitted_s = self._clock()
            self.running.append(self.waiting.pop(0))
