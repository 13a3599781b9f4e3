"""An answer bound by a grammar, for passes whose rows all get a mask. Apart, since it imports parts of the service."""

from __future__ import annotations

import json
from typing import NamedTuple

from lm.model import LanguageModel
from treeline.config import Config
from treeline.v1 import generation_pb2 as pb
from verifier_svc.engine.grammar import GrammarState
from verifier_svc.service.grammars import GrammarCompiler
from verifier_svc.service.server import served


class Bound(NamedTuple):
    """An answer in the middle of a JSON string, where most tokens may follow, and one such token."""

    state: GrammarState
    token: int


def bound_answer(model: LanguageModel) -> Bound:
    compile_grammar = GrammarCompiler(model.tokenizer, served(model, Config()))
    state = compile_grammar(pb.Grammar(json_schema=json.dumps({"properties": {"a": {"type": "string"}}}))).begin()
    *begun, token = model.tokenizer('{"a": "once upon', add_special_tokens=False).input_ids
    for token_id in begun:
        state.take(token_id)
    return Bound(state, token)
