import io
import math
import re
import time
from itertools import groupby
from typing import cast

import pytest
from rich.console import Console

from cli.demo import LOADS, PROMPTS, Outcome, run_turn, show_demo, show_kill
from cli.terminal import Narrator
from treeline.client import TreelineClient
from treeline.v1 import generation_pb2 as pb


def test_streams_are_told_apart_line_by_line():
    out = io.StringIO()
    narrator = Narrator(Console(file=out, width=200))
    for label, text in [
        ("one", "first [b] "),
        ("two", "other"),
        ("one", "line\nsec"),
        ("two", " line\n"),
        ("one", "\n"),
    ]:
        narrator(label, text)
    narrator("long", "word " * 40 + "\n")
    lines = [line.split(" | ") for line in out.getvalue().splitlines()]
    assert [(label.strip(), text) for label, text in lines[:3]] == [
        ("one", "first [b] line"),
        ("two", "other line"),
        ("one", "sec"),
    ]
    assert " ".join(text for _, text in lines[3:]).split() == ["word"] * 40
    assert max(len(text) for _, text in lines) <= 88


def test_the_demo_takes_turns_with_all_prompts_and_with_one_and_compares_them(service, monkeypatch):
    monkeypatch.setattr("cli.demo.ALONE_S", 0.3)
    monkeypatch.setattr("cli.demo.TOGETHER_S", 0.6)
    engine, endpoint = service
    engine.step_s = 0.02
    out = io.StringIO()
    with TreelineClient(endpoint) as client:
        show_demo(client, Console(file=out, width=160), max_tokens=8)
    shown = out.getvalue()
    # A round that only warms up and one that is shown, the climbing load, then turns alone and with all.
    rounds = 2 * len(PROMPTS) + sum(LOADS)
    policies = [request.policy for request in engine.requests]
    assert policies[:rounds] == ["smart"] * rounds
    assert [policy for policy, _ in groupby(policies[rounds:])] == ["smart", "off", "smart", "off", "smart"]
    for prompt in PROMPTS:
        assert f"{prompt.label:>8} | a0 a1 a2 a3" in shown
    for streams in LOADS:
        assert f"{streams:>2} streams: " in shown
    texts = re.findall(r"(\d+) of (\d+) texts identical", shown)
    assert len(texts) == 2
    assert all(same == asked != "0" for same, asked in texts)
    assert "accepted" in shown


def test_a_turn_counts_what_came_in_its_time_and_keeps_whole_answers(monkeypatch):
    def follow(client, prompt, max_tokens, policy, show, until_s=math.inf) -> Outcome:
        started_s = time.perf_counter()
        time.sleep(max(0.0, min(0.2, until_s - started_s)))
        ended_s = time.perf_counter()
        whole = pb.GenerateComplete() if ended_s < until_s else None
        return Outcome(prompt.label, started_s, ended_s, [(started_s, 3), (started_s + 0.19, 1)], "", whole, [])

    monkeypatch.setattr("cli.demo.follow", follow)
    # Answers of two streams begin at 0, 0.2 and 0.4 s; the third ones are cut.
    done = run_turn(cast(TreelineClient, None), PROMPTS[:2], 8, None, 0.5)
    assert (done.tokens, done.seconds, len(done.outcomes)) == (2 * (4 + 4 + 3), pytest.approx(0.5), 4)


def test_the_killed_answer_is_compared_with_an_undisturbed_one(service):
    _, endpoint = service
    out, kills = io.StringIO(), []
    with TreelineClient(endpoint) as client:
        show_kill(client, Console(file=out, width=200), 24, lambda: kills.append(True))
    assert kills == [True]
    assert "a4 <killed> a5" in out.getvalue()
    assert "the same text as" in out.getvalue()
