"""The clients' port: authenticates, checks, and forwards each call to the least loaded verifier. Light: no torch."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Collection, Iterator, Sequence
from contextlib import contextmanager

import grpc
from grpc_health.v1 import health, health_pb2
from prometheus_client import CollectorRegistry

from front_door.routing import Verifier, VerifierPool
from treeline.config import Config
from treeline.errors import DrainingError, DuplicateRequestError, UnavailableError
from treeline.interceptors import SERVICE, CallInterceptor
from treeline.metrics import FrontDoorMetrics, serve_metrics
from treeline.rpc import Discover, add_standard_services, bind, new_server
from treeline.v1 import generation_pb2 as pb
from verifier_svc.service.validation import ServedModel, decode, parse_generate

EXTRA_RPCS = 256
"""Room for calls beside generation: health, load, aborts."""
ABORT_TIMEOUT_S = 5.0
SERVING_CHECK_INTERVAL_S = 0.1
ATTEMPTS = 2
"""A stream that has not emitted anything is tried on one other verifier."""


class FrontDoorServer:
    """One front door. Verifiers may come and go; while there is none, calls get UNAVAILABLE.

    Attributes:
        endpoint: "host:port" of the clients' port.
        metrics_port: port of /metrics.
    """

    def __init__(
        self,
        server: grpc.aio.Server,
        endpoint: str,
        metrics_port: int,
        door: FrontDoor,
        health_servicer: health.aio.HealthServicer,
    ) -> None:
        self.endpoint, self.metrics_port = endpoint, metrics_port
        self._server, self._door, self._health = server, door, health_servicer

    @classmethod
    async def start(cls, config: Config, verifiers: Discover) -> FrontDoorServer:
        """A front door that listens.

        Raises:
            ConfigError: the port is taken, or a certificate or token file cannot be read.
        """
        registry = CollectorRegistry()
        metrics = FrontDoorMetrics(registry)
        generating = config.limits.max_running_requests + config.limits.max_waiting_requests
        server = new_server(
            config.server,
            config.limits.max_message_bytes,
            interceptors=[CallInterceptor(metrics)],
            max_concurrent_rpcs=generating * config.verifier.resources.replicas + EXTRA_RPCS,
        )
        health_servicer = await add_standard_services(server, SERVICE)

        async def show_health(serving: int) -> None:
            metrics.verifiers.set(serving)
            status = health_pb2.HealthCheckResponse
            for service in ("", SERVICE):
                await health_servicer.set(service, status.SERVING if serving else status.NOT_SERVING)

        endpoint = bind(server, config.server, config.server.port)
        door = FrontDoor(config, await VerifierPool.start(config, verifiers, show_health))
        server.add_generic_rpc_handlers((door.handlers(),))
        await server.start()
        return cls(server, endpoint, serve_metrics(registry, config.metrics), door, health_servicer)

    async def until_serving(self) -> None:
        """Wait until there is a verifier to forward to."""
        while not self._door.pool.serving:
            await asyncio.sleep(SERVING_CHECK_INTERVAL_S)

    async def check(self) -> None:
        """Raise RuntimeError if this front door cannot forward any more (being without verifiers is no such reason)."""
        self._door.pool.check()

    async def stop(self, grace_s: float = 5) -> None:
        """Say NOT_SERVING, refuse new requests, let running ones end within `grace_s`."""
        self._door.draining = True
        await self._health.enter_graceful_shutdown()
        await self._server.stop(grace_s)
        await self._door.pool.stop()


class FrontDoor:
    """The generation service by forwarding. Messages stay the bytes they are; only requests are read, to be checked."""

    def __init__(self, config: Config, pool: VerifierPool) -> None:
        self.pool = pool
        self.draining = False
        self._config = config
        self._open_ids: set[str] = set()

    def handlers(self) -> grpc.GenericRpcHandler:
        """Handlers of all methods, bytes in and bytes out."""
        unary = grpc.unary_unary_rpc_method_handler
        return grpc.method_handlers_generic_handler(
            SERVICE,
            {
                "Generate": grpc.unary_stream_rpc_method_handler(self.generate),
                "Abort": unary(self.abort),
                "GetLoad": unary(self.get_load),
                "GetModelInfo": unary(self.get_model_info),
                "Tokenize": unary(self.tokenize),
            },
        )

    async def generate(self, data: bytes, context: grpc.aio.ServicerContext) -> AsyncIterator[bytes]:
        if self.draining:
            raise DrainingError("this front door is shutting down")
        info = served_model(self._model_info())
        request = decode(pb.GenerateRequest, data)
        parse_generate(request, info, self._config.limits, self._config.verifier)
        request_id = request.request_id or uuid.uuid4().hex
        if not request.request_id:
            # Serialised messages one behind the other are one message with the fields of both.
            data += pb.GenerateRequest(request_id=request_id).SerializeToString()
        with self._opened(request_id):
            failed: list[Verifier] = []
            emitted = False
            while True:
                verifier = self._pick(failed)
                call = verifier.call_stream("Generate")(data, timeout=context.time_remaining())
                verifier.in_flight += 1
                try:
                    async for message in call:
                        emitted = True
                        yield message
                    return
                except grpc.aio.AioRpcError as error:
                    if error.code() is not grpc.StatusCode.UNAVAILABLE:
                        raise
                    verifier.serving = False  # until a poll says otherwise
                    failed.append(verifier)
                    if emitted or len(failed) == ATTEMPTS or self.pool.least_loaded(failed) is None:
                        raise
                finally:
                    verifier.in_flight -= 1
                    call.cancel()

    async def abort(self, data: bytes, context: grpc.aio.ServicerContext) -> bytes:
        """Goes to every verifier, as it is not recorded which one has a request."""
        decode(pb.AbortRequest, data)
        calls = [verifier.call("Abort")(data, timeout=ABORT_TIMEOUT_S) for verifier in self.pool.serving]
        replies = await asyncio.gather(*calls, return_exceptions=True)
        aborted = sum(pb.AbortResponse.FromString(reply).aborted for reply in replies if isinstance(reply, bytes))
        return pb.AbortResponse(aborted=aborted).SerializeToString()

    async def get_load(self, data: bytes, context: grpc.aio.ServicerContext) -> bytes:
        self._model_info()
        return total_load([verifier.load for verifier in self.pool.serving]).SerializeToString()

    async def get_model_info(self, data: bytes, context: grpc.aio.ServicerContext) -> bytes:
        return self._model_info().SerializeToString()

    async def tokenize(self, data: bytes, context: grpc.aio.ServicerContext) -> bytes:
        decode(pb.TokenizeRequest, data)
        verifier = self._pick()
        return await verifier.call("Tokenize")(data, timeout=context.time_remaining())

    def _pick(self, failed: Collection[Verifier] = ()) -> Verifier:
        verifier = self.pool.least_loaded(failed)
        if verifier is None:
            raise UnavailableError("no verifier can be reached")
        return verifier

    def _model_info(self) -> pb.GetModelInfoResponse:
        if self.pool.info is None:
            raise UnavailableError("no verifier can be reached")
        return self.pool.info

    @contextmanager
    def _opened(self, request_id: str) -> Iterator[None]:
        if request_id in self._open_ids:
            raise DuplicateRequestError(f"a request with id {request_id!r} is open")
        self._open_ids.add(request_id)
        try:
            yield
        finally:
            self._open_ids.remove(request_id)


def served_model(info: pb.GetModelInfoResponse) -> ServedModel:
    return ServedModel(
        name=info.model,
        architecture=info.architecture,
        dtype=info.dtype,
        vocab_size=info.vocab_size,
        max_context_tokens=info.max_context_tokens,
        eos_token_ids=frozenset(info.eos_token_ids),
        has_chat_template=info.has_chat_template,
    )


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
    )
    weights = [load.tokens_per_s / total.tokens_per_s if total.tokens_per_s else 1 / len(loads) for load in loads]
    for field in ("mean_accepted_length", "mean_tree_nodes", "price"):
        setattr(total, field, sum(w * getattr(load, field) for w, load in zip(weights, loads, strict=True)))
    return total
