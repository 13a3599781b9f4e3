"""Requests and answers on one connection to a drafter: one pending at most, and every wait has a limit."""

from __future__ import annotations

import asyncio
import logging
import queue
import time
from collections.abc import Callable
from typing import Protocol

import grpc

from treeline.drafting import DraftReply, DraftRequest, FeatureSpec, reply_from_proto, request_to_proto
from treeline.plan import Plan
from treeline.v1 import drafting_pb2 as pb

logger = logging.getLogger(__name__)

LOST_TIMEOUTS = 10
"""An answer that takes this many times `verifier.draft_timeout_s` is lost: the connection is closed."""
MAX_LATE_ANSWERS = 8
"""Consecutive late answers after which the connection is closed. Each doubles the wait, so the last one took 256 times
as long as predicted, or longer than `verifier.draft_timeout_s`."""


class Transport(Protocol):
    """Messages both ways. The engine's thread sends and receives."""

    def send(self, message: pb.DraftRequest, timeout_s: float) -> None:
        """Raises OSError if the connection is broken."""
        ...

    def receive(self, timeout_s: float) -> pb.DraftResponse | None:
        """The next message, or None if none comes in time. Raises OSError if the connection is broken."""
        ...


class GrpcTransport:
    """A gRPC stream, which an event loop owns, for the engine's thread."""

    def __init__(self, stream: grpc.aio.StreamStreamCall) -> None:
        self._stream, self._loop = stream, asyncio.get_running_loop()
        self._received: queue.SimpleQueue[pb.DraftResponse | None] = queue.SimpleQueue()  # None: the stream has ended

    def send(self, message: pb.DraftRequest, timeout_s: float) -> None:
        asyncio.run_coroutine_threadsafe(self._stream.write(message), self._loop)  # `run` sees whether it broke

    def receive(self, timeout_s: float) -> pb.DraftResponse | None:
        try:
            message = self._received.get(timeout=timeout_s)
        except queue.Empty:
            return None
        if message is None:
            raise ConnectionError("the drafter ended the stream")
        return message

    async def run(self) -> None:
        """Queue received messages until the stream ends. Raises grpc.aio.AioRpcError if it broke."""
        try:
            async for message in self._stream:
                self._received.put(message)
        finally:
            self._stream.cancel()
            self._received.put(None)


class Conversation:
    """The engine's thread owns its state and calls its methods; other threads may read its attributes.

    Attributes:
        features: the target's features that the drafter reads.
        pending: the request without an answer yet.
        refused: malformed trees so far.
        problem: why it has ended; empty until then.
    """

    def __init__(
        self,
        info: pb.GetDrafterInfoResponse,
        transport: Transport,
        vocab_size: int,
        lost_s: float,
        on_end: Callable[[], object],
    ) -> None:
        """
        Args:
            lost_s: a request without an answer for so long ends the conversation.
            on_end: called once, from the engine's thread.
        """
        self.features = FeatureSpec(tuple(info.feature_layers), info.feature_width) if info.feature_width else None
        self.pending: DraftRequest | None = None
        self.refused = 0
        self.problem = ""
        self._drafts = info.vocab_size > 0
        self._transport, self._vocab_size, self._lost_s, self._on_end = transport, vocab_size, lost_s, on_end
        self._asked_s = self._late_at_s = 0.0  # of the pending request
        self._late = 0  # consecutive late answers
        self._plan: Plan | None = None  # as sent last

    @property
    def connected(self) -> bool:
        return self._drafts and not self.problem

    @property
    def ready(self) -> bool:
        return self.connected and self.pending is None

    def ask(self, request: DraftRequest, timeout_s: float) -> DraftReply | None:
        """The answer to `request`, or None if it does not come in time or the conversation ends."""
        if self.pending is not None or self.problem:
            return None
        self.pending, self._asked_s = request, time.monotonic()
        self._late_at_s = self._asked_s + timeout_s
        message, self._plan = request_to_proto(request, self._plan), request.plan
        try:
            self._transport.send(message, self._lost_s)
        except OSError as error:
            self._end(error)
        reply = self.take(timeout_s)
        if self.pending is not None and not self.problem:
            logger.info("no draft within %.2f s; this step goes on without", timeout_s)
        return reply

    def take(self, timeout_s: float = 0.0) -> DraftReply | None:
        """Wait for the pending request's answer. By default, only take a late one that has arrived."""
        if self.pending is None or self.problem:
            return None
        try:
            message = self._transport.receive(timeout_s)
            if message is not None:
                return self._answer(message, self.pending)
            if time.monotonic() - self._asked_s > self._lost_s:
                raise ConnectionError(f"the drafter's answer did not come within {self._lost_s:g} s")
        except OSError as error:
            self._end(error)
        return None

    def _answer(self, message: pb.DraftResponse, request: DraftRequest) -> DraftReply:
        """Raises ConnectionError if this does not answer the pending request, or too many answers were late."""
        if message.step_id != request.step_id:
            raise ConnectionError("the drafter answered a request that was not pending")
        try:
            reply = reply_from_proto(message, request, self._vocab_size)
        except ValueError as error:
            raise ConnectionError(f"the drafter's answer is malformed: {error}") from None
        self.pending = None
        if reply.refused and not self.refused:
            logger.warning("ignored %d malformed trees of the drafter's answer", reply.refused)
        self.refused += reply.refused
        self._late = self._late + 1 if time.monotonic() > self._late_at_s else 0
        if self._late >= MAX_LATE_ANSWERS:
            raise ConnectionError(f"the drafter's last {MAX_LATE_ANSWERS} answers were late")
        return reply

    def _end(self, error: OSError) -> None:
        self.problem = str(error) or type(error).__name__
        self._on_end()
