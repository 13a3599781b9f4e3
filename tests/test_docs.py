"""Generated pages are current, and links lead somewhere."""

from __future__ import annotations

import importlib.util
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LINK = re.compile(r"\[[^\]]*\]\((?!https?:|#)([^)#\s]+)")


def markdown() -> list[str]:
    return subprocess.run(["git", "ls-files", "*.md"], cwd=ROOT, capture_output=True, text=True).stdout.split()


def test_generated_pages_are_current():
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs/generate.py")
    generate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generate)
    for path, text in generate.pages().items():
        assert path.read_text() == text, f"{path.name} is old: run `make docs`"


@pytest.mark.parametrize("page", markdown())
def test_links_lead_somewhere(page):
    for link in LINK.findall((ROOT / page).read_text()):
        assert ((ROOT / page).parent / link).exists(), link
