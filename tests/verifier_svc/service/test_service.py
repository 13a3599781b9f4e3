import asyncio
import re

import grpc
import pytest
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, RetryInfo
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from grpc_status import rpc_status

from tests.verifier_svc.fake_engine import FakeEngine, fake_verifier, until
from treeline.config import Config, LimitsConfig
from treeline.rpc.interceptors import SERVICE
from treeline.v1 import generation_pb2 as pb
from treeline.v1 import generation_pb2_grpc as pb_grpc
from verifier_svc.engine.request import FinishReason


def with_verifier(scenario, engine: FakeEngine | None = None, config: Config | None = None):
    """Run `scenario(channel, engine)` against a listening verifier."""

    async def run():
        async with (
            fake_verifier(engine or FakeEngine(), config or Config()) as verifier,
            grpc.aio.insecure_channel(verifier.endpoint) as channel,
        ):
            return await asyncio.wait_for(scenario(channel, verifier.engine), 20)

    return asyncio.run(run())


async def collect(call) -> tuple[list[pb.GenerateChunk], pb.GenerateComplete]:
    responses = [response async for response in call]
    assert all(response.HasField("chunk") for response in responses[:-1])
    assert responses[-1].HasField("complete")
    return [response.chunk for response in responses[:-1]], responses[-1].complete


def request(prompt="hello", max_tokens=6, **fields) -> pb.GenerateRequest:
    return pb.GenerateRequest(prompt=prompt, stopping=pb.StoppingParams(max_tokens=max_tokens), **fields)


async def failure(call) -> grpc.aio.AioRpcError:
    try:
        if hasattr(call, "__aiter__"):
            [_ async for _ in call]
        else:
            await call
    except grpc.aio.AioRpcError as error:
        return error
    pytest.fail("the call succeeded")


def details(error: grpc.aio.AioRpcError, kind):
    """The detail of this kind in a status, decoded by the stock library."""

    class Call:
        code, details, trailing_metadata = error.code, error.details, error.trailing_metadata

    found = [detail for detail in rpc_status.from_call(Call).details if detail.Is(kind.DESCRIPTOR)]
    unpacked = kind()
    assert len(found) == 1
    found[0].Unpack(unpacked)
    return unpacked


def test_an_answer_streams_and_completes():
    async def scenario(channel, engine):
        sent = request(
            request_id="r1",
            sampling=pb.SamplingParams(temperature=0.5, seed=11),
            output=pb.OutputOptions(logprobs=2, explain=True),
            speculation=pb.SpeculationOptions(policy="chain:4"),
        )
        return await collect(pb_grpc.GenerationServiceStub(channel).Generate(sent))

    chunks, complete = with_verifier(scenario)
    assert [chunk.text for chunk in chunks] == ["a0 ", "a1 ", "a2 "]
    assert list(chunks[0].token_ids) == [65, 66]
    assert [position.chosen.token_id for position in chunks[0].logprobs] == [65, 66]
    assert [top.logprob for top in chunks[0].logprobs[0].top] == [-0.5, -1.5]
    assert (chunks[0].speculation.drafted_nodes, chunks[0].speculation.reason) == (4, "paid")
    assert complete.finish_reason == pb.FINISH_REASON_LENGTH
    assert (complete.usage.prompt_tokens, complete.usage.completion_tokens) == (5, 6)
    assert (complete.request_id, complete.seed, complete.policy) == ("r1", 11, "chain:4")
    assert (complete.speculation.mean_accepted_length, complete.speculation.mean_tree_nodes) == (2.0, 3.0)
    assert complete.timings.total_s == 0.03
    assert complete.WhichOneof("matched_stop") is None


def test_details_come_only_when_asked_for():
    async def scenario(channel, engine):
        return await collect(pb_grpc.GenerationServiceStub(channel).Generate(request()))

    chunks, complete = with_verifier(scenario)
    assert not any(chunk.logprobs or chunk.HasField("speculation") for chunk in chunks)
    assert complete.request_id
    assert complete.policy == "smart"


def test_text_goes_in_as_it_is_and_chats_through_the_template():
    async def scenario(channel, engine):
        stub = pb_grpc.GenerationServiceStub(channel)
        chat = pb.Chat(messages=[pb.ChatMessage(role="user", content="hi")])
        stopping = pb.StoppingParams(max_tokens=2)
        await collect(stub.Generate(request("<user>hi")))
        await collect(stub.Generate(pb.GenerateRequest(chat=chat, stopping=stopping)))
        await collect(stub.Generate(pb.GenerateRequest(token_ids=pb.TokenIds(ids=[7, 8]), stopping=stopping)))
        tokens = await stub.Tokenize(pb.TokenizeRequest(chat=chat))
        return [generation.prompt_token_ids for generation in engine.requests], list(tokens.token_ids)

    (text, chat, ids), tokens = with_verifier(scenario)
    assert bytes(text) == b"<user>hi"
    assert bytes(chat) == b"<user>hi<assistant>"
    assert ids == [7, 8]
    assert tokens == chat


def test_violations_arrive_as_details():
    async def scenario(channel, engine):
        stub = pb_grpc.GenerationServiceStub(channel)
        return await failure(stub.Generate(request(max_tokens=0, sampling=pb.SamplingParams(top_p=-1))))

    error = with_verifier(scenario)
    assert error.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert {v.field for v in details(error, BadRequest).field_violations} == {"stopping.max_tokens", "sampling.top_p"}
    assert details(error, ErrorInfo).domain == "treeline"


BAD = [
    (request(model="other"), grpc.StatusCode.NOT_FOUND),
    (request("x" * 1024), grpc.StatusCode.INVALID_ARGUMENT),
    (request("x" * 1000, max_tokens=25), grpc.StatusCode.INVALID_ARGUMENT),
    (
        pb.GenerateRequest(chat=pb.Chat(messages=[pb.ChatMessage(role="assistant", content="x")])),
        grpc.StatusCode.INVALID_ARGUMENT,
    ),
    (pb.GenerateRequest(), grpc.StatusCode.INVALID_ARGUMENT),
]


@pytest.mark.parametrize(("bad", "code"), BAD)
def test_bad_requests_get_their_code_and_never_reach_the_engine(bad, code):
    async def scenario(channel, engine):
        error = await failure(pb_grpc.GenerationServiceStub(channel).Generate(bad))
        return error.code(), engine.requests

    assert with_verifier(scenario) == (code, [])


@pytest.mark.parametrize("method", ["Generate", "Tokenize", "Abort"])
@pytest.mark.parametrize("data", [b"\x1a\x02\xff\xfe\x0a\x02\xff\xfe", b"\xff\xff\xff\xff"])
def test_raw_bytes_that_are_no_message_get_invalid_argument(method, data):
    async def scenario(channel, engine):
        kind = channel.unary_stream if method == "Generate" else channel.unary_unary
        return await failure(kind(f"/{SERVICE}/{method}")(data))

    error = with_verifier(scenario)
    assert error.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert "UTF-8" in details(error, BadRequest).field_violations[0].description


def test_a_full_queue_says_when_to_come_back():
    async def scenario(channel, engine):
        return await failure(pb_grpc.GenerationServiceStub(channel).Generate(request()))

    error = with_verifier(scenario, FakeEngine(capacity=0))
    assert error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert details(error, RetryInfo).retry_delay.seconds > 0
    assert details(error, ErrorInfo).reason == "QUEUE_FULL"


def test_unexpected_errors_show_nothing_of_themselves():
    async def scenario(channel, engine):
        return await failure(pb_grpc.GenerationServiceStub(channel).Generate(request()))

    error = with_verifier(scenario, FakeEngine(fail=KeyError("secret")))
    assert error.code() == grpc.StatusCode.INTERNAL
    assert re.fullmatch("internal error; the service's log has it as [0-9a-f]{32}", error.details())


def test_a_request_that_breaks_its_engine_names_the_id_to_look_up():
    async def scenario(channel, engine):
        return await failure(pb_grpc.GenerationServiceStub(channel).Generate(request(request_id="mine")))

    error = with_verifier(scenario, FakeEngine(ends=FinishReason.FAILED))
    assert error.code() == grpc.StatusCode.INTERNAL
    assert "mine" in error.details()


def test_cancelling_frees_the_request():
    async def scenario(channel, engine):
        call = pb_grpc.GenerationServiceStub(channel).Generate(request(max_tokens=100))
        await call.read()
        assert len(engine.open) == 1
        call.cancel()
        await until(lambda: not engine.open)

    with_verifier(scenario, FakeEngine(step_s=0.02))


def test_a_vanished_client_frees_its_requests():
    async def scenario(channel, engine):
        call = pb_grpc.GenerationServiceStub(channel).Generate(request(max_tokens=100))
        await call.read()
        await channel.close()
        await until(lambda: not engine.open)

    with_verifier(scenario, FakeEngine(step_s=0.02))


def test_a_deadline_frees_the_request():
    async def scenario(channel, engine):
        call = pb_grpc.GenerationServiceStub(channel).Generate(request(max_tokens=1000), timeout=0.15)
        error = await failure(call)
        await until(lambda: not engine.open, timeout_s=0.5)
        return error.code(), len(engine.requests)

    assert with_verifier(scenario, FakeEngine(step_s=0.02)) == (grpc.StatusCode.DEADLINE_EXCEEDED, 1)


def test_abort_ends_a_stream_with_a_completion():
    async def scenario(channel, engine):
        stub = pb_grpc.GenerationServiceStub(channel)
        call = stub.Generate(request(max_tokens=100, request_id="x"))
        await until(lambda: "x" in engine.open)
        reply = await stub.Abort(pb.AbortRequest(request_ids=["x", "unknown"]))
        _, complete = await collect(call)
        return reply.aborted, complete.finish_reason

    assert with_verifier(scenario, FakeEngine(step_s=0.02)) == (1, pb.FINISH_REASON_ABORTED)


def test_load_and_model_info():
    config = Config(limits=LimitsConfig(max_running_requests=3, max_waiting_requests=5))

    async def scenario(channel, engine):
        stub = pb_grpc.GenerationServiceStub(channel)
        return await stub.GetLoad(pb.GetLoadRequest()), await stub.GetModelInfo(pb.GetModelInfoRequest())

    load, info = with_verifier(scenario, config=config)
    assert (load.max_requests_running, load.max_requests_waiting, load.kv_blocks_total) == (3, 5, 64)
    assert (load.price, load.plan_version, load.drafter_ready) == (1.5, 7, True)
    assert (info.model, info.vocab_size, info.max_context_tokens) == ("fake", 256, 1024)
    assert (info.default_policy, "eagle2:" in info.allowed_policies) == ("smart", True)
    assert info.default_sampling == pb.SamplingParams(
        temperature=0, top_p=1, top_k=0, repetition_penalty=1, presence_penalty=0, frequency_penalty=0, min_p=0
    )


def test_the_plan_in_force_is_shown_with_its_signals():
    async def scenario(channel, engine):
        return (await pb_grpc.GenerationServiceStub(channel).GetPlan(pb.GetPlanRequest())).plans

    (plan,) = with_verifier(scenario)
    assert (plan.version, plan.price, plan.reason, plan.step_budget_s) == (7, 1.5, "because", 0.05)
    measured, missing = plan.signals
    assert (measured.value_s, measured.objective_s, measured.source) == (0.03, 0.04, "steps")
    assert not missing.HasField("value_s")
    assert not missing.HasField("objective_s")


def test_health_and_reflection_are_on():
    async def scenario(channel, engine):
        check = health_pb2_grpc.HealthStub(channel).Check
        statuses = [(await check(health_pb2.HealthCheckRequest(service=s))).status for s in ("", SERVICE)]
        reflection = reflection_pb2_grpc.ServerReflectionStub(channel)
        listing = reflection_pb2.ServerReflectionRequest(list_services="")
        reply = await reflection.ServerReflectionInfo(iter([listing])).read()
        return statuses, {service.name for service in reply.list_services_response.service}

    statuses, services = with_verifier(scenario)
    assert statuses == [health_pb2.HealthCheckResponse.SERVING] * 2
    assert {SERVICE, "grpc.health.v1.Health"} <= services
