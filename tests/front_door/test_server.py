"""The clients' gRPC port: answers and refusals pass unchanged, strangers are bounded."""

import asyncio
import subprocess
import sys
import time
import urllib.request

import grpc
import pytest
from google.rpc.error_details_pb2 import BadRequest, RetryInfo
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from front_door.silent_streams import MAX_SILENT, MAX_WATCHES
from tests.front_door.doors import METRICS, NOT_SERVING, SERVING, with_front_door
from tests.verifier_svc.fake_engine import FakeEngine, until
from tests.verifier_svc.service.test_service import collect, details, failure, request
from treeline.config import Config, InternalConfig, ServerConfig, TlsConfig
from treeline.rpc.interceptors import SERVICE
from treeline.v1 import generation_pb2 as pb
from treeline.v1 import generation_pb2_grpc as pb_grpc


def test_an_answer_comes_through_unchanged():
    async def scenario(s):
        sent = request(
            request_id="r", output=pb.OutputOptions(logprobs=1, explain=True), sampling=pb.SamplingParams(seed=3)
        )
        direct_channel = grpc.aio.insecure_channel(s.found[0])
        async with direct_channel:
            direct = await collect(pb_grpc.GenerationServiceStub(direct_channel).Generate(sent))
        return direct, await collect(s.stub.Generate(sent))

    direct, forwarded = with_front_door(scenario, FakeEngine())
    assert forwarded == direct


def test_a_request_id_is_given_if_there_is_none():
    async def scenario(s):
        completes = [(await collect(s.stub.Generate(request())))[1] for _ in range(2)]
        return [c.request_id for c in completes], [r.request_id for r in s.engines[0].requests], s.engines[0].requests

    told, used, requests = with_front_door(scenario, FakeEngine())
    assert [f"127.0.0.1/{name}" for name in told] == used
    assert len({*told, ""}) == 3
    assert bytes(requests[0].prompt_token_ids) == b"hello"


def test_wrong_fields_are_refused_at_the_door():
    async def scenario(s):
        return await failure(s.stub.Generate(request(max_tokens=0, sampling=pb.SamplingParams(temperature=-1))))

    engine = FakeEngine()
    error = with_front_door(scenario, engine)
    assert error.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert len(details(error, BadRequest).field_violations) == 2
    assert not engine.requests


def test_what_only_the_verifier_can_see_comes_back_with_details():
    async def scenario(s):
        return await failure(s.stub.Generate(request("x" * 1024)))

    error = with_front_door(scenario, FakeEngine())
    assert error.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert details(error, BadRequest).field_violations[0].field == "prompt"


def test_a_huge_text_is_refused_before_it_is_tokenised(monkeypatch):
    async def scenario(s):
        prompt = "a b " * 975_000
        for call in (s.stub.Generate(request(prompt=prompt)), s.stub.Tokenize(pb.TokenizeRequest(prompt=prompt))):
            error = await failure(call)
            assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert "3900000 characters" in error.details()
        longer = await failure(s.stub.Tokenize(pb.TokenizeRequest(prompt="a" * 1025)))
        assert longer.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert "has 1025 tokens" in longer.details()

    def tokenise(prompt, tokenizer):
        assert len(prompt) < 2000, "tokenised all the same"
        return list(prompt.encode())

    monkeypatch.setattr("verifier_svc.service.service.token_ids_of", tokenise)
    with_front_door(scenario, FakeEngine())


@pytest.mark.parametrize("method", ["Generate", "Tokenize", "Abort"])
def test_invalid_utf8(method):
    async def scenario(s):
        kind = s.channel.unary_stream if method == "Generate" else s.channel.unary_unary
        return await failure(kind(f"/{SERVICE}/{method}")(b"\x0a\x02\xff\xfe\x1a\x02\xff\xfe"))

    assert with_front_door(scenario, FakeEngine()).code() == grpc.StatusCode.INVALID_ARGUMENT


def test_a_full_queue_is_passed_on():
    async def scenario(s):
        return await failure(s.stub.Generate(request()))

    error = with_front_door(scenario, FakeEngine(capacity=0))
    assert error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert details(error, RetryInfo).retry_delay.seconds > 0


def test_unknown_models_are_not_found():
    async def scenario(s):
        return await failure(s.stub.Generate(request(model="other")))

    assert with_front_door(scenario, FakeEngine()).code() == grpc.StatusCode.NOT_FOUND


def test_an_open_request_id_is_not_taken_twice():
    async def scenario(s):
        first = s.stub.Generate(request(max_tokens=100, request_id="x"))
        await first.read()
        error = await failure(s.stub.Generate(request(request_id="x")))
        first.cancel()
        await until(lambda: not any(engine.open for engine in s.engines))
        again = await collect(s.stub.Generate(request(request_id="x")))
        return error.code(), again[1].request_id

    got = with_front_door(scenario, FakeEngine("a", step_s=0.02), FakeEngine("b", step_s=0.02))
    assert got == (grpc.StatusCode.ALREADY_EXISTS, "x")


def test_cancelling_reaches_the_verifier():
    async def scenario(s):
        call = s.stub.Generate(request(max_tokens=100))
        await call.read()
        call.cancel()
        await until(lambda: not s.engines[0].open)

    with_front_door(scenario, FakeEngine(step_s=0.02))


def test_the_deadline_reaches_the_verifier():
    async def scenario(s):
        error = await failure(s.stub.Generate(request(max_tokens=1000), timeout=0.2))
        await until(lambda: not s.engines[0].open, timeout_s=0.5)
        return error.code(), len(s.engines[0].requests)

    assert with_front_door(scenario, FakeEngine(step_s=0.02)) == (grpc.StatusCode.DEADLINE_EXCEEDED, 1)


def test_stopping_lets_running_streams_end_and_takes_no_new_ones():
    async def scenario(s):
        running = asyncio.create_task(collect(s.stub.Generate(request(max_tokens=20))))
        await until(lambda: s.engines[0].open)
        watch = health_pb2_grpc.HealthStub(s.channel).Watch(health_pb2.HealthCheckRequest())
        assert (await watch.read()).status == SERVING
        stopping = asyncio.create_task(s.door.stop(grace_s=5))
        assert (await watch.read()).status == NOT_SERVING
        watch.cancel()
        refused = await failure(s.stub.Generate(request()))
        chunks, _ = await running
        await stopping
        return refused.code(), len(chunks)

    assert with_front_door(scenario, FakeEngine(step_s=0.05)) == (grpc.StatusCode.UNAVAILABLE, 10)


def test_calls_that_pile_up_while_it_stops_are_told_to_go_elsewhere():
    """The event loop is blocked while they come, as on a busy machine. What it takes no more would be CANCELLED."""

    async def scenario(s):
        await collect(s.stub.Generate(request()))
        stopping = asyncio.create_task(s.door.stop(grace_s=5))
        await until(lambda: s.door._door.draining)
        calls = [s.stub.Generate(request()) for _ in range(100)]
        asyncio.get_running_loop().call_later(0.02, time.sleep, 0.2)
        codes = {(await failure(call)).code() for call in calls}
        await stopping
        return codes

    assert with_front_door(scenario, FakeEngine()) == {grpc.StatusCode.UNAVAILABLE}


def test_model_info_tokenize_and_reflection():
    async def scenario(s):
        info = await s.stub.GetModelInfo(pb.GetModelInfoRequest())
        tokens = await s.stub.Tokenize(pb.TokenizeRequest(prompt="ab"))
        listing = reflection_pb2.ServerReflectionRequest(list_services="")
        reply = await reflection_pb2_grpc.ServerReflectionStub(s.channel).ServerReflectionInfo(iter([listing])).read()
        return info.model, list(tokens.token_ids), {x.name for x in reply.list_services_response.service}

    model, tokens, services = with_front_door(scenario, FakeEngine())
    assert (model, tokens) == ("fake", [97, 98])
    assert SERVICE in services


def test_calls_are_counted_by_code():
    async def scenario(s):
        await collect(s.stub.Generate(request()))
        await failure(s.stub.Generate(request(max_tokens=0)))
        s.engines[0].step_s = 0.05
        await failure(s.stub.Generate(request(max_tokens=100), timeout=0.2))
        cancelled, running = (s.stub.Generate(request(max_tokens=100)) for _ in range(2))
        await cancelled.read()
        cancelled.cancel()
        await running.read()
        await until(lambda: len(s.engines[0].open) == 1)
        url = f"http://127.0.0.1:{s.door.metrics_port}/metrics"
        page = (await asyncio.to_thread(urllib.request.urlopen, url)).read().decode()
        running.cancel()
        return {
            name: float(value)
            for name, _, value in (line.rpartition(" ") for line in page.splitlines())
            if "Generate" in name or name.startswith("treeline")
        }

    values = with_front_door(scenario, FakeEngine())
    for code in ("OK", "INVALID_ARGUMENT", "DEADLINE_EXCEEDED", "CANCELLED"):
        assert values[f'grpc_server_handled_total{{grpc_code="{code}",grpc_method="Generate"}}'] == 1, code
    assert values['grpc_server_in_flight{grpc_method="Generate"}'] == 1
    assert values["treeline_front_door_verifiers"] == 1


def test_tls_and_tokens_outside_and_inside(tmp_path):
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    subprocess.run(
        f"openssl req -x509 -newkey rsa:2048 -nodes -keyout {key} -out {certificate} -days 1 -subj /CN=localhost "
        "-addext subjectAltName=IP:127.0.0.1".split(),
        check=True,
        capture_output=True,
    )
    (tmp_path / "clients").write_text("open-sesame\n")
    (tmp_path / "services").write_text("inner\n")
    tls = TlsConfig(certificate=certificate, private_key=key)
    config = Config(
        metrics=METRICS,
        server=ServerConfig(port=0, http={"port": 0}, tls=tls, token_file=tmp_path / "clients"),
        internal=InternalConfig(tls=tls, token_file=tmp_path / "services"),
    )

    async def scenario(s):
        good = await collect(s.stub.Generate(request(), metadata=(("authorization", "Bearer open-sesame"),)))
        refused = [
            (await failure(s.stub.Generate(request(), metadata=metadata))).code()
            for metadata in ((), (("authorization", "Bearer inner"),), (("authorization", "open-sesame"),))
        ]
        return len(good[0]), refused, await s.health()

    credentials = grpc.ssl_channel_credentials(certificate.read_bytes())
    got = with_front_door(scenario, FakeEngine(), config=config, credentials=credentials)
    assert got == (3, [grpc.StatusCode.UNAUTHENTICATED] * 3, SERVING)


def test_streams_that_ask_for_nothing_shut_nobody_out():
    """A stranger opens as many as he likes, with a message and without."""

    async def scenario(s):
        watch = health_pb2_grpc.HealthStub(s.channel).Watch
        silent = s.channel.stream_stream("/treeline.v1.GenerationService/Generate")
        opened = [watch(health_pb2.HealthCheckRequest()) for _ in range(336)]
        for _ in range(2):
            opened += [silent() for _ in range(300)]
            await asyncio.gather(*(call.wait_for_connection() for call in opened[-300:]))
        started_s = asyncio.get_running_loop().time()
        await collect(s.stub.Generate(request()))
        assert await s.health() == SERVING
        assert asyncio.get_running_loop().time() - started_s < 5, "1 s where nothing else runs"
        codes = [await call.code() for call in opened if call.done()]
        assert set(codes) == {grpc.StatusCode.RESOURCE_EXHAUSTED}
        assert len(codes) >= 336 - MAX_WATCHES + 600 - MAX_SILENT
        for call in opened:
            call.cancel()
        await collect(s.stub.Generate(request()))

    with_front_door(scenario, FakeEngine())


def test_a_call_that_stays_silent_ends(monkeypatch):
    monkeypatch.setattr("front_door.silent_streams.MESSAGE_TIMEOUT_S", 0.1)

    async def scenario(s):
        call = s.channel.stream_stream("/treeline.v1.GenerationService/Generate")()
        return await call.code()

    assert with_front_door(scenario, FakeEngine()) is grpc.StatusCode.DEADLINE_EXCEEDED


def test_the_front_door_is_light():
    heavy = ("torch", "transformers", "ray", "opentelemetry.sdk")
    code = f"import sys, front_door.server; print([m for m in {heavy} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert out.stdout.strip() == "[]"
