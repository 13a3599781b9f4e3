import io

from rich.console import Console

from cli.demo import PROMPTS, Narrator, show_demo
from treeline.client import TreelineClient


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


def test_the_demo_runs_both_rounds_at_once_and_compares_them(service):
    engine, endpoint = service
    engine.step_s = 0.02
    out = io.StringIO()
    with TreelineClient(endpoint) as client:
        show_demo(client, Console(file=out, width=160), max_tokens=8)
    shown = out.getvalue()
    # A round that only warms up, then the two that are compared.
    assert [request.policy for request in engine.requests] == ["smart"] * (2 * len(PROMPTS)) + ["off"] * len(PROMPTS)
    for prompt in PROMPTS:
        assert f"{prompt.label:>8} | a0 a1 a2 a3" in shown
    assert f"{len(PROMPTS)} of {len(PROMPTS)} texts identical" in shown
    assert "accepted" in shown
