"""The step taken apart, the late long prompt, the memory: on a tiny real model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from bench.common import Prompt
from bench.engine import run_engine
from bench.local_engine import PlannedEngine, Streams, encode
from bench.stall import long_text, run_stall
from bench.stopwatch import PHASES, PLANNER, watch
from cli.main import app
from lm.model import LanguageModel
from tests.lm.tiny import tiny_llama
from tests.verifier_svc.services import save_tiny_model, tiny_config
from treeline.config import Config, DrafterConfig
from verifier_svc.engine.request import Chunk
from verifier_svc.service.profile import profile_verification


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Config:
    folder = save_tiny_model(tmp_path_factory.mktemp("models") / "target")
    plain = tiny_config(folder)
    return tiny_config(folder, DrafterConfig(kind="model+ngram", model=plain.verifier.target))


@pytest.fixture(scope="module")
def planned(config) -> PlannedEngine:
    model = LanguageModel.load(config.verifier.target)
    return PlannedEngine(model, config, profile_verification(model, model.new_cache(1024, 16)))


@pytest.fixture(scope="module")
def prompts(planned) -> list[list[int]]:
    texts = ("one two three", "a b a b a b", "hello")
    return [encode(planned.engine.model.tokenizer, Prompt(text, "chat", text)) for text in texts]


def test_phases_add_up_to_the_step_and_the_engine_is_left_as_it_was(planned, prompts):
    engine = planned.engine
    before = dict(vars(engine)), dict(vars(engine.draft_stage)), dict(vars(engine.scheduler))
    with watch(planned) as stopwatch:
        load = Streams(planned, prompts, "chain:3", 40, streams=2)
        for _ in range(6):
            stopwatch.take()
            load.step()
            seconds = stopwatch.take()
        record = planned.steps[-1].record
        load.close()
    assert record.verified_nodes > 0
    assert set(seconds) == {*PHASES, PLANNER}
    assert min(seconds.values()) >= 0
    assert seconds["draft passes"] > 0
    # The engine's own clock starts a little later and stops before the last outputs are made.
    assert record.step_s < sum(seconds[phase] for phase in PHASES) < 2 * record.step_s
    assert seconds["verification pass"] + seconds["sample, walk"] == pytest.approx(record.verify_s, rel=0.5)
    assert (vars(engine).keys(), vars(engine.draft_stage).keys(), vars(engine.scheduler).keys()) == tuple(
        part.keys() for part in before
    )


def test_a_row_for_every_phase_policy_and_load(planned, prompts):
    told: list[str] = []
    rows, overheads = run_engine(planned, prompts, ["off", "chain:2"], [1, 3], 4, 30, told.append)
    assert [(row.policy, row.sequences, row.phase) for row in rows] == [
        (policy, count, phase) for count in (1, 3) for policy in ("off", "chain:2") for phase in PHASES
    ]
    for overhead in overheads:
        shares = [r.share for r in rows if (r.policy, r.sequences) == (overhead.policy, overhead.sequences)]
        assert sum(shares) == pytest.approx(1)
        assert 0 < overhead.bookkeeping_share < overhead.outside_models_share < 1
        assert overhead.steps == 4
        assert (overhead.verified_nodes > 0) == (overhead.policy == "chain:2")
    assert len(told) == 4


def test_streams_stay_busy_and_waits_behind_a_long_prompt_are_told(planned, prompts):
    load = Streams(planned, prompts, "off", 5, streams=3)
    seen = [{o.request_id for o in load.step() if isinstance(o.item, Chunk)} for _ in range(12)]
    load.close()
    assert len(set().union(*seen)) > 3  # successors came
    assert max(map(len, seen)) == 3
    late = long_text(prompts, 80)
    assert len(late) == 80
    (row,) = run_stall(planned, prompts, late, ["off"], 3, 2, 100)
    assert (row.policy, row.streams, row.prompt_tokens) == ("off", 3, 80)
    assert row.prompt_steps >= 80 / 32  # the configured chunk
    assert 0 < row.longest_wait_steps_min <= row.longest_wait_steps <= row.longest_wait_steps_max
    assert row.ttft_ms >= row.decode_step_ms * row.longest_wait_steps_min / 2
    assert not planned.engine.has_work


def test_the_command_writes_everything(config, tmp_path: Path, monkeypatch):
    monkeypatch.setenv("TREELINE_CACHE", str(tmp_path / "cache"))
    path, report = tmp_path / "treeline.yaml", tmp_path / "report.json"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    options = ["--sequences", "2", "--steps", "3", "--long-prompt", "70", "--rounds", "1", "--limit", "4"]
    result = CliRunner().invoke(app, ["bench", "engine", "-c", str(path), *options, "--json", str(report)])
    assert result.exit_code == 0, result.output
    written = json.loads(report.read_text())
    assert {"machine", "versions", "config"} < set(written)
    assert {(row["policy"], row["sequences"]) for row in written["rows"]} == {("off", 2), ("smart", 2)}
    assert {row["policy"] for row in written["long_prompt"]} == {"off", "smart"}
    memory = written["memory"]
    assert memory["peak_mb"] >= memory["loaded_mb"] > memory["python_mb"] > 0
    weights = sum(parameter.numel() for parameter in tiny_llama().parameters()) * 4 / 1e6
    assert memory["weights_mb"] == pytest.approx(weights)
    assert memory["target_mb"] == pytest.approx(1.6 * memory["weights_mb"] + memory["kv_pool_mb"] + 400)
    assert "where a step's time goes" in result.stdout


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (["--policies", "fast"], "unknown policy 'fast'"),
        (["--policies", ""], "at least one policy"),
        (["--sequences", "two"], "numbers separated by spaces"),
        (["--long-prompt", "5000"], "exceeds"),
    ],
)
def test_bad_input_gets_one_line(config, tmp_path, options, problem):
    path = tmp_path / "treeline.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    result = CliRunner().invoke(app, ["bench", "engine", "-c", str(path), *options])
    assert result.exit_code == 2, result.output
    assert problem in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
