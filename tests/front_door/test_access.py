"""The access log answers what an operator asks: who, what, how long, why."""

import asyncio
import json
import logging
import urllib.error
import urllib.request

import grpc
import pytest

from front_door.access import MAX_ERROR_CHARS, MAX_REFUSALS_PER_S, AccessLog
from front_door.http.guard import MAX_LOGGED_CHARS
from tests.front_door.doors import METRICS, with_front_door
from tests.front_door.http.calling import HELLO, post
from tests.verifier_svc.fake_engine import FakeEngine, until
from tests.verifier_svc.service.test_service import collect, failure, request
from treeline.config import Config, LimitsConfig, LoggingConfig, ServerConfig
from treeline.errors import EngineFailedError
from treeline.rpc.interceptors import SERVICE
from treeline.v1 import generation_pb2 as pb


@pytest.fixture
def lines(caplog):
    """The access lines so far."""
    caplog.set_level(logging.INFO, "front_door")
    return lambda: [vars(record) for record in caplog.records if record.name == "front_door.access"]


def test_a_line_says_why_a_request_took_its_time(lines):
    async def scenario(s):
        await collect(s.stub.Generate(request(request_id="r1", speculation=pb.SpeculationOptions(policy="off"))))
        await asyncio.to_thread(
            post,
            s.door.http.port,
            "/v1/chat/completions",
            {"model": "fake", "messages": HELLO, "max_tokens": 6, "n": 2},
            {"x-request-id": "r2"},
        )
        return s.verifiers[0].endpoint

    endpoint = with_front_door(scenario, FakeEngine())
    first, second = lines()
    assert (first["method"], first["code"], first["request_id"]) == ("Generate", "OK", "r1")
    assert (first["client"], first["address"]) == ("127.0.0.1", "127.0.0.1")
    assert (first["policy"], first["price"], first["finish"], first["verifier"]) == ("off", 1.5, "length", endpoint)
    parts = first["queue_s"], first["prefill_s"], first["decode_s"]
    assert parts == (0.01, 0.01, 0.01)
    assert (first["accepted_length"], first["resumed"], first["preemptions"]) == (2.0, 0, 1)
    assert first["completion_tokens"] > 0
    assert (second["method"], second["code"]) == ("POST /v1/chat/completions", "200")
    assert second["request_id"].startswith("r2")
    assert second["completion_tokens"] == 12


def test_prompts_and_tokens_stay_out_unless_prompts_are_asked_for(lines, caplog, tmp_path):
    (tmp_path / "tokens").write_text("letmein name=search\n")
    server = ServerConfig(port=0, http={"port": 0}, token_file=tmp_path / "tokens")
    body = {"model": "fake", "messages": [{"role": "user", "content": "between us"}], "max_tokens": 2}

    async def ask(s):
        for token in ("letmein", "letmeout"):
            await asyncio.to_thread(
                post, s.door.http.port, "/v1/chat/completions", body, {"authorization": f"Bearer {token}"}
            )

    for prompts in (False, True):
        caplog.clear()
        with_front_door(
            ask, FakeEngine(), config=Config(server=server, metrics=METRICS, logging=LoggingConfig(prompts=prompts))
        )
        said = json.dumps(lines(), default=str)
        assert ("between us" in said) == prompts
        assert "letme" not in said
        answered, refused = lines()
        assert (answered["client"], refused["code"]) == ("search", "401")


def test_calls_with_a_bad_token_are_told_and_counted(lines, tmp_path):
    (tmp_path / "tokens").write_text("letmein\n")
    server = ServerConfig(port=0, http={"port": 0}, token_file=tmp_path / "tokens")
    bad = {"authorization": "Bearer letmeout"}

    async def scenario(s):
        code = (await failure(s.stub.Generate(request(), metadata=tuple(bad.items())))).code()
        await failure(s.channel.unary_unary(f"/{SERVICE}/Invented")(b"", metadata=tuple(bad.items())))
        status, _, _ = await asyncio.to_thread(post, s.door.http.port, "/x" * 5000, {}, bad)
        good = {"authorization": "Bearer letmein"}
        page = urllib.request.Request(f"http://127.0.0.1:{s.door.http.port}/metrics", headers=good)
        with await asyncio.to_thread(urllib.request.urlopen, page) as answer:
            return code, status, answer.read().decode()

    config = Config(server=server, metrics=METRICS)
    code, status, page = with_front_door(scenario, FakeEngine(), config=config)
    assert (code, status) == (grpc.StatusCode.UNAUTHENTICATED, 401)
    over_grpc, over_http = lines()
    told = over_grpc["method"], over_grpc["code"], over_grpc["address"]
    assert told == ("Generate", "UNAUTHENTICATED", "127.0.0.1")
    assert (over_http["code"], over_http["address"], len(over_http["method"])) == ("401", "127.0.0.1", MAX_LOGGED_CHARS)
    assert 'grpc_server_handled_total{grpc_code="UNAUTHENTICATED",grpc_method="Generate"} 1.0' in page
    assert 'grpc_server_in_flight{grpc_method="Generate"} 0.0' in page
    assert "Invented" not in page


@pytest.mark.parametrize("code", ["UNAUTHENTICATED", "RESOURCE_EXHAUSTED"])
def test_refused_calls_cannot_flood_the_log(code, lines):
    now = 100.0
    log = AccessLog(lambda: now)

    def refuse(calls):
        for _ in range(calls):
            log.started("Generate")
            log.handled("Generate", code, 0.0)

    refuse(1000)
    log.handled("Generate", "INTERNAL", 0.0)
    assert [line["code"] for line in lines()] == [code] * MAX_REFUSALS_PER_S + ["INTERNAL"]
    now += 1.0
    refuse(1)
    assert lines()[-1]["left_out"] == 1000 - MAX_REFUSALS_PER_S


def test_failures_and_lost_verifiers_are_told(lines, caplog):
    async def scenario(s):
        engine = s.engines[0]
        moved = asyncio.create_task(collect(s.stub.Generate(request(request_id="moved"))))
        await until(lambda: len(engine.requests) == 2)
        engine.fail = None
        await moved
        engine.capacity = 0
        await failure(s.stub.Generate(request(request_id="refused")))

    with_front_door(scenario, FakeEngine(step_s=0.2, fail=EngineFailedError("it died")))
    moved, refused = lines()
    assert (moved["resumed"], moved["code"], moved["completion_tokens"]) == (1, "OK", 6)
    (lost,) = [vars(record) for record in caplog.records if record.name == "front_door.stream"]
    assert lost["request_id"] == "moved"
    assert (refused["code"], refused["completion_tokens"]) == ("RESOURCE_EXHAUSTED", 0)
    assert "queue is full" in refused["error"]


def test_every_answer_names_its_request_and_what_is_polled_is_not_logged(lines):
    async def scenario(s):
        url = f"http://127.0.0.1:{s.door.http.port}"
        _, named, _ = await asyncio.to_thread(post, s.door.http.port, "/tokenize", {"prompt": "x"})
        await asyncio.to_thread(post, s.door.http.port, "/v1/completions", {}, {"x-request-id": "wrong"})
        poll = urllib.request.Request(f"{url}/health", headers={"x-request-id": "mine"})
        with await asyncio.to_thread(urllib.request.urlopen, poll) as polled:
            return named["x-request-id"], polled.headers["x-request-id"]

    named, mine = with_front_door(scenario, FakeEngine())
    assert (len(named), mine) == (32, "mine")
    assert [(line["request_id"], line["code"]) for line in lines()] == [("wrong", "400")]


REFUSED_OVER_HTTP = [
    ("/v1/completions", {"prompt": 1}, {}, "400", "prompt"),
    ("/v1/completions", b"prompt=hello", {}, "400", "not JSON"),
    ("/v1/completions", {"prompt": "x", "max_tokens": 0}, {}, "400", "max_tokens"),
    ("/v1/completions", {"prompt": "x", "model": "other"}, {}, "404", "other"),
    ("/nowhere", {}, {}, "404", "Not Found"),
    ("/load", {}, {}, "405", "Method Not Allowed"),
    ("/tokenize", {"prompt": "x" * 2000}, {}, "400", "2000"),
    ("/tokenize", {"prompt": "x" * (1 << 17)}, {}, "413", "limits.max_message_bytes"),
    ("/tokenize", {"prompt": "x"}, {"content-type": "text/plain", "origin": "http://elsewhere"}, "415", "text/plain"),
    ("/tokenize", {"prompt": "x"}, {"authorization": "Bearer letmeout"}, "401", "bearer token"),
]


def test_the_line_of_a_refusal_over_http_says_why(lines, tmp_path):
    (tmp_path / "tokens").write_text("letmein\n")
    server = ServerConfig(port=0, http={"port": 0}, token_file=tmp_path / "tokens")

    async def scenario(s):
        for path, body, headers, code, _ in REFUSED_OVER_HTTP:
            headers = {"authorization": "Bearer letmein"} | headers
            status, _, _ = await asyncio.to_thread(post, s.door.http.port, path, body, headers)
            assert str(status) == code, path

    limits = LimitsConfig(max_message_bytes=1 << 16)
    with_front_door(scenario, FakeEngine(), config=Config(server=server, metrics=METRICS, limits=limits))
    for line, (path, *_, code, why) in zip(lines(), REFUSED_OVER_HTTP, strict=True):
        assert (line["method"], line["code"]) == (f"POST {path}", code)
        assert why in line["error"], line
        assert len(line["error"]) <= MAX_ERROR_CHARS


def test_the_line_of_a_refusal_over_grpc_says_why(lines, tmp_path):
    (tmp_path / "tokens").write_text("letmein\n")
    server = ServerConfig(port=0, http={"port": 0}, token_file=tmp_path / "tokens")
    token = (("authorization", "Bearer letmein"),)

    async def scenario(s):
        malformed = s.channel.unary_unary(f"/{SERVICE}/Tokenize")
        for call in (
            lambda: s.stub.Generate(request()),
            lambda: s.stub.Generate(request(max_tokens=0), metadata=token),
            lambda: s.stub.Tokenize(pb.TokenizeRequest(prompt="x" * 2000), metadata=token),
            lambda: malformed(b"\x0a\x02\xff\xfe", metadata=token),
            lambda: s.stub.Abort(pb.AbortRequest(request_ids=["none"]), metadata=token),
        ):
            await failure(call())
        s.door._door.draining = True
        await failure(s.stub.Generate(request(), metadata=token))

    with_front_door(scenario, FakeEngine(), config=Config(server=server, metrics=METRICS))
    whys = ("bearer token", "max_tokens", "2000", "not a valid message", "no such request", "shutting down")
    for line, why in zip(lines(), whys, strict=True):
        assert why in line["error"], line


def test_what_breaks_an_http_call_is_told_apart_from_a_client_that_hung_up(lines, monkeypatch):
    async def broken(self, message, context):
        raise ZeroDivisionError("secret")

    monkeypatch.setattr("front_door.service.FrontDoor.GetLoad", broken)

    async def scenario(s):
        url = f"http://127.0.0.1:{s.door.http.port}/load"
        with pytest.raises(urllib.error.HTTPError, match="500"):
            await asyncio.to_thread(urllib.request.urlopen, url)

    with_front_door(scenario, FakeEngine())
    assert [(line["code"], line["error"]) for line in lines()] == [("500", "ZeroDivisionError")]
