"""The generation service of one verifier: from gRPC requests to engine requests, and from chunks to messages."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

import grpc
from structlog.contextvars import bind_contextvars

import treeline
from treeline.config import LimitsConfig, VerifierConfig
from treeline.errors import FieldViolation, InvalidRequestError, RequestBrokenError
from treeline.messages import to_message
from treeline.plan import Plan, plan_summary
from treeline.request import CLIENT, MAX_ANSWERS, WEIGHT, identify, identity
from treeline.rpc.merged import merged
from treeline.telemetry import tracing
from treeline.v1 import generation_pb2 as pb
from treeline.v1 import generation_pb2_grpc as pb_grpc
from verifier_svc.engine.grammar import Grammar
from verifier_svc.engine.request import (
    Chunk,
    Completion,
    FinishReason,
    GenerationRequest,
    Load,
    NodeFate,
    TokenLogprobs,
)
from verifier_svc.service.chat import Prompt, token_ids_of
from verifier_svc.service.fields import ServedModel
from verifier_svc.service.grammars import GrammarCompiler
from verifier_svc.service.validation import (
    answer_id,
    parse_detokenize,
    parse_generate,
    parse_tokenize,
    split,
    with_prompt,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TOKENISING_THREADS = 2
"""A long prompt must neither block the streams nor all other prompts; prompts must not take every core."""
_FINISH_REASONS = {
    FinishReason.STOP: pb.FINISH_REASON_STOP,
    FinishReason.LENGTH: pb.FINISH_REASON_LENGTH,
    FinishReason.ABORTED: pb.FINISH_REASON_ABORTED,
}


_FATES = {
    NodeFate.PRUNED: pb.NODE_FATE_PRUNED,
    NodeFate.REJECTED: pb.NODE_FATE_REJECTED,
    NodeFate.ACCEPTED: pb.NODE_FATE_ACCEPTED,
}


class EngineFace(Protocol):
    """The part of AsyncEngine that the service uses."""

    def generate(self, request: GenerationRequest) -> AsyncIterator[Chunk | Completion]: ...

    def abort(self, request_ids: Iterable[str]) -> int: ...

    def load(self) -> Load: ...


class GenerationServicer(pb_grpc.GenerationServiceServicer):
    """Serves `engine`. Errors are raised as TreelineErrors, so the server needs a CallInterceptor."""

    def __init__(
        self,
        engine: EngineFace,
        tokenizer: PreTrainedTokenizerFast,
        info: ServedModel,
        limits: LimitsConfig,
        verifier: VerifierConfig,
        plan: Callable[[], Plan],
    ) -> None:
        """`plan`: returns the plan in force."""
        self._engine, self._tokenizer, self._info, self._plan = engine, tokenizer, info, plan
        self._limits, self._verifier = limits, verifier
        self._tokenising = ThreadPoolExecutor(TOKENISING_THREADS, "tokenise")
        self._compile, self._compiling = GrammarCompiler(tokenizer, info), ThreadPoolExecutor(1, "grammar")

    async def Generate(
        self, request: pb.GenerateRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[pb.GenerateResponse]:
        identify(request)
        bind_contextvars(request_id=request.request_id)
        checked, prompt = parse_generate(request, self._info, self._limits, self._verifier)
        grammar = await self._compiled(request.grammar) if request.HasField("grammar") else None
        checked = replace(checked, grammar=grammar)
        generation = with_prompt(checked, prompt, await self._token_ids(prompt), self._info, self._limits)
        client, weight = _owner(context)
        owned = replace(
            generation, request_id=_owned(client, generation.request_id), client=client, client_weight=weight
        )
        await context.send_initial_metadata(identity(request))
        answers = split(owned, request)
        with tracing.span("verify", dict(context.invocation_metadata() or ())) as span:
            # The prompt's KV is in the prefix cache once the first answer has begun.
            streams = merged([self._traced(answer, span) for _, answer in answers], first_alone=True)
            async with aclosing(streams) as outputs:
                async for place, output in outputs:
                    index, answer = answers[place]
                    if isinstance(output, Chunk):
                        yield pb.GenerateResponse(chunk=await self._spelled(output, index))
                    elif output.finish_reason is FinishReason.FAILED:
                        raise RequestBrokenError(f"internal error; the verifier's log has it as {request.request_id}")
                    else:
                        seeded = replace(generation, sampling=answer.sampling)
                        yield pb.GenerateResponse(complete=completion_to_proto(output, seeded, index))

    async def _traced(self, request: GenerationRequest, span: tracing.Span) -> AsyncIterator[Chunk | Completion]:
        """The engine's outputs; the completion's timings become parts of `span`."""
        span.note({"request_id": request.public_id, "policy": request.policy})
        async with aclosing(self._engine.generate(request)) as outputs:  # type: ignore[type-var]
            async for output in outputs:
                if isinstance(output, Completion):
                    _add_parts(span, output)
                yield output

    async def Abort(self, request: pb.AbortRequest, context: grpc.aio.ServicerContext) -> pb.AbortResponse:
        client, _ = _owner(context)
        ids = [[_owned(client, answer_id(each, i)) for i in range(MAX_ANSWERS)] for each in request.request_ids]
        return pb.AbortResponse(aborted=sum(self._engine.abort(answers) > 0 for answers in ids))

    async def GetLoad(self, request: pb.GetLoadRequest, context: grpc.aio.ServicerContext) -> pb.GetLoadResponse:
        return pb.GetLoadResponse(
            max_requests_running=self._limits.max_running_requests,
            max_requests_waiting=self._limits.max_waiting_requests,
            **vars(self._engine.load()),
        )

    async def GetPlan(self, request: pb.GetPlanRequest, context: grpc.aio.ServicerContext) -> pb.GetPlanResponse:
        return pb.GetPlanResponse(plans=[plan_summary(self._plan())])

    async def GetModelInfo(
        self, request: pb.GetModelInfoRequest, context: grpc.aio.ServicerContext
    ) -> pb.GetModelInfoResponse:
        return to_message(
            self._info,
            pb.GetModelInfoResponse,
            model=self._info.name,
            eos_token_ids=sorted(self._info.eos_token_ids),
            default_policy=self._verifier.default_policy,
            allowed_policies=self._verifier.allowed_policies,
            version=treeline.__version__,
            default_sampling=to_message(self._info.sampling, pb.SamplingParams, seed=None),
        )

    async def Tokenize(self, request: pb.TokenizeRequest, context: grpc.aio.ServicerContext) -> pb.TokenizeResponse:
        token_ids, most = await self._token_ids(parse_tokenize(request, self._info)), self._info.max_context_tokens
        if len(token_ids) > most:
            problem = f"has {len(token_ids)} tokens, more than the {most} of the context"
            raise InvalidRequestError(FieldViolation("input", problem))
        return pb.TokenizeResponse(token_ids=token_ids)

    async def Detokenize(
        self, request: pb.DetokenizeRequest, context: grpc.aio.ServicerContext
    ) -> pb.DetokenizeResponse:
        return pb.DetokenizeResponse(text=str(self._tokenizer.decode(parse_detokenize(request, self._info))))

    async def _spelled(self, chunk: Chunk, index: int) -> pb.GenerateChunk:
        """The chunk's message. Detokenising a whole prompt takes long, and must not hold up other streams."""
        if not chunk.prompt_logprobs:
            return chunk_to_proto(chunk, self._tokenizer, index)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._tokenising, chunk_to_proto, chunk, self._tokenizer, index)

    async def _compiled(self, grammar: pb.Grammar) -> Grammar:
        return await asyncio.get_running_loop().run_in_executor(self._compiling, self._compile, grammar)

    async def _token_ids(self, prompt: Prompt) -> list[int]:
        return await asyncio.get_running_loop().run_in_executor(self._tokenising, token_ids_of, prompt, self._tokenizer)


def _add_parts(span: tracing.Span, completion: Completion) -> None:
    ended_s, totals = time.time(), completion.speculation
    arrived_s = ended_s - completion.total_s
    admitted_s, first_token_s = arrived_s + completion.queue_s, arrived_s + completion.time_to_first_token_s
    span.part("queue", arrived_s, admitted_s)
    span.part("prefill", admitted_s, first_token_s, prompt_tokens=completion.prompt_tokens)
    span.part(
        "decode",
        first_token_s,
        ended_s,
        completion_tokens=completion.completion_tokens,
        steps=totals.steps,
        drafted_nodes=totals.drafted_nodes,
        verified_nodes=totals.verified_nodes,
        accepted_nodes=totals.accepted_nodes,
        price=totals.mean_price,
    )


def _owner(context: grpc.aio.ServicerContext) -> tuple[str, float]:
    """The client that the front door names, and its weight; an empty name and 1 if it names none."""
    metadata = dict(context.invocation_metadata() or ())
    try:
        weight = float(metadata.get(WEIGHT, 1.0))
    except ValueError:
        weight = math.nan
    if not 0 < weight < math.inf:
        raise InvalidRequestError(FieldViolation(WEIGHT, "must be a number above 0"))
    return str(metadata.get(CLIENT, "")), weight


def _owned(client: str, request_id: str) -> str:
    """The id of a client's request in the engine: two clients may choose the same one, and see only their own."""
    return f"{client}/{request_id}" if client else request_id


def chunk_to_proto(chunk: Chunk, tokenizer: PreTrainedTokenizerFast, index: int = 0) -> pb.GenerateChunk:
    """The message of one engine step. `index`: of the answer."""
    message = pb.GenerateChunk(text=chunk.text, token_ids=chunk.token_ids, index=index)
    message.logprobs.extend(_position(position, tokenizer) for position in chunk.logprobs)
    message.prompt_logprobs.extend(_position(position, tokenizer) for position in chunk.prompt_logprobs)
    if chunk.explanation is not None:
        nodes = [
            pb.DraftNode(**node._asdict() | {"fate": _FATES[node.fate], "text": str(tokenizer.decode([node.token_id]))})
            for node in chunk.explanation.nodes
        ]
        message.speculation.CopyFrom(pb.SpeculationStep(**vars(chunk.explanation) | {"nodes": nodes}))
    return message


def _position(position: TokenLogprobs, tokenizer: PreTrainedTokenizerFast) -> pb.PositionLogprobs:
    chosen, *top = (
        pb.TokenLogprob(token_id=token_id, logprob=logprob, text=str(tokenizer.decode([token_id])))
        for token_id, logprob in [(position.token_id, position.logprob), *position.top]
    )
    return pb.PositionLogprobs(chosen=chosen, top=top)


def completion_to_proto(completion: Completion, request: GenerationRequest, index: int = 0) -> pb.GenerateComplete:
    """The last message of a stream: how it ended, and with which seed and policy."""
    totals, matched = completion.speculation, completion.matched_stop
    return pb.GenerateComplete(
        finish_reason=_FINISH_REASONS[completion.finish_reason],
        stop_token_id=matched if isinstance(matched, int) else None,
        stop_string=matched if isinstance(matched, str) else None,
        usage=to_message(completion, pb.Usage, cached_prompt_tokens=completion.cached_tokens),
        timings=to_message(completion, pb.Timings),
        speculation=to_message(
            totals,
            pb.SpeculationSummary,
            mean_price=totals.mean_price,
            mean_accepted_length=totals.mean_accepted_length,
            mean_tree_nodes=totals.mean_tree_nodes,
        ),
        seed=request.sampling.seed,
        request_id=request.request_id,
        policy=request.policy,
        index=index,
    )
