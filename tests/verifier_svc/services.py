"""All four services with a tiny real model, in one event loop, talking to each other over real ports."""

from __future__ import annotations

import asyncio
import urllib.request
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc

from drafter_svc.server import DrafterServer
from front_door.server import FrontDoorServer
from planner.service.server import PlannerServer
from tests.lm.tiny import tiny_llama, tiny_tokenizer
from treeline.config import (
    Config,
    DrafterConfig,
    LimitsConfig,
    MetricsConfig,
    ModelConfig,
    PlannerConfig,
    ServerConfig,
    VerifierConfig,
)
from treeline.v1 import generation_pb2 as pb
from treeline.v1.generation_pb2_grpc import GenerationServiceStub
from verifier_svc.service.server import VerifierServer


def save_tiny_model(folder: Path, seed: int = 0, **sizes: int) -> Path:
    """A model folder such as a user would bring. Its greedy answers never end by themselves."""
    hf = tiny_llama(seed, **sizes)
    hf.generation_config.eos_token_id = None
    hf.config.eos_token_id = None
    hf.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def tiny_config(target: Path, drafter: DrafterConfig | None = None, **limits: int) -> Config:
    return Config(
        server=ServerConfig(port=0, http={"port": 0}),
        verifier=VerifierConfig(
            target=ModelConfig(model=str(target), dtype="float32", threads=1),
            kv_cache_tokens=4096,
            prefill_chunk_tokens=32,
        ),
        drafter=drafter or DrafterConfig(),
        planner=PlannerConfig(interval_s=0.05),
        limits=LimitsConfig(**{"max_running_requests": 8, "max_context_tokens": 256, **limits}),
        metrics=MetricsConfig(base_port=0),
    )


def drafting_config(target: Path) -> Config:
    """The target drafts for itself, and every policy may be asked for."""
    drafter = DrafterConfig(kind="model", model=ModelConfig(model=str(target), dtype="float32", threads=1))
    return tiny_config(target, drafter)


@dataclass
class Services:
    """The running services. A service's endpoint leaves `found` when it stops, as discovery would have it."""

    config: Config
    planner: PlannerServer
    drafters: list[DrafterServer]  # the last one runs
    verifier: VerifierServer
    door: FrontDoorServer
    channel: grpc.aio.Channel
    found: dict[str, list[str]]

    @property
    def drafter(self) -> DrafterServer:
        return self.drafters[-1]

    @property
    def stub(self) -> GenerationServiceStub:
        return GenerationServiceStub(self.channel)

    async def load(self) -> pb.GetLoadResponse:
        """The verifier's own, now: the front door's is as old as its last poll."""
        async with grpc.aio.insecure_channel(self.verifier.endpoint) as channel:
            return await GenerationServiceStub(channel).GetLoad(pb.GetLoadRequest())

    async def stop_drafter(self) -> None:
        self.found["drafter"].clear()
        await self.drafter.stop(0)

    async def start_drafter(self) -> None:
        self.drafters.append(await DrafterServer.start(self.config))
        self.found["drafter"].append(self.drafter.endpoint)

    async def page(self, port: int) -> str:
        """A metrics page."""

        def read() -> str:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
                return answer.read().decode()

        return await asyncio.to_thread(read)


def discovery(found: list[str]):
    async def discover() -> list[str]:
        return list(found)

    return discover


@asynccontextmanager
async def running_services(config: Config) -> AsyncIterator[Services]:
    async with AsyncExitStack() as stack:
        planner = await PlannerServer.start(config)
        stack.push_async_callback(planner.stop, 0)
        found = {"planner": [planner.endpoint], "drafter": [], "verifier": []}
        drafters = [await DrafterServer.start(config)]
        stack.push_async_callback(lambda: drafters[-1].stop(0))
        found["drafter"].append(drafters[-1].endpoint)
        verifier = await VerifierServer.start(config, discovery(found["drafter"]), discovery(found["planner"]))
        stack.push_async_callback(verifier.stop, 0)
        found["verifier"].append(verifier.endpoint)
        door = await FrontDoorServer.start(config, discovery(found["verifier"]))
        stack.push_async_callback(door.stop, 0)
        channel = await stack.enter_async_context(grpc.aio.insecure_channel(door.endpoint))
        yield Services(config, planner, drafters, verifier, door, channel, found)
