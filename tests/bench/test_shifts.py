"""Shifts of the load and of the machine: what is said of made-up runs, and a short real one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from typer.testing import CliRunner

from bench.common import Prompt
from bench.shifts import ALONE, ALONE_AGAIN, CROWD, HOGS, HOGS_GONE, UNDISTURBED, run_hogs
from bench.shifts_hogs import cpu_hogs
from bench.shifts_report import (
    ShiftStep,
    first_good_after_steps,
    good_after_steps,
    hog_rows,
    level,
    load_rows,
    settled_s,
    smoothed_errors,
    smoothed_sizes,
    swings,
)
from bench.systems import start_planned
from cli.main import app
from tests.verifier_svc.services import save_tiny_model, tiny_config
from treeline.config import Config, DrafterConfig
from treeline.errors import ConfigError

TIMES_S = np.arange(80) / 10


def made_up(phase: str, time_s: float, **changed: float) -> ShiftStep:
    usual = {"streams": 2, "sequences": 2, "prefill_tokens": 0, "all_decoding": True, "drafted": 4.0, "verified": 2.0}
    times = {"predicted_ms": 40.0, "measured_ms": 40.0, "predicted_verify_ms": 30.0, "verify_ms": 30.0, "price": 50.0}
    return ShiftStep(phase, time_s, **{**usual, **times, **changed})


def test_sizes_are_smoothed_by_time_and_by_five_steps_at_least():
    fast = smoothed_sizes(np.arange(100) / 100, [0.0] * 50 + [8.0] * 50)
    assert (fast[:74].max(), fast[76:].min()) == (0.0, 8.0)  # half of 0.5 s behind
    slow = smoothed_sizes(np.arange(10.0), [0.0] * 5 + [8.0] * 5)
    assert slow.tolist() == [0.0] * 7 + [8.0] * 3
    assert smoothed_sizes(np.arange(3.0), [6.0, 2.0, 4.0]).tolist() == [6.0, 4.0, 4.0]


def test_trees_that_shrink_settle_when_they_enter_the_band_for_good():
    sizes = np.where(TIMES_S < 1.5, 10.0, 4.0)
    sizes[20] = 9.0  # one more step outside
    at, band = level(TIMES_S, sizes)
    assert (at, band) == (4.0, 1.0)
    assert settled_s(TIMES_S, sizes, at, band, since_s=0.0) == pytest.approx(2.1)
    assert swings(np.where(TIMES_S < 1.5, 10.0, 4.0), band) == 0
    assert level(TIMES_S, sizes * 4) == (16.0, 4.0)


def test_trees_that_were_always_at_their_level_need_no_time():
    sizes = 3.0 + 0.5 * (np.arange(80) % 2)
    assert settled_s(TIMES_S, sizes, *level(TIMES_S, sizes), since_s=0.0) == 0.0
    assert swings(sizes, 1.0) == 0


def test_trees_that_oscillate_never_settle_and_every_turn_is_counted():
    sizes = np.where(np.arange(80) // 10 % 2, 8.0, 2.0)  # four times up, three times down
    assert settled_s(TIMES_S, sizes, *level(TIMES_S, sizes), since_s=0.0) is None
    assert swings(sizes, 1.25) == 6


def test_an_overshoot_is_a_swing_and_a_slow_drift_is_none():
    overshoot = np.interp(TIMES_S, [0, 1, 2, 8], [10, 1, 4, 4])
    assert swings(overshoot, 1.0) == 1
    assert swings(np.linspace(0, 20, 80), 1.0) == 0


def test_trees_that_drift_away_at_the_end_have_not_settled():
    sizes = np.where(TIMES_S < 6.5, 2.0, 9.0)
    assert settled_s(TIMES_S, sizes, *level(TIMES_S, sizes), since_s=0.0) is None


def test_settling_is_counted_from_the_jump_and_from_when_all_decode():
    alone = [made_up(ALONE, 0.1 * (i + 1), streams=1, sequences=1, verified=8.0) for i in range(40)]
    crowd = [
        made_up(
            CROWD,
            4.0 + 0.2 * (i + 1),
            streams=32,
            sequences=min(32, 2 * i),
            prefill_tokens=max(0, 40 - 2 * i),
            all_decoding=i >= 16,
            verified=8.0 if i < 18 else 2.0,
            measured_ms=50.0,
        )
        for i in range(60)
    ]
    one, many = load_rows(alone + crowd)
    assert (one.phase, one.steps, one.nodes, one.settled_s, one.outside_share) == (ALONE, 40, 8.0, 0.0, 0.0)
    assert (many.phase, many.streams, many.steps) == (CROWD, 32, 59)  # in the first one nobody decoded
    assert many.seconds == pytest.approx(12.0)
    assert many.all_decoding_s == pytest.approx(3.4)
    # The nineteenth step is the first with small trees; two more make the median of five.
    assert many.settled_s == pytest.approx(4.2)
    assert many.settled_decoding_s == pytest.approx(0.8)
    assert many.outside_share == pytest.approx(4 / 44)
    assert (many.nodes, many.band, many.swings) == (2.0, 1.0, 0)
    assert many.error == pytest.approx(0.2)


def test_errors_are_smoothed_and_a_lapse_counts_until_it_is_over():
    errors = np.asarray([0.5] * 10 + [0.05] * 40)
    smooth = smoothed_errors(errors)
    assert (good_after_steps(smooth), first_good_after_steps(smooth)) == (17, 17)
    errors[30:40] = 0.3
    smooth = smoothed_errors(errors)
    assert (good_after_steps(smooth), first_good_after_steps(smooth)) == (47, 17)
    assert good_after_steps(smoothed_errors(np.full(40, 0.05))) == 0
    wrong = smoothed_errors(np.full(40, 0.2))
    assert (good_after_steps(wrong), first_good_after_steps(wrong)) == (None, None)


def test_slow_down_is_that_of_steps_of_equal_size_and_prompts_do_not_count():
    usual = [made_up(UNDISTURBED, i, verified=float(i % 2), measured_ms=40.0 + 20 * (i % 2)) for i in range(20)]
    slow = [
        made_up(HOGS, 20 + i, verified=1.0, measured_ms=120.0, predicted_ms=60.0 if i < 9 else 118.0) for i in range(80)
    ]
    slow.insert(0, made_up(HOGS, 20, prefill_tokens=64, measured_ms=900.0))
    slow.append(made_up(HOGS, 99, sequences=1))
    first, beside = hog_rows(usual + slow)
    assert (first.steps, first.slowdown, first.outside_share) == (20, 1.0, None)
    assert (beside.steps, beside.step_ms) == (80, 120.0)
    assert beside.slowdown == pytest.approx(2.0)
    assert (beside.good_after_steps, beside.verify_good_after_steps) == (16, 0)
    assert beside.outside_share == 0.0
    assert beside.error == pytest.approx(2 / 120)


def spins(process_id: int) -> bool:
    """Whether it lives; a zombie does not."""
    try:
        return Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def children(process_id: int) -> list[int]:
    found = Path(f"/proc/{process_id}/task/{process_id}/children").read_text().split()
    return [int(child) for child in found]


def test_hogs_spin_and_are_gone_afterwards_whatever_happens():
    before = set(children(os.getpid()))
    hogs = set[int]()

    def interrupted() -> None:
        with cpu_hogs(2):
            hogs.update(set(children(os.getpid())) - before)
            assert all(map(spins, hogs))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert len(hogs) == 2
    assert not any(map(spins, hogs))


def test_hogs_end_by_themselves_when_their_parent_is_killed():
    code = (
        "import time\nfrom bench.shifts_hogs import cpu_hogs\nwith cpu_hogs(1):\n  print(flush=True)\n  time.sleep(60)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert parent.stdout.readline()
    (hog,) = children(parent.pid)
    parent.kill()
    parent.communicate()
    until_s = time.monotonic() + 20
    while spins(hog) and time.monotonic() < until_s:
        time.sleep(0.05)
    assert not spins(hog)


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Config:
    folder = save_tiny_model(tmp_path_factory.mktemp("models") / "target")
    plain = tiny_config(folder)
    return tiny_config(folder, DrafterConfig(kind="model+ngram", model=plain.verifier.target), max_context_tokens=400)


def run(config: Config, folder: Path, *options: str):
    path = folder / "treeline.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    return CliRunner().invoke(app, ["bench", "shifts", "-c", str(path), *options])


def test_the_command_runs_all_phases_and_writes_everything(config, tmp_path):
    report, picture = tmp_path / "report.json", tmp_path / "plots" / "shifts.png"
    options = ["--streams", "4", "--seconds", "0.5", "--hog-streams", "2", "--hogs", "1", "--steps", "6"]
    options += ["--max-tokens", "60", "--json", str(report), "--plot", str(picture)]
    result = run(config, tmp_path, *options)
    assert result.exit_code == 0, result.output
    assert "tree sizes behind a step of the load" in result.stdout
    assert "predicted step times beside CPU hogs" in result.stdout
    written = json.loads(report.read_text())
    assert {"machine", "versions", "config"} < set(written)
    assert [(row["phase"], row["streams"]) for row in written["rows"]] == [(ALONE, 1), (CROWD, 4), (ALONE_AGAIN, 1)]
    assert all(row["seconds"] >= row["all_decoding_s"] + 0.5 for row in written["rows"])
    assert [row["phase"] for row in written["hogs"]] == [UNDISTURBED, HOGS, HOGS_GONE]
    assert [row["steps"] for row in written["hogs"]][1:] == [6, 6]
    crowd = [step for step in written["load_steps"] if step["phase"] == CROWD]
    assert {step["streams"] for step in crowd} == {4}
    assert max(step["sequences"] for step in crowd) == 4
    again = [step for step in written["load_steps"] if step["phase"] == ALONE_AGAIN]
    assert max(step["sequences"] for step in again) == 1  # the others have left
    assert all(step["measured_ms"] > 0 and step["price"] > 0 for step in again)
    times_s = [step["time_s"] for step in written["load_steps"]]
    assert times_s == sorted(times_s)
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_run_in_which_every_step_has_a_prompt_is_given_up(config):
    texts = [Prompt("short", "chat", "one two three")]
    planned, token_ids = start_planned(config, texts, 2, max_tokens=1)
    with pytest.raises(ConfigError, match="nearly every step"):
        run_hogs(planned, list(token_ids.values()), 2, hogs=1, steps=3, max_tokens=1)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (["--plot", "shifts.exe"], "must end in .png"),
        (["--acceptance", "2"], "acceptance '2'"),
        (["--prompts", "/no/such.jsonl"], "cannot read /no/such.jsonl"),
        (["--max-tokens", "5000"], "exceeds"),
    ],
)
def test_bad_input_gets_one_line(config, tmp_path, options, problem):
    result = run(config, tmp_path, *options)
    assert result.exit_code == 2, result.output
    assert problem in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
