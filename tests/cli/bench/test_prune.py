from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from cli.main import app


def test_bench_prune_times_the_fast_path_and_writes_a_report(tmp_path):
    report = tmp_path / "prune.json"
    sizes = ["--requests", "1 3", "--nodes", "5", "--repeats", "4"]
    result = CliRunner().invoke(app, ["bench", "prune", *sizes, "--json", str(report)])
    assert result.exit_code == 0, result.output
    assert "| prune_batch |" in result.output
    written = json.loads(report.read_text())
    assert written["config"]["requests"] == [1, 3]
    assert [(row["requests"], row["nodes"]) for row in written["rows"][::6]] == [(1, 5), (3, 5)]
    decisions = {"prune_batch", "cut trees", "gate", "gate, drafting", "another_layer", "grow trees"}
    assert {row["what"] for row in written["rows"]} == decisions
    assert all(0 < row["us_min"] <= row["us"] <= row["us_max"] for row in written["rows"])


@pytest.mark.parametrize("requests", ["", "0", "many", "1,8", "1000000"])
def test_what_is_no_number_of_requests_is_one_line(requests):
    result = CliRunner().invoke(app, ["bench", "prune", "--requests", requests])
    assert result.exit_code == 2
    assert "--requests" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
