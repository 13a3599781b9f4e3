"""Tool calls found in text that is cut in every way."""

from __future__ import annotations

import json
import random

import pytest

from front_door.http.tool_calls import SPELLINGS, BoundCalls, FreeCalls

NAMES = ("weather", "add")
WEATHER = '{"name": "weather", "arguments": {"city": "Ulm", "days": [1, 2.5]}}'
TRICKY = (
    r'{"name": "add", "arguments": {"text": "</tool_call> } ] \" \\ {[ é\u00e9 [TOOL_CALLS]", "deep": {"a": [{}]}}}'
)
SWAPPED = '{"arguments": {}, "name": "add"}'
LLAMA = WEATHER.replace("arguments", "parameters")
FOREIGN = WEATHER.replace("weather", "unknown")

FREE = {
    "hermes": {
        f"<tool_call>\n{WEATHER}\n</tool_call>": ("", [WEATHER]),
        f"Let me see.\n\n<tool_call>{TRICKY}</tool_call>\n<tool_call>\n{SWAPPED}</tool_call>\n": (
            "Let me see.",
            [TRICKY, SWAPPED],
        ),
        f"a <tool_call>{WEATHER}</tool_call> b": ("ab", [WEATHER]),
        f"<tool_call>\n{WEATHER}\n": ("", [WEATHER]),
        f"<tool_call>\n{WEATHER}</tool_c": ("", [WEATHER]),
        f"a <tool_call>{WEATHER[:-1]}</tool_call> <tool_call>{SWAPPED}</tool_call>": (
            f"a <tool_call>{WEATHER[:-1]}</tool_call>",
            [SWAPPED],
        ),
    },
    "mistral": {
        f"[TOOL_CALLS] [{WEATHER}, {TRICKY}]": ("", [WEATHER, TRICKY]),
        f"Well: [TOOL_CALLS]{SWAPPED}": ("Well:", [SWAPPED]),
    },
    "llama3": {
        LLAMA: ("", [WEATHER]),
        f" <|python_tag|>{LLAMA}; {LLAMA};\n{SWAPPED}": ("", [WEATHER, WEATHER, SWAPPED]),
        f"So: <|python_tag|>{LLAMA}": ("So:", [WEATHER]),
        f"{LLAMA} then": ("then", [WEATHER]),
    },
}
PLAIN = {
    "hermes": [
        " plain text \n",
        "a < b, <tool_cal, <tool_call",
        "<tool_call>hello</tool_call> ",
        f"<tool_call>{WEATHER[:-4]}",
        f"<tool_call>{FOREIGN}</tool_call>",
        '<tool_call>{"name": "add", "arguments": "x"}</tool_call>',
        '<tool_call>{"name": "add", "arguments": {"a": NaN}}</tool_call>',
        '<tool_call>{"name": "add", "arguments": {"a": 1e999}}</tool_call>',
        '<tool_call>["name"]</tool_call> and [1] and <tool_call>[]</tool_call>',
        f"<tool_call>{WEATHER} no</tool_call>",
        "<tool_call>" + "[" * 3000 + "]" * 3000 + "</tool_call>",
    ],
    "mistral": ["[TOOL_CALLS", "[TOOL_CALLS][1, 2] x", "[1, 2]", f"[TOOL_CALLS] [{WEATHER}, {FOREIGN}]", WEATHER],
    "llama3": ["  ", '{"name": "Bob"}', f" so {LLAMA}", "<|python_tag|>print(1)", FOREIGN + " x", "{a}; {b}"],
}
BOUND = {
    WEATHER: ("", [WEATHER]),
    f"{TRICKY}\n{WEATHER}\n{SWAPPED[:0]}": ("}\n", [TRICKY, WEATHER]),
    f"{WEATHER}\n{TRICKY}": ("", [WEATHER, TRICKY]),
    "plain {text}\n": ("plain {text}\n", []),
    "": ("", []),
    WEATHER[:20]: (WEATHER[:20], []),
}


def split(finder, pieces):
    """(content, [[name, arguments]]) of an answer that comes in `pieces`."""
    content, calls = "", {}
    for found in [*map(finder.feed, pieces), finder.finish()]:
        content += found.content
        for index, name, arguments in found.calls:
            assert (name is None) == (index in calls)
            assert index == len(calls) - (index in calls)
            calls.setdefault(index, [name, ""])[1] += arguments
    return content, list(calls.values())


def cuts(text):
    """The text in every two pieces, in single characters, and in pieces of random lengths."""
    yield [text]
    for at in range(len(text) + 1) if len(text) < 1000 else (9, 11, 3011, len(text) - 5):
        yield [text[:at], text[at:]]
    yield list(text)
    for seed in range(20):
        rng, at, pieces = random.Random(seed), 0, []
        while at < len(text):
            pieces.append(text[at : at + rng.choice([1, 2, 3, 5, 8, 13])])
            at += len(pieces[-1])
        yield pieces


def expected(calls):
    return [[call["name"], call["arguments"]] for call in map(json.loads, calls)]


@pytest.mark.parametrize(("kind", "text"), [(kind, text) for kind, texts in FREE.items() for text in texts])
def test_calls_are_the_same_however_the_text_is_cut(kind, text):
    content, calls = FREE[kind][text]
    for pieces in cuts(text):
        said, found = split(FreeCalls(SPELLINGS[kind], NAMES), pieces)
        assert (said, [[name, json.loads(a)] for name, a in found]) == (content, expected(calls)), pieces


@pytest.mark.parametrize(("kind", "text"), [(kind, text) for kind, texts in PLAIN.items() for text in texts])
def test_what_is_no_call_is_content_as_it_stands(kind, text):
    for pieces in cuts(text):
        assert split(FreeCalls(SPELLINGS[kind], NAMES), pieces) == (text, [])


@pytest.mark.parametrize("text", BOUND)
def test_bound_calls_are_the_same_however_the_text_is_cut(text):
    content, calls = BOUND[text]
    for pieces in cuts(text):
        said, found = split(BoundCalls(), pieces)
        assert (said, [[name, json.loads(a)] for name, a in found]) == (content, expected(calls)), pieces


def test_bound_arguments_come_as_they_are_written():
    finder = BoundCalls()
    pieces = [finder.feed(piece).calls for piece in ('{"name": "add", "argu', 'ments": {"a"', ": 1", "0}", "}")]
    assert [call.arguments for calls in pieces for call in calls if call.arguments] == ['{"a"', ": 1", "0}"]
    assert pieces[1][0].name == "add"


def test_a_cut_off_bound_call_keeps_what_came_of_it():
    assert split(BoundCalls(), [WEATHER[:45]]) == ("", [["weather", WEATHER[33:45]]])


def test_plain_text_is_not_held_back():
    finder = FreeCalls(SPELLINGS["hermes"], NAMES)
    assert [finder.feed(piece).content for piece in ("a", " ", "b <", "c")] == ["a", "", " b", " <c"]
