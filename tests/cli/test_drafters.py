"""`treeline distill` and `treeline eval-drafter`, from a tiny target to a head that is judged."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from cli.main import app
from tests.verifier_svc.services import save_tiny_model


def treeline(*arguments: object):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def target(tmp_path_factory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("models") / "target")


def distil(target: Path, out: Path, *options: object):
    small = ["--texts", 60, "--max-tokens", 64, "--slots", 20, "--epochs", 1, "--batch-tokens", 512]
    return treeline("distill", "--target", target, "--out", out, *small, "--draft-vocab", 64, "--threads", 1, *options)


@pytest.fixture(scope="module")
def head(target, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("head")
    prompts = out / "mine.jsonl"
    prompts.write_text(json.dumps({"id": 1, "category": "chat", "turns": ["how are you"]}) + "\n")
    result = distil(target, out, "--prompts", prompts)
    assert result.exit_code == 0, result.output
    assert "held-out texts" in result.stdout
    assert "drafter.head to this folder" in result.stdout
    return out


@pytest.fixture
def config_file(target, tmp_path) -> Path:
    model = {"model": str(target), "dtype": "float32", "threads": 1}
    path = tmp_path / "treeline.yaml"
    path.write_text(yaml.safe_dump({"verifier": {"target": model}, "drafter": {"kind": "ngram"}}))
    return path


def test_a_head_is_made_and_judged_with_its_parts(head, config_file, tmp_path):
    report = tmp_path / "report.json"
    options = ["--head", head, "--limit", 2, "--max-tokens", 12, "--json", report]
    result = treeline("eval-drafter", "-c", config_file, *options)
    assert result.exit_code == 0, result.output
    written = json.loads(report.read_text())
    assert {"machine", "versions", "config"} < set(written)
    assert written["config"]["drafter"] == "head+ngram"
    assert [row["drafter"] for row in written["rows"]] == ["head+ngram", "head", "ngram"]
    for row in written["rows"]:
        assert 0 <= row["top1"] <= row["top4"] <= 1
        assert row["positions"] == 2 * 11
        assert set(row["accepted_length"]) == set(row["predicted_speedup"]) == {"chain:5", "tree:16"}
        assert min(row["accepted_length"].values()) >= 1
    assert written["top1"] == written["rows"][0]["top1"]
    assert written["draft_pass_ratio"] > 0
    assert set(written["by_category"]) == {"chat"}
    assert set(written["by_drafter_and_category"]) == {"head+ngram", "head", "ngram"}
    assert "of a target pass over 1 token" in result.stdout


def test_distilling_again_finds_it_done(head, target):
    files = {path: path.stat().st_mtime_ns for path in head.rglob("*.safetensors")}
    result = distil(target, head, "--prompts", head / "mine.jsonl")
    assert result.exit_code == 0, result.output
    texts = {path: seen for path, seen in files.items() if path.parent != head}
    assert texts
    assert all(path.stat().st_mtime_ns == seen for path, seen in texts.items())


def test_a_drafter_without_a_head_is_judged_alone(config_file, tmp_path):
    report = tmp_path / "report.json"
    result = treeline("eval-drafter", "-c", config_file, "--limit", 1, "--max-tokens", 8, "--json", report)
    assert result.exit_code == 0, result.output
    assert [row["drafter"] for row in json.loads(report.read_text())["rows"]] == ["ngram"]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["distill", "--out", "x", "--device", "tpu"], "auto, cpu or cuda"),
        (["distill", "--out", "x", "--target", "/no/such/model"], "/no/such/model"),
        (["distill", "--out", "x", "--prompts", "none.jsonl"], "none.jsonl"),
        (["eval-drafter", "--prompts", "none.jsonl"], "none.jsonl"),
        (["eval-drafter", "--config", "none.yaml"], "none.yaml"),
    ],
)
def test_wrong_input_is_one_line(arguments, named):
    result = treeline(*arguments)
    assert result.exit_code == 2
    assert named in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_a_folder_without_a_head_is_one_line(config_file, tmp_path):
    result = treeline("eval-drafter", "-c", config_file, "--head", tmp_path, "--limit", 1)
    assert result.exit_code == 2
    assert str(tmp_path) in result.stderr
