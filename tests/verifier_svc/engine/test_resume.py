"""A request resumed behind any of its tokens goes on with the text it would have had."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.verifier_svc.doubles import OracleDrafter
from tests.verifier_svc.engine.test_engine import Known, assert_all_free, engine_for, prompts
from tests.verifier_svc.engine.test_engine import model as model  # a fixture
from treeline.sampling import SamplingParams
from verifier_svc.engine.request import Chunk, FinishReason, GenerationRequest

MAX_TOKENS = 24


def answer(model, request: GenerationRequest, known: Known | None = None) -> tuple[list[Chunk], object]:
    """A new engine's chunks, and the completion."""
    engine = engine_for(model, OracleDrafter(known, model.vocab_size) if known else None)
    items = [output.item for output in engine.add(request)]
    while engine.has_work:
        items += [output.item for output in engine.step()[0]]
    *chunks, completion = items
    assert_all_free(engine)
    return chunks, completion


def joined(chunks: list[Chunk]) -> tuple[str, list[int], list]:
    texts = "".join(chunk.text for chunk in chunks)
    return texts, [t for chunk in chunks for t in chunk.token_ids], [p for chunk in chunks for p in chunk.logprobs]


@pytest.mark.parametrize(
    "sampling",
    [
        SamplingParams(),
        SamplingParams(temperature=0.9, top_p=0.95, seed=5),
        SamplingParams(temperature=0.7, repetition_penalty=1.3, seed=6),
        SamplingParams(temperature=0.7, presence_penalty=0.5, frequency_penalty=0.5, min_p=0.01, seed=7),
    ],
)
def test_text_logprobs_and_usage_continue_from_any_chunk(model, sampling):
    (prompt,) = prompts(model, 1)
    request = GenerationRequest("r", prompt, sampling, MAX_TOKENS, ignore_eos=True, logprobs=2, policy="chain:4")
    chunks, completion = answer(model, request)
    known = Known()
    known.add(prompt, joined(chunks)[1])
    for cut in range(1, len(chunks) + 1):
        text, tokens, logprobs = joined(chunks[:cut])
        rest, end = answer(model, replace(request, delivered_token_ids=tuple(tokens)), known if cut % 2 else None)
        more_text, more_tokens, more_logprobs = joined(rest)
        assert (text + more_text, tokens + more_tokens) == joined(chunks)[:2]
        assert [p.token_id for p in logprobs + more_logprobs] == joined(chunks)[1]
        assert [p.logprob for p in more_logprobs] == pytest.approx(
            [p.logprob for p in joined(chunks)[2]][len(logprobs) :], abs=1e-3
        )
        assert (end.finish_reason, end.completion_tokens) == (completion.finish_reason, completion.completion_tokens)


def test_a_stop_string_across_the_cut_is_found(model):
    (prompt,) = prompts(model, 1, seed=3)
    request = GenerationRequest("r", prompt, SamplingParams(), MAX_TOKENS, ignore_eos=True, policy="off")
    whole, _, _ = joined(answer(model, request)[0])
    start = len(whole) // 2
    stopping = replace(request, stop=(whole[start : start + 4],))
    chunks, completion = answer(model, stopping)
    assert completion.finish_reason is FinishReason.STOP
    for cut in range(1, len(chunks) + 1):
        text, tokens, _ = joined(chunks[:cut])
        rest, end = answer(model, replace(stopping, delivered_token_ids=tuple(tokens)))
        assert text + joined(rest)[0] == joined(chunks)[0]
        assert (end.finish_reason, end.matched_stop) == (FinishReason.STOP, completion.matched_stop)


def test_times_go_on(model):
    (prompt,) = prompts(model, 1)
    request = GenerationRequest("r", prompt, SamplingParams(), MAX_TOKENS, ignore_eos=True, policy="off")
    tokens = joined(answer(model, request)[0])[1][:5]
    resumed = replace(request, delivered_token_ids=tuple(tokens), elapsed_s=100.0, time_to_first_token_s=2.0)
    chunks, completion = answer(model, resumed)
    assert not any(chunk.first for chunk in chunks)
    assert completion.time_to_first_token_s == pytest.approx(2.0)
    assert 100 < completion.total_s < 130
    assert completion.prompt_tokens == len(prompt)
