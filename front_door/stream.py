"""One client's answer, whichever verifiers it comes from: a stream outlives the verifier that serves it."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing

import grpc

from front_door.clients import Call
from front_door.routing import Verifier, VerifierPool
from treeline.errors import DrainingError, StreamLostError, UnavailableError
from treeline.request import REQUEST_ID, answers_of, delivered_tokens, ends_all, note
from treeline.rpc.reading import messages_of
from treeline.rpc.status import is_lost, reason_of
from treeline.v1 import generation_pb2 as pb

logger = logging.getLogger(__name__)

MAX_FUTILE_RUNS = 3
"""Verifiers that may be lost in a row between taking a stream and giving it a token. A request that kills its verifier
must not take all of them down."""
RETRY_S = 0.05
"""Pause between looks for a verifier: short beside a replica's restart (seconds), and nearly free."""
FUTILE = ("", "ENGINE_FAILED")
"""Reasons of a lost call that the request itself may have caused: a process that died without a word, or its engine."""


class ResumableStream:
    """Runs `request`, whose id and seed are set, on one verifier after another until it is complete.

    A stream that loses its verifier, or whose verifier drains, is sent again with the tokens delivered so far.
    Sampling is keyed by seed and position, so the text is the same as without the interruption.

    Args:
        metadata: names the client to the verifier.
        wait_s: how long the stream may be without a verifier before it ends with UNAVAILABLE.
        draining: whether this front door is shutting down, so that clients should resume through another one.

    Attributes:
        losses: how many verifiers it has lost after they took it.
        endpoint: of the verifier that had it last.
    """

    def __init__(
        self,
        request: pb.GenerateRequest,
        metadata: tuple[tuple[str, str], ...],
        pool: VerifierPool,
        wait_s: float,
        draining: Callable[[], bool],
    ) -> None:
        self._request, self._metadata, self._pool = request, metadata, pool
        self._wait_s, self._draining = wait_s, draining
        self._arrived_s = time.monotonic() - request.resume.elapsed_s
        self._is_resumed = request.HasField("resume")
        self._lost_s: float | None = None  # since when no verifier has had the stream
        self._futile_runs = 0
        self.losses = 0
        self.endpoint = ""

    @property
    def delivered_tokens(self) -> int:
        return delivered_tokens(self._request)

    async def responses(self, context: Call) -> AsyncGenerator[pb.GenerateResponse, None]:
        """The answer's messages, each token once.

        Raises:
            StreamLostError, UnavailableError: no verifier has taken the stream over, or taken it at all, in time.
            DrainingError: this front door is shutting down.
            grpc.aio.AioRpcError: a verifier's own refusal or failure.
        """
        verifier = self._pool.least_loaded()
        if verifier is None:
            raise UnavailableError("no verifier can be reached")
        while True:
            self.endpoint = verifier.endpoint
            with verifier.calling(answers_of(self._request)) as stub:
                call = stub.Generate(self._request, timeout=context.time_remaining(), metadata=self._metadata)
                try:
                    async with aclosing(messages_of(call)) as responses:
                        async for response in responses:
                            self._note(response)
                            yield response
                            if ends_all(self._request, response):
                                return
                    problem, reason = "ended without a completion", ""
                except grpc.aio.AioRpcError as error:
                    if not self._is_passing(error):
                        raise
                    if error.code() is grpc.StatusCode.UNAVAILABLE:  # Else only this stream was cut.
                        verifier.serving = False  # until a poll says otherwise
                    problem, reason = f"{error.code().name}: {error.details()}", reason_of(error)
                if REQUEST_ID in await call.initial_metadata():
                    self._lost_s = None
                    self._futile_runs += reason in FUTILE
                    self.losses += 1
            verifier = await self._next(verifier, problem)

    def _note(self, response: pb.GenerateResponse) -> None:
        """Record what the client has received."""
        self._futile_runs, self._lost_s = 0, None
        note(self._request, response, time.monotonic() - self._arrived_s)

    def _is_passing(self, error: grpc.aio.AioRpcError) -> bool:
        """Whether another verifier, or the same one a little later, may succeed."""
        # The verifier that we lost may not have noticed yet, and may still have the request open.
        return is_lost(error) or (self._is_resumed and error.code() is grpc.StatusCode.ALREADY_EXISTS)

    async def _next(self, lost: Verifier, problem: str) -> Verifier:
        """The verifier that takes over from `lost`: another one if there is any."""
        self._is_resumed = True
        logger.info("verifier %s: %s", lost.endpoint, problem, extra={"request_id": self._request.request_id})
        self._lost_s = self._lost_s or time.monotonic()
        while self._futile_runs < MAX_FUTILE_RUNS and time.monotonic() < self._lost_s + self._wait_s:
            if self._draining():
                raise DrainingError("this front door is shutting down; resume through another one")
            await asyncio.sleep(RETRY_S)
            verifier = self._pool.least_loaded(rather_not=lost)
            if verifier is not None:
                self._request.resume.elapsed_s = time.monotonic() - self._arrived_s
                return verifier
        if not self.losses and not self.delivered_tokens:
            raise UnavailableError(f"no verifier took the request: {problem}")
        raise StreamLostError(f"the stream lost its verifier: {problem}", self.delivered_tokens)
