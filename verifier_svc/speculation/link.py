"""The verifier's link to its drafter: in this process, or over one long-lived connection to the least loaded one."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
from collections.abc import Coroutine

import grpc

from treeline.config import Config
from treeline.drafting import MAX_DRAFT_MESSAGE_BYTES, Drafter, DraftReply, DraftRequest, FeatureSpec
from treeline.errors import ConfigError
from treeline.rpc.channels import Discover, connect
from treeline.rpc.local_stream import connect_local
from treeline.v1 import drafting_pb2 as pb
from treeline.v1.drafting_pb2_grpc import DraftingServiceStub
from verifier_svc.speculation.conversation import LOST_TIMEOUTS, Conversation, GrpcTransport, Transport

logger = logging.getLogger(__name__)

RECONNECT_S = 0.5
"""Between attempts to connect: requests decode plainly meanwhile."""
BALANCE_S = 10.0
"""Between checks of how many verifiers other drafters serve: as often as the autoscaler learns of the load."""
INFO_TIMEOUT_S = 5.0
"""For GetDrafterInfo: a drafter answers it at once, unless its machine is overloaded."""


class LocalLink:
    """A drafter in this process, called directly: for one-process use and for tests."""

    def __init__(self, drafter: Drafter) -> None:
        self._drafter = drafter

    connected = ready = True

    @property
    def features(self) -> FeatureSpec | None:
        return self._drafter.features

    def refresh(self) -> None:
        pass

    def draft(self, request: DraftRequest, timeout_s: float) -> DraftReply | None:
        return self._drafter.draft(request)

    def close(self) -> None:
        self._drafter.close()


class RemoteLink:
    """A drafter in another process. A background task keeps a connection to the least loaded drafter until it breaks.

    The event loop opens and closes connections. The engine's thread uses them, with at most one request pending: until
    a late answer arrives, steps go on without drafts.

    Attributes:
        info: GetDrafterInfo's answer from the drafter connected last.
    """

    def __init__(self, discover: Discover, config: Config, vocab_size: int, vocabulary_sha256: str) -> None:
        self._discover = discover
        self._config = config
        self._vocab_size, self._vocabulary_sha256 = vocab_size, vocabulary_sha256
        self._loop = asyncio.get_running_loop()
        self._conversation: Conversation | None = None
        self._left = ""  # the endpoint of the connection that ended last
        self.info: pb.GetDrafterInfoResponse | None = None
        self._task = asyncio.create_task(self._stay_connected(), name="draft-link")

    @property
    def connected(self) -> bool:
        conversation = self._conversation
        return conversation is not None and conversation.connected

    @property
    def ready(self) -> bool:
        conversation = self._conversation
        return conversation is not None and conversation.ready

    @property
    def features(self) -> FeatureSpec | None:
        conversation = self._conversation
        return conversation.features if conversation is not None else None

    def refresh(self) -> None:
        conversation = self._conversation
        if conversation is not None:
            conversation.take()

    def draft(self, request: DraftRequest, timeout_s: float) -> DraftReply | None:
        conversation = self._conversation
        return conversation.ask(request, timeout_s) if conversation is not None else None

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._task.cancel)

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

    async def _wait_until_crowded(self, endpoint: str) -> None:
        """Wait until another drafter has two verifiers fewer, as a newly started one does."""
        while True:
            await asyncio.sleep(BALANCE_S * random.uniform(0.5, 1.5))  # not all verifiers of a drafter at once
            with contextlib.suppress(Exception):  # discovery asks another system; the next look will tell
                infos = await self._infos(await self._discover())
                streams = {other: info.streams for other, info in infos.items()}
                if streams.get(endpoint, 0) >= 2 + min(streams.values(), default=0):
                    return

    async def _infos(self, endpoints: list[str]) -> dict[str, pb.GetDrafterInfoResponse]:
        """GetDrafterInfo's answer from each drafter that answers."""
        infos = await asyncio.gather(*map(self._ask_info, endpoints), return_exceptions=True)
        return {e: info for e, info in zip(endpoints, infos, strict=True) if not isinstance(info, BaseException)}

    async def _ask_info(self, endpoint: str) -> pb.GetDrafterInfoResponse:
        async with connect(endpoint, self._config.internal, MAX_DRAFT_MESSAGE_BYTES) as channel:
            return await DraftingServiceStub(channel).GetDrafterInfo(pb.GetDrafterInfoRequest(), timeout=INFO_TIMEOUT_S)

    async def _serve_stream(self, endpoint: str) -> None:
        """Keep a connection to `endpoint` until it breaks or another drafter has much less to do.

        Raises:
            grpc.aio.AioRpcError, OSError: it broke, an answer was lost or wrong, or too many were late.
            ConfigError: the drafter has another vocabulary.
        """
        async with connect(endpoint, self._config.internal, MAX_DRAFT_MESSAGE_BYTES) as channel:
            stub = DraftingServiceStub(channel)
            info = await stub.GetDrafterInfo(pb.GetDrafterInfoRequest(), timeout=INFO_TIMEOUT_S)
            if info.vocabulary_sha256 and info.vocabulary_sha256 != self._vocabulary_sha256:
                raise ConfigError(f"the drafter '{info.drafter}' has another vocabulary than the target")
            self.info = info
            path = info.socket_path
            local = connect_local(path, pb.DraftResponse, MAX_DRAFT_MESSAGE_BYTES) if path else None
            if local is None:
                stream = GrpcTransport(stub.Draft())
                await self._converse(info, endpoint, stream, stream.run())
            else:
                with contextlib.closing(local):
                    await self._converse(info, endpoint, local)

    async def _converse(
        self,
        info: pb.GetDrafterInfoResponse,
        endpoint: str,
        transport: Transport,
        *running: Coroutine[None, None, None],
    ) -> None:
        """Let the engine talk over `transport` until it or one of `running` ends, or another drafter has less to do."""
        ended, lost_s = asyncio.Event(), LOST_TIMEOUTS * self._config.verifier.draft_timeout_s
        conversation = self._conversation = Conversation(
            info, transport, self._vocab_size, lost_s, lambda: self._loop.call_soon_threadsafe(ended.set)
        )
        logger.info("drafting with %s at %s", info.drafter, endpoint)
        tasks = [asyncio.ensure_future(one) for one in (ended.wait(), self._wait_until_crowded(endpoint), *running)]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
            if conversation.problem:
                raise ConnectionError(conversation.problem)
        finally:
            self._conversation = None
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


async def wait_for_info(link: RemoteLink, timeout_s: float) -> pb.GetDrafterInfoResponse | None:
    """GetDrafterInfo's answer of the connected drafter, or None if none connects in time."""
    deadline = time.monotonic() + timeout_s
    while link.info is None and time.monotonic() < deadline:
        await asyncio.sleep(0.05)
    return link.info
