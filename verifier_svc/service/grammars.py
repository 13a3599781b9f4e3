"""Compiles the grammars of requests: outside the engine's thread, with bounds, and cached."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from treeline.errors import FieldViolation, InvalidRequestError
from treeline.v1 import generation_pb2 as pb
from verifier_svc.engine.grammar import Grammar
from verifier_svc.service.fields import ServedModel

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

MAX_GRAMMAR_CHARS = 65536
MAX_PROBLEM_CHARS = 300
CACHED_GRAMMARS = 64
LIMITS = LLParserLimits(initial_lexer_fuel=250_000, max_lexer_states=25_000, verbose_errors=False)
"""A grammar compiles within about half a second, and its states take at most 50 MB (2 kB each)."""


class GrammarCompiler:
    """Compiles for one tokenizer. A call may take a second, so it needs a thread of its own."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, info: ServedModel) -> None:
        self._hf_tokenizer, self._info = tokenizer, info
        self._compiled = lru_cache(CACHED_GRAMMARS)(self._compile)

    def __call__(self, given: pb.Grammar) -> Grammar:
        """Raises InvalidRequestError with the position of the mistake."""
        kind = given.WhichOneof("kind")
        if kind is None:
            raise InvalidRequestError(FieldViolation("grammar", "give one of json_schema, regex, lark, choice"))
        return self._compiled(kind, _choice(given.choice.texts) if kind == "choice" else getattr(given, kind))

    @cached_property
    def _tokenizer(self) -> LLTokenizer:
        ends = sorted(self._info.eos_token_ids)
        return LLTokenizer(self._hf_tokenizer.backend_tokenizer.to_str(), self._info.vocab_size, ends or None)

    def _compile(self, kind: str, text: str) -> Grammar:
        field = f"grammar.{kind}"
        if not 0 < len(text) <= MAX_GRAMMAR_CHARS:
            problem = f"has {len(text)} characters, 1 to {MAX_GRAMMAR_CHARS} are allowed"
            raise InvalidRequestError(FieldViolation(field, problem))
        try:
            grammar = _SPELLINGS[kind](text)
        except ValueError as error:
            raise InvalidRequestError(FieldViolation(field, str(error)[:MAX_PROBLEM_CHARS])) from None
        matcher = LLMatcher(self._tokenizer, grammar, log_level=0, limits=LIMITS)
        compiled = Grammar(matcher, self._info.vocab_size)
        problem = matcher.get_error() or compiled.warm_up()
        if problem:
            raise InvalidRequestError(FieldViolation(field, problem[:MAX_PROBLEM_CHARS]))
        return compiled


_SPELLINGS: dict[str, Callable[[str], str]] = {
    "json_schema": LLMatcher.grammar_from_json_schema,
    "regex": LLMatcher.grammar_from_regex,
    "lark": LLMatcher.grammar_from_lark,
    "choice": LLMatcher.grammar_from_lark,
}


def _choice(texts: Iterable[str]) -> str:
    """A Lark grammar that matches one of these texts; empty if there are none."""
    spelled = " | ".join(json.dumps(text) for text in texts)
    return f"start: {spelled}" if spelled else ""
