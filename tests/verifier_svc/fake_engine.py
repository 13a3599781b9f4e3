"""A verifier without a model: a real gRPC server over an engine that counts. For tests of the service's borders."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import grpc
from jinja2 import TemplateError
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from planner.fast.builtin_plan import builtin_plan
from treeline.config import Config, LimitsConfig
from treeline.errors import QueueFullError
from treeline.plan import Signal
from treeline.rpc.channels import add_standard_services, bind, new_server
from treeline.rpc.interceptors import SERVICE, CallInterceptor
from treeline.v1 import generation_pb2_grpc as pb_grpc
from verifier_svc.engine.request import (
    Chunk,
    Completion,
    ExplainedNode,
    FinishReason,
    GenerationRequest,
    Load,
    NodeFate,
    SpeculationTotals,
    StepExplanation,
    TokenLogprobs,
)
from verifier_svc.service.fields import ServedModel
from verifier_svc.service.service import GenerationServicer

INFO = ServedModel("fake", "FakeForCausalLM", "float32", 256, 1024, frozenset({0}), has_chat_template=True)


class FakeTokenizer:
    """One token a byte."""

    def __init__(self) -> None:
        self.added_tokens_decoder: dict[int, object] = {}
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())  # a byte as itself, or from U+0100 on if not printable
        unprintable = [byte for byte in range(256) if chr(byte) not in alphabet]
        vocab = {c: ord(c) if ord(c) < 256 else unprintable[ord(c) - 256] for c in alphabet}
        self.backend_tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
        self.backend_tokenizer.decoder = decoders.ByteLevel()

    def decode(self, token_ids: list[int]) -> str:
        return bytes(token_ids).decode("utf-8", "replace")

    def get_chat_template(self) -> str:
        return "'tool'"

    def __call__(self, text: str, **_: object) -> SimpleNamespace:
        return SimpleNamespace(input_ids=list(text.encode()))

    def apply_chat_template(
        self,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        tokenize: bool = False,
        **more: object,
    ) -> str:
        if messages[0]["role"] == "assistant":
            raise TemplateError("the assistant may not begin")
        heard = "".join(f"<{name}>{json.dumps(value)}" for name, value in {"tools": tools, **more}.items() if value)
        for message in messages:
            calls = json.dumps(message["tool_calls"]) if "tool_calls" in message else ""
            heard += f"<{message['role']}>{message['content']}{calls}"
        return heard + "<assistant>" * add_generation_prompt


class FakeEngine:
    """Answers each request with `name` and a count, one word a step, two tokens a word. Resumes at any word.
    With `says`, it answers with these pieces, one a step, and stops.

    Attributes:
        requests: all that were accepted, in order.
        open: ids of requests that have not ended; the test's proof that nothing is left behind.
    """

    def __init__(
        self,
        name: str = "a",
        step_s: float = 0.0,
        capacity: int = 100,
        fail: Exception | None = None,
        ends: FinishReason = FinishReason.LENGTH,
        says: Sequence[str] = (),
        tool_call_format: str = "",
    ) -> None:
        self.says, self.tool_call_format = says, tool_call_format
        self.name, self.step_s, self.capacity, self.fail, self.ends = name, step_s, capacity, fail, ends
        self.fail_at = 1
        self.requests: list[GenerationRequest] = []
        self.open: set[str] = set()
        self.elsewhere = 0
        self._aborted: set[str] = set()

    async def generate(self, request: GenerationRequest) -> AsyncIterator[Chunk | Completion]:
        if len(self.open) >= self.capacity:
            raise QueueFullError("the queue is full")
        self.requests.append(request)
        self.open.add(request.request_id)
        reason = FinishReason.STOP if self.says else self.ends
        try:
            for piece in self.says:
                yield Chunk(piece, [65, 66], _logprobs(request), _explanation(request))
            words = 0 if self.says else request.max_tokens // 2
            if request.max_tokens == 0:
                yield Chunk("", [], [], prompt_logprobs=_prompt_logprobs(request))
            for step in range(len(request.delivered_token_ids) // 2, words):
                await asyncio.sleep(self.step_s)
                if self.fail and step == self.fail_at:
                    raise self.fail
                if request.request_id in self._aborted:
                    reason = FinishReason.ABORTED
                    break
                of_prompt = _prompt_logprobs(request) if step == 0 else ()
                explanation = _explanation(request)
                yield Chunk(f"{self.name}{step} ", [65, 66], _logprobs(request), explanation, prompt_logprobs=of_prompt)
            steps = request.max_tokens // 2
            totals = SpeculationTotals(
                steps, drafted_nodes=4 * steps, verified_nodes=3 * steps, accepted_nodes=steps, price_sum=1.5 * steps
            )
            prompt_tokens = len(request.prompt_token_ids)
            yield Completion(
                reason,
                None,
                prompt_tokens,
                2 * steps,
                0.01,
                0.02,
                0.03,
                totals,
                cached_tokens=prompt_tokens - 1,
                preemptions=1,
            )
        finally:
            self.open.discard(request.request_id)

    def abort(self, request_ids: Iterable[str]) -> int:
        known = self.open & set(request_ids)
        self._aborted |= known
        return len(known)

    def load(self) -> Load:
        return Load(len(self.open) + self.elsewhere, 0, 8, 64, 10.0, 2.0, 3.0, 7, 1.5, True)


def _logprobs(request: GenerationRequest) -> list[TokenLogprobs]:
    if request.logprobs is None:
        return []
    return [TokenLogprobs(token, -0.5, ((token, -0.5), (1, -1.5))[: request.logprobs]) for token in (65, 66)]


def _prompt_logprobs(request: GenerationRequest) -> Sequence[TokenLogprobs]:
    if request.prompt_logprobs is None:
        return ()
    first, *rest = request.prompt_token_ids
    return [TokenLogprobs(first, math.nan, ()), *(TokenLogprobs(token, -2.0, ((token, -2.0),)) for token in rest)]


def _explanation(request: GenerationRequest) -> StepExplanation | None:
    if not request.explain:
        return None
    nodes = (
        ExplainedNode(65, -1, 0.8, 0.8, NodeFate.ACCEPTED),
        ExplainedNode(66, 0, 0.5, 0.4, NodeFate.REJECTED),
        ExplainedNode(67, -1, 0.1, 0.1, NodeFate.REJECTED),
        ExplainedNode(68, 2, 0.3, 0.03, NodeFate.PRUNED),
    )
    tree = nodes if request.explain_tree else ()
    return StepExplanation(4, 3, 1, 1.5, 7, 2, 8, 0.001, 0.002, 0.004, "paid", tree)


PLAN = replace(
    builtin_plan(LimitsConfig()),
    version=7,
    price=1.5,
    reason="because",
    step_budget_s=0.05,
    signals=(Signal("inter_token_p95", 0.03, 0.04, 1.0, "steps"), Signal("x", None, None, math.inf, "prometheus")),
)


@dataclass
class FakeVerifier:
    """A listening one."""

    endpoint: str
    engine: FakeEngine
    server: grpc.aio.Server
    health: object

    async def kill(self) -> None:
        await self.server.stop(None)


@asynccontextmanager
async def fake_verifier(
    engine: FakeEngine,
    config: Config = Config(),  # noqa: B008
    port: int = 0,
) -> AsyncIterator[FakeVerifier]:
    server = new_server(config.internal, config.limits.max_message_bytes, interceptors=[CallInterceptor()])
    info = replace(INFO, tool_call_format=engine.tool_call_format)
    servicer = GenerationServicer(engine, FakeTokenizer(), info, config.limits, config.verifier, lambda: PLAN)
    pb_grpc.add_GenerationServiceServicer_to_server(servicer, server)
    health = await add_standard_services(server, SERVICE)
    endpoint = bind(server, config.internal, port)
    await server.start()
    try:
        yield FakeVerifier(endpoint, engine, server, health)
    finally:
        await server.stop(None)


def ended(code: grpc.StatusCode) -> grpc.aio.AioRpcError:
    """A call's end without a word of ours, as a proxy or a dying process brings it about."""
    return grpc.aio.AioRpcError(code, grpc.aio.Metadata(), grpc.aio.Metadata())


async def until(condition, timeout_s: float = 3.0) -> None:
    """Wait for `condition()`; fails the test if it does not come true."""
    deadline = asyncio.get_running_loop().time() + timeout_s
    while not condition():
        assert asyncio.get_running_loop().time() < deadline, "did not happen in time"
        await asyncio.sleep(0.005)
