"""Identifies clients by token or address, and enforces their quotas."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol
from urllib.parse import unquote

import grpc

from treeline.errors import FieldViolation, InvalidRequestError, QueueFullError, QuotaExceededError
from treeline.request import answers_of
from treeline.rpc.status import QUEUE_FULL, reason_of
from treeline.rpc.tokens import Client, TokenFile, authorization
from treeline.v1 import generation_pb2 as pb

FULL_S = 0.5
"""How long a verifier's queue counts as full, unless an answer ends sooner: as long as a load report, since a front
door cannot see answers end that came through another one. The verifier's queue keeps it busy meanwhile."""


class Call(Protocol):
    """What is used of a call's context: a grpc.aio.ServicerContext has it, and so does an HTTP call."""

    def time_remaining(self) -> float | None: ...

    def peer(self) -> str: ...

    def invocation_metadata(self) -> Sequence[tuple[str, str | bytes]] | None: ...

    async def send_initial_metadata(self, metadata: tuple[tuple[str, str], ...], /) -> None: ...


def address_of(call: Call) -> str:
    """Where a call comes from, without the port."""
    return unquote(call.peer()).partition(":")[2].rpartition(":")[0].strip("[]")  # "ipv6:%5B::1%5D:4711"


class Clients:
    """Identifies the client of each call and enforces its quotas. Without tokens, each address is a client."""

    def __init__(self, tokens: TokenFile | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._tokens, self._clock = tokens, clock
        self._open: Counter[str] = Counter()
        self._allowed: dict[str, tuple[float, float]] = {}
        """Per client with a rate: how many requests it could send at once, and as of when."""
        self._full_until_s: dict[str, float] = {}
        """Per client that a verifier had no room for: until when to refuse without asking."""

    def of(self, call: Call) -> Client:
        """The client of a call."""
        if self._tokens is None:
            return Client(address_of(call))
        # The token was valid when the call came in, and may have expired since.
        return self._tokens.client(authorization(call.invocation_metadata())) or Client(address_of(call))

    @contextmanager
    def admitted(self, client: Client, request: pb.GenerateRequest) -> Iterator[None]:
        """Counts `request` as open.

        Raises:
            QuotaExceededError: the client has too many requests open, or sent too many lately.
            QueueFullError: a verifier's full queue just refused this client, and no answer has ended since.
            InvalidRequestError: its priority is higher than the client may ask for.
        """
        if request.priority > client.priority:
            problem = f"is {request.priority}; this token may ask for {client.priority} at most"
            raise InvalidRequestError(FieldViolation("priority", problem))
        answers = answers_of(request)
        if self._open[client.name] + answers > client.concurrent:
            raise QuotaExceededError(f"{client.concurrent} requests of this token are open, as many as it may have")
        if not request.HasField("resume"):  # A resumed one counted when it began, perhaps elsewhere.
            self._take_turn(client)
            if self._clock() < self._full_until_s.get(client.name, 0.0):
                raise QueueFullError("the queue is full")
        self._open[client.name] += answers
        found_no_room = False
        try:
            yield
        except grpc.aio.AioRpcError as error:
            found_no_room = reason_of(error) == QUEUE_FULL
            raise
        finally:
            self._open[client.name] -= answers
            self._open += Counter()  # forgets those without open requests
            if found_no_room:
                self._full_until_s[client.name] = self._clock() + FULL_S
            else:  # It may have made room.
                self._full_until_s.clear()

    def _take_turn(self, client: Client) -> None:
        """A token bucket that holds one second's requests, at least one."""
        if client.rate == float("inf"):
            return
        now, most = self._clock(), max(1.0, client.rate)
        allowed, since_s = self._allowed.get(client.name, (most, now))
        allowed = min(most, allowed + (now - since_s) * client.rate)
        if allowed < 1:
            retry_s = (1 - allowed) / client.rate
            raise QuotaExceededError(f"this token may send {client.rate:g} requests per second", retry_s)
        self._allowed[client.name] = allowed - 1, now
