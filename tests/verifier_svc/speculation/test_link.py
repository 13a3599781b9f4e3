"""The way to the drafter: which one is chosen, and that no break, lost or wrong answer ends drafting for good."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import replace

import grpc
import numpy as np
import pytest

from planner.fast.builtin_plan import builtin_plan
from tests.trees import tree_of
from treeline.config import Config, VerifierConfig
from treeline.drafting import DraftRequest, DraftSequence
from treeline.forest import forest_to_proto
from treeline.rpc.channels import bind, new_server
from treeline.rpc.local_stream import LocalServer, LocalStream
from treeline.sampling import SamplingParams
from treeline.v1 import drafting_pb2 as pb
from treeline.v1.drafting_pb2_grpc import DraftingServiceServicer, add_DraftingServiceServicer_to_server
from verifier_svc.speculation import link as link_module
from verifier_svc.speculation.conversation import LOST_TIMEOUTS, MAX_LATE_ANSWERS
from verifier_svc.speculation.link import RemoteLink

CONFIG = Config(verifier=VerifierConfig(draft_timeout_s=0.05))
PLAN = builtin_plan(CONFIG.limits)
Behaviour = Callable[[pb.DraftRequest], "pb.DraftResponse | Exception | None"]


def good(request: pb.DraftRequest) -> pb.DraftResponse:
    return pb.DraftResponse(step_id=request.step_id, forest=forest_to_proto(tree_of([5], [-1])))


class ScriptedDrafter(DraftingServiceServicer):
    """Answers as it is told to: with a message, not at all (None), or by ending the stream (an exception)."""

    def __init__(self, is_local: bool) -> None:
        self.answer: Behaviour = good
        self.delay_s = 0.0
        self.sessions = self.streams = 0
        self.requests: list[pb.DraftRequest] = []
        self.local = LocalServer(self.draft_locally, pb.DraftRequest, 4 << 20) if is_local else None

    async def start(self) -> str:
        self.server = new_server(CONFIG.internal, 4 << 20)
        add_DraftingServiceServicer_to_server(self, self.server)
        endpoint = bind(self.server, CONFIG.internal)
        await self.server.start()
        return endpoint

    async def GetDrafterInfo(self, request, context) -> pb.GetDrafterInfoResponse:
        return pb.GetDrafterInfoResponse(
            drafter="scripted",
            vocab_size=100,
            sessions=self.sessions,
            streams=self.streams,
            socket_path=self.local.path if self.local else None,
        )

    async def stop(self) -> None:
        await self.server.stop(0)
        if self.local:
            await asyncio.to_thread(self.local.close)

    def draft_locally(self, stream: LocalStream[pb.DraftRequest]) -> None:
        self.streams += 1
        try:
            while request := stream.receive():
                self.requests.append(request)
                time.sleep(self.delay_s)
                answer = self.answer(request)
                if isinstance(answer, Exception):
                    return
                if answer is not None:
                    stream.send(answer)
        finally:
            self.streams -= 1

    async def Draft(self, request_iterator, context) -> AsyncIterator[pb.DraftResponse]:
        self.streams += 1
        try:
            async for request in request_iterator:
                self.requests.append(request)
                await asyncio.sleep(self.delay_s)
                answer = self.answer(request)
                if isinstance(answer, Exception):
                    await context.abort(grpc.StatusCode.UNAVAILABLE, str(answer))
                if answer is not None:
                    yield answer
        finally:
            self.streams -= 1


class Steps:
    """A link, used as the engine uses it: from another thread, one request after the other."""

    def __init__(self, endpoints: list[str]) -> None:
        async def discover() -> list[str]:
            return endpoints

        self.link = RemoteLink(discover, CONFIG, 100, "")
        self.step_id = 0

    async def draft(self, timeout_s: float = 1.0):
        self.step_id += 1
        request = DraftRequest(self.step_id, PLAN, [DraftSequence(1, 0, [5], SamplingParams(), "smart", 4, 4)])
        return await asyncio.to_thread(self.link.draft, request, timeout_s)

    async def ready(self, within_s: float = 5.0) -> None:
        deadline_s = time.monotonic() + within_s
        self.link.refresh()
        while not self.link.ready:
            assert time.monotonic() < deadline_s, "drafting never came back"
            await asyncio.sleep(0.005)
            self.link.refresh()


@pytest.fixture(params=["port", "socket"])
def with_drafters(request, monkeypatch) -> Callable[..., None]:
    """Runs a scenario with a link and drafters, which it reaches by their port or by their Unix socket."""
    monkeypatch.setattr(link_module, "RECONNECT_S", 0.02)
    return lambda count, use: asyncio.run(_scenario(count, use, request.param == "socket"))


async def _scenario(count: int, use, is_local: bool) -> None:
    drafters = [ScriptedDrafter(is_local) for _ in range(count)]
    steps = Steps([await drafter.start() for drafter in drafters])
    try:
        await use(steps, *drafters)
    finally:
        steps.link.close()
        for drafter in drafters:
            await drafter.stop()


def test_the_plan_travels_when_it_has_changed(with_drafters):
    async def use(steps: Steps, drafter: ScriptedDrafter) -> None:
        await steps.ready()
        for _ in range(3):
            assert await steps.draft() is not None
        assert [request.HasField("plan") for request in drafter.requests] == [True, False, False]

    with_drafters(1, use)


def test_drafting_comes_back_after_any_break(with_drafters):
    async def use(steps: Steps, drafter: ScriptedDrafter) -> None:
        rng = random.Random(3)
        for _ in range(20):
            await steps.ready()
            drafter.answer = lambda request: ConnectionError("broken on purpose")
            drafter.delay_s = rng.choice([0.0, 0.01])
            assert await steps.draft(rng.choice([0.0, 0.005, 1.0])) is None
            drafter.answer, drafter.delay_s = good, 0.0
        await steps.ready()
        assert await steps.draft() is not None

    with_drafters(1, use)


def test_a_lost_answer_times_out(with_drafters):
    async def use(steps: Steps, drafter: ScriptedDrafter) -> None:
        await steps.ready()
        drafter.answer = lambda request: None
        assert await steps.draft(0.01) is None
        # An idle verifier takes no late answer: its drafter is not away for that.
        assert (steps.link.ready, steps.link.connected) == (False, True)
        drafter.answer = good
        await steps.ready(LOST_TIMEOUTS * CONFIG.verifier.draft_timeout_s + 2)
        assert await steps.draft() is not None

    with_drafters(1, use)


def test_a_wrongly_numbered_answer_costs_one_step(with_drafters):
    async def use(steps: Steps, drafter: ScriptedDrafter) -> None:
        await steps.ready()
        drafter.answer = lambda request: pb.DraftResponse(step_id=request.step_id + 7)
        assert await steps.draft() is None
        drafter.answer = good
        await steps.ready()
        assert await steps.draft() is not None

    with_drafters(1, use)


def test_the_least_loaded_drafter_is_taken_and_kept(with_drafters):
    async def use(steps: Steps, busy: ScriptedDrafter, idle: ScriptedDrafter) -> None:
        busy.sessions = 5
        await steps.ready()
        idle.sessions, busy.sessions = 50, 0
        for _ in range(5):
            assert await steps.draft() is not None
        assert (len(busy.requests), len(idle.requests)) == (0, 5)

    with_drafters(2, use)


def test_a_verifier_leaves_a_drafter_for_one_that_has_two_verifiers_fewer(with_drafters, monkeypatch):
    monkeypatch.setattr(link_module, "BALANCE_S", 0.05)

    async def use(steps: Steps, first: ScriptedDrafter, second: ScriptedDrafter) -> None:
        second.sessions = 5
        await steps.ready()
        first.streams += 1  # another verifier has come
        async with asyncio.timeout(5):
            while (first.streams, second.streams) != (1, 1):
                await asyncio.sleep(0.02)
        await steps.ready()
        assert await steps.draft() is not None
        await asyncio.sleep(0.3)
        assert second.streams == 1  # and stays

    with_drafters(2, use)


def test_a_verifier_moves_when_its_drafter_breaks(with_drafters):
    async def use(steps: Steps, first: ScriptedDrafter, second: ScriptedDrafter) -> None:
        second.sessions = 5
        await steps.ready()
        assert await steps.draft() is not None
        await first.stop()
        while await steps.draft() is None:  # a break may be noticed by the next step only
            await steps.ready()
        assert (len(first.requests), len(second.requests)) == (1, 1)

    with_drafters(2, use)


def test_a_verifier_moves_when_its_drafter_is_always_late(with_drafters):
    async def use(steps: Steps, late: ScriptedDrafter, other: ScriptedDrafter) -> None:
        other.sessions, late.delay_s = 5, 0.02
        while not other.requests:
            await steps.ready()
            await steps.draft(0.01)
        assert len(late.requests) == MAX_LATE_ANSWERS

    with_drafters(2, use)


def test_a_bad_tree_costs_its_step_a_tree_and_nothing_else(with_drafters):
    async def use(steps: Steps, drafter: ScriptedDrafter) -> None:
        await steps.ready()
        bad = replace(tree_of([5], [-1]), sources=np.asarray([3], np.uint8))
        drafter.answer = lambda request: pb.DraftResponse(step_id=request.step_id, forest=forest_to_proto(bad))
        reply = await steps.draft()
        assert reply is not None
        assert (reply.forest.sizes.tolist(), reply.refused) == ([0], 1)
        drafter.answer = good
        reply = await steps.draft()
        assert reply is not None
        assert reply.forest.sizes.tolist() == [1]
        assert drafter.streams == 1

    with_drafters(1, use)


def test_a_senseless_answer_costs_the_stream(with_drafters):
    async def use(steps: Steps, drafter: ScriptedDrafter) -> None:
        await steps.ready()
        drafter.answer = lambda request: pb.DraftResponse(step_id=request.step_id)
        assert await steps.draft() is None
        drafter.answer = good
        await steps.ready()
        assert await steps.draft() is not None

    with_drafters(1, use)
