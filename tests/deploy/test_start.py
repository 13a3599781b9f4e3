"""How `treeline serve` starts, and how it says that it cannot."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
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
        process_group=0,
    )


def plain(target: Path) -> dict:
    return tiny_config(target).model_dump(mode="json")


@dataclass
class Serving:
    """A running `treeline serve`, and the processes it has started."""

    process: subprocess.Popen
    started: list[psutil.Process]

    def raylet(self) -> psutil.Process:
        return next(one for one in self.started if one.name() == "raylet")

    def check_nothing_is_left(self) -> None:
        _, alive = psutil.wait_procs(self.started, timeout=3)
        assert not alive


@pytest.fixture
def serving(target, tmp_path) -> Iterator[Serving]:
    """Started in a folder whose folders are named like our packages, with a path to its model that begins there."""
    for name in ("treeline", "deploy", "lm"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise RuntimeError('the wrong package')")
    (tmp_path / "model").symlink_to(target)
    config = plain(target)
    config["verifier"]["target"]["model"] = "model"
    process = serve(tmp_path, config)
    started: list[psutil.Process] = []
    try:
        lines = []
        for line in process.stderr:
            lines.append(line)
            if "serving at" in line:
                break
        assert "serving at" in lines[-1], lines
        for phase in ("starting Ray", "logs: /", "verifier is running", "front-door is running"):
            assert phase in "".join(lines)
        time.sleep(5)  # for it to have looked once at what runs
        started += psutil.Process(process.pid).children(recursive=True)
        yield Serving(process, started)
    finally:
        for one in (*started, psutil.Process(process.pid) if process.poll() is None else None):
            if one is not None and one.is_running():
                one.kill()


def test_a_dead_raylet_ends_the_service_with_a_reason(serving):
    serving.raylet().kill()
    killed_s = time.monotonic()
    _, errors = serving.process.communicate(timeout=60)
    assert serving.process.returncode == 1
    assert time.monotonic() - killed_s < 30
    assert "treeline: Ray's raylet has ended; logs: " in errors
    assert "Traceback" not in errors
    serving.check_nothing_is_left()


@pytest.mark.slow
def test_sigterm_ends_the_service_cleanly(serving):
    serving.process.send_signal(signal.SIGTERM)
    assert serving.process.wait(30) == 0
    serving.check_nothing_is_left()


def test_sigterm_to_the_whole_group_ends_the_service_too(serving):
    os.killpg(serving.process.pid, signal.SIGTERM)
    assert serving.process.wait(30) == 0
    serving.check_nothing_is_left()


def test_a_second_interrupt_ends_the_service_at_once(serving):
    serving.process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    serving.process.send_signal(signal.SIGINT)
    assert serving.process.wait(10) in (0, 130)  # 0: it had ended already
    serving.check_nothing_is_left()


def test_sigterm_during_the_start_ends_it_quietly(target, tmp_path):
    process = serve(tmp_path, plain(target))
    for line in process.stderr:
        if "starting the services" in line:
            break
    time.sleep(1)
    started = psutil.Process(process.pid).children(recursive=True)
    process.terminate()
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 143, errors
    assert not re.search("SIGTERM|Traceback|Error", errors), errors
    _, alive = psutil.wait_procs(started, timeout=5)
    assert not alive


@pytest.mark.parametrize(
    ("section", "values", "cause"),
    [
        ("limits", {"max_context_tokens": 4096}, "verifier did not start: limits.max_context_tokens is 4096"),
        ("planner", {"resources": {"num_gpus": 64}}, "the services ask for 64 GPUs"),
    ],
)
def test_a_start_that_fails_says_why_in_one_line(target, tmp_path, section, values, cause):
    config = plain(target)
    config[section] = {**config[section], **values}
    process = serve(tmp_path, config)
    _, errors = process.communicate(timeout=400)
    assert process.returncode == 2
    last = errors.strip().splitlines()[-1]
    assert last.startswith(f"treeline: {cause}"), errors
    assert re.search(r"; logs: /\S+", last)
    assert "Traceback" not in errors
