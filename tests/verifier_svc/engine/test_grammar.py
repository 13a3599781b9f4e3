"""Answers under a grammar: the same text under every policy, and all that finish match."""

from __future__ import annotations

import json
import re

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jsonschema import validate

from tests.verifier_svc.doubles import OracleDrafter
from tests.verifier_svc.engine.test_engine import POLICIES, Known, assert_all_free, engine_for, prompts, run, tokens_of
from tests.verifier_svc.engine.test_engine import model as model  # a fixture
from treeline.sampling import SamplingParams
from treeline.v1 import generation_pb2 as pb
from verifier_svc.engine.grammar import Grammar
from verifier_svc.engine.request import Chunk, FinishReason, GenerationRequest
from verifier_svc.service.fields import ServedModel
from verifier_svc.service.grammars import GrammarCompiler

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 5},
        "kind": {"enum": ["tree", "chain"]},
        "sizes": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 99}, "maxItems": 3},
    },
    "required": ["name", "kind", "sizes"],
    "additionalProperties": False,
    "x-guidance": {"whitespace_flexible": False},
}
GRAMMARS = {
    "schema": pb.Grammar(json_schema=json.dumps(SCHEMA)),
    "regex": pb.Grammar(regex="(yes|no), [0-9]{2,6}"),
    "choice": pb.Grammar(choice=pb.Choice(texts=["a/b", 'quo"te', "é", "ab"])),
    "lark": pb.Grammar(lark='start: "((" deep "))"\ndeep: "(" deep ")" | "x"'),
}
SAMPLINGS = [SamplingParams(), SamplingParams(temperature=1.0, frequency_penalty=0.3, top_p=0.95, seed=4)]


@pytest.fixture(scope="module")
def compile_grammar(model) -> GrammarCompiler:
    info = ServedModel("m", "arch", "float32", model.vocab_size, 512, model.eos_token_ids, has_chat_template=True)
    return GrammarCompiler(model.tokenizer, info)


def text_of(items: list) -> str:
    return "".join(item.text for item in items if isinstance(item, Chunk))


def matches(kind: str, text: str) -> bool:
    if kind == "schema":
        validate(json.loads(text), SCHEMA)
        return True
    patterns = {"regex": "(yes|no), [0-9]{2,6}", "choice": 'a/b|quo"te|é|ab', "lark": r"\(*x\)*"}
    return re.fullmatch(patterns[kind], text) is not None and text.count("(") == text.count(")")


def answer(model, request: GenerationRequest, policy: str, known: Known | None = None) -> list:
    drafter = OracleDrafter(known, model.vocab_size, seed=3) if known else None
    engine = engine_for(model, drafter)
    items = run(engine, [GenerationRequest(**vars(request) | {"policy": policy})])["r"]
    assert_all_free(engine, drafter)
    return items


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=["greedy", "sampled"])
@pytest.mark.parametrize("kind", GRAMMARS)
def test_text_is_the_same_under_every_policy_and_matches(model, compile_grammar, kind, sampling):
    (prompt,) = prompts(model, 1, seed=5)
    grammar = compile_grammar(GRAMMARS[kind])
    request = GenerationRequest("r", prompt, sampling, 80, grammar=grammar)
    plain = answer(model, request, "off")
    finished = plain[-1].finish_reason is FinishReason.STOP
    assert finished or kind == "lark"
    assert not finished or matches(kind, text_of(plain))
    known = Known()
    known.add(prompt, tokens_of(plain))
    accepted = 0
    for policy in POLICIES[1:]:
        items = answer(model, request, policy, known)
        assert tokens_of(items) == tokens_of(plain)
        assert (text_of(items), items[-1].finish_reason) == (text_of(plain), plain[-1].finish_reason)
        accepted += items[-1].speculation.accepted_nodes
    assert accepted


LEAVES = st.sampled_from(
    [{"type": "boolean"}, {"type": "null"}, {"enum": ["a", 1, None]}, {"type": "string", "maxLength": 3}, {"const": 7}]
)
SCHEMAS = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.builds(lambda items: {"type": "array", "items": items, "maxItems": 2}, inner),
        st.builds(
            lambda properties: {
                "type": "object",
                "properties": properties,
                "required": sorted(properties)[:1],
                "additionalProperties": False,
            },
            st.dictionaries(st.sampled_from("abc"), inner, max_size=2),
        ),
    ),
    max_leaves=4,
)


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(schema=SCHEMAS, temperature=st.sampled_from([0.0, 1.0]), seed=st.integers(0, 99))
def test_answers_to_any_schema_parse(model, compile_grammar, schema, temperature, seed):
    grammar = compile_grammar(pb.Grammar(json_schema=json.dumps(schema)))
    request = GenerationRequest("r", [7, 8], SamplingParams(temperature, seed=seed), 60, grammar=grammar)
    plain = answer(model, request, "off")
    if plain[-1].finish_reason is FinishReason.STOP:
        validate(json.loads(text_of(plain)), schema)
    known = Known()
    known.add([7, 8], tokens_of(plain))
    assert tokens_of(answer(model, request, "eagle2:4,3,8", known)) == tokens_of(plain)


def test_only_some_of_a_batch_have_one_and_a_dead_end_ends_its_own_request_alone(model, compile_grammar):
    free, bound, dead = prompts(model, 3, seed=6)
    (a,) = model.tokenizer("a").input_ids
    # Only "a" may come, and it may not come yet.
    stuck = {"stop_token_ids": frozenset([a]), "min_tokens": 3, "grammar": compile_grammar(pb.Grammar(regex="a"))}
    requests = [
        GenerationRequest("free", free, SamplingParams(), 20, ignore_eos=True, policy="chain:4"),
        GenerationRequest("bound", bound, SamplingParams(), 80, policy="chain:4", grammar=grammar_of(compile_grammar)),
        GenerationRequest("dead", dead, SamplingParams(), 20, policy="chain:4", **stuck),
    ]
    together = run(engine_for(model, OracleDrafter(Known(), model.vocab_size)), requests)
    assert together["dead"][-1].finish_reason is FinishReason.FAILED
    for request in requests[:2]:
        alone = run(engine_for(model, None), [request])[request.request_id]
        assert tokens_of(together[request.request_id]) == tokens_of(alone)
    assert matches("schema", text_of(together["bound"]))


def grammar_of(compile_grammar: GrammarCompiler) -> Grammar:
    return compile_grammar(GRAMMARS["schema"])


def test_a_resumed_answer_goes_on_in_its_grammar(model, compile_grammar):
    (prompt,) = prompts(model, 1, seed=5)
    request = GenerationRequest("r", prompt, SamplingParams(), 80, grammar=grammar_of(compile_grammar))
    whole = tokens_of(answer(model, request, "off"))
    for cut in (1, 9, len(whole) - 1):
        resumed = GenerationRequest(**vars(request) | {"delivered_token_ids": tuple(whole[:cut])})
        assert whole[:cut] + tokens_of(answer(model, resumed, "off")) == whole


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=["greedy", "sampled"])
def test_what_a_grammar_forces_is_drafted_without_a_drafter_that_knows_it(model, compile_grammar, sampling):
    (prompt,) = prompts(model, 1, seed=5)
    grammar = compile_grammar(pb.Grammar(lark='start: "a long text that leaves no choice, " ("yes" | "no")'))
    request = GenerationRequest("r", prompt, sampling, 80, grammar=grammar)
    plain, drafted = (answer(model, request, policy, Known()) for policy in ("off", "chain:8"))
    assert text_of(drafted) == text_of(plain)
    assert drafted[-1].speculation.steps < plain[-1].speculation.steps / 2
