"""Tools over HTTP: what the model is told, what binds it, and what the client gets."""

from __future__ import annotations

import json

import openai
import pytest

from tests.front_door.http.calling import with_client
from tests.verifier_svc.fake_engine import FakeEngine

ASK = [{"role": "user", "content": "hi"}]
PARAMETERS = {"type": "object", "properties": {"city": {"$ref": "#/$defs/city"}}, "$defs": {"city": {"type": "string"}}}
WEATHER = {"type": "function", "function": {"name": "weather", "description": "d", "parameters": PARAMETERS}}
NOW = {"type": "function", "function": {"name": "now"}}
TOOLS = {"tools": [WEATHER, NOW]}
CALL = {"name": "weather", "arguments": {"city": "Ulm"}}
NAMED = {"type": "function", "function": {"name": "now"}}
TURNS = [
    *ASK,
    {
        "role": "assistant",
        "content": None,
        "refusal": None,
        "tool_calls": [
            {"id": "a1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Ulm"}'}}
        ],
    },
    {"role": "tool", "tool_call_id": "a1", "content": "warm"},
]


def asked(engine=None, **fields):
    """(answer, the engine's request) of a chat."""
    engine = engine or FakeEngine()

    async def scenario(client, s):
        answer = await client.chat.completions.create(**{"model": "fake", "messages": ASK, "max_tokens": 4} | fields)
        if fields.get("stream"):
            answer = [chunk async for chunk in answer]
        return answer, s.engines[0].requests[0]

    return with_client(scenario, engine)


def prompt(request):
    return bytes(request.prompt_token_ids).decode()


def spelled(kind, *calls):
    texts = [json.dumps(call) for call in calls]
    return {
        "hermes": "\n".join(f"<tool_call>\n{text}\n</tool_call>" for text in texts),
        "mistral": f"[TOOL_CALLS] [{', '.join(texts)}]",
        "llama3": "; ".join(texts),
        "": "\n".join(texts),
    }[kind]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("kind", ["hermes", "mistral", "llama3", ""])
def test_calls_come_in_openais_form(kind, stream):
    text = spelled(kind, CALL, {"name": "now", "arguments": {}})
    pieces = [text[at : at + 7] for at in range(0, len(text), 7)]
    answer, request = asked(FakeEngine(says=pieces, tool_call_format=kind), stream=stream, **TOOLS)
    if stream:
        reasons = [chunk.choices[0].finish_reason for chunk in answer]
        assert (reasons[-1], set(reasons[:-1])) == ("tool_calls", {None})
        calls = {}
        for chunk in answer:
            assert not chunk.choices[0].delta.content
            for piece in chunk.choices[0].delta.tool_calls or []:
                call = calls.setdefault(piece.index, {"id": piece.id, "name": piece.function.name, "arguments": ""})
                call["arguments"] += piece.function.arguments
        found = [(call["name"], json.loads(call["arguments"])) for _, call in sorted(calls.items())]
        ids = [call["id"] for call in calls.values()]
    else:
        message = answer.choices[0].message
        assert (message.content, answer.choices[0].finish_reason) == (None, "tool_calls")
        found = [(call.function.name, json.loads(call.function.arguments)) for call in message.tool_calls]
        ids = [call.id for call in message.tool_calls]
    assert found == [("weather", {"city": "Ulm"}), ("now", {})]
    assert len(set(ids)) == 2
    assert request.skip_special_tokens == (kind == "")
    assert (request.grammar is None) == (kind != "")


def test_without_parallel_calls_only_the_first_one_counts():
    engine = FakeEngine(says=[spelled("hermes", CALL, CALL)], tool_call_format="hermes")
    answer, _ = asked(engine, parallel_tool_calls=False, **TOOLS)
    assert len(answer.choices[0].message.tool_calls) == 1


def test_text_beside_a_call_and_a_malformed_call_are_content():
    engine = FakeEngine(says=["Well. <tool_call>{}</tool_call>"], tool_call_format="hermes")
    answer, _ = asked(engine, **TOOLS)
    choice = answer.choices[0]
    assert (choice.message.content, choice.finish_reason) == (engine.says[0], "stop")
    assert choice.message.tool_calls is None


def test_a_template_that_knows_tools_gets_them_and_the_calls_so_far():
    _, request = asked(FakeEngine(tool_call_format="hermes"), messages=TURNS, **TOOLS)
    assert prompt(request).startswith(f"<tools>{json.dumps([WEATHER, NOW])}<user>hi<assistant>[")
    assert '"arguments": {"city": "Ulm"}' in prompt(request)
    assert prompt(request).endswith("<tool>warm<assistant>")


def test_any_other_model_is_told_of_tools_in_words():
    _, request = asked(messages=[{"role": "system", "content": "Be kind."}, *TURNS], **TOOLS)
    text = prompt(request)
    assert text.startswith('<system>Be kind.\n\nYou can call these functions:\n{"name": "weather",')
    assert f"<user>hi<assistant>{json.dumps(CALL)}<user>Result: warm<assistant>" in text
    assert "functions" not in prompt(asked(messages=TURNS, tool_choice="none", **TOOLS)[1])


@pytest.mark.parametrize("kind", ["", "hermes"])
@pytest.mark.parametrize(
    ("fields", "accepted", "refused"),
    [
        ({"tool_choice": "required"}, [(CALL,), (CALL, CALL)], ["no", ""]),
        ({"tool_choice": "required", "parallel_tool_calls": False}, [(CALL,)], [(CALL, CALL)]),
        ({"tool_choice": NAMED}, [({"name": "now", "arguments": {}},)], [(CALL,), "no"]),
    ],
)
def test_a_demanded_call_is_bound_by_a_grammar(kind, fields, accepted, refused):
    _, request = asked(FakeEngine(tool_call_format=kind), **TOOLS, **fields)
    for calls in accepted:
        assert takes(request.grammar, spelled("", *calls))
    for calls in refused:
        assert not takes(request.grammar, calls if isinstance(calls, str) else spelled("", *calls))
    assert not takes(request.grammar, '{"name": "weather", "arguments": {"city": 1}}')
    assert not takes(request.grammar, '{"name": "other", "arguments": {}}')


def test_a_model_of_no_known_format_may_call_or_say_anything():
    _, request = asked(**TOOLS)
    for text in (spelled("", CALL), spelled("", CALL, CALL), "plain {text}\nof any kind", " ", ""):
        assert takes(request.grammar, text), text
    assert not takes(request.grammar, '{"name": "other", "arguments": {}}')


def takes(grammar, text):
    """Whether `text` is a whole answer."""
    state = grammar.begin()
    try:
        for token in text.encode():
            state.take(token)
    except ValueError:
        return False
    return state.ended or bool(state.allowed([])[0] & 1)  # token 0 ends an answer


def one_tool(function):
    return {"tools": [{"type": "function", "function": function}]}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "other"}}, **TOOLS}, "tool_choice"),
        (one_tool({"name": "a b"}), "tools.0.function.name"),
        (one_tool({"name": "a", "parameters": {"type": "array"}}), "tools[0].function.parameters"),
        (one_tool({"name": "a", "parameters": {"type": "object", "$ref": "#/x"}}), "grammar.lark"),
        ({"response_format": {"type": "json_object"}, **TOOLS}, "response_format"),
        (
            {
                "messages": [
                    *TURNS[:1],
                    {"role": "assistant", "tool_calls": [{"function": {"name": "x", "arguments": "{"}}]},
                ]
            },
            "messages.1.tool_calls.0.function.arguments",
        ),
    ],
)
def test_wrong_tools_are_named(fields, param):
    with pytest.raises(openai.BadRequestError) as caught:
        asked(**fields)
    assert caught.value.param.startswith(param)


def test_chat_template_arguments_and_the_seam_of_the_last_turn():
    def text(**fields):
        return prompt(asked(extra_body=fields)[1])

    assert text(chat_template_kwargs={"enable_thinking": 1}) == "<enable_thinking>1<user>hi<assistant>"
    assert text(add_generation_prompt=False) == "<user>hi"
    for fields in ({"chat_template_kwargs": {"tokenize": 1}}, {"continue_final_message": True}):
        with pytest.raises(openai.BadRequestError) as caught:
            text(**fields)
        assert caught.value.param.startswith("chat.")
