"""CI notices what it does not test."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = """
import pytest

@pytest.mark.skip(reason="needs prometheus")
def test_a_service_is_missing(): pass

def test_a_package_is_missing(): pytest.importorskip("no_such_package")

@pytest.mark.skip(reason="no CUDA device")
def test_of_a_gpu(): pass
"""


@pytest.mark.parametrize(("ci", "outcome"), [("", "3 skipped"), ("true", "1 failed, 1 skipped, 1 error")])
def test_only_an_unexpected_skip_fails_and_only_in_ci(tmp_path, ci, outcome):
    shutil.copy(Path(__file__).with_name("conftest.py"), tmp_path)
    (tmp_path / "test_it.py").write_text(TESTS)
    command = [sys.executable, "-m", "pytest", "-rsf", "-p", "no:cacheprovider", "-c", os.devnull, tmp_path]
    done = subprocess.run(command, env={**os.environ, "CI": ci}, capture_output=True, text=True)
    assert f"{outcome} in" in done.stdout
