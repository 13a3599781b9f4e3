"""The check of a GPU, at toy size: its own code works before a device is ever paid for."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from tests.verifier_svc.services import save_tiny_model

START = """
import sys
from dataclasses import replace
import lm.cuda.attention
lm.cuda.attention.SPLITS = 2  # The interpreter runs programs without work as well.
from pathlib import Path
from bench.gpu_check import __main__ as command
heavy = {"ray", "grpc", "typer", "google.rpc", "cli"} & sys.modules.keys()  # The arms need some of them, later.
wrong = command.check(replace(command.toy(), target=sys.argv[2]), 300, Path(sys.argv[1]))
sys.exit(str(wrong or heavy) if wrong or heavy else 0)
"""


PARTS = ["machine", "attention", "passes", "sampling", "fp8", "model", "head"]
PARTS += ["host work", "arms", "second model", "training"]


@pytest.mark.timeout(600)
def test_every_part_runs_and_imports_no_service(tmp_path):
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    target, out = save_tiny_model(tmp_path / "target"), tmp_path / "out"
    run = subprocess.run([sys.executable, "-c", START, out, target], capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stdout + run.stderr[-2000:]
    found = json.loads((out / "gpu_check.json").read_text())
    assert list(found) == PARTS
    assert found["head"]["layer_ms"] > 0
    assert found["attention"]["rows"][0]["error"] < 1e-5
    assert found["model"]["rows"][0]["how"] == found["second model"]["rows"][0]["how"] == "eager"
    rows = found["arms"]["rows"]
    assert [(row["policy"], row["streams"]) for row in rows if row["policy"] == "smart"] == [("smart", 1), ("smart", 2)]
    assert max(row["accepted_length"] for row in rows) > 1.5
    assert found["sampling"]["rows"][0]["same"] == 1.0
    assert [row["nodes"] for row in found["host work"]["rows"]] == [0, 3]
    assert found["training"]["trained_tokens"] > found["training"]["written_tokens"] > 60 * 30
    before, after = found["training"]["loss"]
    assert after < before
    assert len(found["training"]["top4"]) == 2


def test_what_goes_wrong_is_kept_and_said(tmp_path, monkeypatch):
    import tests.lm.interpreter  # noqa: F401
    from bench.gpu_check import __main__ as command

    def broken() -> dict:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(command, "parts", lambda scale: iter([("broken", broken), ("late", dict)]))
    monkeypatch.setattr(command.time, "perf_counter", iter([0.0, 0.0, 1.0, 9.0]).__next__)
    wrong = command.check(command.toy(), 5, tmp_path)
    assert "no such kernel" in wrong[0]
    assert wrong[1] == "late: no time was left"
    assert set(json.loads((tmp_path / "gpu_check.json").read_text())) == {"broken", "late"}


def test_without_a_gpu_it_says_what_it_would_do_and_fails(tmp_path, monkeypatch, capsys):
    import tests.lm.interpreter  # noqa: F401
    from bench.gpu_check import __main__ as command

    monkeypatch.setattr(sys, "argv", ["gpu_check", "--out", str(tmp_path)])
    monkeypatch.setattr(command.torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="no CUDA device"):
        command.main()
    assert capsys.readouterr().out.startswith("parts: machine, attention, passes, sampling, fp8, model")
    assert not list(tmp_path.iterdir())


def test_a_load_under_which_smart_loses_is_named():
    import tests.lm.interpreter  # noqa: F401
    from bench.gpu_check.arms import _slow
    from bench.load import Measured
    from bench.sweep import Block, Result

    rates = {1: {"off": 100, "chain:2": 200, "smart": 199}, 8: {"off": 300, "chain:2": 250, "smart": 290}}
    results = [
        Result(Block("closed", streams, 1, policy), Measured(rate, 1, 0, None, None, None, 0), [])
        for streams, by_policy in rates.items()
        for policy, rate in by_policy.items()
    ]
    assert _slow(results) == ["smart reaches 0.97 of off at 8 streams"]
