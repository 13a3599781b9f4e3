"""Every field of a request that shapes or describes its text, on trees: 24 answers are those of `off` each time."""

from __future__ import annotations

from typing import Any

import pytest

from lm.model import LanguageModel
from tests.verifier_svc.doubles import OracleDrafter
from tests.verifier_svc.engine.test_engine import POLICIES, Known, assert_all_free, engine_for, prompts, run, tokens_of
from tests.verifier_svc.engine.test_engine import model as model  # a fixture
from tests.verifier_svc.engine.test_grammar import GRAMMARS, text_of
from tests.verifier_svc.engine.test_grammar import compile_grammar as compile_grammar  # a fixture
from treeline.sampling import SamplingParams
from verifier_svc.engine.request import Chunk, GenerationRequest
from verifier_svc.service.grammars import GrammarCompiler

PROMPTS, MAX_TOKENS = 24, 20
FIELDS: dict[str, dict[str, Any]] = {
    "presence_penalty": {"sampling": {"presence_penalty": 1.5}},
    "frequency_penalty": {"sampling": {"frequency_penalty": 0.7}},
    "repetition_penalty": {"sampling": {"repetition_penalty": 1.3}},
    "min_p": {"sampling": {"temperature": 1.0, "min_p": 0.02}},
    "top_k": {"sampling": {"temperature": 1.2, "top_k": 20}},
    "top_p": {"sampling": {"temperature": 1.0, "top_p": 0.8}},
    "logit_bias": {"sampling": {"logit_bias": {9: 3.0, 50: -4.0}}},
    "min_tokens": {"stop_token_ids": frozenset(range(0, 256, 5)), "min_tokens": 9},
    "include_stop": {"stop": ("a", "e", "t", " "), "include_stop": True},
    "skip_special_tokens": {"sampling": {"logit_bias": {258: 8.0}}, "skip_special_tokens": False},
    "logprobs": {"logprobs": 2},
    "prompt_logprobs": {"prompt_logprobs": 1},
    **{name: {"grammar": name, "sampling": {"temperature": 1.0}} for name in GRAMMARS},
}


def requests_of(model: LanguageModel, fields: list[str], compile_grammar: GrammarCompiler) -> list[GenerationRequest]:
    """One a prompt, with the fields in turn."""
    requests = []
    for index, prompt in enumerate(prompts(model, PROMPTS, seed=21)):
        given = FIELDS[fields[index % len(fields)]]
        more = {"sampling": SamplingParams(**given.get("sampling", {}), seed=index)}
        if "grammar" in given:
            more["grammar"] = compile_grammar(GRAMMARS[given["grammar"]])
        requests.append(GenerationRequest(f"r{index}", prompt, **{"max_tokens": MAX_TOKENS, **given, **more}))
    return requests


def told(items: list) -> Any:
    """All that a client is told of an answer, log-probabilities apart, which rounding moves."""
    chunks, end = [item for item in items if isinstance(item, Chunk)], items[-1]
    scored = [entry.token_id for chunk in chunks for entry in chunk.logprobs]
    of_prompt = [entry.token_id for chunk in chunks for entry in chunk.prompt_logprobs]
    return text_of(items), tokens_of(items), scored, of_prompt, end.finish_reason, end.matched_stop


@pytest.mark.parametrize(
    "fields", [[*FIELDS], *(pytest.param([name], id=name, marks=pytest.mark.slow) for name in FIELDS)]
)
def test_answers_are_those_of_off_under_every_policy(model, compile_grammar, fields):
    requests = requests_of(model, fields, compile_grammar)
    plain = run(engine_for(model, None), [GenerationRequest(**vars(r) | {"policy": "off"}) for r in requests])
    known = Known()
    for request in requests:
        known.add(request.prompt_token_ids, tokens_of(plain[request.request_id]))
    for policy in POLICIES[1:]:
        drafter = OracleDrafter(known, model.vocab_size, seed=3)
        engine = engine_for(model, drafter)
        found = run(engine, [GenerationRequest(**vars(r) | {"policy": policy}) for r in requests])
        assert {name: told(items) for name, items in found.items()} == {n: told(items) for n, items in plain.items()}
        assert sum(items[-1].speculation.accepted_nodes for items in found.values()), "no tree was ever of use"
        assert_all_free(engine, drafter)
