import asyncio
import subprocess
import sys
import urllib.request
from contextlib import AsyncExitStack

import grpc
import pytest
from google.rpc.error_details_pb2 import BadRequest, RetryInfo
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from front_door.server import FrontDoorServer, no_pages
from front_door.streams import MAX_SILENT, MAX_WATCHES
from tests.verifier_svc.fake_engine import FakeEngine, FakeVerifier, ended, fake_verifier, until
from tests.verifier_svc.service.test_service import collect, details, failure, request
from treeline.config import Config, InternalConfig, LimitsConfig, MetricsConfig, ServerConfig, TlsConfig
from treeline.rpc.interceptors import SERVICE
from treeline.v1 import generation_pb2 as pb
from treeline.v1 import generation_pb2_grpc as pb_grpc
from verifier_svc.service.service import GenerationServicer

METRICS = MetricsConfig(base_port=0)
CONFIG = Config(server=ServerConfig(port=0, http={"port": 0}), metrics=METRICS)
SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING


class Setup:
    """A front door over verifiers, a channel to it, and the list that discovery returns."""

    def __init__(
        self, door: FrontDoorServer, channel: grpc.aio.Channel, verifiers: list[FakeVerifier], found: list[str]
    ):
        self.door, self.channel, self.verifiers, self.found = door, channel, verifiers, found
        self.stub = pb_grpc.GenerationServiceStub(channel)
        self.engines = [verifier.engine for verifier in verifiers]

    async def health(self) -> int:
        check = health_pb2_grpc.HealthStub(self.channel).Check
        return (await check(health_pb2.HealthCheckRequest(), timeout=2)).status


def with_front_door(
    scenario, *engines: FakeEngine, config: Config = CONFIG, credentials=None, timeout_s=20, pages=no_pages
):
    async def run():
        async with AsyncExitStack() as stack:
            verifiers = [await stack.enter_async_context(fake_verifier(engine, config)) for engine in engines]
            found = [verifier.endpoint for verifier in verifiers]

            async def discover():
                if None in found:
                    raise ConnectionError("the controller is away")
                return list(found)

            door = await FrontDoorServer.start(config, discover, pages)
            stack.push_async_callback(door.stop, 0)
            channel = (
                grpc.aio.secure_channel(door.endpoint, credentials)
                if credentials
                else grpc.aio.insecure_channel(door.endpoint)
            )
            await stack.enter_async_context(channel)
            return await asyncio.wait_for(scenario(Setup(door, channel, verifiers, found)), timeout_s)

    return asyncio.run(run())


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
        error = await failure(s.stub.Generate(request(max_tokens=100), timeout=0.2))
        await until(lambda: not s.engines[0].open, timeout_s=0.5)
        return error.code(), len(s.engines[0].requests)

    assert with_front_door(scenario, FakeEngine(step_s=0.02)) == (grpc.StatusCode.DEADLINE_EXCEEDED, 1)


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
            await asyncio.sleep(0.8)
            assert await s.health() == SERVING
            await collect(s.stub.Generate(request()))
        await asyncio.sleep(0.8)
        assert await s.health() == NOT_SERVING
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
    monkeypatch.setattr("front_door.streams.MESSAGE_TIMEOUT_S", 0.1)

    async def scenario(s):
        call = s.channel.stream_stream("/treeline.v1.GenerationService/Generate")()
        return await call.code()

    assert with_front_door(scenario, FakeEngine()) is grpc.StatusCode.DEADLINE_EXCEEDED


def test_the_front_door_is_light():
    heavy = ("torch", "transformers", "ray", "opentelemetry.sdk")
    code = f"import sys, front_door.server; print([m for m in {heavy} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert out.stdout.strip() == "[]"
