"""The examples run as their pages say."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from examples.own_policy import SureChain
from planner.policies import parse_policy
from tests.planner.builders import linear_cost, plan_with

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
