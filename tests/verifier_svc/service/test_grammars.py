import numpy as np
import pytest

from tests.lm.tiny import tiny_tokenizer
from treeline.errors import InvalidRequestError
from treeline.v1 import generation_pb2 as pb
from verifier_svc.service.fields import ServedModel
from verifier_svc.service.grammars import MAX_GRAMMAR_CHARS, GrammarCompiler


def compiler() -> GrammarCompiler:
    return GrammarCompiler(tiny_tokenizer(), ServedModel("m", "a", "f", 260, 64, frozenset({256}), True))


@pytest.mark.parametrize(
    ("given", "field"),
    [
        (pb.Grammar(), "grammar"),
        (pb.Grammar(json_schema="{"), "grammar.json_schema"),
        (pb.Grammar(json_schema='{"type": "no-such"}'), "grammar.json_schema"),
        (pb.Grammar(json_schema="3"), "grammar.json_schema"),
        (pb.Grammar(regex=""), "grammar.regex"),
        (pb.Grammar(regex="a(b"), "grammar.regex"),
        (pb.Grammar(regex="a" * (MAX_GRAMMAR_CHARS + 1)), "grammar.regex"),
        (pb.Grammar(regex="(a{1000}){1000}{1000}"), "grammar.regex"),  # small to write, and too large to build
        (pb.Grammar(lark="start: foo"), "grammar.lark"),
        (pb.Grammar(choice=pb.Choice()), "grammar.choice"),
    ],
)
def test_what_does_not_compile_is_named(given, field):
    with pytest.raises(InvalidRequestError) as caught:
        compiler()(given)
    assert [violation.field for violation in caught.value.violations] == [field]
    assert len(str(caught.value)) < 400


def test_the_position_of_an_error_is_told():
    with pytest.raises(InvalidRequestError, match=r"1\(8\)"):
        compiler()(pb.Grammar(lark="start: foo"))


def token_ids(bits):
    """Of a mask."""
    return np.unpackbits(bits.view(np.uint8), bitorder="little").nonzero()[0].tolist()


def test_each_grammar_is_compiled_once_and_its_states_are_apart():
    compile_grammar = compiler()
    grammar = compile_grammar(pb.Grammar(regex="ab"))
    assert compile_grammar(pb.Grammar(regex="ab")) is grammar
    (a,), (b,) = (tiny_tokenizer()(c).input_ids for c in "ab")
    one, other = grammar.begin(), grammar.begin()
    one.take(a)
    assert token_ids(one.allowed([])) == [b]
    assert token_ids(other.allowed([])) == [a]
    assert token_ids(other.allowed([a])) == [b]
    assert (other.allows([a, b]), other.allows([b])) == (True, False)
    assert not one.ended
    one.take(b)
    assert one.ended
    with pytest.raises(ValueError, match="grammar"):
        other.take(b)
