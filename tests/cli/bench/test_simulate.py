from __future__ import annotations

import json
import os

import pytest
from typer.testing import CliRunner

from cli.main import app


def test_simulate_prints_a_table_and_writes_report_and_picture(tmp_path, monkeypatch):
    def fork():
        raise AssertionError("a forked worker may find locks taken by threads that it does not have")

    monkeypatch.setattr(os, "fork", fork)
    report, picture = tmp_path / "simulated.json", tmp_path / "simulated.png"
    disturbed = ["--conditions", "steady overlapped"]
    options = ["--policies", "off chain:2", "--loads", "1 2", "--steps", "800", "--seed", "3", *disturbed]
    result = CliRunner().invoke(app, ["simulate", *options, "--json", str(report), "--plot", str(picture)])
    assert result.exit_code == 0, result.output
    assert "| load | policy |" in result.stdout
    assert "steps per second" in result.stdout
    written = json.loads(report.read_text())
    assert [row["policy"] for row in written["rows"]] == ["off", "chain:2", "oracle-fixed"] * 4
    assert [row["conditions"] for row in written["rows"][::6]] == ["steady", "overlapped"]
    assert written["config"]["device"] == "llama-8b@h100"
    assert {"machine", "versions"} <= set(written)
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--preset", "llama-8b@abacus"], "llama-8b@h100"),
        (["--policies", "fastest"], "fastest"),
        (["--loads", "poisson:x"], "poisson"),
        (["--loads", ""], "at least one"),
        (["--conditions", "windy"], "noisy-neighbour"),
        (["--curves", "none.json"], "none.json"),
        (["--trace", "none.jsonl"], "none.jsonl"),
    ],
)
def test_wrong_input_is_one_line(options, named):
    result = CliRunner().invoke(app, ["simulate", *options])
    assert result.exit_code == 2
    assert named in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
