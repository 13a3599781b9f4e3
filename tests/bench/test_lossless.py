"""Greedy answers beside those of transformers: on a tiny real model."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from typer.testing import CliRunner

import bench.lossless
from bench.common import Prompt
from bench.local_engine import encode
from bench.lossless import difference, run_lossless, truncated_drafter
from bench.peers.transformers import generate_one_by_one
from bench.step.passes import load_transformers
from cli.main import app
from lm.model import LanguageModel
from tests.verifier_svc.services import save_tiny_model
from treeline.config import DrafterConfig, ModelConfig

PROMPTS = [Prompt("short", "chat", "hello"), Prompt("repeats", "chat", "a b a b a b a b")]
MAX_TOKENS = 12


@pytest.fixture(scope="module")
def target(tmp_path_factory) -> ModelConfig:
    folder = save_tiny_model(tmp_path_factory.mktemp("models") / "target")
    return ModelConfig(model=str(folder), dtype="float32", threads=1)


def test_every_drafter_and_policy_gives_the_answers_of_transformers(target, tmp_path):
    cut = truncated_drafter(target.model, 1, tmp_path / "cut")
    drafters = {
        "ngram": DrafterConfig(kind="ngram"),
        "model": DrafterConfig(kind="model", model=ModelConfig(model=str(cut), dtype="float32", threads=1)),
    }
    begun: list[str] = []
    rows = run_lossless(target, drafters, PROMPTS, MAX_TOKENS, ("off", "chain:3"), begun.append)
    ran = [(name, policy, batch) for name in drafters for policy, batch in (("off", 1), ("chain:3", 1), ("mixed", 8))]
    assert [(row["drafter"], row["policy"], row["batch"]) for row in rows] == ran
    assert begun[2:] == [f"{name}, {policy}, batch {batch}" for name, policy, batch in ran]
    assert all((row["identical"], row["tokens"]) == (2, 2 * MAX_TOKENS) for row in rows)
    accepted = {(row["drafter"], row["policy"]): row["accepted_nodes"] for row in rows}
    assert accepted["ngram", "off"] == 0
    assert accepted["model", "chain:3"] > 0


def test_a_wrong_token_is_found_with_what_the_target_thinks_of_it(target):
    model = LanguageModel.load(target)
    hf = load_transformers(target.model, model)
    token_ids = encode(model.tokenizer, PROMPTS[0])
    (answer,) = generate_one_by_one(hf, MAX_TOKENS)([token_ids], 1)
    assert difference(hf, PROMPTS[0], token_ids, answer, answer) is None
    wrong = [*answer[:5], (answer[5] + 1) % 10, *answer[6:]]
    found = difference(hf, PROMPTS[0], token_ids, answer, wrong)
    assert found is not None
    assert (found.prompt, found.position) == ("short", 5)
    assert found.logit_gap > 0
    ended_early = difference(hf, PROMPTS[0], token_ids, answer, answer[:-1])
    assert ended_early is not None
    assert (ended_early.position, ended_early.logit_gap) == (MAX_TOKENS - 1, math.inf)


def test_the_command_fails_when_an_answer_differs(target, tmp_path, monkeypatch):
    prompts, report = tmp_path / "prompts.jsonl", tmp_path / "report.json"
    prompts.write_text(json.dumps({"id": "short", "category": "chat", "turns": ["hello"]}) + "\n")

    def run(into: Path) -> int:
        options = f"--target {target.model} --max-tokens 6 --draft-layers 1 --prompts {prompts} --json {into}"
        return CliRunner().invoke(app, ["bench", "lossless", *options.split()]).exit_code

    assert run(report) == 0
    assert {row["identical"] for row in json.loads(report.read_text())["rows"]} == {1}
    monkeypatch.setattr(bench.lossless, "greedy_answers", lambda *arguments: ([[0]], 0))
    assert run(report) == 1
