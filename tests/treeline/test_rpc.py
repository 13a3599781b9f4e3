import asyncio
import gc
import platform
import subprocess
import sys
import weakref
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import grpc
import pytest
from grpc._cython import cygrpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from treeline.config import InternalConfig, TlsConfig
from treeline.errors import ConfigError, UnavailableError
from treeline.rpc.channels import bind, connect, new_server
from treeline.rpc.interceptors import CallInterceptor
from treeline.v1 import generation_pb2 as pb
from treeline.v1.generation_pb2_grpc import (
    GenerationServiceServicer,
    GenerationServiceStub,
    add_GenerationServiceServicer_to_server,
)

METHODS = ("UnaryUnary", "UnaryStream", "StreamUnary", "StreamStream")


def echo_handlers() -> grpc.GenericRpcHandler:
    async def one(request, context):
        return request

    async def many(request, context):
        yield request

    async def last(requests, context):
        return [r async for r in requests][-1]

    async def each(requests, context):
        async for request in requests:
            yield request

    return grpc.method_handlers_generic_handler(
        "test.Echo",
        {
            "UnaryUnary": grpc.unary_unary_rpc_method_handler(one),
            "UnaryStream": grpc.unary_stream_rpc_method_handler(many),
            "StreamUnary": grpc.stream_unary_rpc_method_handler(last),
            "StreamStream": grpc.stream_stream_rpc_method_handler(each),
        },
    )


async def call_all(channel: grpc.aio.Channel) -> list[bytes]:
    async def requests():
        yield b"a"

    return [
        await channel.unary_unary("/test.Echo/UnaryUnary")(b"a", timeout=5),
        *[m async for m in channel.unary_stream("/test.Echo/UnaryStream")(b"a", timeout=5)],
        await channel.stream_unary("/test.Echo/StreamUnary")(requests(), timeout=5),
        *[m async for m in channel.stream_stream("/test.Echo/StreamStream")(requests(), timeout=5)],
    ]


def run_against_echo(server_side: InternalConfig, client_side: InternalConfig, use, max_message_bytes: int = 1 << 20):
    async def scenario():
        server = new_server(server_side, max_message_bytes)
        server.add_generic_rpc_handlers((echo_handlers(),))
        health_pb2_grpc.add_HealthServicer_to_server(health.aio.HealthServicer(), server)
        endpoint = bind(server, server_side)
        await server.start()
        try:
            async with connect(endpoint, client_side, 1 << 20) as channel:
                return await use(channel)
        finally:
            await server.stop(None)

    return asyncio.run(scenario())


@pytest.fixture
def token_file(tmp_path: Path) -> Path:
    path = tmp_path / "tokens"
    path.write_text("# services\nalpha\n\nbeta\n")
    return path


@pytest.fixture
def tls(tmp_path: Path) -> TlsConfig:
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    command = (
        f"openssl req -x509 -newkey rsa:2048 -nodes -keyout {key} -out {certificate} -days 1 "
        "-subj /CN=localhost -addext subjectAltName=IP:127.0.0.1,DNS:localhost"
    )
    subprocess.run(command.split(), check=True, capture_output=True)
    return TlsConfig(certificate=certificate, private_key=key)


def test_every_kind_of_call_carries_the_token(token_file):
    internal = InternalConfig(token_file=token_file)
    assert run_against_echo(internal, internal, call_all) == [b"a"] * 4


def test_streams_that_are_written_to_carry_the_token_too(token_file):
    async def use(channel):
        stream = channel.stream_stream("/test.Echo/StreamStream")()
        echoed = []
        for message in (b"a", b"b"):
            await stream.write(message)
            echoed.append(await stream.read())
        await stream.done_writing()
        return echoed

    internal = InternalConfig(token_file=token_file)
    assert run_against_echo(internal, internal, use) == [b"a", b"b"]


def test_every_accepted_token_opens_the_door(token_file, tmp_path):
    other = tmp_path / "other"
    other.write_text("beta")
    got = run_against_echo(InternalConfig(token_file=token_file), InternalConfig(token_file=other), call_all)
    assert got == [b"a"] * 4


@pytest.mark.parametrize("token", [None, "alph", "alphaa", "gamma"])
@pytest.mark.parametrize("method", METHODS)
def test_calls_without_an_accepted_token_are_refused(token_file, tmp_path, token, method):
    client = InternalConfig()
    if token:
        (tmp_path / "given").write_text(token)
        client = InternalConfig(token_file=tmp_path / "given")

    async def use(channel):
        async def requests():
            await asyncio.Event().wait()  # refused before a word is said
            yield b"a"

        call = {
            "UnaryUnary": lambda: channel.unary_unary("/test.Echo/UnaryUnary")(b"a", timeout=5),
            "UnaryStream": lambda: channel.unary_stream("/test.Echo/UnaryStream")(b"a", timeout=5),
            "StreamUnary": lambda: channel.stream_unary("/test.Echo/StreamUnary")(requests(), timeout=5),
            "StreamStream": lambda: channel.stream_stream("/test.Echo/StreamStream")(requests(), timeout=5),
        }[method]()
        return await call.code()

    assert run_against_echo(InternalConfig(token_file=token_file), client, use) == grpc.StatusCode.UNAUTHENTICATED


def test_health_checks_need_no_token(token_file):
    async def use(channel):
        reply = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=5)
        return reply.status

    got = run_against_echo(InternalConfig(token_file=token_file), InternalConfig(), use)
    assert got == health_pb2.HealthCheckResponse.SERVING


def test_tls_with_token(token_file, tls):
    internal = InternalConfig(token_file=token_file, tls=tls)
    assert run_against_echo(internal, internal, call_all) == [b"a"] * 4


def test_plain_client_does_not_get_into_a_tls_server(tls):
    async def use(channel):
        return await channel.unary_unary("/test.Echo/UnaryUnary")(b"a", timeout=2).code()

    got = run_against_echo(InternalConfig(tls=tls), InternalConfig(), use)
    assert got in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)


def test_oversized_messages_are_refused():
    async def use(channel):
        return await channel.unary_unary("/test.Echo/UnaryUnary")(b"x" * 200_000, timeout=5).code()

    got = run_against_echo(InternalConfig(), InternalConfig(), use, max_message_bytes=1 << 16)
    assert got == grpc.StatusCode.RESOURCE_EXHAUSTED


def test_a_taken_port_is_one_clear_error():
    async def scenario():
        first, second = (new_server(InternalConfig(), 1 << 20) for _ in range(2))
        port = int(bind(first, InternalConfig()).rpartition(":")[2])
        await first.start()
        try:
            with pytest.raises(ConfigError, match=f"127.0.0.1:{port}"):
                bind(second, InternalConfig(), port)
        finally:
            await first.stop(None)

    asyncio.run(scenario())


@pytest.mark.parametrize("kind", METHODS)
def test_a_message_that_does_not_parse_is_an_invalid_argument(kind):
    """For every kind of call: grpc's own answer is UNKNOWN or INTERNAL."""

    async def scenario():
        server = new_server(InternalConfig(), 1 << 20)
        handlers = echo_handlers().service(SimpleNamespace(method=f"/test.Echo/{kind}", invocation_metadata=()))
        parsed = handlers._replace(
            request_deserializer=health_pb2.HealthCheckRequest.FromString,
            response_serializer=health_pb2.HealthCheckRequest.SerializeToString,
        )
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test.Echo", {kind: parsed}),))
        endpoint = bind(server, InternalConfig())
        await server.start()
        async with grpc.aio.insecure_channel(endpoint) as channel:
            ends = []
            for message in (b"\x0a\x01a", b"\x0a\x05a"):
                call = channel.stream_stream(f"/test.Echo/{kind}")(iter([message]), timeout=5)
                try:
                    ends.append(await call.read())
                except grpc.aio.AioRpcError as error:
                    ends.append(error.code())
        await server.stop(0)
        return ends

    assert asyncio.run(scenario()) == [b"\x0a\x01a", grpc.StatusCode.INVALID_ARGUMENT]


FAULTS = """
import resource
from treeline.rpc.channels import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        parts = [bytes(bytearray(3 << 20)) for _ in range(4)]
        del parts
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

before = faults()
keep_freed_memory()
faults()
print(before, faults())
"""


def test_a_call_that_ends_while_it_is_answered_is_no_failure(caplog):
    """grpc then raises at the next write, if the handler has not been cancelled yet."""
    codes = []
    observer = SimpleNamespace(started=lambda method: None, handled=lambda method, code, *_: codes.append(code))

    class Servicer(GenerationServiceServicer):
        async def Generate(self, request, context):
            yield pb.GenerateResponse()
            raise cygrpc.ExecuteBatchError("Failed")

    async def run():
        server = new_server(InternalConfig(), 1 << 20, interceptors=[CallInterceptor(observer)])
        add_GenerationServiceServicer_to_server(Servicer(), server)
        endpoint = bind(server, InternalConfig())
        await server.start()
        async with grpc.aio.insecure_channel(endpoint) as channel:
            with suppress(grpc.RpcError):
                await GenerationServiceStub(channel).Generate(pb.GenerateRequest()).read()
            while not codes:
                await asyncio.sleep(0.02)
        await server.stop(None)

    asyncio.run(run())
    assert codes == ["CANCELLED"]
    assert not caplog.records


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_memory_of_large_messages_is_used_again():
    run = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True, timeout=60)
    before, after = map(int, run.stdout.split())
    assert after < before / 10


class Held:
    pass


class Refusing(GenerationServiceServicer):
    """Refuses every call, and knows which of what its handlers held still lives."""

    def __init__(self):
        self.held = weakref.WeakSet()

    async def GetLoad(self, request, context):
        self.refuse()

    async def Generate(self, request, context):
        self.refuse()
        yield

    def refuse(self):
        held = Held()
        self.held.add(held)
        raise UnavailableError("not now")


def test_a_refused_call_is_forgotten_without_the_collector():
    """Requests may have megabytes, and a full collection is minutes away."""

    async def scenario():
        servicer, server = Refusing(), new_server(InternalConfig(), 1 << 20, interceptors=[CallInterceptor()])
        add_GenerationServiceServicer_to_server(servicer, server)
        endpoint = bind(server, InternalConfig())
        await server.start()
        async with grpc.aio.insecure_channel(endpoint) as channel:
            stub, codes = GenerationServiceStub(channel), []
            for call in (stub.GetLoad(pb.GetLoadRequest()), stub.Generate(pb.GenerateRequest()).read()):
                try:
                    await call
                except grpc.aio.AioRpcError as error:
                    codes.append(error.code())
        await server.stop(None)
        return codes, len(servicer.held)

    gc.disable()
    try:
        assert asyncio.run(scenario()) == ([grpc.StatusCode.UNAVAILABLE] * 2, 0)
    finally:
        gc.enable()
