"""Who calls, by token or address, and how much each may ask for."""

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
"""How long a verifier's full queue is believed, unless an answer ends sooner: as long as a report of its load, since a
front door cannot see answers end that came through another one. Its queue keeps it busy meanwhile."""


class Call(Protocol):
    """What a call's context is asked: a grpc.aio.ServicerContext knows it, and so does an HTTP call."""

    def time_remaining(self) -> float | None: ...

    def peer(self) -> str: ...

    def invocation_metadata(self) -> Sequence[tuple[str, str | bytes]] | None: ...

    async def send_initial_metadata(self, metadata: tuple[tuple[str, str], ...], /) -> None: ...


def address_of(call: Call) -> str:
    """Where a call comes from, without the port."""
    return unquote(call.peer()).partition(":")[2].rpartition(":")[0].strip("[]")  # "ipv6:%5B::1%5D:4711"


class Clients:
    """Names the client of each call and keeps its quotas. Without tokens, all calls of one address are one client."""

    def __init__(self, tokens: TokenFile | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._tokens, self._clock = tokens, clock
        self._open: Counter[str] = Counter()
        self._allowed: dict[str, tuple[float, float]] = {}
        """Per client with a rate: how many requests it might send at once, and when that was so."""
        self._full_until_s: dict[str, float] = {}
        """Per client for whom a verifier had no room: until when it need not be asked again."""

    def of(self, call: Call) -> Client:
        """Whose call this is."""
        if self._tokens is None:
            return Client(address_of(call))
        # It was accepted when the call came in, and may have expired since.
        return self._tokens.client(authorization(call.invocation_metadata())) or Client(address_of(call))

    @contextmanager
    def admitted(self, client: Client, request: pb.GenerateRequest) -> Iterator[None]:
        """Counts `request` as open.

        Raises:
            QuotaExceededError: the client has too many requests open, or sent too many lately.
            QueueFullError: a verifier has just said so to this client, and no answer has ended since.
            InvalidRequestError: its priority is higher than the client may ask for.
        """
        if request.priority > client.priority:
            problem = f"is {request.priority}; this token may ask for {client.priority} at most"
            raise InvalidRequestError(FieldViolation("priority", problem))
        answers = answers_of(request)
        if self._open[client.name] + answers > client.concurrent:
            raise QuotaExceededError(f"{client.concurrent} requests of this token are open, as many as it may have")
        if not request.HasField("resume"):  # It counted when it began, perhaps elsewhere.
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
