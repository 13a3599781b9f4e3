"""The engine's thread and its asyncio side, over a tiny real model."""

from __future__ import annotations

import asyncio
import gc
import threading
from dataclasses import replace

import pytest

from planner.fast.builtin_plan import builtin_plan
from tests.verifier_svc.doubles import SilentLink
from tests.verifier_svc.engine.test_engine import CONFIG, LIMITS
from tests.verifier_svc.engine.test_engine import model as model  # a fixture
from tests.verifier_svc.fake_engine import until
from treeline.drafting import DraftRequest
from treeline.errors import DrainingError, QueueFullError, UnavailableError
from treeline.sampling import SamplingParams
from treeline.step_record import StepRecord
from verifier_svc.engine.engine import Engine
from verifier_svc.engine.request import Completion, FinishReason, GenerationRequest
from verifier_svc.service import async_engine
from verifier_svc.service.async_engine import AsyncEngine


def with_engine(model, scenario, max_running: int = 8, max_waiting: int = 8, link=None, **observers):
    async def run():
        own = Engine(model, link, lambda: builtin_plan(LIMITS), CONFIG)
        engine = AsyncEngine(own, max_running, max_waiting, **observers)
        try:
            return await asyncio.wait_for(scenario(engine), 30)
        finally:
            await engine.stop(0)

    return asyncio.run(run())


def ask(name: str, max_tokens: int = 8) -> GenerationRequest:
    return GenerationRequest(name, [5, 6, 7], SamplingParams(), max_tokens, ignore_eos=True, policy="off")


async def answer(engine: AsyncEngine, request: GenerationRequest) -> list:
    return [item async for item in engine.generate(request)]


def test_observers_that_raise_do_not_end_the_engine(model):
    def broken(_):
        raise RuntimeError("a metric is broken")

    async def scenario(engine):
        return await answer(engine, ask("a"))

    assert with_engine(model, scenario, on_step=broken, on_output=broken)[-1].finish_reason is FinishReason.LENGTH


def test_records_of_steps_are_kept_no_longer_than_the_rates_need(model, monkeypatch):
    monkeypatch.setattr(async_engine, "RATE_WINDOW_S", 0.0)
    steps = []

    async def scenario(engine):
        await answer(engine, ask("a", 40))
        return sum(isinstance(kept, StepRecord) for kept in gc.get_objects())

    gc.collect()
    before = sum(isinstance(kept, StepRecord) for kept in gc.get_objects())
    kept = with_engine(model, scenario, on_step=lambda record: steps.append(record.step_id))
    assert len(steps) >= 40
    assert kept - before <= 2


def test_a_dead_engine_tells_its_streams_to_go_elsewhere_and_shows_nothing_of_the_cause(model):
    async def scenario(engine):
        def broken():
            raise KeyError("secret")

        engine.engine.step = broken
        for name in ("a", "b"):
            with pytest.raises(UnavailableError) as caught:
                await answer(engine, ask(name))
            assert "secret" not in str(caught.value)
            assert "KeyError" not in str(caught.value)
        with pytest.raises(RuntimeError, match="secret"):
            engine.check()

    with_engine(model, scenario)


class LateLink(SilentLink):
    """A drafter whose answers come when `arrives` is set."""

    def __init__(self) -> None:
        self.arrives, self.released = threading.Event(), list[int]()
        self.ready = True  # type: ignore[misc]

    def refresh(self) -> None:
        self.ready = self.ready or self.arrives.is_set()

    def draft(self, request: DraftRequest, timeout_s: float) -> None:
        self.released += request.released
        self.ready = False


def test_a_drafter_that_answers_when_nothing_runs_any_more_hears_of_the_end(model, monkeypatch):
    monkeypatch.setattr(async_engine, "IDLE_WAIT_S", 0.01)
    link = LateLink()

    async def scenario(engine):
        await answer(engine, replace(ask("a"), policy="chain:4"))
        assert not link.released
        link.arrives.set()
        await until(lambda: link.released)

    with_engine(model, scenario, link=link)


def test_slots_and_queue_bound_what_is_open(model):
    async def scenario(engine):
        streams = [engine.generate(ask(f"r{i}", 200)) for i in range(5)]
        await asyncio.gather(*(anext(stream) for stream in streams))
        load = engine.load()
        with pytest.raises(QueueFullError):
            await answer(engine, ask("late"))
        for stream in streams:
            await stream.aclose()
        return load.num_requests_running, load.num_requests_waiting

    assert with_engine(model, scenario, max_running=4, max_waiting=1) == (5, 0)


def test_who_has_less_in_a_full_queue_takes_the_place_of_who_has_most(model):
    async def scenario(engine):
        def of(client: str, number: int) -> GenerationRequest:
            return replace(ask(f"{client}{number}", 200), client=client)

        greedy = [asyncio.ensure_future(answer(engine, of("greedy", i))) for i in range(12)]
        await asyncio.sleep(0.05)
        polite = [asyncio.ensure_future(answer(engine, of("polite", i))) for i in range(5)]
        results = await asyncio.gather(*greedy, *polite, return_exceptions=True)
        again = await answer(engine, of("greedy", 11))
        return [isinstance(result, QueueFullError) for result in results], again[-1].finish_reason

    refused, again = with_engine(model, scenario, max_running=8, max_waiting=4)
    assert refused == [False] * 8 + [True] * 4 + [False] * 4 + [True], "who has begun stays"
    assert again is FinishReason.LENGTH


def test_draining_ends_what_is_left_with_an_error_and_never_as_finished(model):
    async def scenario(engine):
        stream = engine.generate(ask("a", 200))
        await anext(stream)
        stopping = asyncio.ensure_future(engine.stop(0))
        rest = []
        with pytest.raises(DrainingError):
            rest += [item async for item in stream]
        assert not any(isinstance(item, Completion) for item in rest)
        await stopping
        with pytest.raises(DrainingError):
            await answer(engine, ask("b"))

    with_engine(model, scenario)
