"""What is said and declared about the two distributions."""

from __future__ import annotations

import re
import subprocess
import tomllib
from pathlib import Path

import pytest

import treeline

ROOT = Path(__file__).parent.parent
OTHERS_PACKAGE = re.compile(r"pip install[^\n&]*[\s'\"]treeline(?!-(client|serve)|/|\w)")
"""PyPI's `treeline` belongs to another project."""


@pytest.mark.parametrize(
    ("command", "wrong"),
    [
        ("pip install treeline", True),
        ("pip install -U 'treeline[serve]'", True),
        ("pip install treeline-client", False),
        ("pip install ./treeline .", False),
    ],
)
def test_the_pattern_knows_our_names(command, wrong):
    assert bool(OTHERS_PACKAGE.search(command)) == wrong


def test_no_page_or_message_installs_another_project():
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    texts = [
        ROOT / name for name in listed.split("\0") if name.endswith((".py", ".md", ".yml", "Dockerfile", "Makefile"))
    ]
    wrong = [
        path for path in texts if path.exists() and path != Path(__file__) and OTHERS_PACKAGE.search(path.read_text())
    ]
    assert not wrong


def test_all_public_python_versions_are_declared_alike():
    declared = [
        tomllib.loads((ROOT / name).read_text())["project"] for name in ("pyproject.toml", "treeline/pyproject.toml")
    ]
    assert len({(project["requires-python"], project["license"]) for project in declared}) == 1
    assert all(f"Programming Language :: Python :: 3.{n}" in p["classifiers"] for p in declared for n in (11, 12, 13))
    assert re.fullmatch(r"\d+\.\d+\.\d+", treeline.__version__)
