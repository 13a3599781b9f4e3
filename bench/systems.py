"""What can be put under load: an engine in this process, or a running service."""

from __future__ import annotations

import heapq
import queue
import threading
import time
from collections.abc import Callable, Sequence
from typing import Literal

import torch

from bench.common import Prompt
from bench.load import End, Request, Tokens
from bench.local_engine import PlannedEngine, encode, greedy_answers, planned_engine
from bench.synthetic import Acceptance, SyntheticProposer
from lm.model import LanguageModel
from lm.parallel import load_model
from treeline.client import TreelineClient
from treeline.config import Config, DrafterConfig
from treeline.errors import ConfigError, QueueFullError, TreelineError
from treeline.plan import CostCurve
from treeline.sampling import SamplingParams
from treeline.v1 import generation_pb2 as pb
from verifier_svc.engine.grammar import Grammar
from verifier_svc.engine.request import Chunk, Completion, FinishReason, GenerationRequest, SpeculationTotals
from verifier_svc.service.grammars import GrammarCompiler
from verifier_svc.service.profile import profile_verification
from verifier_svc.service.server import served

PROFILE_CACHE_TOKENS = 4096
REQUEST_TIMEOUT_S = 600.0


class LocalSystem:
    """Engine, drafter and planner in this process.

    Args:
        token_ids: of each prompt that may be asked.
        sleep: waits some seconds while there is nothing to do.
        grammar: of every answer.
    """

    def __init__(
        self,
        planned: PlannedEngine,
        token_ids: dict[Prompt, list[int]],
        sleep: Callable[[float], None] = time.sleep,
        grammar: Grammar | None = None,
    ) -> None:
        self.planned, self._token_ids, self._sleep, self._grammar = planned, token_ids, sleep, grammar
        self._aborted: list[Tokens | End] = []

    def submit(self, request: Request) -> None:
        asked = GenerationRequest(
            request.id,
            self._token_ids[request.prompt],
            SamplingParams(),
            request.max_tokens,
            policy=request.policy,
            grammar=self._grammar,
        )
        self.planned.engine.add(asked)

    def poll(self, timeout_s: float) -> list[Tokens | End]:
        events, self._aborted = self._aborted, []
        if self.planned.engine.has_work:
            events += [_from_engine(output.request_id, output.item) for output in self.planned.step()]
        elif not events:
            self._sleep(timeout_s)
        return events

    def abort(self, request_ids: Sequence[str]) -> None:
        ended = self.planned.engine.abort(request_ids)
        self._aborted += [_from_engine(output.request_id, output.item) for output in ended]


class LocalSystems:
    """An engine for each policy, over one target model: none learns from another, and each can be halted.

    Args:
        start: makes an engine.
        grammar: of every answer.
    """

    def __init__(
        self,
        start: Callable[[], PlannedEngine],
        token_ids: dict[Prompt, list[int]],
        device: torch.device,
        grammar: Grammar | None,
    ) -> None:
        self._start, self._token_ids, self.device, self._grammar = start, token_ids, device, grammar
        self._systems: dict[str, LocalSystem] = {}

    def system(self, policy: str) -> LocalSystem:
        if policy not in self._systems:
            self._systems[policy] = LocalSystem(self._start(), self._token_ids, grammar=self._grammar)
        return self._systems[policy]


def start_local(
    config: Config,
    prompts: Sequence[Prompt],
    streams: int,
    max_tokens: int,
    acceptance: Acceptance | None = None,
    grammar: pb.Grammar | None = None,
) -> LocalSystems:
    """`systems_over` the target that `config` describes, which is loaded now.

    Raises:
        ConfigError: a model cannot be loaded, or a prompt and its answer exceed the context.
        InvalidRequestError: the grammar cannot be compiled.
    """
    model = load_model(config.verifier.target)
    compiled = GrammarCompiler(model.tokenizer, served(model, config))(grammar) if grammar else None
    token_ids = {prompt: encode(model.tokenizer, prompt) for prompt in prompts}
    return systems_over(model, config, token_ids, streams, max_tokens, acceptance, compiled)


def systems_over(
    model: LanguageModel,
    config: Config,
    token_ids: dict[Prompt, list[int]],
    streams: int,
    max_tokens: int,
    acceptance: Acceptance | None = None,
    grammar: Grammar | None = None,
) -> LocalSystems:
    """Engines that `config` describes over one target, which is profiled now, with room for these streams.

    Args:
        token_ids: of each prompt that may be sent.
        acceptance: draft with this acceptance, whatever drafter is configured.
        grammar: of every answer.

    Raises:
        ConfigError: a drafter cannot be loaded, or a prompt and its answer exceed the context.
    """
    config = with_room(config, {prompt.id: len(ids) for prompt, ids in token_ids.items()}, streams, max_tokens)
    curves = profile_verification(model, model.new_cache(PROFILE_CACHE_TOKENS, config.verifier.kv_block_tokens))
    known = _answers(model, config, curves, list(token_ids.values()), streams, max_tokens) if acceptance else {}

    def start() -> PlannedEngine:
        proposer = SyntheticProposer(acceptance, known, model.vocab_size) if acceptance else None
        return planned_engine(model, config, curves, proposer)

    return LocalSystems(start, token_ids, model.device, grammar)


def _answers(
    model: LanguageModel,
    config: Config,
    curves: tuple[CostCurve, ...],
    prompts: list[list[int]],
    streams: int,
    max_tokens: int,
) -> dict[tuple[int, ...], list[int]]:
    """The target's answer to each of these prompts."""
    plain = config.model_copy(update={"drafter": DrafterConfig(kind="ngram")})
    planned = planned_engine(model, plain, curves)
    answers, _ = greedy_answers(planned, prompts, ["off"] * len(prompts), max_tokens, streams)
    return {tuple(prompt): answer for prompt, answer in zip(prompts, answers, strict=True)}


def with_room(config: Config, prompt_tokens: dict[str, int], streams: int, max_tokens: int) -> Config:
    """`config` with slots and KV blocks for `streams` of these prompts, the longest of them, and the largest trees.

    Raises:
        ConfigError: a prompt and its answer exceed the context.
    """
    limits, verifier = config.limits, config.verifier
    for prompt_id, tokens in prompt_tokens.items():
        if tokens + max_tokens > limits.max_context_tokens:
            raise ConfigError(
                f"prompt {prompt_id} has {tokens} tokens: with an answer of {max_tokens} it exceeds "
                f"limits.max_context_tokens, {limits.max_context_tokens}"
            )
    block = 128 if verifier.kv_block_tokens == "auto" else verifier.kv_block_tokens
    longest = heapq.nlargest(streams, prompt_tokens.values())
    longest += longest[:1] * (streams - len(longest))
    needed = sum(-(-(tokens + max_tokens + limits.max_tree_nodes) // block) * block for tokens in longest)
    return config.model_copy(
        update={
            "limits": limits.model_copy(update={"max_running_requests": max(streams, limits.max_running_requests)}),
            "verifier": verifier.model_copy(update={"kv_cache_tokens": _at_least(needed, verifier.kv_cache_tokens)}),
            "drafter": config.drafter.model_copy(
                update={"kv_cache_tokens": _at_least(needed, config.drafter.kv_cache_tokens)}
            ),
        }
    )


class RemoteSystem:
    """A running service, asked through its clients' port. Its one planner serves all policies."""

    device = None

    def __init__(self, client: TreelineClient, streams: int, grammar: pb.Grammar | None = None) -> None:
        """
        Args:
            grammar: of every answer.

        Raises:
            ConfigError: it does not run so many streams at once.
            TreelineError: it cannot be reached.
        """
        self._client, self._grammar = client, grammar
        self._chat = client.model_info().has_chat_template
        self._events: queue.SimpleQueue[Tokens | End | TreelineError] = queue.SimpleQueue()
        most = client.load().max_requests_running
        if streams > most:
            raise ConfigError(
                f"the service at {client.target} runs {most} requests at once: raise its "
                f"limits.max_running_requests, or ask for a concurrency up to {most}"
            )

    def system(self, policy: str) -> RemoteSystem:
        return self

    def submit(self, request: Request) -> None:
        threading.Thread(target=self._follow, args=(request,), daemon=True).start()

    def poll(self, timeout_s: float) -> list[Tokens | End]:
        """
        Raises:
            TreelineError: a request failed.
        """
        events: list[Tokens | End] = []
        try:
            while True:
                event = self._events.get(timeout=0 if events else timeout_s)
                if isinstance(event, TreelineError):
                    raise event
                events.append(event)
        except queue.Empty:
            return events

    def abort(self, request_ids: Sequence[str]) -> None:
        self._client.abort(*request_ids)

    def _follow(self, request: Request) -> None:
        """One stream, in a thread of its own."""
        try:
            messages = self._client.generate(
                prompt=None if self._chat else request.prompt.text,
                messages=_messages(request.prompt) if self._chat else None,
                max_tokens=request.max_tokens,
                temperature=0.0,
                policy=request.policy,
                grammar=self._grammar,
                request_id=request.id,
                timeout_s=REQUEST_TIMEOUT_S,
            )
            for message in messages:
                self._events.put(_from_client(request.id, message))
        except QueueFullError:
            self._events.put(End(request.id, rejected=True))
        except TreelineError as error:
            self._events.put(error)


def _messages(prompt: Prompt) -> list[dict[str, str]]:
    return [{"role": "user", "content": prompt.text}]


def _from_engine(request_id: str, item: Chunk | Completion) -> Tokens | End:
    if isinstance(item, Chunk):
        return Tokens(request_id, item.token_ids)
    return _end(request_id, item.finish_reason is not FinishReason.ABORTED, item.speculation)


def _from_client(request_id: str, message: pb.GenerateChunk | pb.GenerateComplete) -> Tokens | End:
    if isinstance(message, pb.GenerateChunk):
        return Tokens(request_id, list(message.token_ids))
    return _end(request_id, message.finish_reason != pb.FINISH_REASON_ABORTED, message.speculation)


def _end(request_id: str, finished: bool, totals: SpeculationTotals | pb.SpeculationSummary) -> End:
    return End(
        request_id,
        finished=finished,
        steps=totals.steps,
        verified_nodes=totals.verified_nodes,
        accepted_nodes=totals.accepted_nodes,
    )


def _at_least(needed: int, tokens: int | Literal["auto"]) -> int | Literal["auto"]:
    return tokens if tokens == "auto" else max(needed, tokens)
