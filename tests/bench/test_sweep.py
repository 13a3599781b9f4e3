"""What a sweep runs, in which order, and what its command writes: a tiny real model with a real planner."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from bench.common import Prompt
from bench.load import Measured, Window, measure
from bench.sweep import (
    MIN_SUCCESSORS,
    Block,
    Settings,
    checked_policies,
    closed_blocks,
    closed_requests,
    open_blocks,
)
from cli.bench.sweep import POLICIES
from cli.main import app
from tests.verifier_svc.services import save_tiny_model
from treeline.errors import ConfigError

SETTINGS = Settings(("off", "chain:2", "smart"), (1, 4), (0.5,), rounds=3, max_tokens=16, block_s=20.0, seed=0)
MEASURES = ("tokens_per_s", "accepted_length", "tree_nodes", "ttft_ms_p50", "itl_ms_p50", "itl_ms_p95")


def order(blocks: list[Block], load: float) -> list[str]:
    rounds: dict[int, list[str]] = {}
    for block in blocks:
        if block.load == load:
            rounds.setdefault(block.round, []).append(block.policy)
    return [" ".join(policies) for policies in rounds.values()]


def test_policies_take_turns_in_every_round_and_each_of_them_goes_first():
    rounds = ["off chain:2 smart", "chain:2 smart off", "smart off chain:2"]
    assert [block.load for block in closed_blocks(SETTINGS)] == [1] * 12 + [4] * 12
    assert order(closed_blocks(SETTINGS), 1) == order(closed_blocks(SETTINGS), 4) == [rounds[0], *rounds]
    assert order(open_blocks(SETTINGS), 0.5) == rounds


def test_beginnings_are_spread_over_all_policies_however_few_rounds_there_are():
    settings = replace(SETTINGS, policies=("off", "a", "b", "c"), rounds=2)
    assert order(closed_blocks(settings), 1) == ["off a b c", "off a b c", "b c off a"]


def test_by_default_every_policy_is_swept():
    names = {policy.partition(":")[0] for policy in checked_policies(POLICIES.split())}
    assert names == {
        "off", "chain", "static", "sequoia", "eagle2", "opt-tree", "smartspec", "sglang-ema", "vllm-adaptive",
        "cast", "smart-paper", "smart",
    }  # fmt: skip


def test_all_policies_of_a_round_are_asked_the_same_and_rounds_differ():
    prompts = [Prompt(str(number), "chat", "one two") for number in range(80)]

    def asked(policy: str, round_: int) -> list[tuple[str, int]]:
        block = Block("closed", 4, round_, policy)
        return [(r.prompt.id, r.max_tokens) for r in closed_requests(block, prompts, 16)]

    assert asked("off", 1) == asked("smart", 1)
    assert [tokens for _, tokens in asked("off", 1)] == [4, 8, 12, 16] + [16] * MIN_SUCCESSORS
    assert not {prompt for prompt, _ in asked("off", 1)} & {prompt for prompt, _ in asked("off", 2)}
    assert [tokens for _, tokens in asked("off", 0)] == [16] * 4


def test_plain_decoding_is_always_swept():
    assert checked_policies(["smart", " chain:2", "smart"]) == ("off", "smart", "chain:2")
    assert checked_policies(["smart", "off"]) == ("smart", "off")
    with pytest.raises(ConfigError, match="unknown policy 'fast'"):
        checked_policies(["fast"])


@pytest.fixture(scope="module")
def config_file(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sweep")
    model = {"model": str(save_tiny_model(folder / "target")), "dtype": "float32", "threads": 1}
    config = {
        "verifier": {"target": model, "kv_cache_tokens": 1024, "prefill_chunk_tokens": 512},
        "drafter": {"kind": "model+ngram", "model": model},
        "limits": {"max_context_tokens": 512, "max_running_requests": 2, "max_tree_nodes": 16},
    }
    path = folder / "treeline.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def run(config_file: Path, *options: str, policies: str = "off chain:3 eagle2:2,2,4 smart"):
    loads = ["--policies", policies, "--concurrency", "1,4", "--rounds", "2", "--max-tokens", "8"]
    command = [
        "bench",
        "sweep",
        "--config",
        str(config_file),
        *loads,
        "--rates",
        "0.7",
        "--limit",
        "6",
        "--block-seconds",
        "1",
    ]
    return CliRunner().invoke(app, [*command, *options])


def test_the_command_writes_everything(config_file, tmp_path):
    file = tmp_path / "report.json"
    result = run(config_file, "--json", str(file))
    assert result.exit_code == 0, result.output
    report = json.loads(file.read_text())
    assert {"machine", "versions", "config"} < set(report)
    assert report["config"]["complete"] is True
    assert report["config"]["policies"] == ["off", "chain:3", "eagle2:2,2,4", "smart"]

    swept = {(row["policy"], row["concurrency"]) for row in report["rows"]}
    assert swept == {(p, c) for p in [*report["config"]["policies"], "oracle-fixed"] for c in (1, 4)}
    for row in report["rows"]:
        assert row["rounds"] == 2
        for name in MEASURES:
            assert row[f"{name}_min"] <= row[name] <= row[f"{name}_max"], name
    by_policy = {row["policy"]: row for row in report["rows"] if row["concurrency"] == 4}
    assert by_policy["off"]["tree_nodes"] == 0
    assert by_policy["off"]["accepted_length"] == 1
    assert by_policy["chain:3"]["accepted_length"] > 2  # the target drafts for itself
    assert {row["rate"] for row in report["open_loop"]} == {0.7}
    assert all(row["requests_per_s"] > 0 and not row["rejected"] for row in report["open_loop"])

    assert report["identical_outputs"] is True
    assert report["different_outputs"] == []
    assert report["compared_outputs"] > 50
    assert [row["concurrency"] for row in report["ratios"]] == [1, 4]
    assert "Open loop" in result.stdout
    assert f"0 of {report['compared_outputs']} answers differ" in result.stdout


def test_drafts_of_a_given_quality_are_swept_without_a_drafter(config_file, tmp_path):
    report = tmp_path / "report.json"
    options = ["--acceptance", "0.9,0.05", "--rates", "", "--json", str(report)]
    result = run(config_file, *options, policies="off chain:3")
    assert result.exit_code == 0, result.output
    written = json.loads(report.read_text())
    assert written["config"]["acceptance"] == "0.9,0.05"
    assert written["identical_outputs"] is True
    chains = [row for row in written["rows"] if row["policy"] == "chain:3"]
    assert all(2 < row["accepted_length"] < 4 for row in chains)


def test_ctrl_c_writes_what_has_been_measured(config_file, tmp_path, monkeypatch):
    windows = []

    def interrupted(window: Window) -> Measured:
        windows.append(window)
        if len(windows) == 4:
            raise KeyboardInterrupt
        return measure(window)

    monkeypatch.setattr("bench.sweep.measure", interrupted)
    result = run(config_file, "--json", str(tmp_path / "report.json"), policies="off chain:2")
    assert result.exit_code == 130
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["config"]["complete"] is False
    rounds = {row["policy"]: row["rounds"] for row in report["rows"] if row["policy"] != "oracle-fixed"}
    assert sorted(rounds.values()) == [1, 2]


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (["--concurrency", "1 x"], "numbers separated by spaces"),
        (["--concurrency", "0"], "numbers above 0"),
        (["--concurrency", ""], "at least one number of streams"),
        (["--target", "127.0.0.1:1"], "leave out --target"),
        (["--acceptance", "0.9,0.9"], "adding up to 1 at most"),
        (["--json-schema", "nowhere"], "cannot read nowhere"),
        (["--max-tokens", "500"], "exceeds limits.max_context_tokens"),
    ],
)
def test_bad_input_gets_one_line(config_file, options, problem):
    result = run(config_file, *options)
    assert result.exit_code == 2
    assert problem in result.stderr
