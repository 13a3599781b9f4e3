"""The systems that can be swept: room for all streams, planners apart, and a real service through its port."""

from __future__ import annotations

import asyncio
import json
import threading

import pytest
from typer.testing import CliRunner

from bench.common import Prompt
from bench.load import End, Request, Tokens
from bench.systems import start_local, with_room
from cli.main import app
from tests.verifier_svc.services import running_services, save_tiny_model, tiny_config
from treeline.config import Config, VerifierConfig
from treeline.errors import ConfigError
from treeline.v1 import generation_pb2 as pb

PROMPT = Prompt("p", "chat", "one two three, one two three")


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Config:
    return tiny_config(save_tiny_model(tmp_path_factory.mktemp("models") / "target"))


def test_there_is_room_for_the_longest_prompts_and_trees():
    config = Config(verifier=VerifierConfig(kv_cache_tokens=64, kv_block_tokens=16))
    enlarged = with_room(config, {"a": 100, "b": 20}, streams=32, max_tokens=48)
    per_stream = -(-(100 + 48 + config.limits.max_tree_nodes) // 16) * 16
    assert enlarged.verifier.kv_cache_tokens == 31 * per_stream + -(-(20 + 48 + 64) // 16) * 16
    assert enlarged.limits.max_running_requests == 32
    assert with_room(Config(), {"a": 10}, streams=1, max_tokens=8) == Config()
    with pytest.raises(ConfigError, match="prompt a has 2040 tokens"):
        with_room(Config(), {"a": 2040}, streams=1, max_tokens=48)


def test_each_policy_keeps_its_own_planner(config):
    systems = start_local(config, [PROMPT], streams=2, max_tokens=8)

    def steps(policy: str) -> list[int]:
        system = systems.system(policy)
        system.submit(Request("r", PROMPT, 8, policy))
        versions = []
        while not any(isinstance(event, End) for event in system.poll(0.0)):
            versions.append(system.planned.last.plan_version)
        return versions

    first = steps("smart")
    assert steps("off")[0] == 1  # a new planner's first plan, whatever the other one has come to
    assert steps("smart")[0] >= first[-1]


def test_aborted_requests_end(config):
    system = start_local(config, [PROMPT], streams=2, max_tokens=8).system("off")
    system.submit(Request("r", PROMPT, 8, "off"))
    assert isinstance(system.poll(0.0)[0], Tokens)
    system.abort(["r"])
    (end,) = system.poll(0.0)
    assert isinstance(end, End)
    assert not end.finished


def test_every_answer_may_be_bound_by_a_grammar(config):
    systems = start_local(config, [PROMPT], streams=2, max_tokens=8, grammar=pb.Grammar(regex="ab?"))
    tokens = {}
    for policy in ("off", "chain:3"):
        system, events = systems.system(policy), []
        system.submit(Request("r", PROMPT, 8, policy))
        while not any(isinstance(event, End) for event in events):
            events += system.poll(0.0)
        tokens[policy] = [token for event in events if isinstance(event, Tokens) for token in event.token_ids]
    assert tokens["off"] == tokens["chain:3"]
    assert systems.system("off").planned.engine.model.tokenizer.decode(tokens["off"], True) in ("a", "ab")


@pytest.fixture
def endpoint(config):
    """All services, in a thread of their own."""
    loop, ready, found = asyncio.new_event_loop(), threading.Event(), []

    async def serve(stop: asyncio.Event) -> None:
        async with running_services(config) as services:
            found.append(services.door.endpoint)
            ready.set()
            await stop.wait()

    stop = asyncio.Event()
    thread = threading.Thread(target=lambda: loop.run_until_complete(serve(stop)))
    thread.start()
    assert ready.wait(60)
    yield found[0]
    loop.call_soon_threadsafe(stop.set)
    thread.join(30)
    loop.close()


def test_a_running_service_is_swept_through_its_port(endpoint, tmp_path):
    loads = ["--concurrency", "1 3", "--rates", "0.8", "--block-seconds", "3"]
    options = [*loads, "--rounds", "1", "--max-tokens", "12", "--limit", "4"]
    path = tmp_path / "report.json"
    command = ["bench", "sweep", "--target", endpoint, "--policies", "off chain:3 smart", *options, "--json", str(path)]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    report = json.loads(path.read_text())
    assert report["config"]["target"] == endpoint
    assert report["identical_outputs"] is True
    assert report["compared_outputs"] > 10
    assert {(row["policy"], row["concurrency"]) for row in report["rows"]} == {
        (policy, load) for policy in ("off", "chain:3", "smart", "oracle-fixed") for load in (1, 3)
    }
    chain = next(row for row in report["rows"] if row["policy"] == "chain:3")
    assert chain["tree_nodes"] > 0
    assert all(row["tokens_per_s"] > 0 for row in report["open_loop"])


def test_more_streams_than_the_service_runs_and_unknown_policies_are_refused(endpoint):
    def run(*options: str):
        return CliRunner().invoke(app, ["bench", "sweep", "--target", endpoint, "--limit", "2", *options])

    refused = run("--concurrency", "9", "--policies", "off")
    assert refused.exit_code == 2
    assert "runs 8 requests at once" in refused.stderr
    unreachable = CliRunner().invoke(app, ["bench", "sweep", "--target", "127.0.0.1:1"])
    assert unreachable.exit_code == 1
    assert "cannot reach 127.0.0.1:1" in unreachable.stderr
