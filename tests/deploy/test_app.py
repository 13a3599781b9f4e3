"""`treeline serve` on a real Ray, with a tiny model, used by plain grpcio from another process."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest
import yaml
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from tests.verifier_svc.services import save_tiny_model, tiny_config
from treeline.config import DrafterConfig, ModelConfig
from treeline.v1 import generation_pb2 as pb
from treeline.v1.generation_pb2_grpc import GenerationServiceStub

pytestmark = pytest.mark.ray
RECOVERY_S = 90
PROMPT = "one two three, one two three, one two"


class Serving:
    """A running `treeline serve`."""

    def __init__(self, process: subprocess.Popen, endpoint: str) -> None:
        self.process = process
        self.channel = grpc.insecure_channel(endpoint)
        self.stub = GenerationServiceStub(self.channel)

    def answer(self, policy: str = "chain:4", max_tokens: int = 32) -> list[int]:
        request = pb.GenerateRequest(
            prompt=PROMPT,
            stopping=pb.StoppingParams(max_tokens=max_tokens),
            speculation=pb.SpeculationOptions(policy=policy),
        )
        responses = list(self.stub.Generate(request, timeout=30))
        assert responses[-1].complete.finish_reason == pb.FINISH_REASON_LENGTH
        return [token for response in responses[:-1] for token in response.chunk.token_ids]

    def load(self) -> pb.GetLoadResponse:
        return self.stub.GetLoad(pb.GetLoadRequest(), timeout=5)

    def replica(self, deployment: str) -> int:
        """The process id of a deployment's replica. Raises LookupError while there is none."""
        name = f"ray::ServeReplica:treeline:{deployment}"
        for entry in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                command, pid = entry.read_bytes().decode(errors="replace"), int(entry.parent.name)
            except OSError:
                continue
            if command.startswith(name) and self.process.pid in ancestors(pid):
                return pid
        raise LookupError(deployment)

    def followers(self) -> list[int]:
        """The process ids of the other ranks of the verifier's model."""
        verifier, found = self.replica("verifier"), []
        for entry in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                spawned = b"--multiprocessing-fork" in entry.read_bytes()
                if spawned and verifier == parent(int(entry.parent.name)):
                    found.append(int(entry.parent.name))
            except OSError:
                continue
        return found

    def kill(self, deployment: str) -> None:
        os.kill(self.replica(deployment), signal.SIGKILL)

    def until(self, condition) -> None:
        """Wait until `condition()` is true; a call that fails or a replica that is not there counts as not yet."""
        deadline = time.monotonic() + RECOVERY_S
        while time.monotonic() < deadline:
            try:
                if condition():
                    return
            except (grpc.RpcError, LookupError):
                pass
            time.sleep(0.2)
        pytest.fail("it did not recover")


def ancestors(pid: int) -> Iterator[int]:
    while pid > 1:
        yield pid
        pid = parent(pid)


def parent(pid: int) -> int:
    return int(re.search(r"PPid:\t(\d+)", Path(f"/proc/{pid}/status").read_text())[1])


@pytest.fixture(scope="module")
def serving(tmp_path_factory) -> Iterator[Serving]:
    with started(tmp_path_factory.mktemp("serve")) as running:
        yield running


@contextmanager
def started(folder: Path, tensor_parallel: int = 1) -> Iterator[Serving]:
    target = save_tiny_model(folder / "target")
    drafter = DrafterConfig(kind="model+ngram", model=ModelConfig(model=str(target), dtype="float32", threads=1))
    config = tiny_config(target, drafter).model_dump(mode="json")
    config["verifier"]["target"]["tensor_parallel"] = tensor_parallel
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    process = subprocess.Popen(
        [sys.executable, "-c", "from cli.main import main; main()", "serve", "--config", str(folder / "config.yaml")],
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        for line in process.stderr:
            if found := re.search(r"serving at (\S+);", line):
                break
        else:
            pytest.fail("treeline serve ended")
        yield Serving(process, found[1])
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            raise


def test_every_policy_gives_one_answer(serving):
    answers = [serving.answer(policy) for policy in ("off", "chain:4", "static:3-2-1", "eagle2:4,3,8", "smart")]
    assert answers == [answers[0]] * len(answers)


def test_health_and_reflection(serving):
    health = health_pb2_grpc.HealthStub(serving.channel).Check(health_pb2.HealthCheckRequest(), timeout=5)
    assert health.status == health_pb2.HealthCheckResponse.SERVING
    asked = iter([reflection_pb2.ServerReflectionRequest(list_services="")])
    reply = next(reflection_pb2_grpc.ServerReflectionStub(serving.channel).ServerReflectionInfo(asked, timeout=5))
    names = {service.name for service in reply.list_services_response.service}
    assert {"treeline.v1.GenerationService", "grpc.health.v1.Health"} <= names


def test_answers_go_on_while_the_drafter_is_replaced(serving):
    serving.until(lambda: serving.load().drafter_ready)
    expected = serving.answer("off")
    serving.kill("drafter")
    assert serving.answer() == expected
    serving.until(lambda: serving.load().drafter_ready)
    assert serving.answer() == expected


def test_answers_go_on_while_the_planner_is_replaced(serving):
    expected = serving.answer("off")
    killed = serving.replica("planner")
    serving.kill("planner")
    assert serving.answer("smart") == expected
    serving.until(lambda: serving.load().plan_version and serving.replica("planner") != killed)


def test_a_stream_outlives_its_killed_verifier(serving):
    expected = serving.answer("off", 200)
    request = pb.GenerateRequest(prompt=PROMPT, stopping=pb.StoppingParams(max_tokens=200))
    call = serving.stub.Generate(request, timeout=RECOVERY_S)
    tokens = list(next(call).chunk.token_ids)
    serving.kill("verifier")
    for response in call:
        tokens += response.chunk.token_ids
    assert tokens == expected


def test_ctrl_c_stops_everything(serving):
    """The last test: it ends what the others use."""
    ray_processes = {serving.replica(deployment) for deployment in ("drafter", "verifier", "planner", "front-door")}
    serving.process.send_signal(signal.SIGINT)
    assert serving.process.wait(60) == 0
    serving.until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in ray_processes))


@pytest.mark.slow
def test_a_replica_that_loses_a_rank_of_its_model_is_replaced(tmp_path):
    with started(tmp_path, tensor_parallel=2) as serving:
        expected, killed = serving.answer(), serving.replica("verifier")
        (follower,) = serving.followers()
        os.kill(follower, signal.SIGKILL)
        serving.until(lambda: serving.replica("verifier") != killed and len(serving.followers()) == 1)
        again: list[list[int]] = []
        serving.until(lambda: again.append(serving.answer()) is None)
        assert again == [expected]
        assert not Path(f"/proc/{killed}").exists()
