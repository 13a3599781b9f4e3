import io
import time
from typing import cast

from rich.console import Console

from cli.demo import ALONE_TURNS, LOADS, PROMPTS, TOGETHER_REPEATS, TURNS, Outcome, run_round, show_demo, show_kill
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


def test_the_demo_takes_turns_with_all_prompts_and_with_one_and_compares_them(service):
    engine, endpoint = service
    engine.step_s = 0.02
    out = io.StringIO()
    with TreelineClient(endpoint) as client:
        show_demo(client, Console(file=out, width=160), max_tokens=8)
    shown = out.getvalue()
    # A round that only warms up and one that is shown, the climbing load, then turns alone and with all.
    rounds = ["smart"] * (2 * len(PROMPTS) + sum(LOADS))
    alone = [policy or "smart" for policy in ALONE_TURNS]
    together = [policy or "smart" for policy in TURNS for _ in range(TOGETHER_REPEATS * len(PROMPTS))]
    assert [request.policy for request in engine.requests] == rounds + alone + together
    for prompt in PROMPTS:
        assert f"{prompt.label:>8} | a0 a1 a2 a3" in shown
    for streams in LOADS:
        assert f"{streams:>2} streams: " in shown
    for texts in (len(ALONE_TURNS) // 2, TOGETHER_REPEATS * len(TURNS) // 2 * len(PROMPTS)):
        assert f"{texts} of {texts} texts identical" in shown
    assert "accepted" in shown


def test_streams_that_have_run_out_of_requests_are_not_measured(monkeypatch):
    now_s, endings_s = time.perf_counter(), iter([1.0, 2.0, 5.0, 9.0])

    def follow(*_) -> Outcome:
        end_s = now_s + next(endings_s)
        return Outcome(now_s, end_s, [(end_s - 0.5, 3), (end_s, 1)], "", pb.GenerateComplete(), [])

    monkeypatch.setattr("cli.demo.follow", follow)
    # Two streams, four requests: after 5 s one stream finds no more to take.
    done = run_round(cast(TreelineClient, None), PROMPTS[:2], 8, repeats=2)
    assert (done.tokens, round(done.seconds, 1)) == (12, 5.0)


def test_the_killed_answer_is_compared_with_an_undisturbed_one(service):
    _, endpoint = service
    out, kills = io.StringIO(), []
    with TreelineClient(endpoint) as client:
        show_kill(client, Console(file=out, width=200), 24, lambda: kills.append(True))
    assert kills == [True]
    assert "a4 <killed> a5" in out.getvalue()
    assert "the same text as" in out.getvalue()
