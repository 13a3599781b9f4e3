"""Which verifier a call goes to, as verifiers come, hang, drain and go."""

import asyncio
import socket

import grpc
import pytest
from google.rpc.error_details_pb2 import RetryInfo

from front_door.server import FrontDoorServer
from tests.front_door.doors import CONFIG, METRICS, NOT_SERVING, SERVING, with_front_door
from tests.verifier_svc.fake_engine import FakeEngine, ended, fake_verifier, until
from tests.verifier_svc.service.test_service import collect, details, failure, request
from treeline.config import Config, LimitsConfig, ServerConfig
from treeline.v1 import generation_pb2 as pb
from verifier_svc.service.service import GenerationServicer


def test_streams_go_to_the_least_loaded_verifier():
    async def scenario(s):
        calls = [s.stub.Generate(request(max_tokens=100)) for _ in range(6)]
        for call in calls:
            await call.read()
        spread = [len(engine.open) for engine in s.engines]
        for call in calls:
            call.cancel()
        return spread

    assert with_front_door(scenario, *[FakeEngine(name, step_s=0.02) for name in "abc"]) == [2, 2, 2]


def test_load_from_elsewhere_counts_too():
    busy, idle = FakeEngine("busy"), FakeEngine("idle")
    busy.elsewhere = 5

    async def scenario(s):
        for _ in range(3):
            await collect(s.stub.Generate(request()))

    with_front_door(scenario, busy, idle)
    assert (len(busy.requests), len(idle.requests)) == (0, 3)


def test_a_stream_that_has_not_begun_moves_to_another_verifier():
    async def scenario(s):
        await s.verifiers[0].kill()
        return [(await collect(s.stub.Generate(request())))[0][0].text for _ in range(3)]

    assert with_front_door(scenario, FakeEngine("a"), FakeEngine("b")) == ["b0 "] * 3


def test_without_verifiers_calls_are_unavailable_until_one_appears():
    async def scenario(s):
        assert await s.health() == NOT_SERVING
        error = await failure(s.stub.Generate(request()))
        async with fake_verifier(FakeEngine()) as verifier:
            s.found.append(verifier.endpoint)
            await s.until_health(SERVING)
            await collect(s.stub.Generate(request()))
        await s.until_health(NOT_SERVING)
        await s.door.check()
        return error

    error = with_front_door(scenario)
    assert error.code() == grpc.StatusCode.UNAVAILABLE
    assert details(error, RetryInfo).retry_delay.seconds > 0


def test_failing_discovery_keeps_the_known_verifiers():
    async def scenario(s):
        s.found.append(None)  # makes discover() raise
        await asyncio.sleep(0.8)
        await collect(s.stub.Generate(request()))
        await s.door.check()

    with_front_door(scenario, FakeEngine())


def answer_loads_after(monkeypatch, delays_s):
    """Make verifiers answer GetLoad after these times, one after the other, and then at once."""
    monkeypatch.setattr("front_door.routing.POLL_TIMEOUT_S", 0.2)
    answer = GenerationServicer.GetLoad

    async def late(servicer, message, context):
        await asyncio.sleep(delays_s.pop(0) if delays_s else 0)
        return await answer(servicer, message, context)

    monkeypatch.setattr(GenerationServicer, "GetLoad", late)


def test_a_verifier_that_answers_late_keeps_its_place(monkeypatch):
    delays_s = [0, 0.5, 0.5, 0]
    answer_loads_after(monkeypatch, delays_s)

    async def scenario(s):
        while delays_s:
            assert await s.health() == SERVING
            await asyncio.sleep(0.05)

    with_front_door(scenario, FakeEngine())


def test_a_verifier_that_no_longer_answers_loses_its_place(monkeypatch):
    answer_loads_after(monkeypatch, [0, *[0.5] * 20])

    async def scenario(s):
        assert await s.health() == SERVING
        await asyncio.sleep(3)
        assert await s.health() == NOT_SERVING

    with_front_door(scenario, FakeEngine())


def test_a_verifier_that_hangs_delays_no_news_of_the_others():
    """It takes connections and never says a word: each poll of it lasts its whole timeout."""

    async def scenario(s):
        async def until_running(requests):
            while (await s.stub.GetLoad(pb.GetLoadRequest())).num_requests_running != requests:
                await asyncio.sleep(0.02)

        with socket.create_server(("127.0.0.1", 0)) as hung:
            s.found.append(f"127.0.0.1:{hung.getsockname()[1]}")
            for requests in range(1, 6):
                s.engines[0].elsewhere = requests
                await asyncio.wait_for(until_running(requests), 1)
            async with fake_verifier(FakeEngine()) as newcomer:
                newcomer.engine.elsewhere = 10
                s.found.append(newcomer.endpoint)
                await asyncio.wait_for(until_running(15), 1.5)
            await s.door.check()

    with_front_door(scenario, FakeEngine())


def test_a_client_that_watches_health_and_reads_nothing_delays_no_news(monkeypatch):
    async def stuck(self, service, status):
        await asyncio.sleep(60)

    async def scenario(s):
        monkeypatch.setattr("grpc_health.v1.health.aio.HealthServicer._set", stuck)
        await asyncio.sleep(0.6)
        s.engines[0].elsewhere = 3
        async with asyncio.timeout(1):
            while (await s.stub.GetLoad(pb.GetLoadRequest())).num_requests_running != 3:
                await asyncio.sleep(0.02)
        monkeypatch.undo()

    with_front_door(scenario, FakeEngine())


def test_a_poll_that_grpc_cancels_by_itself_is_not_the_last(monkeypatch):
    polls = []

    async def cancelled(self):
        polls.append(self)
        raise asyncio.CancelledError

    async def scenario(s):
        with monkeypatch.context() as patched:
            patched.setattr("front_door.routing.Verifier._info", cancelled)
            await until(lambda: polls)
        s.engines[0].elsewhere = 3
        while (await s.stub.GetLoad(pb.GetLoadRequest())).num_requests_running != 3:
            await asyncio.sleep(0.02)
        await s.door.check()

    with_front_door(scenario, FakeEngine())


def test_a_front_door_starts_beside_a_verifier_that_hangs(monkeypatch):
    monkeypatch.setattr("front_door.routing.POLL_TIMEOUT_S", 0.3)

    async def scenario():
        with socket.create_server(("127.0.0.1", 0)) as hung:

            async def discover():
                return [f"127.0.0.1:{hung.getsockname()[1]}"]

            async with asyncio.timeout(1.3):
                door = await FrontDoorServer.start(CONFIG, discover)
            await door.stop(0)

    asyncio.run(scenario())


def test_a_verifier_that_starts_again_where_it_was_is_found_at_once():
    """Its channel, which has failed for a while, does not wait longer and longer between attempts."""

    async def scenario(s):
        await s.verifiers[0].kill()
        await asyncio.sleep(2)
        async with fake_verifier(FakeEngine(), port=int(s.found[0].rpartition(":")[2])):
            await s.until_health(SERVING, 0.6)

    with_front_door(scenario, FakeEngine())


def test_one_poll_that_fails_oddly_costs_a_verifier_nothing(monkeypatch):
    answer, polls = GenerationServicer.GetLoad, []

    async def odd(servicer, message, context):
        polls.append(message)
        if len(polls) == 2:
            raise ended(grpc.StatusCode.RESOURCE_EXHAUSTED)
        return await answer(servicer, message, context)

    monkeypatch.setattr(GenerationServicer, "GetLoad", odd)

    async def scenario(s):
        while len(polls) < 3:
            assert await s.health() == SERVING
            await asyncio.sleep(0.05)

    with_front_door(scenario, FakeEngine())


def test_a_call_for_tokens_outlives_its_verifier(monkeypatch):
    """Twice: the verifier ends the call, and the verifier vanishes from discovery while it works."""
    answer, asked = GenerationServicer.Tokenize, []

    async def doomed(servicer, message, context):
        asked.append(servicer._engine.name)
        if message.prompt == "cancel" and len(asked) == 1:
            raise ended(grpc.StatusCode.CANCELLED)
        await asyncio.sleep(1.2 if message.prompt == "slow" else 0)
        return await answer(servicer, message, context)

    monkeypatch.setattr(GenerationServicer, "Tokenize", doomed)

    async def scenario(s):
        assert list((await s.stub.Tokenize(pb.TokenizeRequest(prompt="cancel"))).token_ids) == [*b"cancel"]
        assert len(set(asked)) == 2
        slow = s.stub.Tokenize(pb.TokenizeRequest(prompt="slow"))
        await until(lambda: len(asked) == 3)
        s.found.clear()
        assert list((await slow).token_ids) == [*b"slow"]

    with_front_door(scenario, FakeEngine("a"), FakeEngine("b"))


def test_a_call_that_every_verifier_drops_is_unavailable(monkeypatch):
    async def dropped(servicer, message, context):
        raise ended(grpc.StatusCode.CANCELLED)

    monkeypatch.setattr(GenerationServicer, "Detokenize", dropped)

    async def scenario(s):
        return await failure(s.stub.Detokenize(pb.DetokenizeRequest(token_ids=[65])))

    error = with_front_door(scenario, FakeEngine("a"), FakeEngine("b"))
    assert error.code() is grpc.StatusCode.UNAVAILABLE
    assert details(error, RetryInfo).retry_delay.seconds > 0


@pytest.mark.parametrize("nonsense", [{"tokens_per_s": float("nan")}, {"num_requests_running": 2**32 - 1}])
def test_a_verifier_whose_load_report_makes_no_sense_gets_no_streams(monkeypatch, nonsense):
    answer = GenerationServicer.GetLoad

    async def spoilt(servicer, message, context):
        load = await answer(servicer, message, context)
        if servicer._engine.name == "a":
            load.MergeFrom(pb.GetLoadResponse(**nonsense))
        return load

    monkeypatch.setattr(GenerationServicer, "GetLoad", spoilt)

    async def scenario(s):
        for _ in range(3):
            await collect(s.stub.Generate(request()))
        assert [len(engine.requests) for engine in s.engines] == [0, 3]
        assert (await s.stub.GetLoad(pb.GetLoadRequest())).max_requests_running == CONFIG.limits.max_running_requests

    with_front_door(scenario, FakeEngine("a"), FakeEngine("b"))


def test_a_draining_verifier_gets_no_new_streams():
    async def scenario(s):
        await s.verifiers[0].health.enter_graceful_shutdown()
        await asyncio.sleep(0.8)
        for _ in range(3):
            await collect(s.stub.Generate(request()))

    draining, other = FakeEngine(), FakeEngine()
    with_front_door(scenario, draining, other)
    assert (len(draining.requests), len(other.requests)) == (0, 3)


def test_aborts_go_to_all_and_load_adds_up():
    async def scenario(s):
        ids = ["x", "y"]
        tasks = [
            asyncio.create_task(collect(s.stub.Generate(request(max_tokens=100, request_id=request_id))))
            for request_id in ids
        ]
        await until(lambda: all(engine.open for engine in s.engines))
        await asyncio.sleep(0.7)
        load = await s.stub.GetLoad(pb.GetLoadRequest())
        aborted = (await s.stub.Abort(pb.AbortRequest(request_ids=ids))).aborted
        reasons = [(await task)[1].finish_reason for task in tasks]
        return load, aborted, reasons

    config = Config(
        server=ServerConfig(port=0, http={"port": 0}), metrics=METRICS, limits=LimitsConfig(max_running_requests=3)
    )
    load, aborted, reasons = with_front_door(scenario, FakeEngine(step_s=0.02), FakeEngine(step_s=0.02), config=config)
    assert (load.num_requests_running, load.max_requests_running, load.kv_blocks_total) == (2, 6, 128)
    assert (load.tokens_per_s, load.mean_accepted_length, load.price) == (20.0, 2.0, 1.5)
    assert (aborted, reasons) == (2, [pb.FINISH_REASON_ABORTED] * 2)


def test_plans_of_all_verifiers_are_shown():
    async def scenario(s):
        return (await s.stub.GetPlan(pb.GetPlanRequest())).plans

    assert [plan.version for plan in with_front_door(scenario, FakeEngine(), FakeEngine())] == [7, 7]
