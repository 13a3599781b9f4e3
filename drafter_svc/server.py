"""The drafting service: one stream per verifier, one thread that drafts for all of them."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
from grpc_health.v1 import health

from drafter_svc.drafter import DrafterInfo, TreeDrafter, another_vocabulary, build_drafter
from lm.store import has_vocabulary, resolve_model
from planner.fast.builtin_plan import builtin_plan
from planner.policies import parse_policy
from treeline.config import DEFAULT_MODEL, Config, LimitsConfig
from treeline.drafting import MAX_DRAFT_MESSAGE_BYTES, DraftReply, DraftRequest, reply_to_proto, request_from_proto
from treeline.messages import to_message
from treeline.metrics import DrafterMetrics
from treeline.plan import Plan
from treeline.rpc.channels import add_standard_services, bind, new_server
from treeline.rpc.local_stream import LocalServer, LocalStream
from treeline.telemetry.page import new_registry, serve_metrics
from treeline.v1 import drafting_pb2 as pb
from treeline.v1 import drafting_pb2_grpc as pb_grpc

logger = logging.getLogger(__name__)

SERVICE = pb.DESCRIPTOR.services_by_name["DraftingService"].full_name
STREAM_GRACE_S = 0.2
"""For the step that is being drafted; the streams never end by themselves."""


class DrafterServer:
    """One drafter replica.

    Attributes:
        endpoint: "host:port" of the drafting service.
        metrics_port: port of /metrics.
    """

    def __init__(
        self,
        endpoint: str,
        metrics_port: int,
        server: grpc.aio.Server,
        health_servicer: health.aio.HealthServicer,
        service: DraftingService,
    ) -> None:
        self.endpoint = endpoint
        self.metrics_port = metrics_port
        self._server, self._health, self._service = server, health_servicer, service

    @classmethod
    async def start(cls, config: Config, build: Callable[[Config], TreeDrafter] | None = None) -> DrafterServer:
        """Load and measure the model, then listen.

        Args:
            build: makes the drafter; by default, the one that `config` describes.

        Raises:
            ConfigError: the draft model cannot be used, or a certificate, token or port is wrong.
        """
        worker = ThreadPoolExecutor(1, thread_name_prefix="drafter")
        drafter = await asyncio.get_running_loop().run_in_executor(worker, build or _build, config)
        registry = new_registry()
        service = DraftingService(drafter, config.limits, worker, DrafterMetrics(registry))
        server = new_server(config.internal, MAX_DRAFT_MESSAGE_BYTES)
        pb_grpc.add_DraftingServiceServicer_to_server(service, server)
        health_servicer = await add_standard_services(server, SERVICE)
        endpoint = bind(server, config.internal)
        metrics_port = serve_metrics(registry, config.metrics)
        await server.start()
        logger.info("drafter %s listens on %s", drafter.info.name, endpoint)
        return cls(endpoint, metrics_port, server, health_servicer, service)

    async def check(self) -> None:
        """Raise RuntimeError if this replica can no longer draft."""
        await self._service.check()

    def stats(self) -> dict[str, float]:
        """For the autoscaler, see `DraftingService.stats`."""
        return self._service.stats()

    async def stop(self, grace_s: float = 5) -> None:
        """Report NOT_SERVING, end the streams, free everything. Verifiers decode plainly."""
        await self._health.enter_graceful_shutdown()
        await self._server.stop(min(grace_s, STREAM_GRACE_S))
        await self._service.close()


class _RefusedError(Exception):
    """A request is malformed or exceeds the limits."""


class _Verifier:
    """One verifier's stream.

    Attributes:
        number: unique; the drafter keeps sessions by it.
        plan: of the latest request.
    """

    def __init__(self, number: int) -> None:
        self.number = number
        self.plan: Plan | None = None


class DraftingService(pb_grpc.DraftingServiceServicer):
    """Streams over gRPC and over a Unix socket, in front of one drafter, which only the worker's single thread uses."""

    def __init__(
        self, drafter: TreeDrafter, limits: LimitsConfig, worker: ThreadPoolExecutor, metrics: DrafterMetrics
    ) -> None:
        self._drafter = drafter
        self._limits = limits
        self._worker = worker
        self._metrics = metrics
        self._numbers = itertools.count(1)
        self._verifiers: set[_Verifier] = set()
        self._in_queue_s = self._drafting_s = 0.0  # since `_told_s`, the last call of `stats`
        self._told_s = time.monotonic()
        self._counted = drafter.passes.copy()
        self._local: LocalServer[pb.DraftRequest] | None = None
        try:
            self._local = LocalServer(self._draft_locally, pb.DraftRequest, MAX_DRAFT_MESSAGE_BYTES)
        except OSError as error:
            logger.warning("no Unix socket, verifiers on this machine use the TCP port: %s", error)

    async def Draft(
        self, request_iterator: AsyncIterator[pb.DraftRequest], context: grpc.aio.ServicerContext
    ) -> AsyncIterator[pb.DraftResponse]:
        loop = asyncio.get_running_loop()
        with self._connected() as verifier:
            async for message in request_iterator:
                try:
                    yield await loop.run_in_executor(self._worker, self._answer, message, verifier, time.monotonic())
                except _RefusedError as error:
                    await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))

    def _draft_locally(self, stream: LocalStream[pb.DraftRequest]) -> None:
        """As `Draft`, in a thread of its own."""
        with self._connected() as verifier:
            while message := stream.receive():
                try:
                    answer = self._worker.submit(self._answer, message, verifier, time.monotonic()).result()
                except _RefusedError as error:
                    logger.warning("ended a verifier's stream: %s", error)
                    return
                stream.send(answer)

    @contextlib.contextmanager
    def _connected(self) -> Iterator[_Verifier]:
        verifier = _Verifier(next(self._numbers))
        self._verifiers.add(verifier)
        try:
            yield verifier
        finally:
            self._verifiers.discard(verifier)
            # Not waited for, since this may be a cancellation. The single worker runs it after a step in progress.
            with contextlib.suppress(RuntimeError):  # the worker has ended, and the sessions with it
                self._worker.submit(self._release, verifier)

    async def GetDrafterInfo(
        self, request: pb.GetDrafterInfoRequest, context: grpc.aio.ServicerContext
    ) -> pb.GetDrafterInfoResponse:
        info = self._drafter.info
        return to_message(
            info,
            pb.GetDrafterInfoResponse,
            drafter=info.name,
            feature_width=info.features.width if info.features else 0,
            feature_layers=info.features.layers if info.features else (),
            sessions=self._drafter.sessions,
            streams=len(self._verifiers),
            socket_path=self._local.path if self._local else None,
        )

    def stats(self) -> dict[str, float]:
        """Since the last call: verifiers connected, how many waited for their turn, and the share of time drafting."""
        now_s = time.monotonic()
        elapsed_s, self._told_s = max(1e-3, now_s - self._told_s), now_s
        queued, busy = self._in_queue_s / elapsed_s, self._drafting_s / elapsed_s
        self._in_queue_s = self._drafting_s = 0.0
        return {"streams": len(self._verifiers), "queued": queued, "busy": busy}

    async def check(self) -> None:
        """Raise RuntimeError if the drafter's thread accepts no work."""
        await asyncio.get_running_loop().run_in_executor(self._worker, lambda: None)

    async def close(self) -> None:
        """End the streams that are left, and free everything."""
        if self._local:
            await asyncio.to_thread(self._local.close)
        await asyncio.get_running_loop().run_in_executor(self._worker, self._drafter.close)
        self._worker.shutdown(wait=False)

    def _answer(self, message: pb.DraftRequest, verifier: _Verifier, received_s: float) -> pb.DraftResponse:
        """On the worker's thread. Raises _RefusedError."""
        begun_s = time.monotonic()
        try:
            request = request_from_proto(message, verifier.plan)
            check_request(request, self._limits, self._drafter.info)
        except ValueError as error:
            raise _RefusedError(str(error)) from None
        verifier.plan = request.plan
        reply = self._drafter.draft(request, verifier.number)
        self._in_queue_s += begun_s - received_s
        self._drafting_s += time.monotonic() - begun_s
        self._measure(reply)
        return reply_to_proto(reply)

    def _release(self, verifier: _Verifier) -> None:
        self._drafter.release_verifier(verifier.number)
        self._metrics.sessions.set(self._drafter.sessions)

    def _measure(self, reply: DraftReply) -> None:
        metrics, stats = self._metrics, reply.stats
        metrics.steps.inc()
        metrics.sessions.set(self._drafter.sessions)
        metrics.step_seconds.observe(stats.draft_s)
        metrics.catch_up_tokens.inc(stats.catch_up_tokens)
        for seconds in stats.layer_s:
            metrics.layer_seconds.observe(seconds)
        metrics.nodes.inc(len(reply.forest.token_ids))
        for how, count in (self._drafter.passes - self._counted).items():
            metrics.passes.labels(how).inc(count)
        self._counted = self._drafter.passes.copy()


def check_request(request: DraftRequest, limits: LimitsConfig, info: DrafterInfo) -> None:
    """Raise ValueError if `request` exceeds the deployment's limits or does not fit the drafter."""
    width = info.features.width if info.features else 0
    if len(request.sequences) > limits.max_running_requests:
        raise ValueError(f"{len(request.sequences)} sequences, at most {limits.max_running_requests} run at once")
    for sequence in request.sequences:
        where = f"session {sequence.session_id}"
        if sequence.length > limits.max_context_tokens:
            raise ValueError(f"{where}: {sequence.length} tokens, at most {limits.max_context_tokens} are served")
        if sequence.max_nodes > limits.max_tree_nodes or sequence.max_depth > limits.max_tree_depth:
            raise ValueError(f"{where}: a tree beyond {limits.max_tree_nodes} nodes or depth {limits.max_tree_depth}")
        if info.vocab_size and max(sequence.token_ids) >= info.vocab_size:
            raise ValueError(f"{where}: token id outside the vocabulary")
        if len(sequence.features) and sequence.features.shape[1] != width:
            raise ValueError(f"{where}: {sequence.features.shape[1]} features a token, {width} are read")
        parse_policy(sequence.policy)


def _build(config: Config) -> TreeDrafter:
    """Build the drafter. A hub's target is not fetched for its tokenizer alone: the verifier compares vocabularies."""
    target = config.verifier.target
    built = build_drafter(config.drafter, target, config.limits, None)
    sha256 = built.info.vocabulary_sha256
    here = target.model == DEFAULT_MODEL or Path(target.model).expanduser().exists()
    if sha256 and here and not has_vocabulary(resolve_model(target.model), sha256):
        raise another_vocabulary(built.info, target.model)
    built.warm_up(builtin_plan(config.limits))
    return built
