"""Routes each request to the least loaded live verifier."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from treeline.config import Config
from treeline.messages import Bounds, check_numbers
from treeline.rpc.channels import Discover, connect
from treeline.v1 import generation_pb2 as pb
from treeline.v1 import generation_pb2_grpc as pb_grpc

logger = logging.getLogger(__name__)

POLL_INTERVAL_S = 0.5
LOST_POLL_INTERVAL_S = 0.1
"""For a verifier that does not serve, and for discovery while none serves: streams may wait for one."""
POLL_TIMEOUT_S = 2.0
MAX_FAILED_POLLS = 3
"""A verifier that answers late, or reports too many calls, may only be busy; one that is gone refuses at once."""
MOST_LOAD: Bounds = dict.fromkeys(
    ("num_requests_running", "num_requests_waiting", "max_requests_running", "max_requests_waiting"), (0, 1 << 20)
)
"""Bounds of request counts in a load report: the sum over a thousand verifiers still fits 32 bits."""

OnPoll = Callable[[int], None]
"""Called after each poll with the number of serving verifiers."""


@dataclass(eq=False)
class Verifier:
    """One verifier as this front door knows it.

    Attributes:
        serving: reported SERVING when it last answered, and has not failed too many polls since.
        failed_polls: polls in a row without an answer.
        in_flight: answers that this front door has open there now.
        calls: all calls for clients that this front door has open there now.
        others: requests there from elsewhere, as of the last poll.
        following: the polling task; `polled`: set after its first poll.
    """

    endpoint: str
    channel: grpc.aio.Channel
    serving: bool = False
    failed_polls: int = 0
    in_flight: int = 0
    calls: int = 0
    others: int = 0
    load: pb.GetLoadResponse = field(default_factory=pb.GetLoadResponse)
    info: pb.GetModelInfoResponse | None = None
    following: asyncio.Task[None] | None = None
    polled: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def requests(self) -> int:
        return self.in_flight + self.others

    @cached_property
    def stub(self) -> pb_grpc.GenerationServiceStub:
        return pb_grpc.GenerationServiceStub(self.channel)

    @contextmanager
    def calling(self, answers: int = 0) -> Iterator[pb_grpc.GenerationServiceStub]:
        """Keep the channel open for one call that asks for `answers`."""
        self.calls += 1
        self.in_flight += answers
        try:
            yield self.stub
        finally:
            self.calls -= 1
            self.in_flight -= answers

    async def poll(self) -> None:
        """Bring everything but `in_flight` and `calls` up to date, within POLL_TIMEOUT_S."""
        health, in_flight = health_pb2_grpc.HealthStub(self.channel), self.in_flight
        # Exceptions as results: grpc.aio at times cancels a call by itself, which must not end the task.
        answers: tuple[Any, ...] = await asyncio.gather(
            health.Check(health_pb2.HealthCheckRequest(), timeout=POLL_TIMEOUT_S),
            self.stub.GetLoad(pb.GetLoadRequest(), timeout=POLL_TIMEOUT_S),
            self._info(),
            return_exceptions=True,
        )
        errors = [answer for answer in answers if isinstance(answer, BaseException)]
        if errors:
            codes = [error.code() for error in errors if isinstance(error, grpc.aio.AioRpcError)]
            self.failed_polls += 1
            if grpc.StatusCode.UNAVAILABLE in codes or self.failed_polls >= MAX_FAILED_POLLS:
                self._set_serving(False, codes[0].name if codes else repr(errors[0]))
            return
        status, load, self.info = answers
        try:
            check_numbers(load, MOST_LOAD)
        except ValueError as error:
            self._set_serving(False, f"invalid load report: {error}")
            return
        self.failed_polls, self.load = 0, load
        self.others = max(0, self.load.num_requests_running + self.load.num_requests_waiting - in_flight)
        self._set_serving(status.status == health_pb2.HealthCheckResponse.SERVING, "draining")

    async def _info(self) -> pb.GetModelInfoResponse:
        return self.info or await self.stub.GetModelInfo(pb.GetModelInfoRequest(), timeout=POLL_TIMEOUT_S)

    async def close(self) -> None:
        if self.following is not None:
            self.following.cancel()
            await asyncio.gather(self.following, return_exceptions=True)
        await self.channel.close()

    def _set_serving(self, serving: bool, problem: str) -> None:
        if serving != self.serving:
            logger.info("verifier %s: %s", self.endpoint, "serving" if serving else problem)
        self.serving = serving


class VerifierPool:
    """Follows discovery in one background task, and each verifier's health and load in one of its own: a hanging
    verifier does not delay polls of the others."""

    def __init__(self, config: Config, discover: Discover, on_poll: OnPoll) -> None:
        self._config, self._discover, self._on_poll = config, discover, on_poll
        self._verifiers: dict[str, Verifier] = {}
        self._discovery_fails = False
        self._looking: asyncio.Task[None] | None = None

    @classmethod
    async def start(cls, config: Config, discover: Discover, on_poll: OnPoll) -> VerifierPool:
        """A pool that has run discovery once and polled each verifier it found."""
        pool = cls(config, discover, on_poll)
        await pool._look()
        await asyncio.gather(*(verifier.polled.wait() for verifier in pool._verifiers.values()))
        on_poll(len(pool.serving))  # There may be none to poll.
        pool._looking = asyncio.create_task(pool._keep_looking(), name="verifier-pool")
        return pool

    @property
    def serving(self) -> list[Verifier]:
        return [verifier for verifier in self._verifiers.values() if verifier.serving]

    @property
    def info(self) -> pb.GetModelInfoResponse | None:
        """What is served: all verifiers serve the same model. None until one was reached."""
        return next((verifier.info for verifier in self._verifiers.values() if verifier.info), None)

    def least_loaded(self, rather_not: Verifier | None = None) -> Verifier | None:
        """The serving verifier with the fewest requests, then with the most free KV blocks; `rather_not` comes last."""
        return min(self.serving, key=lambda v: (v is rather_not, v.requests, v.load.kv_blocks_used), default=None)

    def check(self) -> None:
        """Raise RuntimeError if a background task has ended."""
        tasks = (self._looking, *(verifier.following for verifier in self._verifiers.values()))
        if any(task is not None and task.done() for task in tasks):
            raise RuntimeError("the verifiers are no longer followed")

    async def stop(self) -> None:
        if self._looking is not None:
            self._looking.cancel()
            await asyncio.gather(self._looking, return_exceptions=True)
        await asyncio.gather(*(verifier.close() for verifier in self._verifiers.values()))

    async def _keep_looking(self) -> None:
        while True:
            await asyncio.sleep(POLL_INTERVAL_S if self.serving else LOST_POLL_INTERVAL_S)
            await self._look()

    async def _follow(self, verifier: Verifier) -> None:
        while True:
            try:
                await verifier.poll()
                self._on_poll(len(self.serving))
            finally:
                verifier.polled.set()
            await asyncio.sleep(POLL_INTERVAL_S if verifier.serving else LOST_POLL_INTERVAL_S)

    async def _look(self) -> None:
        """Run discovery, follow new verifiers, and drop those that are gone and have no call open."""
        try:
            found = set(await self._discover())
            self._discovery_fails = False
        except Exception as error:  # discovery asks another system, which may fail in its own ways
            if not self._discovery_fails:
                logger.warning("discovery failed, the known verifiers stay: %r", error)
            self._discovery_fails = True
            found = set(self._verifiers)
        for endpoint in found - self._verifiers.keys():
            channel = connect(endpoint, self._config.internal, self._config.limits.max_message_bytes)
            self._verifiers[endpoint] = verifier = Verifier(endpoint, channel)
            verifier.following = asyncio.create_task(self._follow(verifier), name=f"verifier {endpoint}")
        for endpoint, verifier in list(self._verifiers.items()):
            if endpoint not in found and not verifier.calls:
                del self._verifiers[endpoint]
                await verifier.close()
                self._on_poll(len(self.serving))
