"""Decides which requests run: continuous batching over slots and KV blocks."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import accumulate

from lm.kv_cache import KVCache, SequenceCache
from planner.fast.step_prices import StepPrices
from treeline.config import LimitsConfig
from treeline.plan import Plan
from verifier_svc.engine.fair_shares import FairShares
from verifier_svc.engine.request import FinishReason, GenerationRequest
from verifier_svc.engine.sequence import Sequence

MAX_STRETCH = 2.25
"""A pass with prompt chunks may take this many times as long as one without: the decoding requests wait for it. Their
inter-token gaps should stay below three usual ones, and single passes take up to a third longer than predicted. If
more prompts are in prefill than requests decode, the limit grows in proportion."""
AGEING_S = 5.0
"""A queued request gains one priority level per this many seconds, up to the highest level queued: after
8 * 5 = 40 s it is next in its client's turn, whatever the priorities (-4 to 4). Ten times the usual time to first
token, so that priorities still matter."""
LEAST_CHUNK_TOKENS = 8
"""A prompt advances by at least this many tokens a step, however much they cost: on a CPU a pass over 8 tokens takes
little longer than over 1 (bench step)."""


@dataclass(frozen=True)
class Batch:
    """One step's work.

    Attributes:
        plan: the plan in force.
        decoding: sequences whose root is to be verified, with a tree or without.
        prefilling: (sequence, tokens) chunks of prompts.
        finished_prompts: sequences of `prefilling` whose prompt ends with this chunk; they get their first token.
        preempted: sequences that lost their blocks to others and are queued again.
        prices: what this step costs.
        context_tokens: committed tokens of all sequences together.
        running, waiting: requests that run and that wait.
    """

    plan: Plan
    decoding: list[Sequence]
    prefilling: list[tuple[Sequence, int]]
    finished_prompts: list[Sequence]
    preempted: list[Sequence]
    prices: StepPrices
    context_tokens: int
    running: int
    waiting: int

    @property
    def sequences(self) -> int:
        return len(self.decoding) + len(self.prefilling)

    @property
    def prefill_tokens(self) -> int:
        return sum(tokens for _, tokens in self.prefilling)


class Scheduler:
    """The one registry of the engine's open sequences, waiting and running; owns the reservation of KV blocks.

    A request holds the blocks of its tokens; free blocks are room for trees. When blocks run out, trees give theirs
    back first. Then the latest request of the lowest priority is preempted: it returns to the queue and is recomputed
    later. The first request of all is never preempted, so the batch always progresses. With prefix caching, tokens
    whose KV earlier prompts and answers left in the cache are not recomputed.
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
        self._shares = FairShares()

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence."""
        self.waiting.append(sequence)

    def find(self, request_ids: Iterable[str]) -> list[Sequence]:
        """The open sequences among these ids."""
        wanted = set(request_ids)
        return [s for s in (*self.running, *self.waiting) if s.request.request_id in wanted]

    def tree_nodes(self, sequence: Sequence) -> int:
        """The most draft nodes that this step may verify for a running request: its limit, or its room in the cache."""
        return min(self._wanted_nodes(sequence), sequence.kv.capacity - len(sequence.token_ids))

    def schedule(self, plan: Plan) -> Batch:
        """Give running requests their next blocks, admit what fits, then take all decoding and some prompt chunks."""
        self._remember_prompts()
        preempted = self._hold_next_tokens()
        if not preempted:
            self._admit()
        decoding = [s for s in self.running if s.is_prefilled]
        prompts = [s for s in self.running if not s.is_prefilled]
        budget = most = self._prompt_budget(decoding, prompts, plan) if prompts else 0
        prefilling, finished_prompts = [], []
        for sequence in prompts:
            tokens = min(sequence.uncomputed_tokens, budget)
            if tokens:
                prefilling.append((sequence, tokens))
                budget -= tokens
                if tokens == sequence.uncomputed_tokens:
                    finished_prompts.append(sequence)
        sequences = [*decoding, *(sequence for sequence, _ in prefilling)]
        context_tokens = sum([s.kv.length for s in sequences])
        prices = StepPrices.of(
            plan,
            len(decoding),
            context_tokens=context_tokens // max(1, len(sequences)),
            startable=_startable(prompts[len(prefilling) :], most),
            max_nodes=len(decoding) * self._limits.max_tree_nodes,
            prompt_tokens=sum([tokens for _, tokens in prefilling]),
            prompts=len(prefilling),
        )
        self._leave_room_for_trees(decoding)
        counts = len(self.running), len(self.waiting)
        return Batch(plan, decoding, prefilling, finished_prompts, preempted, prices, context_tokens, *counts)

    def _prompt_budget(self, decoding: list[Sequence], prompts: list[Sequence], plan: Plan) -> int:
        """Most prompt tokens of this step that MAX_STRETCH and the step budget allow, by the plan's costs.

        The whole chunk if nothing decodes, and under the built-in plan, whose costs are a guess.
        """
        most = self._prefill_chunk_tokens
        if not decoding or plan.version == 0:
            return most
        roots, context_tokens = len(decoding), sum([s.kv.length for s in decoding]) // len(decoding)
        plain = StepPrices.of(plan, roots, context_tokens, startable=0, max_nodes=0)
        # Most tokens of the pass belong to the first prompt, and attend to its context so far.
        beside_prompt = StepPrices.of(plan, roots, max(context_tokens, prompts[0].kv.length), 0, 0, most)
        longest_s = MAX_STRETCH * max(1.0, len(prompts) / roots) * plan.wait_factor * plain.undrafted_s
        longest_s = min(longest_s, plan.step_budget_s - plan.cost.step_overhead_s)
        fitting = int(beside_prompt.seconds[roots:].searchsorted(longest_s, side="right")) - 1
        return min(most, max(int(fitting / plan.cost.prompt_ratio), LEAST_CHUNK_TOKENS))

    def remove(self, sequence: Sequence) -> None:
        """Remove a sequence, waiting or running, and free its blocks."""
        if sequence.cache is None:
            self.waiting.remove(sequence)
        else:
            self._release(sequence)
        if sequence.admitted_s is not None:
            request = sequence.request
            self._shares.give_back(request.client, sequence.remaining_tokens, request.client_weight)

    def _remember_prompts(self) -> None:
        """Share the prompts that the last step finished, while their requests still run."""
        if self._prefix_caching:
            for sequence in self.running:
                if sequence.is_prefilled and not sequence.is_remembered:
                    self._cache.remember(sequence.kv, sequence.token_ids)
                    sequence.is_remembered = True

    def _hold_next_tokens(self) -> list[Sequence]:
        """Give each running sequence blocks for all its tokens. Returns the sequences that were preempted for them."""
        if all(sequence.kv.capacity >= len(sequence.token_ids) for sequence in self.running):
            return []
        preempted: list[Sequence] = []
        ranked = sorted(self.running, key=_standing)
        for sequence in reversed(ranked.copy()):
            while sequence.cache is not None and not self._holds_all(sequence):
                preempted.append(ranked.pop(0))
                self._preempt(preempted[-1])
        return preempted

    def _holds_all(self, sequence: Sequence) -> bool:
        tokens = len(sequence.token_ids)
        if self._cache.extend(sequence.kv, tokens):
            return True
        self._reclaim_tree_room()
        return self._cache.extend(sequence.kv, tokens)

    def _reclaim_tree_room(self) -> None:
        for sequence in self.running:
            self._cache.shrink(sequence.kv, len(sequence.token_ids))

    def _leave_room_for_trees(self, decoding: list[Sequence]) -> None:
        """Divide the free blocks among the requests that may draft; they can be reclaimed at any time."""
        short = [s for s in decoding if s.kv.capacity < len(s.token_ids) + self._wanted_nodes(s)]
        if not short:
            return
        free = self._cache.free_blocks
        for left, sequence in zip(range(len(short), 0, -1), short, strict=True):
            wanted = self._cache.blocks_for(len(sequence.token_ids) + self._wanted_nodes(sequence))
            blocks = min(wanted, len(sequence.kv.blocks) + free // left)
            free -= max(0, blocks - len(sequence.kv.blocks))
            self._cache.extend(sequence.kv, blocks * self._cache.block_tokens)

    def _wanted_nodes(self, sequence: Sequence) -> int:
        if sequence.policy.max_depth == 0:
            return 0
        most, limit = sequence.request.max_nodes, self._limits.max_tree_nodes
        return limit if most is None else min(most, limit)

    def _preempt(self, sequence: Sequence) -> None:
        """Return a sequence to the queue, with all its tokens; the prefix cache still knows its freed blocks."""
        self._release(sequence)
        sequence.preemptions += 1
        self.add(sequence)

    def _release(self, sequence: Sequence) -> None:
        """Remove a sequence from the running ones and free its blocks."""
        self.running.remove(sequence)
        # The tokens of a failed sequence may be fewer than its cache holds.
        if self._prefix_caching and sequence.finish_reason is not FinishReason.FAILED:
            self._cache.remember(sequence.kv, sequence.token_ids)
        self._cache.free(sequence.kv)
        sequence.cache = None

    def _admit(self) -> None:
        # In order: a large request at the head is not starved by small ones behind it.
        while self.waiting and len(self.running) < self._limits.max_running_requests:
            sequence = self._next()
            cache = self._place(sequence)
            if cache is None:
                return
            if sequence.admitted_s is None:
                sequence.admitted_s, sequence.cached_tokens = self._clock(), cache.length
                self._charge(sequence.request, len(sequence.token_ids) + sequence.remaining_tokens)
            sequence.cache, sequence.admitted_tokens, sequence.is_remembered = cache, len(sequence.token_ids), False
            self.waiting.remove(sequence)
            self.running.append(sequence)

    def _next(self) -> Sequence:
        """The request to admit: by aged priority, then preempted ones, then by the client's turn, then resumed streams.

        No request ages above the highest queued priority, so that a long wait does not outweigh a client's share.
        """
        now, highest = self._clock(), max(s.request.priority for s in self.waiting)

        def rank(one: Sequence) -> tuple[float, bool, float, bool, float]:
            request, queued_s = one.request, one.arrived_s + one.request.elapsed_s
            priority = min(highest, request.priority + (now - queued_s) // AGEING_S)
            turn = self._shares.turn(request.client)
            return -priority, not one.preemptions, turn, not request.delivered_token_ids, queued_s

        return min(self.waiting, key=rank)

    def _charge(self, request: GenerationRequest, tokens: int) -> None:
        earliest = min(self._shares.turn(one.request.client) for one in self.waiting)
        self._shares.start(request.client, tokens, request.client_weight, earliest)

    def _place(self, sequence: Sequence) -> SequenceCache | None:
        """Blocks for all tokens of a waiting sequence, if each running one can still take one more block.

        Without that reserve the admitted request would soon be preempted, and its work lost.
        """
        # The last token always runs: its logits give the next one.
        cached = self._prefix_caching and not sequence.wants_prompt_logprobs
        prefix = sequence.token_ids[:-1] if cached else []
        tokens, headroom = len(sequence.token_ids), len(self.running) + 1 if self.running else 0
        cache = self._cache.allocate(tokens, prefix, headroom)
        if cache is None:
            self._reclaim_tree_room()
            cache = self._cache.allocate(tokens, prefix, headroom)
        return cache


def _standing(sequence: Sequence) -> float:
    """The sequence with the highest standing is preempted last. All age alike, so the order never changes."""
    request = sequence.request
    return request.priority - (sequence.arrived_s + request.elapsed_s) / AGEING_S


def _startable(prompts: list[Sequence], budget: int) -> int:
    """How many of these prompts a step of `budget` prompt tokens starts."""
    starts = accumulate((prompt.uncomputed_tokens for prompt in prompts), initial=0)
    return sum(start < budget for start, _ in zip(starts, prompts, strict=False))
