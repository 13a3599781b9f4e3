"""Streams outlive their verifiers: every token comes once, in order, whoever it comes from."""

from __future__ import annotations

import asyncio
import re

import grpc
import pytest
from google.rpc.error_details_pb2 import ErrorInfo, RetryInfo

from tests.front_door.doors import METRICS, with_front_door
from tests.front_door.test_access import lines as lines  # a fixture
from tests.verifier_svc.fake_engine import FakeEngine, FakeVerifier, ended, fake_verifier, until
from tests.verifier_svc.service.test_service import collect, details, failure, request
from treeline.config import Config, ServerConfig
from treeline.errors import DrainingError, EngineFailedError
from treeline.v1 import generation_pb2 as pb

CANCELLED = ended(grpc.StatusCode.CANCELLED)
IMPATIENT = Config(server=ServerConfig(port=0, http={"port": 0}, resume_wait_s=1.0), metrics=METRICS)


def steps_of(chunks: list[pb.GenerateChunk]) -> list[int]:
    """The number in each chunk's word: 0, 1, 2, ... if nothing was lost or repeated."""
    return [int(re.fullmatch(r"\D(\d+) ", chunk.text)[1]) for chunk in chunks]


def running(s) -> FakeVerifier:
    (found,) = [verifier for verifier in s.verifiers if verifier.engine.open]
    return found


async def rest_of(call, chunks: list[pb.GenerateChunk]) -> pb.GenerateComplete:
    """Read a stream of which some was read before to its end; its chunks are added to `chunks`."""
    while not (response := await call.read()).HasField("complete"):
        chunks.append(response.chunk)
    return response.complete


def test_a_stream_goes_on_where_a_killed_verifier_left_it():
    async def scenario(s):
        call = s.stub.Generate(request(max_tokens=40, request_id="x", sampling=pb.SamplingParams(temperature=1)))
        chunks = [(await call.read()).chunk]
        await running(s).kill()
        complete = await rest_of(call, chunks)
        return chunks, complete, [engine.requests for engine in s.engines]

    chunks, complete, asked = with_front_door(scenario, FakeEngine("a", step_s=0.02), FakeEngine("b", step_s=0.02))
    assert steps_of(chunks) == list(range(20))
    assert len({chunk.text[0] for chunk in chunks}) == 2, "it did not move"
    assert complete.usage.completion_tokens == 40
    (before,), (after,) = sorted(asked, key=lambda requests: len(requests[0].delivered_token_ids))
    assert (before.sampling, before.request_id) == (after.sampling, after.request_id)
    assert complete.seed == before.sampling.seed
    assert 0 < after.time_to_first_token_s <= after.elapsed_s


def test_every_stream_survives_kill_after_kill():
    async def scenario(s):
        calls = [asyncio.create_task(collect(s.stub.Generate(request(max_tokens=60)))) for _ in range(8)]
        for _ in range(3):
            await asyncio.sleep(0.15)
            doomed = max(s.verifiers, key=lambda verifier: len(verifier.engine.open))
            s.found.remove(doomed.endpoint)
            s.verifiers.remove(doomed)
            await doomed.kill()
        return await asyncio.gather(*calls)

    engines = [FakeEngine(name, step_s=0.03) for name in "abcd"]
    for chunks, complete in with_front_door(scenario, *engines):
        assert steps_of(chunks) == list(range(30))
        assert complete.finish_reason == pb.FINISH_REASON_LENGTH


@pytest.mark.parametrize("error", [DrainingError("draining"), EngineFailedError("failed"), CANCELLED])
def test_a_draining_verifier_or_a_dead_engine_hands_its_streams_over(error):
    async def scenario(s):
        return await collect(s.stub.Generate(request(max_tokens=12)))

    leaving, staying = FakeEngine("a", fail=error), FakeEngine("b")
    staying.elsewhere = 1  # so that the other one is asked first
    chunks, _ = with_front_door(scenario, leaving, staying)
    assert [chunk.text for chunk in chunks] == ["a0 ", *(f"b{step} " for step in range(1, 6))]


def test_one_lost_stream_does_not_shut_the_only_verifier_to_others():
    async def scenario(s):
        lost = asyncio.create_task(collect(s.stub.Generate(request(max_tokens=12))))
        await until(lambda: s.engines[0].requests)
        await asyncio.sleep(0.05)
        s.engines[0].fail = None
        return steps_of((await collect(s.stub.Generate(request(max_tokens=12))))[0]), steps_of((await lost)[0])

    engine = FakeEngine(fail=CANCELLED)
    engine.fail_at = 0
    assert with_front_door(scenario, engine) == (list(range(6)), list(range(6)))


def test_a_stream_waits_for_a_new_verifier():
    async def scenario(s):
        call = s.stub.Generate(request(max_tokens=40))
        chunks = [(await call.read()).chunk]
        await running(s).kill()
        s.found.clear()
        await asyncio.sleep(0.7)
        async with fake_verifier(FakeEngine("b")) as replacement:
            s.found.append(replacement.endpoint)
            await rest_of(call, chunks)
        return chunks

    chunks = with_front_door(scenario, FakeEngine("a", step_s=0.02))
    assert steps_of(chunks) == list(range(20))


def test_past_its_limit_a_stream_says_how_much_was_delivered():
    async def scenario(s):
        call = s.stub.Generate(request(max_tokens=40))
        chunks = [(await call.read()).chunk]
        await running(s).kill()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await rest_of(call, chunks)
        return chunks, caught.value

    chunks, error = with_front_door(scenario, FakeEngine("a", step_s=0.05), config=IMPATIENT)
    assert error.code() is grpc.StatusCode.UNAVAILABLE
    info = details(error, ErrorInfo)
    assert info.reason == "STREAM_LOST"
    assert int(info.metadata["delivered_tokens"]) == sum(len(chunk.token_ids) for chunk in chunks)
    assert details(error, RetryInfo).retry_delay.seconds > 0


def test_what_no_verifier_ever_took_is_not_a_lost_stream(lines):
    async def scenario(s):
        await s.verifiers[0].kill()  # the front door believes it alive until its next poll
        return await failure(s.stub.Generate(request()))

    error = with_front_door(scenario, FakeEngine(), config=IMPATIENT)
    assert (error.code(), details(error, ErrorInfo).reason) == (grpc.StatusCode.UNAVAILABLE, "UNAVAILABLE")
    assert [line["resumed"] for line in lines()] == [0]


def test_a_request_that_kills_engines_does_not_kill_all_of_them():
    async def scenario(s):
        error = await failure(s.stub.Generate(request(request_id="poison")))
        return error, sum(len(engine.requests) for engine in s.engines)

    engines = [FakeEngine(name, fail=EngineFailedError("it died")) for name in "abcdef"]
    for engine in engines:
        engine.fail_at = 0
    error, runs = with_front_door(scenario, *engines)
    assert (error.code(), details(error, ErrorInfo).reason) == (grpc.StatusCode.UNAVAILABLE, "STREAM_LOST")
    assert runs == 3


def test_a_client_resumes_through_another_front_door():
    async def scenario(s):
        sent = request(max_tokens=20, request_id="mine")
        call = s.stub.Generate(sent)
        metadata = dict(await call.initial_metadata())
        chunks = [(await call.read()).chunk for _ in range(3)]
        call.cancel()
        assert metadata["treeline-request-id"] == "mine"
        sent.sampling.seed = int(metadata["treeline-seed"])
        sent.resume.token_ids.extend(token for chunk in chunks for token in chunk.token_ids)
        await until(lambda: not s.engines[0].open)
        rest, complete = await collect(s.stub.Generate(sent))
        return chunks + rest, complete, [r.sampling.seed for r in s.engines[0].requests]

    chunks, complete, seeds = with_front_door(scenario, FakeEngine("a", step_s=0.02))
    assert steps_of(chunks) == list(range(10))
    assert complete.usage.completion_tokens == 20
    assert seeds == [complete.seed] * 2
