"""The examples run as their pages say."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from deploy.replicas import drafters
from examples.own_policy import SureChain
from lm.model import LanguageModel
from lm.store import vocabulary_sha256
from planner.policies import parse_policy
from tests.lm.tiny import tiny_llama, tiny_tokenizer
from tests.planner.builders import linear_cost, plan_with
from treeline.config import Config, DrafterConfig, ModelConfig, VerifierConfig
from treeline.sampling import SamplingParams
from verifier_svc.engine.engine import Engine
from verifier_svc.engine.request import Completion, GenerationRequest
from verifier_svc.speculation.link import RemoteLink, wait_for_info

EXAMPLES = Path(__file__).parents[2] / "examples"
NODE = pytest.mark.skipif(
    not (shutil.which("node") and (EXAMPLES / "node/node_modules").exists()),
    reason="needs npm install in examples/node",
)
CLIENTS = [
    pytest.param([sys.executable, EXAMPLES / "client.py"], id="python"),
    pytest.param(["node", EXAMPLES / "node/client.js"], id="node", marks=NODE),
]


@pytest.mark.parametrize("command", CLIENTS)
def test_a_client_streams_the_text(service, command):
    engine, endpoint = service
    done = subprocess.run([*command, "hi", endpoint], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("a0 a1 a2 ")
    assert "[100 tokens, " in done.stdout
    assert bytes(engine.requests[0].prompt_token_ids) == b"<user>hi<assistant>"


@pytest.mark.parametrize("command", CLIENTS)
def test_a_client_says_that_nobody_answers(command):
    done = subprocess.run([*command, "hi", "127.0.0.1:9"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr.startswith("failed: ")


def test_a_policy_of_ones_own_is_known_by_its_name():
    policy = parse_policy("sure-chain:0.4")
    assert policy == SureChain(0.4)
    layer = SimpleNamespace(scores=np.float32([0.3, 0.5, 0.2, 0.1]), tree_of=np.array([0, 0, 1, 1]))
    assert policy.keep(layer, plan_with(linear_cost())).tolist() == [False, True, False, False]


@pytest.fixture
def own_drafter() -> Iterator[str]:
    """ "host:port" of the example, in a process of its own."""
    command = [sys.executable, EXAMPLES / "own_drafter.py", "127.0.0.1:0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield process.stdout.readline().removeprefix("drafting on ").strip()
        process.terminate()


def test_a_drafter_of_ones_own_drafts_for_a_verifier(own_drafter):
    torch.manual_seed(0)
    model = LanguageModel.from_hf(tiny_llama(), tiny_tokenizer())
    config = Config(
        verifier=VerifierConfig(target=ModelConfig(dtype="float32"), kv_cache_tokens=1024, draft_timeout_s=10),
        drafter=DrafterConfig(kind="head", endpoints=[own_drafter]),  # without prompt lookup
    )
    prompt = [5, 6, 7, 8] * 3

    def answer(link: RemoteLink | None, policy: str) -> tuple[list[int], Completion]:
        engine = Engine(model, link, lambda: plan_with(linear_cost()), config)
        engine.add(GenerationRequest(policy, prompt, SamplingParams(), 64, policy=policy, ignore_eos=True))
        items = [output.item for _ in iter(lambda: engine.has_work, False) for output in engine.step()[0]]
        completion = items.pop()
        assert isinstance(completion, Completion)
        return [token for chunk in items for token in chunk.token_ids], completion

    async def answers() -> tuple[list[int], Completion]:
        link = RemoteLink(drafters(config, None), config, model.vocab_size, vocabulary_sha256(model.tokenizer))
        info = await wait_for_info(link, 10)
        assert info is not None
        assert info.drafter == "bigrams"
        drafted = await asyncio.to_thread(answer, link, "chain:4")
        link.close()
        return drafted

    token_ids, completion = asyncio.run(answers())
    assert token_ids == answer(None, "off")[0]
    assert completion.speculation.drafted_nodes > 20
    assert completion.speculation.accepted_nodes > 0
