"""The engine: one `step()` schedules, drafts, verifies, commits and reports. One thread calls it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import count
from typing import Literal, NamedTuple

import numpy as np
import torch

from lm.model import LanguageModel
from lm.packed import PackedSequence
from lm.sampling import Row, argmax, choose_tokens
from planner.policies import parse_policy
from treeline.config import Config
from treeline.drafting import DraftLink
from treeline.errors import FieldViolation, InvalidRequestError
from treeline.forest import ROOT, Forest
from treeline.plan import Plan
from treeline.step_record import StepRecord
from verifier_svc.engine.detokenizer import Detokenizer
from verifier_svc.engine.request import Chunk, FinishReason, GenerationRequest
from verifier_svc.engine.scheduler import Batch, Scheduler
from verifier_svc.engine.sequence import Output, Sequence
from verifier_svc.engine.step_report import explanation, note_prompt_logprobs, step_record, token_logprobs
from verifier_svc.engine.walk import Verified, Walk, target_walks
from verifier_svc.speculation.exchange import Exchange
from verifier_svc.speculation.hidden_states import HiddenStates
from verifier_svc.speculation.speculator import Drafts, Speculator

logger = logging.getLogger(__name__)


class Advance(NamedTuple):
    """One sequence's tokens from one step. `place`: index of its walk in the pass."""

    sequence: Sequence
    place: int
    chunk: Chunk


class Engine:
    """Continuous batching with speculative trees over one target model.

    Args:
        link: the link to the drafter; None never drafts.
        plan: returns the plan in force; called once per step.
        clock: monotonic seconds; a simulation passes its own clock.
    """

    def __init__(
        self,
        model: LanguageModel,
        link: DraftLink | None,
        plan: Callable[[], Plan],
        config: Config,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.model = model
        self.cache = model.new_cache(config.verifier.kv_cache_tokens, config.verifier.kv_block_tokens)
        verifier = config.verifier
        chunk_tokens = min(verifier.prefill_chunk_tokens, model.passes.most_tokens)
        self.scheduler = Scheduler(self.cache, config.limits, chunk_tokens, verifier.prefix_caching, clock)
        hidden_states = HiddenStates(model)
        # Captured passes include the drafter's features: knowing it now avoids a second capture.
        hidden_states.follow(link.features if link else None)
        model.capture(self.cache)
        looks_up = link is not None and config.drafter.looks_up
        exchange = Exchange(link, hidden_states, verifier.draft_timeout_s)
        self.speculator = Speculator(exchange, self.scheduler, config.limits, looks_up, clock)
        self.plan = plan
        self._clock = clock
        self._session_ids = count(1)
        self._step_ids = count(1)

    def add(self, request: GenerationRequest) -> list[Output]:
        """Queue a request whose id is not in use.

        Returns its completion if it resumes after its last token.

        Raises:
            InvalidRequestError: it could never fit the KV cache.
        """
        self.check_fits(request)
        now = self._clock()
        sequence = Sequence(
            request,
            next(self._session_ids),
            parse_policy(request.policy),
            Detokenizer(
                self.model.tokenizer.backend_tokenizer,
                request.stop,
                request.prompt_token_ids,
                request.include_stop,
                request.skip_special_tokens,
                request.min_tokens,
            ),
            list(request.prompt_token_ids),
            arrived_s=now - request.elapsed_s,
            grammar=request.grammar.begin() if request.grammar else None,
            ending_token_ids=request.stop_token_ids.union(() if request.ignore_eos else self.model.eos_token_ids),
        )
        with _confined(sequence):
            sequence.resume(now)
        if sequence.finish_reason is not None:
            return [Output(request.request_id, sequence.completion(now))]
        self.scheduler.add(sequence)
        return []

    def check_fits(self, request: GenerationRequest) -> None:
        """Raise InvalidRequestError if the KV cache could never hold this request."""
        needed = len(request.prompt_token_ids) + request.max_tokens
        held = self.cache.total_blocks * self.cache.block_tokens
        if needed > held:
            problem = f"needs {needed} KV cache tokens (prompt and max_tokens); the cache holds {held}"
            raise InvalidRequestError(FieldViolation("stopping.max_tokens", problem))

    def abort(self, request_ids: Iterable[str]) -> list[Output]:
        """End these requests; unknown ids are ignored. Their memory is free when this returns."""
        sequences = self.scheduler.find(request_ids)
        for sequence in sequences:
            sequence.finish_reason = FinishReason.ABORTED
        return [self._finish(sequence) for sequence in sequences]

    @property
    def has_work(self) -> bool:
        """Whether requests wait or run, or the drafter must still be told of ended ones."""
        return bool(self.scheduler.running or self.scheduler.waiting) or self.speculator.exchange.owes_release

    def step(self) -> tuple[list[Output], StepRecord | None]:
        """One step of the whole batch. The record is None if there was nothing to run."""
        started_s = self._clock()
        batch = self.scheduler.schedule(self.plan())
        for sequence in batch.preempted:
            self._draft_anew(sequence)
        if batch.sequences == 0:
            self.speculator.exchange.release(batch.plan)
            return [], None
        drafts = self.speculator.run(batch)
        verified = self._verify(batch, drafts.kept)
        self._commit(batch, verified.walks)
        self.speculator.exchange.hidden_states.keep(batch, verified.walks, drafts.kept.sizes.tolist())
        advances = self._accept(batch, drafts, verified)
        step_s = self._clock() - started_s
        self.speculator.gate.worked(step_s)
        chunks = [advance.chunk for advance in advances]
        record = step_record(next(self._step_ids), batch, drafts, verified, chunks, step_s)
        return self._outputs(advances, drafts, verified, record), record

    def _verify(self, batch: Batch, forest: Forest) -> Verified:
        """The verification pass, and the target's walk down every tree."""
        started_s = self._clock()
        logits, largest = self._forward(batch, forest), self.model.passes.largest
        if any(sequence.wants_prompt_logprobs for sequence, _ in batch.prefilling):
            logits, largest = logits[_walked_rows(batch, forest, logits)], None
        walks = self._walk(batch, forest, logits, largest)
        return Verified(walks, logits, self._clock() - started_s, self.model.passes.how)

    def _forward(self, batch: Batch, forest: Forest) -> torch.Tensor:
        """Logits float32 [rows, vocab]: root and nodes of each decoding sequence, then one row per finished prompt, or
        one per token of a prompt whose log-probabilities are wanted."""
        packed = []
        token_ids, first = forest.token_ids.tolist(), 0
        for sequence, size in zip(batch.decoding, forest.sizes.tolist(), strict=True):
            nodes = slice(first, first + size)
            parents = np.concatenate(([ROOT], forest.parents[nodes] + 1)).astype(np.int32) if size else None
            packed.append(PackedSequence(sequence.kv, [sequence.token_ids[-1], *token_ids[nodes]], parents, "all"))
            first += size
        for sequence, tokens in batch.prefilling:
            start = sequence.kv.length
            wanted: Literal["all", "last", "none"] = "last" if tokens == sequence.uncomputed_tokens else "none"
            wanted = "all" if sequence.wants_prompt_logprobs else wanted
            packed.append(PackedSequence(sequence.kv, sequence.token_ids[start : start + tokens], None, wanted))
        return self.model.forward(packed, self.cache)

    def _walk(self, batch: Batch, forest: Forest, logits: torch.Tensor, largest: torch.Tensor | None) -> list[Walk]:
        """One walk per decoding sequence, then one per finished prompt: its first token. `largest`: see `Passes`."""
        sequences = batch.decoding + batch.finished_prompts
        if not sequences:
            return []
        forest = forest.spread(range(len(batch.decoding)), len(sequences))
        if all(sequence.is_argmax for sequence in sequences):
            chosen = argmax(logits) if largest is None else largest
        else:
            chosen = choose_tokens(logits, _rows(sequences, forest))
        return target_walks(forest, chosen.tolist())  # The step waits for the device here, and nowhere else.

    def _commit(self, batch: Batch, walks: list[Walk]) -> None:
        """Keep the KV of the roots, the accepted nodes and the prompt chunks; drop the rest."""
        decoded = zip(batch.decoding, walks[: len(batch.decoding)], strict=True)
        moves = [(sequence.kv, [0, *(1 + node for node in walk.accepted)]) for sequence, walk in decoded]
        moves += [(sequence.kv, list(range(tokens))) for sequence, tokens in batch.prefilling]
        self.cache.commit(moves)

    def _accept(self, batch: Batch, drafts: Drafts, verified: Verified) -> list[Advance]:
        """Give every walked sequence its tokens."""
        now_s, advances, first_row = self._clock(), [], 0
        price = drafts.pruning.price if drafts.pruning else 0.0
        sequences = batch.decoding + batch.finished_prompts
        for place, (sequence, walk) in enumerate(zip(sequences, verified.walks, strict=True)):
            drafted, kept = drafts.sizes(place)
            with _confined(sequence):
                waited_s, first = sequence.receive(now_s)
                if place < len(batch.decoding):
                    sequence.count_step(drafted, kept, len(walk.accepted), price)
                text, taken = sequence.accept(walk.tokens)
                logprobs = token_logprobs(sequence, walk, taken, verified.logits, first_row)
                of_prompt = sequence.prompt_logprobs if first else ()
                priority = sequence.request.priority
                chunk = Chunk(text, walk.tokens[:taken], logprobs, None, waited_s, first, of_prompt, priority)
                advances.append(Advance(sequence, place, chunk))
            first_row += 1 + kept
        return advances

    def _outputs(self, advances: list[Advance], drafts: Drafts, verified: Verified, record: StepRecord) -> list[Output]:
        """The chunk of each sequence that advanced, then the completions of those that ended or failed."""
        outputs = []
        for sequence, place, chunk in advances:
            with _confined(sequence):
                if sequence.request.explain:
                    why = explanation(sequence, place, drafts, verified.walks[place], record)
                    chunk = replace(chunk, explanation=why)
                outputs.append(Output(sequence.request.request_id, chunk))
        ended = [sequence for sequence in self.scheduler.running if sequence.finish_reason is not None]
        return outputs + [self._finish(sequence) for sequence in ended]

    def _draft_anew(self, sequence: Sequence) -> None:
        """Give a preempted sequence a new draft session: it is recomputed from its tokens."""
        self.speculator.forget(sequence)
        sequence.session_id, sequence.drafter_tokens = next(self._session_ids), 0

    def _finish(self, sequence: Sequence) -> Output:
        """End a sequence and free all it holds."""
        self.scheduler.remove(sequence)
        self.speculator.forget(sequence)
        return Output(sequence.request.request_id, sequence.completion(self._clock()))


@contextmanager
def _confined(sequence: Sequence) -> Iterator[None]:
    """Let an exception inside end `sequence` alone: the rest of the batch goes on."""
    try:
        yield
    except Exception:
        fields = {"request_id": sequence.request.public_id, "client": sequence.request.client}
        logger.exception("request failed: processing it raised", extra=fields)
        sequence.finish_reason = FinishReason.FAILED


def _walked_rows(batch: Batch, forest: Forest, logits: torch.Tensor) -> list[int]:
    """The rows of `logits` to walk: of a prompt only the last. Notes prompt log-probabilities on the way."""
    first = len(batch.decoding) + len(forest.token_ids)
    walked = list(range(first))
    for sequence, tokens in batch.prefilling:
        finishes, rows = tokens == sequence.uncomputed_tokens, 0
        if sequence.wants_prompt_logprobs:
            rows = tokens
            with _confined(sequence):
                note_prompt_logprobs(sequence, logits[first : first + rows])
        elif finishes:
            rows = 1
        first += rows
        if finishes:
            walked.append(first - 1)
    return walked


def _rows(sequences: list[Sequence], forest: Forest) -> list[Row]:
    """How the token after each root, and after each of its nodes, is drawn."""
    trees = zip(sequences, forest.paths(), strict=True)
    return [sequence.row(path) for sequence, paths in trees for path in ([], *paths)]
