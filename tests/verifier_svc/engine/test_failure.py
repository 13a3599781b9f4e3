"""What raises inside one sequence's part of a step ends that sequence and no other."""

from __future__ import annotations

import pytest

from lm.model import LanguageModel
from tests.verifier_svc.engine.test_engine import assert_all_free, engine_for, plain_greedy, prompts, run, tokens_of
from tests.verifier_svc.engine.test_engine import model as model  # a fixture
from treeline.sampling import SamplingParams
from verifier_svc.engine import engine as engine_module
from verifier_svc.engine.detokenizer import Detokenizer
from verifier_svc.engine.engine import Engine
from verifier_svc.engine.request import Chunk, Completion, FinishReason, GenerationRequest

DOOMED = "r1"


def requests(model: LanguageModel) -> list[GenerationRequest]:
    return [
        GenerationRequest(f"r{index}", prompt, SamplingParams(), 12, ignore_eos=True, logprobs=1, explain=True)
        for index, prompt in enumerate(prompts(model, 4))
    ]


def fail_in_detokeniser(monkeypatch, engine: Engine) -> None:
    feed = Detokenizer.feed

    def broken(detokenizer, token_id):
        (doomed,) = [s for s in engine.scheduler.running if s.detokenizer is detokenizer]
        if doomed.request.request_id == DOOMED and doomed.output_tokens > 3:
            raise ValueError("Invalid prefix encountered")
        return feed(detokenizer, token_id)

    monkeypatch.setattr(Detokenizer, "feed", broken)


def fail_in(name: str):
    """Make a function of the engine's module raise for the doomed sequence after a few tokens."""

    def arrange(monkeypatch, engine: Engine) -> None:
        original = getattr(engine_module, name)

        def broken(sequence, *rest):
            if sequence.request.request_id == DOOMED and sequence.output_tokens > 3:
                raise RuntimeError("broken")
            return original(sequence, *rest)

        monkeypatch.setattr(engine_module, name, broken)

    return arrange


@pytest.mark.parametrize(
    "arrange", [fail_in_detokeniser, fail_in("token_logprobs"), fail_in("explanation")], ids=lambda f: f.__name__
)
def test_a_failing_sequence_ends_alone(model, monkeypatch, arrange):
    asked = requests(model)
    engine = engine_for(model, None)
    arrange(monkeypatch, engine)
    outputs = run(engine, asked)
    assert outputs[DOOMED][-1].finish_reason is FinishReason.FAILED
    for request in asked:
        chunks, end = outputs[request.request_id][:-1], outputs[request.request_id][-1]
        assert isinstance(end, Completion)
        assert all(isinstance(chunk, Chunk) for chunk in chunks)
        expected = plain_greedy(model, request.prompt_token_ids, 12)
        if request.request_id == DOOMED:
            assert 0 < len(tokens_of(chunks)) < 12
            assert tokens_of(chunks) == expected[: len(tokens_of(chunks))]
        else:
            assert end.finish_reason is FinishReason.LENGTH
            assert tokens_of(chunks) == expected
    assert_all_free(engine)
