import asyncio
import time

import pytest

from tests.verifier_svc.fake_engine import FakeEngine, fake_verifier
from treeline.client import TreelineClient
from treeline.config import Config, InternalConfig
from treeline.errors import InvalidRequestError, QueueFullError, RequestFailedError, UnavailableError, UnknownModelError
from treeline.v1 import generation_pb2 as pb


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

    error = with_client(use)
    assert {v.field for v in error.violations} == {"sampling.top_p", "stopping.max_tokens"}


def test_exactly_one_input():
    with TreelineClient("127.0.0.1:1") as client:
        for inputs in ({}, {"prompt": "a", "token_ids": [1]}):
            with pytest.raises(ValueError, match="exactly one"):
                client.generate(**inputs)


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
