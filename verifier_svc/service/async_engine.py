"""The engine in its own thread, behind an asyncio interface."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import defaultdict, deque
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

from lm.cpu.threads import own_cores
from treeline.errors import (
    DrainingError,
    DuplicateRequestError,
    EngineFailedError,
    QueueFullError,
    TreelineError,
    UnavailableError,
)
from treeline.step_record import StepRecord
from verifier_svc.engine.engine import Engine
from verifier_svc.engine.request import Chunk, Completion, GenerationRequest, Load
from verifier_svc.engine.sequence import Output
from verifier_svc.speculation.alarm import AcceptanceAlarm

logger = logging.getLogger(__name__)

RATE_WINDOW_S = 5.0
"""Window of the rates in `Load`: as long as Prometheus' quantiles (deploy/prometheus)."""
IDLE_WAIT_S = 0.5
"""Longest sleep without work; after it, a drafter that is back, or has answered at last, is told of ended requests."""


class Occupancy(NamedTuple):
    """Published by the engine's thread after each step, read by the event loop."""

    running: int
    queued: int
    kv_blocks_used: int


@dataclass(eq=False)
class _Stream:
    """An open request as the event loop knows it.

    Attributes:
        request: what was asked for.
        items: the engine's outputs; an error ends the stream.
        begun: part of the answer has arrived.
        refused: another client has taken its place in the queue; the engine has yet to drop it.
    """

    request: GenerationRequest
    items: asyncio.Queue[Chunk | Completion | TreelineError] = field(default_factory=asyncio.Queue)
    begun: bool = False
    refused: bool = False


class AsyncEngine:
    """Runs `Engine.step()` in a thread of its own; all else runs on the event loop that created it.

    The event loop knows each open request by its stream. The engine's thread knows it by its sequence in the scheduler,
    which no other thread reads.

    Args:
        on_step: called in the engine's thread after each step; its exceptions are logged.
        on_output: called in the engine's thread for every output of a request; its exceptions are logged.
    """

    def __init__(
        self,
        engine: Engine,
        max_running: int,
        max_waiting: int,
        on_step: Callable[[StepRecord], None] = lambda record: None,
        on_output: Callable[[Chunk | Completion], None] = lambda output: None,
    ) -> None:
        self.engine = engine
        self.max_running, self._max_open = max_running, max_running + max_waiting
        self._max_waiting = max_waiting
        self._on_step, self._on_output = on_step, on_output
        self._alarm = AcceptanceAlarm()
        self._loop = asyncio.get_running_loop()
        self._streams: dict[str, _Stream] = {}
        self._wake = threading.Condition()
        self._inbox: list[GenerationRequest | str] = []  # new requests, and ids to abort, in order
        self._recent: deque[StepRecord] = deque()  # of RATE_WINDOW_S before the last one
        self._occupancy = Occupancy(0, 0, 0)
        self._draining = self._stopping = False
        self._failure: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    async def generate(self, request: GenerationRequest) -> AsyncIterator[Chunk | Completion]:
        """Chunks as they are produced, then one Completion. Closing the iterator aborts the request.

        Raises:
            QueueFullError, UnavailableError, DuplicateRequestError, InvalidRequestError: at once, before it is queued.
            EngineFailedError: a step failed. DrainingError: this replica stops before the request has ended. In both
                cases the request can resume on another replica.
        """
        self._check_admission(request)
        stream = self._streams[request.request_id] = _Stream(request)
        self._tell(request)
        ended = False
        try:
            while not ended:
                item = await stream.items.get()
                if isinstance(item, TreelineError):
                    ended = True
                    raise item
                ended = isinstance(item, Completion)
                yield item
        finally:
            if not ended:
                self._tell(request.request_id)

    def abort(self, request_ids: Iterable[str]) -> int:
        """End these requests; their streams get a Completion. Returns how many of them were open."""
        known = [request_id for request_id in request_ids if request_id in self._streams]
        self._tell(*known)
        return len(known)

    @property
    def queued(self) -> int:
        """Requests for which the last step had no slot or blocks; later arrivals are not counted."""
        return self._occupancy.queued

    def load(self) -> Load:
        """The present load."""
        cutoff = time.time() - RATE_WINDOW_S
        recent = [record for record in list(self._recent) if record.unix_s >= cutoff]
        decoded = sum(r.sequences for r in recent)
        last = self._recent[-1] if self._recent else None
        running, _, kv_blocks_used = self._occupancy
        return Load(
            num_requests_running=running,
            num_requests_waiting=max(0, len(self._streams) - running),
            kv_blocks_used=kv_blocks_used,
            kv_blocks_total=self.engine.cache.total_blocks,
            tokens_per_s=sum(r.emitted_tokens for r in recent) / RATE_WINDOW_S,
            mean_accepted_length=1 + sum(r.accepted_nodes for r in recent) / decoded if decoded else 0.0,
            mean_tree_nodes=sum(r.verified_nodes for r in recent) / decoded if decoded else 0.0,
            plan_version=last.plan_version if last else 0,
            price=self.engine.plan().price,
            drafter_ready=self.engine.speculator.exchange.connected,
            drafter_problem=self._alarm.problem,
        )

    def check(self) -> None:
        """Raise RuntimeError if the engine can no longer serve."""
        if self._failure is not None:
            raise RuntimeError(f"engine step failed: {self._failure!r}")
        if not self._thread.is_alive():
            raise RuntimeError("the engine's thread has ended")

    async def stop(self, grace_s: float) -> None:
        """Refuse new requests, let running ones end within `grace_s`, and end the rest with DrainingError."""
        self._draining = True
        deadline = time.monotonic() + grace_s
        while self._streams and time.monotonic() < deadline:
            await asyncio.sleep(0.02)
        self._fail_all(DrainingError("this replica has shut down; resume the request on another one"))
        with self._wake:
            self._stopping = True
            self._wake.notify()
        await asyncio.to_thread(self._thread.join, 10.0)

    def _check_admission(self, request: GenerationRequest) -> None:
        if self._failure is not None:
            raise UnavailableError("the verifier's engine has failed and is being replaced")
        if self._draining:
            raise DrainingError("this replica is shutting down")
        if request.request_id in self._streams:
            raise DuplicateRequestError(f"a request with id {request.request_id!r} is open")
        self.engine.check_fits(request)
        # A resumed stream was admitted before, so it is not refused; the front doors bound the number of streams.
        if len(self._streams) >= self._max_open and not request.delivered_token_ids:
            self._make_place(request)

    def _make_place(self, request: GenerationRequest) -> None:
        """Refuse the newest waiting request of the client with the most requests per weight.

        Raises QueueFullError if that client would then have less than the one that sends `request`.
        """
        taken = [stream for stream in self._streams.values() if not stream.refused]
        if len(taken) < self._max_open:
            return
        held: defaultdict[str, float] = defaultdict(float)
        for stream in taken:
            held[stream.request.client] += 1 / stream.request.client_weight
        most = max(held, key=held.__getitem__)
        waiting = [s for s in taken if s.request.client == most and not (s.begun or s.request.delivered_token_ids)]
        mine = held[request.client] + 1 / request.client_weight
        if not waiting or held[most] - 1 / waiting[-1].request.client_weight < mine:
            raise QueueFullError(f"{self._max_waiting} requests are waiting already")
        waiting[-1].refused = True
        waiting[-1].items.put_nowait(QueueFullError("the queue is full, and other clients have fewer requests in it"))
        self._tell(waiting[-1].request.request_id)

    def _tell(self, *messages: GenerationRequest | str) -> None:
        with self._wake:
            self._inbox += messages
            self._wake.notify()

    def _run(self) -> None:
        try:
            with own_cores(self.engine.model.device):
                while self._take_in():
                    outputs, record = self.engine.step()
                    scheduler, cache = self.engine.scheduler, self.engine.cache
                    self._occupancy = Occupancy(len(scheduler.running), len(scheduler.waiting), cache.used_blocks)
                    self._deliver(outputs)
                    if record is not None:
                        self._recent.append(record)
                        while self._recent[0].unix_s < record.unix_s - RATE_WINDOW_S:
                            self._recent.popleft()
                        self._alarm.observe(record.outcomes)
                        _observe(self._on_step, record)
        except Exception as error:
            logger.exception("the engine died")
            self._failure = error
            self._loop.call_soon_threadsafe(self._fail_all, EngineFailedError("the verifier's engine failed"))

    def _take_in(self) -> bool:
        """Wait for work; hand new and aborted requests to the engine. False once stopped."""
        with self._wake:
            while not (self._inbox or self._stopping or self.engine.has_work):
                self._wake.wait(IDLE_WAIT_S)
                self.engine.speculator.exchange.follow_drafter()  # Until a late answer is taken, nothing can be sent.
            inbox, self._inbox = self._inbox, []
            stopping = self._stopping
        for message in inbox:
            if isinstance(message, GenerationRequest):
                self._deliver(self.engine.add(message))
            else:
                self._deliver(self.engine.abort([message]))
        return not stopping

    def _deliver(self, outputs: list[Output]) -> None:
        if outputs:
            self._loop.call_soon_threadsafe(self._dispatch, outputs)
            for output in outputs:
                _observe(self._on_output, output.item)

    def _dispatch(self, outputs: list[Output]) -> None:
        for output in outputs:
            stream = self._streams.get(output.request_id)
            if stream is None:
                continue  # ended by `_fail_all`
            stream.items.put_nowait(output.item)
            stream.begun = True
            if isinstance(output.item, Completion):
                del self._streams[output.request_id]  # only now may the id be used again

    def _fail_all(self, error: TreelineError) -> None:
        for stream in self._streams.values():
            stream.items.put_nowait(error)
        self._streams.clear()


T = TypeVar("T")


def _observe(observer: Callable[[T], None], seen: T) -> None:
    """Call an observer; its exceptions must not stop the engine."""
    try:
        observer(seen)
    except Exception:
        logger.exception("an observer of the engine raised")
