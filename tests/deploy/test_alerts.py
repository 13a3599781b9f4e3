"""The alerts: each fires on its case alone, says what is wrong, and has an entry in the operators' guide."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "deploy/prometheus"
RULES, _ = (group["rules"] for group in yaml.safe_load((FOLDER / "rules.yml").read_text())["groups"])
CASES = Path(__file__).with_name("rules.test.yml")
GUIDE = ROOT / "docs/alerts.md"


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule["alert"])
def test_every_alert_says_what_is_wrong_and_what_to_do(rule):
    assert {"for", "keep_firing_for"} <= rule.keys()
    assert rule["labels"]["severity"] in ("warning", "critical")
    assert rule["annotations"].keys() == {"summary", "description", "runbook"}
    page, _, anchor = rule["annotations"]["runbook"].partition("#")
    assert (ROOT / page, anchor) == (GUIDE, rule["alert"].lower())


def test_the_guide_and_the_cases_cover_the_alerts():
    alerts = [rule["alert"] for rule in RULES]
    assert re.findall(r"^## (\w+)$", GUIDE.read_text(), flags=re.MULTILINE) == alerts
    fired = set()
    for case in yaml.safe_load(CASES.read_text())["tests"]:
        for expected in case["promql_expr_test"]:
            fired |= {sample["labels"] for sample in expected["exp_samples"]}
    assert fired == {f'{{alertname="{alert}"}}' for alert in alerts}


@pytest.mark.skipif(not shutil.which("promtool"), reason="needs promtool")
def test_every_alert_fires_on_its_case_alone():
    tested = subprocess.run(["promtool", "test", "rules", CASES], capture_output=True, text=True)
    assert tested.returncode == 0, tested.stdout + tested.stderr
