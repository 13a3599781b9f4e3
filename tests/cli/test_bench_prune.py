import json

from typer.testing import CliRunner

from cli.main import app


def test_bench_prune_times_the_fast_path_and_writes_a_report(tmp_path):
    report = tmp_path / "prune.json"
    result = CliRunner().invoke(
        app, ["bench", "prune", "--requests", "3", "--nodes", "5", "--repeats", "4", "--json", str(report)]
    )
    assert result.exit_code == 0, result.output
    assert "prune_batch" in result.output
    written = json.loads(report.read_text())
    assert written["config"]["requests"] == 3
    assert {row["what"] for row in written["rows"]} == {"prune_batch", "cut trees", "gate"}
    assert all(0 < row["us_min"] <= row["us"] <= row["us_max"] for row in written["rows"])
