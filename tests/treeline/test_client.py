import asyncio
import time
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path

import grpc
import pytest

import treeline
from front_door.server import FrontDoorServer
from tests.verifier_svc.fake_engine import FakeEngine, ended, fake_verifier, until
from treeline.client import TreelineClient
from treeline.client.base import texts_of
from treeline.config import Config, InternalConfig, MetricsConfig, ServerConfig
from treeline.errors import (
    ConfigError,
    DrainingError,
    DuplicateRequestError,
    InvalidRequestError,
    QueueFullError,
    RequestFailedError,
    UnavailableError,
    UnknownModelError,
)
from treeline.rpc import status
from treeline.v1 import generation_pb2 as pb
from treeline.v1.generation_pb2_grpc import (
    GenerationServiceServicer,
    GenerationServiceStub,
    add_GenerationServiceServicer_to_server,
)


def with_client(use, engine: FakeEngine | None = None, config: Config | None = None, **client_options):
    """Run the blocking `use(client, engine)` against a listening server."""

    async def run():
        async with fake_verifier(engine or FakeEngine(), config or Config()) as verifier:

            def block():
                with TreelineClient(verifier.endpoint, **client_options) as client:
                    return use(client, verifier.engine)

            return await asyncio.to_thread(block)

    return asyncio.run(run())


def test_chunks_come_before_the_completion():
    def use(client, engine):
        return list(client.generate("hello", max_tokens=4, seed=9, explain=True, request_id="r"))

    *chunks, complete = with_client(use)
    assert [chunk.text for chunk in chunks] == ["a0 ", "a1 "]
    assert chunks[0].speculation.reason == "paid"
    assert isinstance(complete, pb.GenerateComplete)
    assert (complete.seed, complete.request_id) == (9, "r")


def test_unset_arguments_stay_unset():
    def use(client, engine):
        list(client.generate(token_ids=[1, 2]))
        return engine.requests[0]

    request = with_client(use)
    assert request.prompt_token_ids == [1, 2]
    assert (request.policy, request.max_nodes, request.logprobs, request.max_tokens) == ("smart", None, None, 256)


def test_other_calls():
    def use(client, engine):
        chat = [{"role": "user", "content": "x"}]
        return (
            client.model_info().model,
            client.load().kv_blocks_total,
            client.tokenize(messages=chat),
            client.abort("x"),
        )

    model, blocks, tokens, aborted = with_client(use)
    assert (model, blocks, bytes(tokens), aborted) == ("fake", 64, b"<user>x<assistant>", 0)


def test_errors_come_back_as_what_they_were():
    def use(client, engine):
        with pytest.raises(InvalidRequestError) as invalid:
            list(client.generate("x", top_p=2.0, max_tokens=0))
        with pytest.raises(UnknownModelError, match="other"):
            list(client.generate("x", model="other"))
        engine.capacity = 0
        with pytest.raises(QueueFullError, match="full"):
            list(client.generate("x"))
        return invalid.value

    error = with_client(use, max_retries=0)
    assert {v.field for v in error.violations} == {"sampling.top_p", "stopping.max_tokens"}


def test_exactly_one_input_and_known_options_alone():
    with TreelineClient("127.0.0.1:1") as client:
        for inputs in ({}, {"prompt": "a", "token_ids": [1]}):
            with pytest.raises(ValueError, match="exactly one"):
                client.generate(**inputs)
        for unknown in ("max_token", "resume"):
            with pytest.raises(TypeError, match=f"no argument '{unknown}'"):
                client.generate("a", **{unknown: None})


def test_leaving_the_loop_frees_the_request():
    def use(client, engine):
        for message in client.generate("x", max_tokens=100):
            assert message.text == "a0 "
            break
        deadline = time.monotonic() + 2
        while engine.open and time.monotonic() < deadline:
            time.sleep(0.01)
        return engine.open

    assert with_client(use, FakeEngine(step_s=0.02)) == set()


def test_deadlines_tokens_and_lost_servers(tmp_path):
    (tmp_path / "token").write_text("t")
    config = Config(internal=InternalConfig(token_file=tmp_path / "token"))

    def late(client, engine):
        with pytest.raises(RequestFailedError) as caught:
            list(client.generate("x", max_tokens=100, timeout_s=0.1))
        return caught.value.code

    def refused(client, engine):
        with pytest.raises(RequestFailedError) as caught:
            client.load()
        return caught.value.code

    slow = FakeEngine(step_s=0.02)
    assert with_client(late, slow, config, token="t") == "DEADLINE_EXCEEDED"
    assert with_client(refused, config=config, token="wrong") == "UNAUTHENTICATED"
    with TreelineClient("127.0.0.1:1") as client, pytest.raises(UnavailableError, match=r"cannot reach 127\.0\.0\.1:1"):
        client.load()


class SoonFree(FakeEngine):
    """Has room for one more with each request."""

    async def generate(self, request):
        self.capacity += 1
        async for item in super().generate(request):
            yield item


@asynccontextmanager
async def two_doors(engines: list[FakeEngine]):
    """Two front doors over the same verifiers."""
    async with AsyncExitStack() as stack:
        verifiers = [await stack.enter_async_context(fake_verifier(engine)) for engine in engines]

        async def discover():
            return [verifier.endpoint for verifier in verifiers]

        config = Config(server=ServerConfig(port=0, http={"port": 0}), metrics=MetricsConfig(base_port=0))
        doors = [await FrontDoorServer.start(config, discover) for _ in range(2)]
        for door in doors:
            stack.push_async_callback(door.stop, 0)
        yield doors


def test_a_stream_outlives_its_front_door():
    async def run():
        async with two_doors([FakeEngine(step_s=0.02)]) as doors:
            loop = asyncio.get_running_loop()

            def read():
                with TreelineClient([door.endpoint for door in doors]) as client:
                    answer = client.generate("hello", max_tokens=60)
                    chunks = [next(answer) for _ in range(3)]
                    asyncio.run_coroutine_threadsafe(doors[0].stop(0), loop).result(10)
                    *rest, complete = answer
                    return client.load().kv_blocks_total, chunks + rest, complete

            return await asyncio.to_thread(read)

    blocks, chunks, complete = asyncio.run(run())
    assert [chunk.text for chunk in chunks] == [f"a{step} " for step in range(30)]
    assert complete.usage.completion_tokens == 60
    assert blocks == 64


def test_a_stream_whose_servers_stay_away_says_so():
    def use(client, engine):
        answer = client.generate("hello", max_tokens=60)
        next(answer)
        engine.fail = DrainingError("this replica has shut down")
        engine.fail_at = 5
        with pytest.raises(UnavailableError):
            list(answer)

    engine = FakeEngine(step_s=0.02)
    with_client(use, engine, resume_wait_s=0.5)
    assert len(engine.requests) > 1, "it was not resumed"


class Recovering(FakeEngine):
    """Only its first call fails."""

    async def generate(self, request):
        try:
            async for item in super().generate(request):
                yield item
        finally:
            self.fail = None


def test_a_stream_that_the_way_there_cancels_goes_on():
    def use(client, engine):
        return client.generate("x", max_tokens=8).text()

    assert with_client(use, Recovering(fail=ended(grpc.StatusCode.CANCELLED))) == "a0 a1 a2 a3 "


def test_a_closed_client_ends_its_streams_as_cancelled():
    def use(client, engine):
        answer = client.generate("x", max_tokens=100)
        next(answer)
        client.close()
        with pytest.raises(RequestFailedError) as caught:
            list(answer)
        return caught.value.code, len(engine.requests)

    assert with_client(use, FakeEngine(step_s=0.02)) == ("CANCELLED", 1)


def test_the_whole_text_and_every_field_of_a_chat():
    asked = {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}
    chat = [{"role": "user", "content": "x"}, asked]

    def use(client, engine):
        text = client.generate(messages=chat, template_arguments={"tools": [1]}, max_tokens=6).text()
        return text, bytes(engine.requests[0].prompt_token_ids)

    text, prompt = with_client(use)
    assert text == "a0 a1 a2 "
    assert prompt == b'<tools>[1]<user>x<assistant>[{"id": "1"}]<assistant>'


def test_a_refused_call_comes_again_when_the_server_says(monkeypatch):
    monkeypatch.setattr(status, "RETRY_DELAY_S", 0.05)

    def use(client, engine):
        return client.generate("x", max_tokens=4).text()

    assert with_client(use, SoonFree(capacity=-2)) == "a0 a1 "
    for engine, options in ((SoonFree(capacity=-3), {}), (SoonFree(capacity=-2), {"max_retries": 1})):
        with pytest.raises(QueueFullError):
            with_client(use, engine, **options)


class StillOpen(FakeEngine):
    """The first call breaks off before its first token, and its request stays open for two more."""

    calls = 0

    async def generate(self, request):
        self.calls += 1
        if self.calls == 1:
            raise DrainingError("the connection is lost")
        if self.calls < 4:
            raise DuplicateRequestError(f"a request with id {request.request_id!r} is open")
        async for item in super().generate(request):
            yield item


def test_a_request_that_its_lost_connection_still_holds_open_is_asked_for_again():
    assert with_client(lambda client, engine: client.generate("x", max_tokens=4).text(), StillOpen()) == "a0 a1 "


def test_no_retry_outlasts_the_deadline():
    def use(client, engine):
        started_s = time.monotonic()
        with pytest.raises(QueueFullError):
            client.generate("x", timeout_s=0.5).text()
        return time.monotonic() - started_s

    assert with_client(use, FakeEngine(capacity=0)) < 1, "which says: in a second"


def test_grpc_retries_by_its_own_configuration(monkeypatch):
    monkeypatch.setattr(status, "RETRY_DELAY_S", 0.05)
    monkeypatch.setattr("front_door.clients.FULL_S", 0)
    config = (Path(treeline.__file__).parents[1] / "examples" / "retries.json").read_text()
    config = config.replace('"0.5s"', '"30s"').replace('"5s"', '"30s"')

    async def run():
        request = pb.GenerateRequest(prompt="x", stopping=pb.StoppingParams(max_tokens=4))
        async with two_doors([SoonFree(capacity=-2)]) as (door, _):
            channel = grpc.aio.insecure_channel(door.endpoint, [("grpc.service_config", config)])
            async with channel:
                return [response async for response in GenerationServiceStub(channel).Generate(request)]

    started_s = time.monotonic()
    assert "".join(response.chunk.text for response in asyncio.run(run())) == "a0 a1 "
    assert time.monotonic() - started_s < 10, "it did not wait as told, but as configured"


@pytest.mark.parametrize("target", ["10.0.0.1:1", "example.com:1", "[2001:db8::1]:1"])
def test_tokens_leave_the_machine_only_encrypted(target):
    with pytest.raises(ConfigError, match="plain text"):
        TreelineClient(["localhost:1", target], "t")
    TreelineClient(target, "t", allow_plaintext_token=True).close()
    TreelineClient(target).close()
    TreelineClient(["127.0.0.2:1", "[::1]:1", "unix:/run/treeline"], "t").close()


def test_asyncio():
    async def run():
        engine = FakeEngine(step_s=0.01)
        async with fake_verifier(engine) as verifier, treeline.AsyncClient(verifier.endpoint) as client:
            answers = await asyncio.gather(*(client.generate("x", max_tokens=n).text() for n in (2, 6)))
            others = (await client.model_info()).model, (await client.load()).kv_blocks_total, await client.abort("x")
            ids = await client.tokenize("hé")
            round_trip = await client.detokenize(ids)
            answer = client.generate("x", max_tokens=100)
            async for _ in answer:
                break
            await answer.aclose()
            await until(lambda: not engine.open)
            with pytest.raises(InvalidRequestError):
                await client.generate("x", top_p=2.0).text()
            return answers, others, round_trip

    assert asyncio.run(run()) == (["a0 ", "a0 a1 a2 "], ("fake", 64, 0), "hé")


def test_several_answers_to_one_prompt():
    def use(client, engine):
        answer = client.generate("x", n=3, seed=2**64 - 2, max_tokens=6, request_id="r")
        messages = list(answer)
        return messages, [(r.request_id, r.sampling.seed) for r in engine.requests]

    messages, asked = with_client(use)
    assert asked == [("r", 2**64 - 2), ("r#1", 2**64 - 1), ("r#2", 0)]
    ends = [message for message in messages if isinstance(message, pb.GenerateComplete)]
    assert sorted((end.index, end.seed) for end in ends) == [(0, 2**64 - 2), (1, 2**64 - 1), (2, 0)]
    assert texts_of(messages) == ["a0 a1 a2 "] * 3


def test_abort_ends_all_answers():
    def use(client, engine):
        answer = client.generate("x", n=3, max_tokens=200, request_id="r")
        assert [next(answer).index for _ in range(4)]
        assert client.abort("r") == 1
        return {m.finish_reason for m in answer if isinstance(m, pb.GenerateComplete)}

    assert with_client(use, FakeEngine(step_s=0.02)) == {pb.FINISH_REASON_ABORTED}


def test_what_asks_for_too_many_answers_is_refused():
    def use(client, engine):
        for n in (0, -1, 17):
            with pytest.raises(InvalidRequestError, match="n: is"):
                client.generate("x", n=n).text()

    with_client(use)


def test_all_answers_outlive_their_front_door():
    """Those that have ended do not come again."""

    class Uneven(FakeEngine):
        async def generate(self, request):
            most = 10 if request.request_id.endswith("#1") else request.max_tokens
            async for item in super().generate(replace(request, max_tokens=most)):
                yield item

    async def run():
        async with AsyncExitStack() as stack:
            doors = await stack.enter_async_context(two_doors([Uneven(step_s=0.02)]))
            client = await stack.enter_async_context(treeline.AsyncClient([door.endpoint for door in doors]))
            answer = client.generate("hello", n=3, max_tokens=40)
            messages = []
            async for message in answer:
                messages.append(message)
                if isinstance(message, pb.GenerateComplete) and message.index == 1:
                    await doors[0].stop(0)
            return messages

    messages = asyncio.run(run())
    assert texts_of(messages) == ["".join(f"a{step} " for step in range(steps)) for steps in (20, 5, 20)]
    ends = [message.index for message in messages if isinstance(message, pb.GenerateComplete)]
    assert sorted(ends) == [0, 1, 2]


def test_an_asyncio_stream_outlives_its_front_door():
    async def run():
        async with AsyncExitStack() as stack:
            doors = await stack.enter_async_context(two_doors([FakeEngine(step_s=0.02)]))
            client = await stack.enter_async_context(treeline.AsyncClient([door.endpoint for door in doors]))
            answer = client.generate("hello", max_tokens=40)
            first = await anext(answer)
            await doors[0].stop(0)
            return first.text + await answer.text()

    assert asyncio.run(run()) == "".join(f"a{step} " for step in range(20))


class LostBehindTheEnd(GenerationServiceServicer):
    """A server whose connection breaks between the last message and the status."""

    async def Generate(self, request, context):
        yield pb.GenerateResponse(chunk=pb.GenerateChunk(text="a", token_ids=[1]))
        yield pb.GenerateResponse(complete=pb.GenerateComplete(finish_reason=pb.FINISH_REASON_LENGTH))
        await context.abort(grpc.StatusCode.UNAVAILABLE, "Socket closed")


@pytest.mark.parametrize("kind", [TreelineClient, treeline.AsyncClient])
def test_a_connection_lost_behind_the_completion_brings_no_second_one(kind):
    async def run():
        server = grpc.aio.server()
        add_GenerationServiceServicer_to_server(LostBehindTheEnd(), server)
        target = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
        await server.start()
        if kind is TreelineClient:
            with TreelineClient(target) as client:
                messages = await asyncio.to_thread(lambda: list(client.generate("x")))
        else:
            async with treeline.AsyncClient(target) as client:
                messages = [message async for message in client.generate("x")]
        await server.stop(0)
        return [type(message) for message in messages]

    assert asyncio.run(asyncio.wait_for(run(), 20)) == [pb.GenerateChunk, pb.GenerateComplete]
