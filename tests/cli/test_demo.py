import io

from rich.console import Console

from cli.demo import ALONE_ROUNDS, PROMPTS, TOGETHER_ROUNDS, Narrator, Outcome, show_demo, show_kill, usual_reason
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
    # A round that only warms up, then turns of all prompts, then of one alone.
    rounds = ["smart", *["smart", "off"] * TOGETHER_ROUNDS]
    together = [policy for policy in rounds for _ in PROMPTS]
    assert [request.policy for request in engine.requests] == together + ["smart", "off"] * ALONE_ROUNDS
    for prompt in PROMPTS:
        assert f"{prompt.label:>8} | a0 a1 a2 a3" in shown
    compared = TOGETHER_ROUNDS * len(PROMPTS)
    assert f"{compared} of {compared} texts identical" in shown
    assert f"{ALONE_ROUNDS} of {ALONE_ROUNDS} texts identical" in shown
    assert "accepted" in shown


def test_the_killed_answer_is_compared_with_an_undisturbed_one(service):
    _, endpoint = service
    out, kills = io.StringIO(), []
    with TreelineClient(endpoint) as client:
        show_kill(client, Console(file=out, width=200), 24, lambda: kills.append(True))
    assert kills == [True]
    assert "a4 <killed> a5" in out.getvalue()
    assert "the same text as" in out.getvalue()


def test_the_usual_reason_counts_sentences_that_differ_in_their_numbers_alone():
    reasons = ["plain decoding 10", "probing", "plain decoding 12.5"]
    assert (
        usual_reason([Outcome(0.1, 1.0, "", pb.GenerateComplete(), reasons)]) == "in 2 of 3 steps: plain decoding 12.5"
    )
