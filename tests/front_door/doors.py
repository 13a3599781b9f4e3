"""A front door over verifiers with fake engines, for tests to call."""

import asyncio
from contextlib import AsyncExitStack

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from front_door.server import FrontDoorServer, no_pages
from tests.verifier_svc.fake_engine import FakeEngine, FakeVerifier, fake_verifier
from treeline.config import Config, MetricsConfig, ServerConfig
from treeline.v1 import generation_pb2_grpc as pb_grpc

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

    async def until_health(self, status: int, timeout_s: float = 3.0) -> None:
        async with asyncio.timeout(timeout_s):
            while await self.health() != status:
                await asyncio.sleep(0.02)


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
