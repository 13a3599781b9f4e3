"""Who calls and what each may ask for: quotas, priorities, and nobody else's requests."""

from __future__ import annotations

import asyncio

import grpc
import pytest
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, RetryInfo

from front_door.clients import Clients
from tests.front_door.doors import METRICS, with_front_door
from tests.front_door.http.calling import post
from tests.verifier_svc.fake_engine import FakeEngine
from tests.verifier_svc.service.test_service import collect, details, failure, request
from treeline.config import Config, ServerConfig
from treeline.errors import QuotaExceededError
from treeline.rpc.tokens import Client
from treeline.v1 import generation_pb2 as pb

TOKENS = """\
alice name=alice weight=2
bob name=bob concurrent=1 priority=0
carol name=carol rate=0.4
old expires=2001-01-01
"""


def as_(token: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"bearer {token}"),)


@pytest.fixture
def config(tmp_path):
    (tmp_path / "tokens").write_text(TOKENS)
    server = ServerConfig(port=0, http={"port": 0}, token_file=tmp_path / "tokens")
    return Config(server=server, metrics=METRICS)


def test_verifiers_are_told_whose_request_it_is(config):
    async def scenario(s):
        _, complete = await collect(s.stub.Generate(request(request_id="r"), metadata=as_("alice")))
        return complete.request_id, s.engines[0].requests[0]

    told, seen = with_front_door(scenario, FakeEngine(), config=config)
    assert told == "r"
    assert (seen.client, seen.client_weight) == ("alice", 2.0)


def test_without_tokens_the_address_tells_clients_apart():
    async def scenario(s):
        sent = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 2}
        await collect(s.stub.Generate(request()))
        await asyncio.to_thread(post, s.door.http.port, "/v1/chat/completions", sent)
        return [seen.client for seen in s.engines[0].requests]

    assert with_front_door(scenario, FakeEngine()) == ["127.0.0.1"] * 2


def test_only_ones_own_requests_can_be_aborted_and_ids_are_ones_own(config):
    async def scenario(s):
        call = s.stub.Generate(request(max_tokens=200, request_id="r"), metadata=as_("alice"))
        await call.read()
        theirs = await failure(s.stub.Abort(pb.AbortRequest(request_ids=["r"]), metadata=as_("carol")))
        unknown = await failure(s.stub.Abort(pb.AbortRequest(request_ids=["s"]), metadata=as_("carol")))
        same_id, _ = await collect(s.stub.Generate(request(max_tokens=2, request_id="r"), metadata=as_("bob")))
        own = (await s.stub.Abort(pb.AbortRequest(request_ids=["r"]), metadata=as_("alice"))).aborted
        while not (last := await call.read()).HasField("complete"):
            pass
        return theirs, unknown, len(same_id), own, last.complete.finish_reason

    theirs, unknown, chunks, own, reason = with_front_door(scenario, FakeEngine(step_s=0.02), config=config)
    assert theirs.code() == grpc.StatusCode.NOT_FOUND
    assert (theirs.code(), theirs.details()) == (unknown.code(), unknown.details()), "it tells nothing"
    assert (chunks, own, reason) == (1, 1, pb.FINISH_REASON_ABORTED)


def test_quotas_are_answered_with_when_to_come_back(config):
    async def scenario(s):
        open_call = s.stub.Generate(request(max_tokens=200), metadata=as_("bob"))
        await open_call.read()
        errors = [await failure(s.stub.Generate(request(), metadata=as_("bob")))]
        await collect(s.stub.Generate(request(), metadata=as_("carol")))
        errors.append(await failure(s.stub.Generate(request(), metadata=as_("carol"))))
        body = {"messages": [{"role": "user", "content": "x"}]}
        bearer = {"authorization": "Bearer carol"}
        http = await asyncio.to_thread(post, s.door.http.port, "/v1/chat/completions", body, bearer)
        await collect(s.stub.Generate(request(), metadata=as_("alice")))
        open_call.cancel()
        await asyncio.sleep(0.1)
        await collect(s.stub.Generate(request(), metadata=as_("bob")))
        return errors, http

    errors, (status, headers, body) = with_front_door(scenario, FakeEngine(step_s=0.02), config=config)
    for error in errors:
        assert error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert details(error, ErrorInfo).reason == "QUOTA_EXCEEDED"
    assert 2.0 < details(errors[1], RetryInfo).retry_delay.ToTimedelta().total_seconds() <= 2.5
    assert (status, headers["Retry-After"], body["error"]["code"]) == (429, "3", "resource_exhausted")


def test_a_full_queue_is_asked_again_after_a_while(monkeypatch):
    monkeypatch.setattr("front_door.clients.FULL_S", 0.3)

    async def scenario(s):
        s.engines[0].capacity = 0
        errors = [await failure(s.stub.Generate(request()))]
        s.engines[0].capacity = 1
        errors.append(await failure(s.stub.Generate(request())))
        await asyncio.sleep(0.3)
        await collect(s.stub.Generate(request()))
        return [details(error, ErrorInfo).reason for error in errors]

    assert with_front_door(scenario, FakeEngine()) == ["QUEUE_FULL"] * 2


def test_a_full_queue_is_asked_again_once_an_answer_has_ended(config, monkeypatch):
    monkeypatch.setattr("front_door.clients.FULL_S", 60)

    async def scenario(s):
        running = asyncio.create_task(collect(s.stub.Generate(request(max_tokens=20), metadata=as_("alice"))))
        while not s.engines[0].open:
            await asyncio.sleep(0.01)
        refused = await failure(s.stub.Generate(request(), metadata=as_("alice")))
        await running
        await collect(s.stub.Generate(request(), metadata=as_("alice")))
        return details(refused, ErrorInfo).reason

    assert with_front_door(scenario, FakeEngine(capacity=1, step_s=0.02), config=config) == "QUEUE_FULL"


def test_a_priority_above_ones_own_is_refused(config):
    async def scenario(s):
        await collect(s.stub.Generate(request(priority=4), metadata=as_("alice")))
        await collect(s.stub.Generate(request(priority=-4), metadata=as_("bob")))
        return await failure(s.stub.Generate(request(priority=1), metadata=as_("bob")))

    error = with_front_door(scenario, FakeEngine(), config=config)
    assert error.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert details(error, BadRequest).field_violations[0].field == "priority"


def test_an_expired_token_is_none(config):
    async def scenario(s):
        bearer = {"authorization": "Bearer old"}
        http = await asyncio.to_thread(post, s.door.http.port, "/tokenize", {"prompt": "x"}, bearer)
        return (await failure(s.stub.Generate(request(), metadata=as_("old")))).code(), http[0]

    codes = with_front_door(scenario, FakeEngine(), config=config)
    assert codes == (grpc.StatusCode.UNAUTHENTICATED, 401)


def test_a_rate_lets_one_second_come_at_once_and_then_as_many_a_second():
    now = 100.0
    clients, client, sent = Clients(None, lambda: now), Client("c", rate=4.0), pb.GenerateRequest()

    def burst() -> int:
        passed, waits_s = 0, []
        for _ in range(10):
            try:
                with clients.admitted(client, sent):
                    passed += 1
            except QuotaExceededError as error:
                waits_s.append(error.retry_s)
        assert 0 < max(waits_s) <= 0.25
        return passed

    assert burst() == 4
    now += 0.5
    assert burst() == 2
    now += 60
    assert burst() == 4
    resumed = pb.GenerateRequest(resume=pb.Resume(token_ids=[1]))
    with clients.admitted(client, resumed):
        pass  # it has counted before
