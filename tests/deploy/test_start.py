"""How `treeline serve` starts, and how it says that it cannot."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.verifier_svc.services import save_tiny_model, tiny_config

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def target(tmp_path_factory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("models") / "target")


def serve(folder: Path, config: dict) -> subprocess.Popen:
    """`treeline serve` started in `folder`, which is not on this process's own module path (-P)."""
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return subprocess.Popen(
        [sys.executable, "-P", "-c", "from cli.main import main; main()", "serve", "--config", "config.yaml"],
        cwd=folder,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), "HOME": str(folder)},
        stderr=subprocess.PIPE,
        text=True,
    )


def plain(target: Path, folder: Path) -> dict:
    config = tiny_config(target).model_dump(mode="json")
    config["metrics"]["targets_file"] = str(folder / "targets.json")
    return config


def test_folders_named_like_our_packages_do_not_matter(target, tmp_path):
    for name in ("treeline", "deploy", "lm"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise RuntimeError('the wrong package')")
    (tmp_path / "model").symlink_to(target)
    config = plain(target, tmp_path)
    config["verifier"]["target"]["model"] = "model"
    process = serve(tmp_path, config)
    try:
        lines = []
        for line in process.stderr:
            lines.append(line.strip())
            if re.search("serving at", line):
                break
        assert "serving at" in lines[-1], lines
        phases = "\n".join(lines)
        for phase in ("starting Ray", "verifier is running", "front-door is running"):
            assert phase in phases
    finally:
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0


@pytest.mark.parametrize(
    ("section", "values", "cause"),
    [
        ("limits", {"max_context_tokens": 4096}, "verifier did not start: limits.max_context_tokens is 4096"),
        ("planner", {"resources": {"num_gpus": 64}}, "the services ask for 64 GPUs"),
        ("drafter", {"kind": "head", "head": "nowhere"}, "drafter did not start: "),
    ],
)
def test_a_start_that_fails_says_why_in_one_line(target, tmp_path, section, values, cause):
    config = plain(target, tmp_path)
    config[section] = {**config[section], **values}
    process = serve(tmp_path, config)
    _, errors = process.communicate(timeout=400)
    assert process.returncode == 2
    last = errors.strip().splitlines()[-1]
    assert last.startswith(f"treeline: {cause}"), errors
    assert re.search(r"; logs: /\S+", last)
    assert "Traceback" not in errors
