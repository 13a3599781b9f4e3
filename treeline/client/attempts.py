"""Decides whether a failed call is retried, resumed or given up. The clients make the calls and wait."""

from __future__ import annotations

import random
import time
from typing import Any

import grpc

from treeline.errors import RequestFailedError, StreamLostError, TreelineError, UnavailableError
from treeline.request import delivered_tokens, ends_all, note
from treeline.rpc.status import from_rpc_error, is_lost, retry_delay_s
from treeline.v1 import generation_pb2 as pb

RETRY_S = 0.2
"""Pause between rounds over all servers while a broken stream seeks one."""
MOST_JITTER = 1.5
"""A retry delay from the server is stretched by up to this factor, so that clients refused together spread out."""


class Servers:
    """The addresses of a client. One at a time is in use.

    Attributes:
        closed: the client itself has ended its calls.
    """

    def __init__(self, targets: list[str]) -> None:
        self.targets, self.current, self.closed = targets, 0, False

    @property
    def target(self) -> str:
        return self.targets[self.current]

    def use_next(self) -> None:
        self.current = (self.current + 1) % len(self.targets)

    def error(self, error: Any) -> TreelineError:
        """The TreelineError for a failed call to the server in use."""
        if self.closed:
            return RequestFailedError("CANCELLED", "the client was closed")
        if error.code() is grpc.StatusCode.UNAVAILABLE and not error.trailing_metadata():
            # The transport failed, not the service.
            why = (error.details() or "").rpartition(": ")[2].rstrip("]")
            return UnavailableError(f"cannot reach {self.target}: {why}")
        return from_rpc_error(error)


class Attempts:
    """The calls of one request, one after the other.

    Attributes:
        ended: the last message has arrived. The request has succeeded, however the call ends.

    Args:
        request: the streamed request; collects what a server needs to resume it. None for a unary call.
        timeout_s: for all calls together.
    """

    def __init__(
        self,
        servers: Servers,
        request: pb.GenerateRequest | None,
        timeout_s: float | None,
        resume_wait_s: float,
        max_retries: int,
    ) -> None:
        self.ended = False
        self._servers, self._request = servers, request
        self._timeout_s, self._resume_wait_s, self._retries_left = timeout_s, resume_wait_s, max_retries
        self._started_s = time.monotonic()
        self._lost_s: float | None = None  # when the stream broke, and failed calls, since the last message
        self._failures = 0

    @property
    def left_s(self) -> float | None:
        """Seconds that the next call may take."""
        return None if self._timeout_s is None else max(0.0, self._started_s + self._timeout_s - time.monotonic())

    def message(self, response: pb.GenerateResponse) -> pb.GenerateChunk | pb.GenerateComplete:
        """The message in `response`, recorded so that the stream can resume after it."""
        assert self._request is not None
        self._lost_s, self._failures = None, 0
        note(self._request, response, time.monotonic() - self._started_s)
        self.ended = ends_all(self._request, response)
        return response.chunk if response.HasField("chunk") else response.complete

    def failed(self, error: Any) -> float:
        """Seconds to wait before the next call, to the server then in use. `error`: the grpc.RpcError.

        Raises:
            TreelineError: the request has failed.
        """
        problem = self._servers.error(error)
        # A server that has not noticed the lost connection still has the request open.
        is_open = error.code() is grpc.StatusCode.ALREADY_EXISTS and self._failures > 0
        if isinstance(problem, StreamLostError):
            raise problem from None
        self._failures += 1
        begun = self._request is not None and delivered_tokens(self._request) > 0
        lost = (is_lost(error) and not self._servers.closed) or is_open
        wait_s = self._until_resumed(lost) if begun or is_open else self._until_retried(error, lost)
        left_s = self.left_s
        if wait_s is None or (left_s is not None and wait_s >= left_s):
            raise problem from None
        if begun and self._request is not None:
            self._request.resume.elapsed_s = time.monotonic() - self._started_s
        return wait_s

    def _until_resumed(self, lost: bool) -> float | None:
        self._lost_s = self._lost_s or time.monotonic()
        if not lost or time.monotonic() - self._lost_s > self._resume_wait_s:
            return None
        self._servers.use_next()
        return RETRY_S if self._failures >= len(self._servers.targets) else 0.0

    def _until_retried(self, error: Any, lost: bool) -> float | None:
        """Before the first token: the other servers at once, then after the server's delay."""
        told_s = retry_delay_s(error)
        if lost:
            self._servers.use_next()
            if self._failures % len(self._servers.targets):
                return 0.0
        if told_s is None or not self._retries_left:
            return None
        self._retries_left -= 1
        return told_s * random.uniform(1.0, MOST_JITTER)
