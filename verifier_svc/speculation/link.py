"""The verifier's link to its drafter: in this process, or over one long-lived gRPC stream."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import logging
import random
import time

import grpc

from treeline.config import Config
from treeline.drafting import (
    Drafter,
    DraftReply,
    DraftRequest,
    FeatureSpec,
    reply_from_proto,
    request_to_proto,
)
from treeline.errors import ConfigError
from treeline.plan import Plan
from treeline.rpc.channels import Discover, connect
from treeline.v1 import drafting_pb2 as pb
from treeline.v1.drafting_pb2_grpc import DraftingServiceStub

logger = logging.getLogger(__name__)

RECONNECT_S = 0.5
"""Between attempts to connect: requests decode plainly meanwhile."""
BALANCE_S = 10.0
"""Between looks at how many verifiers other drafters have: as often as the autoscaler learns of the load."""
INFO_TIMEOUT_S = 5.0
"""For GetDrafterInfo: a drafter answers it at once, unless its machine is overloaded."""
LOST_TIMEOUTS = 10
"""An answer that takes this many times `verifier.draft_timeout_s` is lost: the stream is closed."""
MAX_LATE_ANSWERS = 8
"""Consecutive late answers after which the stream is closed. Each doubles the wait, so the last one took 256 times as
long as predicted, or longer than `verifier.draft_timeout_s`."""


class LocalLink:
    """A drafter in this process, called directly: for one-process use and for tests."""

    def __init__(self, drafter: Drafter) -> None:
        self._drafter = drafter

    ready = True

    @property
    def features(self) -> FeatureSpec | None:
        return self._drafter.features

    def draft(self, request: DraftRequest, timeout_s: float) -> DraftReply | None:
        return self._drafter.draft(request)

    def close(self) -> None:
        self._drafter.close()


class GrpcLink:
    """A drafter in another process. A background task keeps a stream to the least loaded drafter until it breaks.

    The event loop owns all state. The engine's thread hands a request to the loop and waits for the answer. At most one
    request is pending: until its late answer has come, steps go on without drafts.

    Attributes:
        info: GetDrafterInfo's answer of the drafter connected last.
    """

    def __init__(self, discover: Discover, config: Config, vocab_size: int, vocabulary_sha256: str) -> None:
        self._discover = discover
        self._config = config
        self._vocab_size, self._vocabulary_sha256 = vocab_size, vocabulary_sha256
        self._loop = asyncio.get_running_loop()
        self._connection: _Connection | None = None
        self._left = ""  # the endpoint of the stream that ended last
        self.info: pb.GetDrafterInfoResponse | None = None
        self._task = asyncio.create_task(self._stay_connected(), name="draft-link")

    @property
    def ready(self) -> bool:
        connection = self._connection
        return connection is not None and connection.pending is None and connection.drafts

    @property
    def features(self) -> FeatureSpec | None:
        connection = self._connection
        return connection.features if connection is not None else None

    def draft(self, request: DraftRequest, timeout_s: float) -> DraftReply | None:
        """Called from the engine's thread."""
        exchange = asyncio.run_coroutine_threadsafe(self._exchange(request, timeout_s), self._loop)
        try:
            return exchange.result(timeout_s)
        except concurrent.futures.TimeoutError:
            logger.info("no draft within %.2f s; this step goes on without", timeout_s)
            return None
        except concurrent.futures.CancelledError:  # gRPC raises it when the stream was cancelled
            return None

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._task.cancel)

    async def _exchange(self, request: DraftRequest, timeout_s: float) -> DraftReply | None:
        connection = self._connection
        if connection is None or connection.pending is not None:
            return None
        return await connection.ask(request, timeout_s)

    async def _stay_connected(self) -> None:
        last_problem = ""
        while True:
            try:
                endpoint = await self._least_loaded()
                if endpoint is None:
                    problem = "no drafter found"
                else:
                    self._left = endpoint  # true by the time it is read
                    await self._serve_stream(endpoint)
                    problem = "the drafter ended the stream"
            except (grpc.aio.AioRpcError, ConfigError, OSError) as error:
                problem = str(error.details() if isinstance(error, grpc.aio.AioRpcError) else error)
            except Exception as error:  # discovery asks another system, which may fail in any way
                problem = f"{type(error).__name__}: {error}"
            if problem != last_problem:
                logger.warning("no drafter, decoding plainly: %s", problem)
                last_problem = problem
            await asyncio.sleep(RECONNECT_S)

    async def _least_loaded(self) -> str | None:
        """The drafter with the fewest open requests, then the fewest verifiers; the last one used comes last."""
        endpoints = await self._discover()
        if len(endpoints) < 2:
            return next(iter(endpoints), None)
        loads = {
            endpoint: (endpoint == self._left, info.sessions, info.streams, random.random())
            for endpoint, info in (await self._infos(endpoints)).items()
        }
        return min(loads, key=loads.__getitem__, default=endpoints[0])

    async def _leave_if_crowded(self, endpoint: str, stream: grpc.aio.StreamStreamCall) -> None:
        """End `stream` once another drafter has two verifiers fewer, as one that has started since has."""
        while True:
            await asyncio.sleep(BALANCE_S * random.uniform(0.5, 1.5))  # not all verifiers of a drafter at once
            with contextlib.suppress(Exception):  # discovery asks another system; the next look will tell
                infos = await self._infos(await self._discover())
                streams = {other: info.streams for other, info in infos.items()}
                if streams.get(endpoint, 0) >= 2 + min(streams.values(), default=0):
                    await stream.done_writing()  # the answer under way still comes
                    return

    async def _infos(self, endpoints: list[str]) -> dict[str, pb.GetDrafterInfoResponse]:
        """What each drafter that answers says of itself."""
        infos = await asyncio.gather(*map(self._ask_info, endpoints), return_exceptions=True)
        return {e: info for e, info in zip(endpoints, infos, strict=True) if not isinstance(info, BaseException)}

    async def _ask_info(self, endpoint: str) -> pb.GetDrafterInfoResponse:
        async with connect(endpoint, self._config.internal, self._config.limits.max_message_bytes) as channel:
            return await DraftingServiceStub(channel).GetDrafterInfo(pb.GetDrafterInfoRequest(), timeout=INFO_TIMEOUT_S)

    async def _serve_stream(self, endpoint: str) -> None:
        """Keep a stream to `endpoint` until it breaks.

        Raises:
            grpc.aio.AioRpcError: it broke.
            OSError: an answer was lost or wrong, or too many were late.
            ConfigError: the drafter has another vocabulary.
        """
        async with connect(endpoint, self._config.internal, self._config.limits.max_message_bytes) as channel:
            stub = DraftingServiceStub(channel)
            info = await stub.GetDrafterInfo(pb.GetDrafterInfoRequest(), timeout=INFO_TIMEOUT_S)
            if info.vocabulary_sha256 and info.vocabulary_sha256 != self._vocabulary_sha256:
                raise ConfigError(f"the drafter '{info.drafter}' has another vocabulary than the target")
            self.info = info
            try:
                async with asyncio.timeout(None) as lost:
                    stream = stub.Draft()
                    lost_s = LOST_TIMEOUTS * self._config.verifier.draft_timeout_s
                    connection = self._connection = _Connection(info, stream, self._vocab_size, lost, lost_s)
                    logger.info("drafting with %s at %s", info.drafter, endpoint)
                    leaving = asyncio.create_task(self._leave_if_crowded(endpoint, stream), name="draft-balance")
                    try:
                        async for message in stream:
                            connection.receive(message)
                    finally:
                        leaving.cancel()
                        self._connection = None
                        connection.end()
            except TimeoutError:
                raise ConnectionError(f"the drafter's answer did not come within {lost_s:g} s") from None


class _Pending:
    """A request without an answer yet: when the answer is late, and the future that takes it."""

    def __init__(self, request: DraftRequest, timeout_s: float) -> None:
        loop = asyncio.get_running_loop()
        self.request = request
        self.late_at_s = loop.time() + timeout_s
        self.reply: asyncio.Future[DraftReply | None] = loop.create_future()


class _Connection:
    """One open stream; used on the event loop alone.

    Attributes:
        drafts: whether the drafter has a model.
        features: what the drafter reads of the target's passes.
        pending: the request without an answer yet.
        refused: malformed trees so far.
    """

    def __init__(
        self,
        info: pb.GetDrafterInfoResponse,
        stream: grpc.aio.StreamStreamCall,
        vocab_size: int,
        lost: asyncio.Timeout,
        lost_s: float,
    ) -> None:
        """`lost`: closes the stream when it expires, `lost_s` after a request."""
        self.features = FeatureSpec(tuple(info.feature_layers), info.feature_width) if info.feature_width else None
        self.pending: _Pending | None = None
        self._stream, self._vocab_size = stream, vocab_size
        self._lost, self._lost_s = lost, lost_s
        self.drafts = info.vocab_size > 0
        self.refused = 0
        self._plan: Plan | None = None  # as sent last
        self._late = 0  # consecutive late answers

    async def ask(self, request: DraftRequest, timeout_s: float) -> DraftReply | None:
        """The answer to `request`, or None if the stream ends before."""
        self.pending = pending = _Pending(request, timeout_s)
        self._lost.reschedule(asyncio.get_running_loop().time() + self._lost_s)
        message, self._plan = request_to_proto(request, self._plan), request.plan
        try:
            await self._stream.write(message)
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            return None  # the task that reads the stream sees the same and closes it
        return await pending.reply

    def receive(self, message: pb.DraftResponse) -> None:
        """Raises ConnectionError if this does not answer the pending request, or too many answers were late."""
        pending = self.pending
        if pending is None or message.step_id != pending.request.step_id:
            raise ConnectionError("the drafter answered a request that was not pending")
        self.pending = None
        self._lost.reschedule(None)
        try:
            reply = reply_from_proto(message, pending.request, self._vocab_size)
        except ValueError as error:
            pending.reply.set_result(None)
            raise ConnectionError(f"the drafter's answer is malformed: {error}") from None
        if reply.refused and not self.refused:
            logger.warning("ignored %d malformed trees of the drafter's answer", reply.refused)
        self.refused += reply.refused
        pending.reply.set_result(reply)
        self._late = self._late + 1 if asyncio.get_running_loop().time() > pending.late_at_s else 0
        if self._late >= MAX_LATE_ANSWERS:
            raise ConnectionError(f"the drafter's last {MAX_LATE_ANSWERS} answers were late")

    def end(self) -> None:
        """The stream has ended: let nobody wait for an answer."""
        if self.pending is not None and not self.pending.reply.done():
            self.pending.reply.set_result(None)


async def wait_for_info(link: GrpcLink, timeout_s: float) -> pb.GetDrafterInfoResponse | None:
    """GetDrafterInfo's answer of the connected drafter, or None if none connects in time."""
    deadline = time.monotonic() + timeout_s
    while link.info is None and time.monotonic() < deadline:
        await asyncio.sleep(0.05)
    return link.info
