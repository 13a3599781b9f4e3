"""Real verifiers in processes of their own are killed and drained under real streams: no text changes."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from front_door.server import FrontDoorServer
from tests.verifier_svc.services import discovery, save_tiny_model
from treeline.config import Config, MetricsConfig, ServerConfig
from treeline.v1 import generation_pb2 as pb
from treeline.v1.generation_pb2_grpc import GenerationServiceStub

CONFIG = Config(server=ServerConfig(port=0, http={"port": 0}, resume_wait_s=120), metrics=MetricsConfig(base_port=0))
STREAMS, TOKENS = 8, 150


class Verifiers:
    """Processes by endpoint; a dead one leaves `found`, as discovery would have it."""

    def __init__(self, target: Path) -> None:
        self._target = target
        self._processes: dict[str, subprocess.Popen] = {}
        self.found: list[str] = []

    def start(self, count: int) -> None:
        command = [sys.executable, "-m", "tests.verifier_svc.verifier_process", str(self._target)]
        for process in [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(count)]:
            endpoint = process.stdout.readline().strip()
            self._processes[endpoint] = process
            self.found.append(endpoint)

    def end(self, endpoint: str, number: signal.Signals) -> None:
        process = self._processes.pop(endpoint)
        process.send_signal(number)
        process.wait(30)
        self.found.remove(endpoint)

    def close(self) -> None:
        for endpoint in list(self._processes):
            self.end(endpoint, signal.SIGKILL)


@pytest.fixture(scope="module")
def verifiers(tmp_path_factory) -> Iterator[Verifiers]:
    started = Verifiers(save_tiny_model(tmp_path_factory.mktemp("models") / "target"))
    try:
        yield started
    finally:
        started.close()


def ask(seed: int) -> pb.GenerateRequest:
    return pb.GenerateRequest(
        prompt="one two three, one two three",
        sampling=pb.SamplingParams(temperature=0.8 * (seed % 2), repetition_penalty=1.1, seed=seed),
        stopping=pb.StoppingParams(max_tokens=TOKENS, ignore_eos=True),
    )


async def answer(stub: GenerationServiceStub, seed: int) -> tuple[str, list[int]]:
    text, token_ids = "", []
    async for response in stub.Generate(ask(seed)):
        if response.HasField("complete"):
            assert response.complete.usage.completion_tokens == len(token_ids) == TOKENS
            assert response.complete.finish_reason == pb.FINISH_REASON_LENGTH
        text += response.chunk.text
        token_ids += response.chunk.token_ids
    return text, token_ids


def under_streams(verifiers: Verifiers, disturb) -> None:
    """Answers while `disturb()` runs, in a thread, are those of an undisturbed run."""

    async def run() -> None:
        door = await FrontDoorServer.start(CONFIG, discovery(verifiers.found))
        async with grpc.aio.insecure_channel(door.endpoint) as channel:
            stub = GenerationServiceStub(channel)
            await door.until_serving()
            expected = await asyncio.gather(*(answer(stub, seed) for seed in range(STREAMS)))
            disturbed = [asyncio.create_task(answer(stub, seed)) for seed in range(STREAMS)]
            await asyncio.sleep(0.1)
            assert not any(task.done() for task in disturbed)
            await asyncio.to_thread(disturb)
            assert await asyncio.gather(*disturbed) == expected
        await door.stop(0)

    asyncio.run(asyncio.wait_for(run(), 180))


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=["killed", "drained"])
def test_one_of_two_verifiers_goes(verifiers, number):
    verifiers.start(2 - len(verifiers.found))
    under_streams(verifiers, lambda: verifiers.end(verifiers.found[0], number))


def test_the_only_verifier_is_killed_and_replaced(verifiers):
    verifiers.start(1 - len(verifiers.found))

    def replace() -> None:
        verifiers.end(verifiers.found[0], signal.SIGKILL)
        verifiers.start(1)

    under_streams(verifiers, replace)
