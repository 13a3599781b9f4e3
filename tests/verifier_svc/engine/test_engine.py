"""The engine against transformers' own generate, whatever is drafted, kept or batched."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from lm.model import LanguageModel
from planner.fast.builtin_plan import builtin_plan
from tests.lm.helpers import pad_passes
from tests.lm.tiny import tiny_llama, tiny_tokenizer
from tests.verifier_svc.doubles import OracleDrafter, SilentLink
from treeline.config import Config, LimitsConfig, ModelConfig, VerifierConfig
from treeline.errors import InvalidRequestError
from treeline.sampling import SamplingParams
from verifier_svc.engine.engine import Engine
from verifier_svc.engine.request import Chunk, Completion, FinishReason, GenerationRequest, NodeFate
from verifier_svc.speculation.link import LocalLink

POLICIES = ("off", "chain:4", "static:3-2-1", "eagle2:4,3,8", "smart-paper", "smart")
LIMITS = LimitsConfig(max_running_requests=8, max_context_tokens=256, max_tree_nodes=16, max_tree_depth=6)
CONFIG = Config(
    verifier=VerifierConfig(
        target=ModelConfig(dtype="float32"), kv_cache_tokens=1024, kv_block_tokens=4, prefill_chunk_tokens=16
    ),
    limits=LIMITS,
)


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    torch.manual_seed(0)
    return LanguageModel.from_hf(tiny_llama(), tiny_tokenizer())


def plain_greedy(model: LanguageModel, prompt: list[int], max_tokens: int) -> list[int]:
    """transformers' own greedy continuation, with its own attention."""
    # Its eager attention of Falcon adds ALiBi biases twice: to the mask as well.
    model.hf.set_attn_implementation("sdpa" if model.hf.config.model_type == "falcon" else "eager")
    try:
        out = model.hf.generate(
            torch.tensor([prompt]), max_new_tokens=max_tokens, do_sample=False, eos_token_id=-1, pad_token_id=0
        )
    finally:
        model.hf.set_attn_implementation("treeline")
    return out[0, len(prompt) :].tolist()


class Known:
    """Continuations by prompt, for an oracle drafter."""

    def __init__(self) -> None:
        self.answers: list[tuple[list[int], list[int]]] = []

    def add(self, prompt: list[int], answer: list[int]) -> None:
        self.answers.append((prompt, answer))

    def __call__(self, tokens: list[int]) -> list[int]:
        for prompt, answer in self.answers:
            whole = prompt + answer
            if whole[: len(tokens)] == tokens:
                return whole[len(tokens) :]
        return []


def run(engine: Engine, requests: list[GenerationRequest], on_step=lambda step: None) -> dict[str, list]:
    """All outputs by request, with one request joining every other step."""
    outputs: dict[str, list] = {request.request_id: [] for request in requests}
    waiting = list(requests)
    step = 0
    while waiting or engine.has_work:
        if waiting and step % 2 == 0:
            engine.add(waiting.pop(0))
        for output in engine.step()[0]:
            outputs[output.request_id].append(output.item)
        on_step(step)
        step += 1
        assert step < 2000
    return outputs


def tokens_of(items: list) -> list[int]:
    return [token for item in items if isinstance(item, Chunk) for token in item.token_ids]


def prompts(model: LanguageModel, count: int, seed: int = 1) -> list[list[int]]:
    random = np.random.default_rng(seed)
    return [random.integers(3, model.vocab_size, random.integers(1, 40)).tolist() for _ in range(count)]


def engine_for(model: LanguageModel, drafter: OracleDrafter | None) -> Engine:
    plan = builtin_plan(LIMITS)
    return Engine(model, LocalLink(drafter) if drafter else None, lambda: plan, CONFIG)


def assert_all_free(engine: Engine, drafter: OracleDrafter | None = None) -> None:
    assert engine.cache.used_blocks == 0
    assert not engine.has_work
    assert not engine.scheduler.running
    if drafter is not None:
        assert not drafter.tokens


@pytest.mark.parametrize("policy", [*POLICIES, "mixed"])
def test_greedy_equals_transformers_with_every_policy(model, policy):
    known = Known()
    requests = []
    for index, prompt in enumerate(prompts(model, 12)):
        known.add(prompt, plain_greedy(model, prompt, 24))
        chosen = POLICIES[index % len(POLICIES)] if policy == "mixed" else policy
        requests.append(GenerationRequest(f"r{index}", prompt, SamplingParams(), 24, ignore_eos=True, policy=chosen))
    drafter = OracleDrafter(known, model.vocab_size)
    engine = engine_for(model, drafter)
    outputs = run(engine, requests)
    for (_, answer), request in zip(known.answers, requests, strict=True):
        assert tokens_of(outputs[request.request_id]) == answer
        completion = outputs[request.request_id][-1]
        assert completion.finish_reason is FinishReason.LENGTH
        assert completion.completion_tokens == 24
    if policy not in ("off", "mixed"):
        accepted = sum(outputs[r.request_id][-1].speculation.accepted_nodes for r in requests)
        assert accepted > 0, "nothing was ever accepted, so nothing was tested"
    assert_all_free(engine, drafter)


def test_padded_passes_write_the_same_text(model):
    """As on a GPU: prompts, trees and plain steps in buckets of tokens."""
    padded = LanguageModel.from_hf(tiny_llama(), tiny_tokenizer())
    pad_passes(padded.passes)
    known, requests = Known(), []
    for index, prompt in enumerate(prompts(model, 3)):
        known.add(prompt, plain_greedy(model, prompt, 10))
        requests.append(
            GenerationRequest(f"r{index}", prompt, SamplingParams(), 10, ignore_eos=True, policy="static:2-1")
        )
    outputs = run(engine_for(padded, OracleDrafter(known, model.vocab_size)), requests)
    assert [tokens_of(outputs[r.request_id]) for r in requests] == [answer for _, answer in known.answers]


@pytest.mark.parametrize(
    "sampling",
    [
        SamplingParams(temperature=1.0, seed=7),
        SamplingParams(temperature=0.7, top_p=0.9, seed=8),
        SamplingParams(temperature=1.3, top_k=5, seed=2**63 + 11),
        SamplingParams(temperature=0.8, repetition_penalty=1.3, seed=9),
        SamplingParams(temperature=0.0, repetition_penalty=1.5),
        SamplingParams(presence_penalty=1.0, frequency_penalty=0.4),
        SamplingParams(temperature=0.9, frequency_penalty=-0.3, min_p=0.02, logit_bias={9: 3.0, 50: -4.0}, seed=10),
    ],
)
def test_the_same_seed_gives_the_same_text_under_every_policy(model, sampling):
    (prompt,) = prompts(model, 1, seed=5)

    def answer(policy: str, drafter: OracleDrafter | None) -> list[int]:
        request = GenerationRequest("r", prompt, sampling, 40, ignore_eos=True, policy=policy)
        engine = engine_for(model, drafter)
        items = run(engine, [request])["r"]
        assert_all_free(engine, drafter)
        return tokens_of(items)

    plain = answer("off", None)
    known = Known()
    known.add(prompt, plain)
    for policy in POLICIES[1:]:
        drafter = OracleDrafter(known, model.vocab_size, seed=3)
        assert answer(policy, drafter) == plain
        assert drafter.drafted_nodes > 0


def test_a_drafter_that_loses_sessions_is_caught_up(model):
    known = Known()
    (prompt,) = prompts(model, 1, seed=9)
    known.add(prompt, plain_greedy(model, prompt, 40))
    drafter = OracleDrafter(known, model.vocab_size)
    engine = engine_for(model, drafter)

    def lose(step: int) -> None:
        if step % 5 == 2:
            drafter.tokens.clear()

    outputs = run(
        engine, [GenerationRequest("r", prompt, SamplingParams(), 40, ignore_eos=True, policy="chain:4")], lose
    )
    assert tokens_of(outputs["r"]) == known.answers[0][1]
    assert outputs["r"][-1].speculation.accepted_nodes > 5


def test_a_silent_drafter_changes_nothing(model):
    (prompt,) = prompts(model, 1, seed=10)
    plan = builtin_plan(LIMITS)
    engine = Engine(model, SilentLink(), lambda: plan, CONFIG)
    outputs = run(engine, [GenerationRequest("r", prompt, SamplingParams(), 12, ignore_eos=True, policy="chain:4")])
    assert tokens_of(outputs["r"]) == plain_greedy(model, prompt, 12)


def test_stop_tokens_end_a_request_inside_an_accepted_path(model):
    (prompt,) = prompts(model, 1, seed=11)
    answer = plain_greedy(model, prompt, 30)
    stop = answer[10]
    expected = answer[: answer.index(stop) + 1]
    known = Known()
    known.add(prompt, answer)
    for seed in range(5):
        drafter = OracleDrafter(known, model.vocab_size, seed)
        engine = engine_for(model, drafter)
        request = GenerationRequest(
            "r", prompt, SamplingParams(), 30, stop_token_ids=frozenset([stop]), ignore_eos=True, policy="chain:6"
        )
        items = run(engine, [request])["r"]
        assert tokens_of(items) == expected
        assert items[-1].finish_reason is FinishReason.STOP
        assert items[-1].matched_stop == stop
        assert_all_free(engine, drafter)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_nothing_ends_an_answer_before_its_least_tokens_under_any_policy(model, temperature):
    (prompt,) = prompts(model, 1, seed=11)
    sampling = SamplingParams(temperature=temperature, seed=2)
    free = GenerationRequest("r", prompt, sampling, 40, ignore_eos=True, policy="off")
    whole = tokens_of(run(engine_for(model, None), [free])["r"])
    early = frozenset(whole[2:6])
    request = replace(free, stop_token_ids=early, min_tokens=9)
    plain = run(engine_for(model, None), [request])["r"]
    answer = tokens_of(plain)
    assert len(answer) > 9
    assert not early & set(answer[:9])
    for policy in POLICIES[1:]:
        known = Known()
        known.add(prompt, answer)
        drafter = OracleDrafter(known, model.vocab_size, seed=3)
        items = run(engine_for(model, drafter), [replace(request, policy=policy)])["r"]
        assert tokens_of(items) == answer
        assert items[-1].finish_reason == plain[-1].finish_reason


def test_a_stop_string_is_kept_where_asked_for_and_not_looked_for_too_early(model):
    (prompt,) = prompts(model, 1, seed=11)
    free = GenerationRequest("r", prompt, SamplingParams(), 40, ignore_eos=True, policy="off")

    def text_of(request: GenerationRequest) -> str:
        items = run(engine_for(model, None), [request])["r"]
        return "".join(item.text for item in items if isinstance(item, Chunk))

    whole = text_of(free)
    stop = whole[2:5]
    assert text_of(replace(free, stop=(stop,))) == whole[: whole.index(stop)]
    assert text_of(replace(free, stop=(stop,), include_stop=True)) == whole[: whole.index(stop) + len(stop)]
    assert text_of(replace(free, stop=(stop,), min_tokens=39)) == whole


def test_abort_frees_everything_at_once_waiting_or_running(model):
    engine = engine_for(model, None)
    requests = [
        GenerationRequest(f"r{i}", prompt, SamplingParams(), 60, ignore_eos=True, policy="off")
        for i, prompt in enumerate(prompts(model, 12, seed=12))
    ]
    for request in requests:
        engine.add(request)
    for _ in range(3):
        engine.step()
    assert engine.cache.used_blocks > 0
    assert engine.scheduler.waiting
    outputs = engine.abort([r.request_id for r in requests] + ["unknown"])
    assert {o.item.finish_reason for o in outputs if isinstance(o.item, Completion)} == {FinishReason.ABORTED}
    assert len(outputs) == 12
    assert_all_free(engine)


def test_logprobs_are_those_of_the_raw_distribution(model):
    (prompt,) = prompts(model, 1, seed=13)
    request = GenerationRequest("r", prompt, SamplingParams(), 5, logprobs=3, ignore_eos=True, policy="off")
    items = run(engine_for(model, None), [request])["r"]
    given = [entry for item in items if isinstance(item, Chunk) for entry in item.logprobs]
    answer = tokens_of(items)
    model.hf.set_attn_implementation("eager")
    with torch.inference_mode():
        logits = model.hf(torch.tensor([prompt + answer])).logits[0].float()
    model.hf.set_attn_implementation("treeline")
    expected = logits[len(prompt) - 1 : -1].log_softmax(-1)
    assert [entry.token_id for entry in given] == answer
    for entry, row in zip(given, expected, strict=True):
        assert entry.logprob == pytest.approx(row[entry.token_id].item(), abs=1e-4)
        assert [t for t, _ in entry.top] == row.topk(3).indices.tolist()


def test_prompt_logprobs_are_the_same_under_every_policy_whatever_is_cached(model):
    prompt = np.random.default_rng(3).integers(3, model.vocab_size, 70).tolist()
    known = Known()
    known.add(prompt, plain_greedy(model, prompt, 12))
    plain = GenerationRequest("plain", prompt, SamplingParams(), 12, ignore_eos=True)
    asked = [
        replace(plain, request_id=policy, policy=policy, prompt_logprobs=2) for policy in ("off", "chain:3", "smart")
    ]
    engine = engine_for(model, OracleDrafter(known, model.vocab_size))
    found = run(engine, [plain, *asked])  # the others find the prompt in the prefix cache
    model.hf.set_attn_implementation("eager")
    with torch.inference_mode():
        expected = model.hf(torch.tensor([prompt])).logits[0].float().log_softmax(-1)
    model.hf.set_attn_implementation("treeline")
    for request in asked:
        first, *others = [item for item in found[request.request_id] if isinstance(item, Chunk)]
        assert not any(chunk.prompt_logprobs for chunk in others)
        assert [entry.token_id for entry in first.prompt_logprobs] == prompt
        assert math.isnan(first.prompt_logprobs[0].logprob)
        for entry, row in zip(first.prompt_logprobs[1:], expected, strict=False):
            assert entry.logprob == pytest.approx(row[entry.token_id].item(), abs=1e-4)
            assert [t for t, _ in entry.top] == row.topk(2).indices.tolist()
    assert len({tuple(tokens_of(items)) for items in found.values()}) == 1
    assert_all_free(engine)


def test_a_prompt_is_scored_without_an_answer_amid_others(model):
    prompt = np.random.default_rng(3).integers(3, model.vocab_size, 70).tolist()
    answer = GenerationRequest("answer", prompt, SamplingParams(), 6, ignore_eos=True, prompt_logprobs=1)
    engine = engine_for(model, None)
    found = run(engine, [replace(answer, request_id="score", max_tokens=0, logprobs=1), answer])
    chunk, end = found["score"]
    assert (chunk.text, chunk.token_ids, chunk.logprobs) == ("", [], [])
    assert [entry.token_id for entry in chunk.prompt_logprobs] == prompt
    values, expected = ([e.logprob for e in c.prompt_logprobs[1:]] for c in (chunk, found["answer"][0]))
    assert values == pytest.approx(expected, abs=1e-4)
    assert (end.finish_reason, end.completion_tokens) == (FinishReason.LENGTH, 0)
    assert tokens_of(found["answer"]) == plain_greedy(model, prompt, 6)
    assert_all_free(engine)


def test_explanations_account_for_every_token(model):
    known = Known()
    (prompt,) = prompts(model, 1, seed=14)
    known.add(prompt, plain_greedy(model, prompt, 30))
    engine = engine_for(model, OracleDrafter(known, model.vocab_size))
    request = GenerationRequest("r", prompt, SamplingParams(), 30, ignore_eos=True, policy="eagle2:4,3,8", explain=True)
    items = run(engine, [request])["r"]
    chunks = [item for item in items if isinstance(item, Chunk)]
    assert all(len(c.token_ids) == 1 + c.explanation.accepted_nodes for c in chunks[:-1])
    assert all(c.explanation.verified_nodes <= c.explanation.drafted_nodes for c in chunks)
    assert all(c.explanation.reason for c in chunks)


def test_an_explained_tree_shows_what_became_of_each_node(model):
    known = Known()
    (prompt,) = prompts(model, 1, seed=14)
    answer = plain_greedy(model, prompt, 30)
    known.add(prompt, answer)
    engine = engine_for(model, OracleDrafter(known, model.vocab_size))
    options = {"ignore_eos": True, "explain": True, "explain_tree": True}
    items = run(engine, [GenerationRequest("r", prompt, SamplingParams(), 30, policy="smart", **options)])["r"]
    chunks = [item for item in items if isinstance(item, Chunk)]
    drawn = [c for c in chunks if c.explanation.nodes]
    assert drawn
    for chunk in drawn:
        why = chunk.explanation
        fates = [node.fate for node in why.nodes]
        assert len(fates) == why.drafted_nodes
        assert len(fates) - fates.count(NodeFate.PRUNED) == why.verified_nodes
        accepted = [node for node in why.nodes if node.fate is NodeFate.ACCEPTED]
        assert [node.token_id for node in accepted][: len(chunk.token_ids)] == chunk.token_ids[: len(accepted)]
        assert all(node.parent < place for place, node in enumerate(why.nodes))
        assert all(0 < node.probability <= 1 and node.gain > 0 for node in why.nodes)


def test_what_can_never_fit_is_refused(model):
    engine = engine_for(model, None)
    with pytest.raises(InvalidRequestError, match="KV cache"):
        engine.add(GenerationRequest("r", [5] * 100, SamplingParams(), 2000, policy="off"))


def test_a_long_prompt_does_not_stall_running_streams(model):
    engine = engine_for(model, None)
    engine.add(GenerationRequest("short", [5, 6], SamplingParams(), 60, ignore_eos=True, policy="off"))
    engine.step()
    engine.add(GenerationRequest("long", [7] * 120, SamplingParams(), 4, ignore_eos=True, policy="off"))
    for _ in range(8):
        outputs, _ = engine.step()
        assert any(o.request_id == "short" for o in outputs)
