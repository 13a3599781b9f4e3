"""The verifier's end of the way to its drafter: in this process, or over one long-lived gRPC stream."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import logging
import time

import grpc

from treeline.config import Config
from treeline.drafting import Drafter, DraftReply, DraftRequest, FeatureSpec
from treeline.drafting_wire import reply_from_proto, request_to_proto
from treeline.errors import ConfigError
from treeline.rpc import Discover, connect
from treeline.v1 import drafting_pb2 as pb
from treeline.v1.drafting_pb2_grpc import DraftingServiceStub

logger = logging.getLogger(__name__)

RECONNECT_S = 0.5
INFO_TIMEOUT_S = 5.0


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
    """A drafter elsewhere. A background task keeps a stream to one of the discovered drafters open.

    At most one request is on its way: while a late reply is awaited, steps go on unspeculated.
    """

    def __init__(self, discover: Discover, config: Config, vocab_size: int, vocabulary_sha256: str) -> None:
        self._discover = discover
        self._config = config
        self._vocab_size, self._vocabulary_sha256 = vocab_size, vocabulary_sha256
        self._loop = asyncio.get_running_loop()
        self._requests: asyncio.Queue[DraftRequest] | None = None  # None while there is no stream
        self._pending: concurrent.futures.Future[DraftReply] | None = None
        self._pending_step_id = 0
        self.info: pb.GetDrafterInfoResponse | None = None
        self._task = asyncio.create_task(self._stay_connected(), name="draft-link")

    @property
    def ready(self) -> bool:
        return self._requests is not None and self._pending is None

    @property
    def features(self) -> FeatureSpec | None:
        info = self.info
        if self._requests is None or info is None or not info.feature_width:
            return None
        return FeatureSpec(tuple(info.feature_layers), info.feature_width)

    def draft(self, request: DraftRequest, timeout_s: float) -> DraftReply | None:
        """Called from the engine's thread."""
        requests = self._requests
        if requests is None or self._pending is not None:
            return None
        pending: concurrent.futures.Future[DraftReply] = concurrent.futures.Future()
        self._pending_step_id, self._pending = request.step_id, pending
        self._loop.call_soon_threadsafe(requests.put_nowait, request)
        try:
            return pending.result(timeout_s)
        except concurrent.futures.TimeoutError:
            logger.info("no draft within %.2f s; going on without", timeout_s)
            return None
        except ConnectionError:
            return None

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._task.cancel)

    async def _stay_connected(self) -> None:
        last_problem = ""
        while True:
            try:
                for endpoint in await self._discover():
                    await self._serve_stream(endpoint)
                problem = "no drafter found"
            except (grpc.aio.AioRpcError, ConfigError, OSError) as error:
                problem = str(error.details() if isinstance(error, grpc.aio.AioRpcError) else error)
            except Exception as error:  # discovery asks another system, which may fail in its own ways
                problem = f"{type(error).__name__}: {error}"
            finally:
                self._disconnect()
            if problem != last_problem:
                logger.warning("no drafter, decoding goes on without: %s", problem)
                last_problem = problem
            await asyncio.sleep(RECONNECT_S)

    async def _serve_stream(self, endpoint: str) -> None:
        """Hold a stream to `endpoint` until it breaks.

        Raises:
            grpc.aio.AioRpcError: it broke.
            ConfigError: the drafter speaks another vocabulary.
        """
        async with connect(endpoint, self._config.internal, self._config.limits.max_message_bytes) as channel:
            stub = DraftingServiceStub(channel)
            self.info = await stub.GetDrafterInfo(pb.GetDrafterInfoRequest(), timeout=INFO_TIMEOUT_S)
            self._check_vocabulary(self.info)
            stream = stub.Draft()
            requests: asyncio.Queue[DraftRequest] = asyncio.Queue()
            sender = asyncio.create_task(_send(stream, requests))
            self._requests = requests
            logger.info("drafting with %s at %s", self.info.drafter, endpoint)
            try:
                async for message in stream:
                    self._receive(reply_from_proto(message))
            finally:
                sender.cancel()
                with contextlib.suppress(asyncio.CancelledError, grpc.aio.AioRpcError):
                    await sender

    def _check_vocabulary(self, info: pb.GetDrafterInfoResponse) -> None:
        if info.vocabulary_sha256 and info.vocabulary_sha256 != self._vocabulary_sha256:
            raise ConfigError(f"the drafter '{info.drafter}' has another vocabulary than the target")

    def _receive(self, reply: DraftReply) -> None:
        for tree in reply.trees.values():
            tree.check(self._vocab_size)
        if self._pending is not None and reply.step_id == self._pending_step_id:
            pending, self._pending = self._pending, None
            pending.set_result(reply)

    def _disconnect(self) -> None:
        self._requests = None
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.set_exception(ConnectionError("the drafter's stream ended"))


async def _send(stream: grpc.aio.StreamStreamCall, requests: asyncio.Queue[DraftRequest]) -> None:
    while True:
        await stream.write(request_to_proto(await requests.get()))


async def wait_for_info(link: GrpcLink, timeout_s: float) -> pb.GetDrafterInfoResponse | None:
    """The drafter's own account of itself, or None if it does not appear in time."""
    deadline = time.monotonic() + timeout_s
    while link.info is None and time.monotonic() < deadline:
        await asyncio.sleep(0.05)
    return link.info
