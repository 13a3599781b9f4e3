"""Two verifiers and two drafters, each a process: a drafter for each verifier, and one for both when the other dies."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from planner.service.server import PlannerServer
from tests.verifier_svc.services import drafting_config, save_tiny_model
from treeline.v1 import drafting_pb2
from treeline.v1 import generation_pb2 as pb
from treeline.v1.drafting_pb2_grpc import DraftingServiceStub
from treeline.v1.generation_pb2_grpc import GenerationServiceStub

pytestmark = pytest.mark.slow
TOKENS, BUSY = 120, 6
"""Tokens of an answer, and streams at the busy verifier; the other one has a single stream."""
MOVE_S = 20.0


class Processes:
    def __init__(self) -> None:
        self.started: dict[str, subprocess.Popen] = {}

    def start(self, module: str, *args: str) -> str:
        command = [sys.executable, "-m", f"tests.verifier_svc.{module}", *args]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        endpoint = process.stdout.readline().strip()
        self.started[endpoint] = process
        return endpoint

    def kill(self, endpoint: str) -> None:
        self.started[endpoint].kill()
        self.started.pop(endpoint).wait(30)


@pytest.fixture
def processes() -> Iterator[Processes]:
    running = Processes()
    try:
        yield running
    finally:
        for endpoint in list(running.started):
            running.kill(endpoint)


async def answers(verifier: str, streams: int, policy: str) -> tuple[list[str], list[pb.SpeculationStep]]:
    """The texts of so many streams at once, and all their steps."""
    steps: list[pb.SpeculationStep] = []

    async def one(stub: GenerationServiceStub, seed: int) -> str:
        text = ""
        request = pb.GenerateRequest(
            prompt=f"one two three {seed}",
            sampling=pb.SamplingParams(temperature=0.8 * (seed % 2), seed=seed),
            stopping=pb.StoppingParams(max_tokens=TOKENS, ignore_eos=True),
            speculation=pb.SpeculationOptions(policy=policy),
            output=pb.OutputOptions(explain=True),
        )
        async for response in stub.Generate(request):
            text += response.chunk.text
            if response.HasField("chunk"):
                steps.append(response.chunk.speculation)
        return text

    async with grpc.aio.insecure_channel(verifier) as channel:
        stub = GenerationServiceStub(channel)
        return await asyncio.gather(*(one(stub, seed) for seed in range(streams))), steps


async def verifiers_of(drafter: str) -> int:
    async with grpc.aio.insecure_channel(drafter) as channel:
        return (await DraftingServiceStub(channel).GetDrafterInfo(drafting_pb2.GetDrafterInfoRequest())).streams


async def until(drafter: str, verifiers: int) -> None:
    deadline_s = time.monotonic() + MOVE_S
    while await verifiers_of(drafter) != verifiers:
        assert time.monotonic() < deadline_s, f"{drafter} never got {verifiers} verifiers"
        await asyncio.sleep(0.1)


def check_drafted(answered: list, expected: list) -> None:
    """Both verifiers wrote the expected texts, and had drafts for most of their steps."""
    for (texts, _), (expected_texts, _) in zip(answered, expected, strict=True):
        assert texts == expected_texts
    for _, steps in answered:
        assert sum(step.drafted_nodes > 0 for step in steps) > len(steps) / 2


def test_verifiers_share_drafters_out_and_move_when_one_dies(tmp_path: Path, processes: Processes):
    target = str(save_tiny_model(tmp_path / "target"))

    async def run() -> None:
        planner = await PlannerServer.start(drafting_config(Path(target)))
        start = lambda *args: asyncio.to_thread(processes.start, *args)  # noqa: E731
        drafters = await asyncio.gather(*(start("drafter_process", target) for _ in range(2)))
        busy = await start("verifier_process", target, planner.endpoint, *drafters)
        quiet = await start("verifier_process", target, planner.endpoint, *drafters)
        for drafter in drafters:
            await until(drafter, verifiers=1)

        expected = await asyncio.gather(answers(busy, BUSY, "off"), answers(quiet, 1, "off"))
        before = await asyncio.gather(answers(busy, BUSY, "chain:3"), answers(quiet, 1, "chain:3"))
        check_drafted(before, expected)
        processes.kill(drafters[0])
        await until(drafters[1], verifiers=2)
        after = await asyncio.gather(answers(busy, BUSY, "chain:3"), answers(quiet, 1, "chain:3"))
        check_drafted(after, expected)
        await planner.stop(0)

    asyncio.run(run())
