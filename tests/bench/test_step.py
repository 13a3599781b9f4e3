"""The cost of a pass: complete rows, honest limits."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from bench.simulator.devices import measured
from bench.step.bound import bound_answer
from bench.step.limits import MachineLimit, ModelSize, Point, measure_limit
from bench.step.measure import Subject, grid, head_subject, model_subject, run_step
from bench.step.passes import transformers_passes, treeline_passes
from bench.step.shapes import SHAPES, random_model
from cli.main import app
from lm.model import LanguageModel
from lm.packed import PackedSequence
from tests.lm.tiny import tiny_llama, tiny_tokenizer
from tests.lm.tiny_head import tiny_head
from treeline.config import ModelConfig
from treeline.errors import ConfigError

CPU = torch.device("cpu")
POINTS = [Point(1, 1, 16), Point(4, 2, 16)]


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "tiny"
    tiny_llama().save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


@pytest.fixture
def model():
    return LanguageModel.from_hf(tiny_llama(), tiny_tokenizer())


def test_the_grid_gives_every_sequence_a_token():
    points = grid()
    assert len(points) == len(set(points)) == 2 * (7 + 5 + 4 + 3)
    assert all(point.tokens >= point.sequences for point in points)


def test_every_point_has_a_row_for_both_systems(folder):
    config = ModelConfig(model=str(folder), dtype="float32", device="cpu")
    seen = []
    subjects = [model_subject("target", config), model_subject("drafter", config)]
    result = run_step(subjects, POINTS, 2, seen.append)
    assert len(seen) == 1 + 2 * len(POINTS)
    assert [(r["model"], r["tokens"], r["sequences"], r["context"]) for r in result.rows] == [
        (name, p.tokens, p.sequences, p.context) for name in ("target", "drafter") for p in POINTS
    ]
    for row in result.rows:
        assert 0 < row["ours_ms_min"] <= row["ours_ms"] <= row["ours_ms_max"]
        assert 0 < row["transformers_ms_min"] <= row["transformers_ms"] <= row["transformers_ms_max"]
        assert row["limit_ms"] > 0
        assert row["grammar_ms_min"] <= row["grammar_ms"] <= row["grammar_ms_max"]
    assert result.limit_json().keys() == {"read_gb_s", "gemm_gflop_s", "pass_ms"}
    assert result.limit_json()["pass_ms"] == result.rows[0]["limit_ms"]


def test_a_draft_head_is_measured_like_a_draft_model(folder, model):
    target = model_subject("target", ModelConfig(model=str(folder), dtype="float32", device="cpu"))
    subjects = [target, head_subject(tiny_head(model.hf), 512)]
    result = run_step(subjects, POINTS, 1)
    rows = [row for row in result.rows if row["model"] == "drafter"]
    assert [row["tokens"] for row in rows] == [1, 4]
    assert all(row["ours_ms"] > 0 and row["transformers_ms"] is None for row in rows)


def test_a_subject_may_be_any_pass_and_points_beyond_its_context_are_left_out(model):
    head = Subject("drafter", None, 64, model.dtype, CPU, {"treeline": treeline_passes(model)})
    result = run_step([head], [Point(1, 1, 16), Point(1, 1, 64)], 1)
    (row,) = result.rows
    assert (row["context"], row["transformers_ms"], row["limit_ms"]) == (16, None, None)


@pytest.mark.parametrize("system", ["treeline", "transformers"])
def test_a_pass_gives_a_row_of_logits_a_token_and_can_be_repeated(model, system):
    point = Point(6, 3, 20)
    make = treeline_passes(model) if system == "treeline" else transformers_passes(tiny_llama(), model.layers)
    measured = make(point)
    first = measured.forward()
    measured.reset()
    again = measured.forward()
    measured.reset()
    assert first.shape == (6, 260)
    assert torch.equal(first, again)
    with pytest.raises(ValueError, match="evenly"):
        make(Point(5, 3, 20))


def test_tokens_of_a_bound_pass_are_those_that_its_grammar_allows(model):
    measured = treeline_passes(model, bound_answer(model))(Point(6, 3, 20))
    line_end, letter = model.tokenizer("\nx", add_special_tokens=False).input_ids
    logits = torch.zeros(6, 260)
    logits[:, line_end], logits[:, letter] = 2, 1  # no line ends in a text in JSON
    assert measured.choose(logits) == [line_end] * 6
    assert measured.choose_bound(logits) == [letter] * 6


def test_the_limit_is_the_slower_of_reading_and_computing():
    assert all(value > 0 for value in vars(measure_limit(torch.float32, CPU, read_bytes=1 << 20)).values())
    size = ModelSize(weight_bytes=10**9, token_flops=10**9, entry_bytes=0, entry_flops=0)
    limit = MachineLimit(read_gb_s=10, gemm_gflop_s=100)
    assert limit.pass_ms(size, Point(1, 1, 128)) == pytest.approx(100)
    assert limit.pass_ms(size, Point(64, 1, 128)) == pytest.approx(640)
    cached = ModelSize(weight_bytes=0, token_flops=0, entry_bytes=10**6, entry_flops=10**6)
    assert limit.pass_ms(cached, Point(2, 2, 100)) == pytest.approx(20)
    assert limit.pass_ms(cached, Point(64, 1, 100)) == pytest.approx(64)


def test_a_model_is_read_once_without_the_rows_it_only_looks_up(model):
    hf = tiny_llama()
    weights = sum(p.numel() for p in hf.parameters())
    size = ModelSize.of(hf, model)
    assert size.weight_bytes == 4 * (weights - 260 * 48)
    assert size.token_flops == 2 * (weights - 260 * 48 - 5 * 48)
    assert size.entry_bytes == 4 * 2 * 2 * (8 + 8)


def test_the_command_writes_its_report(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("bench.step.measure.QUICK", tuple(POINTS))
    config, report = tmp_path / "c.yaml", tmp_path / "r.json"
    config.write_text(f"verifier: {{target: {{model: {folder}, dtype: float32}}}}\n")
    arguments = ["--config", str(config), "--quick", "--repeats", "1", "--json", str(report)]
    result = CliRunner().invoke(app, ["bench", "step", *arguments])
    assert result.exit_code == 0, result.output
    assert "target: milliseconds of a pass" in result.stdout
    written = json.loads(report.read_text())
    assert written.keys() == {"machine", "versions", "config", "rows", "limit"}
    assert len(written["rows"]) == 2
    assert written["rows"][0].keys() >= {"model", "tokens", "sequences", "context", "ours_ms", "transformers_ms"}


def test_a_shape_of_random_weights_is_measured_and_its_curves_can_be_simulated(tmp_path, monkeypatch):
    monkeypatch.setattr("bench.step.measure.QUICK", tuple(POINTS))
    monkeypatch.setattr("verifier_svc.service.profile.BUDGET_S", 0.5)
    config, report, curves = tmp_path / "c.yaml", tmp_path / "r.json", tmp_path / "curves.json"
    config.write_text("verifier: {target: {dtype: float32, device: cpu}, kv_cache_tokens: 512}\n")
    arguments = ["--config", str(config), "--quick", "--repeats", "1", "--json", str(report), "--curves", str(curves)]
    result = CliRunner().invoke(app, ["bench", "step", "--shape", "llama-tiny", *arguments])
    assert result.exit_code == 0, result.output
    rows = json.loads(report.read_text())["rows"]
    assert [row["tokens"] for row in rows] == [1, 4]
    assert all(row["ours_ms"] > 0 and row["limit_ms"] > 0 and row["transformers_ms"] is None for row in rows)
    assert measured(curves, 0.0, 0.0).profile.verify[0].tokens[0] == 1


def test_random_weights_have_finite_logits_and_the_shape_they_should():
    made = random_model("llama-tiny", ModelConfig(dtype="bfloat16", device="cpu"))
    cache = made.new_cache(64, 16)
    logits = made.forward([PackedSequence(cache.allocate(5), [1, 2, 3, 4, 5])], cache)
    assert logits.shape == (5, 512)
    assert logits.isfinite().all()
    assert logits.std() > 0
    with torch.device("meta"):
        big = AutoModelForCausalLM.from_config(SHAPES["llama-8b"])
    assert sum(p.numel() for p in big.parameters()) == 8_030_261_248
    with pytest.raises(ConfigError, match="llama-tiny"):
        random_model("llama-9b", ModelConfig())
