"""The generation service: forwards each call to the least loaded verifier, which checks the request."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import aclosing, contextmanager
from typing import TypeVar

import grpc

from front_door.access import Fields, answering, combined, completed
from front_door.clients import Call, Clients, address_of
from front_door.routing import VerifierPool
from front_door.stream import ResumableStream
from treeline.errors import DrainingError, DuplicateRequestError, UnavailableError, UnknownRequestError
from treeline.request import CLIENT, WEIGHT, identify, identity
from treeline.rpc.status import is_lost
from treeline.rpc.tokens import Client
from treeline.telemetry import tracing
from treeline.v1 import generation_pb2 as pb
from treeline.v1 import generation_pb2_grpc as pb_grpc

ABORT_TIMEOUT_S = 5.0
PLAN_TIMEOUT_S = 2.0
ASKED_AT_MOST = 2
"""Verifiers that one tokenizer call may lose: a request that kills its verifier must not take all of them down."""

T = TypeVar("T")


class FrontDoor(pb_grpc.GenerationServiceServicer):
    """Forwards calls to the verifiers of `pool`. Errors are raised, so the server needs a CallInterceptor."""

    def __init__(self, pool: VerifierPool, clients: Clients, resume_wait_s: float, log_prompts: bool = False) -> None:
        self.pool, self._log_prompts = pool, log_prompts
        self._clients = clients
        self._resume_wait_s = resume_wait_s
        self.draining = False
        self.turned_away = 0  # requests refused while draining
        self._open: set[tuple[str, str]] = set()
        """Client and request id: two clients may choose the same id."""

    async def Generate(self, request: pb.GenerateRequest, context: Call) -> AsyncIterator[pb.GenerateResponse]:
        if self.draining:
            self.turned_away += 1
            raise DrainingError("this front door is shutting down")
        identify(request)
        client, address, resumes = self._clients.of(context), address_of(context), request.HasField("resume")
        with (
            tracing.span("generate", _headers(context)) as span,
            answering(request, client, address, self._log_prompts) as fields,
            self._clients.admitted(client, request),
            self._opened(client, request.request_id),
        ):
            metadata, begun = (*_metadata(client), *span.headers), False
            ended: list[Fields] = []
            stream = ResumableStream(request, metadata, self.pool, self._resume_wait_s, lambda: self.draining)
            try:
                async with aclosing(stream.responses(context)) as responses:
                    async for response in responses:
                        if not begun:  # Not before: until a stream has begun, gRPC's own retries may send it again.
                            await context.send_initial_metadata(identity(request))
                            begun = True
                        if response.HasField("complete"):
                            ended.append(completed(response.complete))
                        yield response
            finally:
                fields |= combined(ended) | {"verifier": stream.endpoint, "resumed": stream.losses + resumes}
                fields.setdefault("completion_tokens", stream.delivered_tokens)
                span.note(fields)

    async def Abort(self, request: pb.AbortRequest, context: Call) -> pb.AbortResponse:
        """Asks every verifier: the request may have come through another front door.

        Raises UnknownRequestError if the caller has none of these requests open.
        """
        metadata = _metadata(self._clients.of(context))
        calls = [v.stub.Abort(request, timeout=ABORT_TIMEOUT_S, metadata=metadata) for v in self.pool.serving]
        replies = await asyncio.gather(*calls, return_exceptions=True)
        aborted = sum(reply.aborted for reply in replies if isinstance(reply, pb.AbortResponse))
        if request.request_ids and not aborted:
            raise UnknownRequestError("no such request of yours is open")
        return pb.AbortResponse(aborted=aborted)

    async def GetLoad(self, request: pb.GetLoadRequest, context: Call) -> pb.GetLoadResponse:
        self._model_info()
        return total_load([verifier.load for verifier in self.pool.serving])

    async def GetPlan(self, request: pb.GetPlanRequest, context: Call) -> pb.GetPlanResponse:
        """The plan of each verifier that answers, ordered by address."""
        self._model_info()
        serving = sorted(self.pool.serving, key=lambda verifier: verifier.endpoint)
        calls = [verifier.stub.GetPlan(request, timeout=PLAN_TIMEOUT_S) for verifier in serving]
        replies = await asyncio.gather(*calls, return_exceptions=True)
        return pb.GetPlanResponse(plans=[p for r in replies if isinstance(r, pb.GetPlanResponse) for p in r.plans])

    async def GetModelInfo(self, request: pb.GetModelInfoRequest, context: Call) -> pb.GetModelInfoResponse:
        return self._model_info()

    async def Tokenize(self, request: pb.TokenizeRequest, context: Call) -> pb.TokenizeResponse:
        return await self._asked(lambda stub: stub.Tokenize(request, timeout=context.time_remaining()))

    async def Detokenize(self, request: pb.DetokenizeRequest, context: Call) -> pb.DetokenizeResponse:
        return await self._asked(lambda stub: stub.Detokenize(request, timeout=context.time_remaining()))

    async def _asked(self, ask: Callable[[pb_grpc.GenerationServiceStub], Awaitable[T]]) -> T:
        """The answer of the least loaded verifier; if it is lost meanwhile, of another one if there is one."""
        lost, problem = None, "no verifier can be reached"
        for _ in range(ASKED_AT_MOST):
            verifier = self.pool.least_loaded(rather_not=lost)
            if verifier is None:
                break
            with verifier.calling() as stub:
                try:
                    return await ask(stub)
                except grpc.aio.AioRpcError as error:
                    if not is_lost(error):
                        raise
                    lost, problem = verifier, f"the verifier was lost: {error.code().name}"
        raise UnavailableError(problem)

    def _model_info(self) -> pb.GetModelInfoResponse:
        if self.pool.info is None:
            raise UnavailableError("no verifier can be reached")
        return self.pool.info

    @contextmanager
    def _opened(self, client: Client, request_id: str) -> Iterator[None]:
        request = client.name, request_id
        if request in self._open:
            raise DuplicateRequestError(f"a request with id {request_id!r} is open")
        self._open.add(request)
        try:
            yield
        finally:
            self._open.remove(request)


def _headers(context: Call) -> dict[str, str | bytes]:
    return dict(context.invocation_metadata() or ())


def _metadata(client: Client) -> tuple[tuple[str, str], ...]:
    return (CLIENT, client.name), (WEIGHT, repr(client.weight))


def total_load(loads: Sequence[pb.GetLoadResponse]) -> pb.GetLoadResponse:
    """The load of all verifiers together: counts and rates add up, means are weighted by tokens per second."""
    total = pb.GetLoadResponse(
        num_requests_running=sum(load.num_requests_running for load in loads),
        num_requests_waiting=sum(load.num_requests_waiting for load in loads),
        max_requests_running=sum(load.max_requests_running for load in loads),
        max_requests_waiting=sum(load.max_requests_waiting for load in loads),
        kv_blocks_used=sum(load.kv_blocks_used for load in loads),
        kv_blocks_total=sum(load.kv_blocks_total for load in loads),
        tokens_per_s=sum(load.tokens_per_s for load in loads),
        plan_version=max((load.plan_version for load in loads), default=0),
        drafter_ready=bool(loads) and all(load.drafter_ready for load in loads),
        drafter_problem=max((load.drafter_problem for load in loads), default=""),
    )
    weights = [load.tokens_per_s / total.tokens_per_s if total.tokens_per_s else 1 / len(loads) for load in loads]
    for field in ("mean_accepted_length", "mean_tree_nodes", "price"):
        setattr(total, field, sum(w * getattr(load, field) for w, load in zip(weights, loads, strict=True)))
    return total
