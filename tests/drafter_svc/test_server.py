import asyncio
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from drafter_svc.drafter import build_drafter
from drafter_svc.server import DrafterServer
from lm.store import vocabulary_sha256
from tests.drafter_svc.doubles import GREEDY, plan, trees_of
from tests.lm.tiny import VOCAB_SIZE, tiny_llama, tiny_tokenizer
from treeline.config import Config, DrafterConfig, LimitsConfig, MetricsConfig, ModelConfig, VerifierConfig
from treeline.drafting import DraftReply, DraftRequest, DraftSequence, reply_from_proto, request_to_proto
from treeline.errors import ConfigError
from treeline.forest import Forest
from treeline.plan import Plan
from treeline.rpc.channels import connect
from treeline.rpc.local_stream import connect_local
from treeline.v1 import drafting_pb2 as pb
from treeline.v1.drafting_pb2_grpc import DraftingServiceStub

REPEATING = [1, 2, 3, 4, 5, 6, 1, 2, 3]
LIMITS = LimitsConfig(max_context_tokens=256, max_tree_nodes=32)

PLAN = plan()


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny-draft"
    tiny_llama().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def config_of(drafter: DrafterConfig, target: str = "elsewhere/target") -> Config:
    return Config(
        drafter=drafter,
        verifier=VerifierConfig(target=ModelConfig(model=target)),
        limits=LIMITS,
        metrics=MetricsConfig(base_port=0),
    )


def model_config(folder: Path, kind: str = "model") -> DrafterConfig:
    model = ModelConfig(model=str(folder), dtype="float32", device="cpu")
    return DrafterConfig(kind=kind, model=model, kv_cache_tokens=2048)


def with_server(config: Config, use):
    """Run `use(server, channel)` against a drafter that really listens."""

    async def scenario():
        server = await DrafterServer.start(config)
        try:
            async with connect(server.endpoint, config.internal, 4 << 20) as channel:
                return await use(server, channel)
        finally:
            await server.stop(1)

    return asyncio.run(scenario())


def message(tokens: list[int], session_id: int = 1, start: int = 0, policy: str = "chain:3", nodes: int = 8, depth=8):
    return DraftSequence(session_id, start, tokens[start:], GREEDY, policy, nodes, depth)


class Answer(NamedTuple):
    """By session."""

    reply: DraftReply
    trees: dict[int, Forest]
    held: dict[int, int]


async def exchange(stream, *sequences: DraftSequence, step_id: int = 1, released=(), a_plan: Plan = PLAN) -> Answer:
    request = DraftRequest(step_id, a_plan, list(sequences), list(released))
    await stream.write(request_to_proto(request))
    reply = await asyncio.wait_for(stream.read(), 10)
    assert reply is not grpc.aio.EOF, await stream.details()
    received = reply_from_proto(reply, request, VOCAB_SIZE)
    return Answer(received, trees_of(request, received), received.held)


async def until(condition) -> None:
    for _ in range(500):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it never came true")


async def until_sessions(stub: DraftingServiceStub, count: int) -> None:
    async with asyncio.timeout(5):
        while (await stub.GetDrafterInfo(pb.GetDrafterInfoRequest())).sessions != count:
            await asyncio.sleep(0.01)


def test_steps_are_drafted_and_answered_in_order(model_folder):
    async def use(server, channel):
        stream = DraftingServiceStub(channel).Draft()
        for step_id in range(1, 4):
            reply = await exchange(stream, message(REPEATING, 7), message([9, 8], 2**64 - 1), step_id=step_id)
            assert reply.reply.step_id == step_id
            assert [len(reply.trees[session]) for session in (7, 2**64 - 1)] == [3, 3]
            assert reply.held == {}
            assert reply.reply.stats.draft_s > 0

    with_server(config_of(model_config(model_folder)), use)


def test_the_autoscaler_hears_how_busy_the_drafter_is(model_folder):
    async def use(server, channel):
        server.stats()
        streams = [DraftingServiceStub(channel).Draft() for _ in range(2)]
        for step_id in range(1, 4):
            await asyncio.gather(*(exchange(stream, message(REPEATING, 7), step_id=step_id) for stream in streams))
        stats = server.stats()
        assert stats["streams"] == 2
        assert 0 < stats["busy"] <= 1
        assert 0 < stats["queued"] <= 1  # one of two waits for the other
        assert server.stats()["busy"] == 0

    with_server(config_of(model_config(model_folder)), use)


def test_a_session_that_is_behind_says_what_it_holds_and_catches_up(model_folder):
    async def use(server, channel):
        stream = DraftingServiceStub(channel).Draft()
        assert (await exchange(stream, message(REPEATING, start=4))).held == {1: 0}
        await exchange(stream, message(REPEATING[:4]))
        assert (await exchange(stream, message(REPEATING, start=6))).held == {1: 4}
        reply = await exchange(stream, message(REPEATING, start=4))
        assert reply.held == {}
        assert len(reply.trees[1]) == 3
        await exchange(stream, released=[1])
        assert (await exchange(stream, message(REPEATING, start=4))).held == {1: 0}

    with_server(config_of(model_config(model_folder)), use)


@pytest.mark.parametrize("kind", ["model", "model+ngram"])
def test_a_closed_stream_leaves_nothing(model_folder, kind):
    async def use(server, channel):
        drafter = server._service._drafter
        cache = drafter._model.cache
        streams = [DraftingServiceStub(channel).Draft() for _ in range(3)]
        for stream in streams:
            reply = await exchange(stream, message(REPEATING, 1), message([9, 8, 7], 2))
            assert [len(tree) for tree in reply.trees.values()] == [3, 3]
        assert drafter.sessions == 6
        streams[0].cancel()
        await until(lambda: drafter.sessions == 4)
        await streams[1].done_writing()
        await until(lambda: drafter.sessions == 2)
        assert cache.used_blocks > 0
        # The third stream's sessions are untouched.
        assert (await exchange(streams[2], message([*REPEATING, 4], 1, start=9))).held == {}
        await streams[2].write(request_to_proto(DraftRequest(5, PLAN, [message(REPEATING, 3)])))
        streams[2].cancel()
        await until(lambda: drafter.sessions == 0)
        assert cache.used_blocks == 0

    with_server(config_of(model_config(model_folder, kind)), use)


def test_verifiers_do_not_see_one_anothers_sessions(model_folder):
    async def use(server, channel):
        first, second = (DraftingServiceStub(channel).Draft() for _ in range(2))
        alone = await exchange(first, message(REPEATING, 1))
        await exchange(second, message([200, 100, 50], 1))
        again = await exchange(first, message(REPEATING, 1, start=8))
        assert again.trees[1].token_ids.tolist() == alone.trees[1].token_ids.tolist()

    with_server(config_of(model_config(model_folder)), use)


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        (message([1, 2], policy="fastest"), "fastest"),
        (message([1, 2], policy=""), "policy"),
        (message([1] * 257), "257 tokens"),
        (message([1, 2], nodes=33), "32 nodes"),
        (message([1, 2], depth=9), "depth 8"),
        (message([1, 260]), "vocabulary"),
        (message([1, 2**32 - 1]), "vocabulary"),
        (message([1], start=1), "no tokens"),
    ],
)
def test_malformed_requests_end_their_stream_only(model_folder, bad, says):
    async def use(server, channel):
        stub = DraftingServiceStub(channel)
        good, stream = stub.Draft(), stub.Draft()
        await exchange(good, message(REPEATING, 1))
        await stream.write(request_to_proto(DraftRequest(1, PLAN, [bad])))
        assert await stream.code() == grpc.StatusCode.INVALID_ARGUMENT
        assert says in await stream.details()
        assert len((await exchange(good, message(REPEATING, 1))).trees[1]) == 3

    with_server(config_of(model_config(model_folder)), use)


def test_verifiers_of_this_machine_get_the_same_over_the_socket(model_folder):
    async def use(server, channel):
        stub = DraftingServiceStub(channel)
        over_port = await exchange(stub.Draft(), message(REPEATING, 7))
        info = await stub.GetDrafterInfo(pb.GetDrafterInfoRequest())
        local = connect_local(info.socket_path, pb.DraftResponse, 4 << 20)
        assert local is not None
        request = DraftRequest(1, PLAN, [message(REPEATING, 7)])
        local.send(request_to_proto(request))
        reply = reply_from_proto(await asyncio.to_thread(local.receive, 10), request, VOCAB_SIZE)
        assert trees_of(request, reply)[7].token_ids.tolist() == over_port.trees[7].token_ids.tolist()
        assert (await stub.GetDrafterInfo(pb.GetDrafterInfoRequest())).sessions == 2
        local.send(request_to_proto(DraftRequest(2, PLAN, [message(REPEATING, 7, nodes=10**6)])))
        with pytest.raises(ConnectionError, match="ended"):
            await asyncio.to_thread(local.receive, 10)
        await until_sessions(stub, 1)

    with_server(config_of(model_config(model_folder)), use)


def test_bytes_that_are_no_message_do_not_stop_the_service(model_folder):
    async def use(server, channel):
        raw = channel.stream_stream("/treeline.v1.DraftingService/Draft")()
        await raw.write(b"\xff\xff\xff\xff not a message")
        assert await raw.code() != grpc.StatusCode.OK
        stream = DraftingServiceStub(channel).Draft()
        assert len((await exchange(stream, message(REPEATING))).trees[1]) == 3
        await server.check()

    with_server(config_of(model_config(model_folder)), use)


def test_the_drafter_tells_what_it_is(model_folder):
    async def use(server, channel):
        return await DraftingServiceStub(channel).GetDrafterInfo(pb.GetDrafterInfoRequest(), timeout=5)

    ngram = with_server(config_of(DrafterConfig()), use)
    assert (ngram.drafter, ngram.vocab_size, ngram.layer_s, ngram.node_s) == ("none", 0, 0, 0)
    both = with_server(config_of(model_config(model_folder, "model+ngram")), use)
    assert both.drafter == "tiny-draft"
    assert both.vocab_size == tiny_llama().config.vocab_size
    assert both.vocabulary_sha256 == vocabulary_sha256(tiny_tokenizer())
    assert both.layer_s > 0


def test_health_reflection_and_metrics(model_folder):
    async def use(server, channel):
        check = health_pb2_grpc.HealthStub(channel).Check
        for service in ("", "treeline.v1.DraftingService"):
            reply = await check(health_pb2.HealthCheckRequest(service=service), timeout=5)
            assert reply.status == health_pb2.HealthCheckResponse.SERVING
        ask = reflection_pb2.ServerReflectionRequest(list_services="")
        replies = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(iter([ask]))
        listed = {s.name async for r in replies for s in r.list_services_response.service}
        assert "treeline.v1.DraftingService" in listed
        stream = DraftingServiceStub(channel).Draft()
        await exchange(stream, message(REPEATING))
        page = await read_metrics(server.metrics_port)
        assert "treeline_drafter_nodes_total 3.0" in page
        assert 'treeline_drafter_passes_total{how="native"} 3.0' in page
        assert "treeline_drafter_sessions 1.0" in page
        assert "treeline_drafter_steps_total 1.0" in page

    with_server(config_of(model_config(model_folder)), use)


async def read_metrics(port: int) -> str:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"GET /metrics HTTP/1.0\r\n\r\n")
    page = (await reader.read()).decode()
    writer.close()
    return page


def test_another_vocabulary_is_refused_naming_both(model_folder, tmp_path):
    with pytest.raises(ConfigError, match=r"tiny-draft.*vocabulary.*0123456789ab"):
        build_drafter(model_config(model_folder), ModelConfig(), LIMITS, "0123456789abcdef")
    other = tiny_tokenizer()
    other.add_tokens(["extra"])
    target = tmp_path / "target"
    tiny_llama().save_pretrained(target)
    other.save_pretrained(target)
    with pytest.raises(ConfigError, match="another vocabulary"):
        asyncio.run(DrafterServer.start(config_of(model_config(model_folder), str(target))))


def test_the_targets_own_vocabulary_is_welcome(model_folder):
    drafter = build_drafter(model_config(model_folder), ModelConfig(), LIMITS, vocabulary_sha256(tiny_tokenizer()))
    tree = drafter.draft(DraftRequest(1, PLAN, [message(REPEATING)])).forest
    assert len(tree) == 3
    drafter.close()


def test_each_verifiers_trees_follow_its_own_prices(model_folder):
    """One verifier's plan makes every node too dear, whichever of the two was heard of last."""

    async def use(server, channel):
        dear, cheap = (DraftingServiceStub(channel).Draft() for _ in range(2))
        priced = replace(PLAN, version=9, price=1e9, cost=replace(PLAN.cost, node_s=1.0))
        for step_id in range(1, 4):
            wanted = [message(REPEATING, policy="smart", start=8 * (step_id > 1))]
            for stream, a_plan, grows in ((dear, priced, False), (cheap, PLAN, True)):
                answer = await exchange(stream, *wanted, step_id=step_id, a_plan=a_plan)
                assert bool(len(answer.trees[1])) == grows

    with_server(config_of(model_config(model_folder)), use)
