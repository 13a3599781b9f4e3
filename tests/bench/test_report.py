"""The report is what its command makes of the results."""

from __future__ import annotations

import json

from bench.report import REPORT, report


def test_the_report_is_generated_from_the_results():
    assert REPORT.read_text() == report()


def test_rows_become_lines_of_medians(tmp_path):
    made = {"machine": {"processor": "p", "cores": 2}, "versions": {"torch": "t"}}
    rows = [{"policy": "off", "rate": 10.12345, "rate_min": 9.0, "nothing": None}, {"policy": "smart", "setting": "x"}]
    (tmp_path / "a.json").write_text(json.dumps({**made, "rows": rows}))
    lines = report(tmp_path).splitlines()
    assert "## a" in lines
    assert lines[-4:] == [
        "| policy | rate | setting |",
        "| --- | --- | --- |",
        "| off | 10.12 |  |",
        "| smart |  | x |",
    ]
