"""Prompts that begin alike share their KV, and nothing else changes."""

from __future__ import annotations

import pytest

from lm.kv_cache import KVCache
from lm.model import LanguageModel
from planner.fast.builtin_plan import builtin_plan
from tests.lm.tiny import tiny_llama, tiny_tokenizer
from tests.verifier_svc.engine.test_engine import plain_greedy
from treeline.config import Config, LimitsConfig, ModelConfig, VerifierConfig
from treeline.sampling import SamplingParams
from verifier_svc.engine.engine import Engine
from verifier_svc.engine.request import Chunk, Completion, GenerationRequest

BLOCK = 4
SYSTEM = [(7 * i + 3) % 250 for i in range(41)]


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return LanguageModel.from_hf(tiny_llama(), tiny_tokenizer())


def new_engine(model: LanguageModel, tokens: int = 1024, prefix_caching: bool = True) -> Engine:
    verifier = VerifierConfig(
        target=ModelConfig(dtype="float32"),
        kv_cache_tokens=tokens,
        kv_block_tokens=BLOCK,
        prefill_chunk_tokens=16,
        prefix_caching=prefix_caching,
    )
    limits = LimitsConfig(max_running_requests=4, max_context_tokens=256, max_tree_nodes=8)
    plan = builtin_plan(limits)
    return Engine(model, None, lambda: plan, Config(verifier=verifier, limits=limits))


def run(engine: Engine, requests: list[GenerationRequest]) -> tuple[list[list[int]], list[int]]:
    """Answers, and how many tokens of each prompt were cached."""
    answers: dict[str, list[int]] = {request.request_id: [] for request in requests}
    cached: dict[str, int] = {}
    for request in requests:
        engine.add(request)
    while engine.has_work:
        for output in engine.step()[0]:
            if isinstance(output.item, Chunk):
                answers[output.request_id] += output.item.token_ids
            else:
                assert isinstance(output.item, Completion)
                cached[output.request_id] = output.item.cached_tokens
    return list(answers.values()), [cached[request.request_id] for request in requests]


def request(name: str, prompt: list[int], max_tokens: int = 12) -> GenerationRequest:
    return GenerationRequest(name, prompt, SamplingParams(), max_tokens, policy="off", ignore_eos=True)


def test_a_known_beginning_is_not_computed_again_and_the_answer_is_the_same(model: LanguageModel) -> None:
    engine = new_engine(model)
    prompts = [[*SYSTEM, 200, 201, 202], [*SYSTEM, 99], [*SYSTEM[:20], 5, 6]]
    for prompt, known in zip(prompts, (0, 40, 20), strict=True):
        answers, cached = run(engine, [request("one", prompt)])
        assert answers == [plain_greedy(model, prompt, 12)]
        assert cached == [known]
        assert engine.cache.used_blocks == 0


def test_the_next_turn_finds_the_answer_of_the_last_one(model: LanguageModel) -> None:
    engine = new_engine(model)
    ((answer,), _) = run(engine, [request("first", SYSTEM)])
    turn = SYSTEM + answer + [17, 18]
    answers, cached = run(engine, [request("second", turn)])
    assert answers == [plain_greedy(model, turn, 12)]
    assert cached == [52]  # All but the last token of the answer have KV.


def test_a_whole_prompt_that_is_known_still_runs_its_last_token(model: LanguageModel) -> None:
    engine = new_engine(model)
    prompt = SYSTEM[:40]
    first, _ = run(engine, [request("first", prompt)])
    second, cached = run(engine, [request("second", prompt)])
    assert (second, cached) == (first, [36])


def test_requests_that_run_at_a_time_share_blocks(model: LanguageModel) -> None:
    engine = new_engine(model)
    engine.add(request("early", [*SYSTEM, 1], 30))
    while not engine.scheduler.running or not engine.scheduler.running[0].output_tokens:
        engine.step()
    alone = engine.cache.used_blocks
    engine.add(request("late", [*SYSTEM, 2], 30))
    engine.step()
    early, late = engine.scheduler.running
    assert late.kv.blocks[:10] == early.kv.blocks[:10]
    assert engine.cache.used_blocks == 2 * alone - 10
    engine.abort(["early"])
    assert engine.cache.used_blocks == alone
    engine.abort(["late"])
    assert engine.cache.used_blocks == 0


def test_under_pressure_what_is_remembered_makes_room_and_answers_stay_right(model: LanguageModel) -> None:
    engine = new_engine(model, tokens=128)
    for i in range(12):
        prompt = [*range(10 + i, 60 + i), *SYSTEM[:20]]
        answers, cached = run(engine, [request("one", prompt)])
        assert (answers, cached) == ([plain_greedy(model, prompt, 12)], [0])
        assert engine.cache.used_blocks == 0
    assert engine.cache.free_blocks == engine.cache.total_blocks


def test_without_prefix_caching_everything_is_computed(model: LanguageModel) -> None:
    engine = new_engine(model, prefix_caching=False)
    assert [run(engine, [request("one", SYSTEM)])[1] for _ in range(2)] == [[0], [0]]


def test_the_least_recently_used_end_is_forgotten_first() -> None:
    cache: KVCache = LanguageModel.from_hf(tiny_llama(), tiny_tokenizer()).new_cache(8 * BLOCK, BLOCK)
    texts = [[start + i for i in range(4 * BLOCK)] for start in (0, 100)]
    for text in texts:
        sequence = cache.allocate(len(text))
        assert sequence is not None
        sequence.length = len(text)
        cache.remember(sequence, text)
        cache.free(sequence)
    other = cache.allocate(2 * BLOCK)
    assert other is not None
    lengths = []
    for text in reversed(texts):
        found = cache.allocate(len(text), text)
        assert found is not None
        lengths.append(found.length)
        with pytest.raises(ValueError, match="cannot truncate"):
            found.truncate(found.length - 1)
        cache.free(found)
    assert lengths == [4 * BLOCK, 2 * BLOCK]
