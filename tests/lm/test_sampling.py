"""Choosing tokens: against transformers' logits processors, in distribution, and coupled with the drafter."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from lm.noise import gumbel_noise
from lm.sampling import Row, _scores, choose_tokens, logprobs, top_drafts
from treeline.sampling import SamplingParams

PARAMS = [
    SamplingParams(),
    SamplingParams(repetition_penalty=1.7),
    SamplingParams(temperature=0.6, seed=1),
    SamplingParams(temperature=1.5, seed=2),
    SamplingParams(temperature=1.0, top_k=1, seed=3),
    SamplingParams(temperature=1.0, top_k=20, seed=4),
    SamplingParams(temperature=1.0, top_k=10**6, seed=5),
    SamplingParams(temperature=1.0, top_p=0.8, seed=6),
    SamplingParams(temperature=1.0, top_p=1e-9, seed=7),
    SamplingParams(temperature=0.9, top_k=50, top_p=0.7, repetition_penalty=1.3, seed=8),
    SamplingParams(temperature=1.2, top_p=0.95, repetition_penalty=0.8, seed=9),
    SamplingParams(presence_penalty=1.5, logit_bias={0: 4.0, 7: -100.0, 39: 2.5}),
    SamplingParams(temperature=0.8, frequency_penalty=-0.5, min_p=0.1, seed=10),
    SamplingParams(
        temperature=1.1,
        top_k=30,
        top_p=0.9,
        repetition_penalty=1.2,
        presence_penalty=-0.4,
        frequency_penalty=0.7,
        min_p=0.05,
        logit_bias={3: 1.0, 5: -2.0},
        seed=11,
    ),
]


def shaped(logits: torch.Tensor, row: Row) -> torch.Tensor:
    """float32 [vocab]: OpenAI's penalties by their formula, the rest by transformers' own processors, in this order."""
    params, steps = row.params, LogitsProcessorList()
    history = [0] if row.history is None else np.asarray(row.history).tolist()
    logits = logits.clone()
    for token, bias in params.logit_bias.items():
        logits[token] += bias
    logits[list(row.barred)] = -torch.inf
    if params.repetition_penalty != 1.0 and row.history is not None:
        steps.append(RepetitionPenaltyLogitsProcessor(params.repetition_penalty))
    penalised = steps(torch.tensor([history]), logits[None])[0]
    for token in set(history[row.prompt_tokens :]) if row.history is not None else ():
        count = history[row.prompt_tokens :].count(token)
        penalised[token] -= np.float32(params.presence_penalty + params.frequency_penalty * count)
    steps = LogitsProcessorList()
    if params.temperature > 0:
        steps.append(TemperatureLogitsWarper(params.temperature))
    if params.top_k:
        steps.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1.0:
        steps.append(TopPLogitsWarper(params.top_p))
    if params.min_p > 0 and params.temperature > 0:
        steps.append(MinPLogitsWarper(params.min_p))
    return steps(torch.tensor([history]), penalised[None])[0]


def reference_choice(logits: torch.Tensor, row: Row) -> int:
    scores = shaped(logits, row)
    if not row.params.greedy:
        scores = scores.log_softmax(-1) + gumbel_noise(row.params.seed, row.position, len(logits), "cpu")
    return int(scores.argmax())


def random_rows(rng: np.random.Generator, count: int, vocab_size: int, scale: float) -> tuple[torch.Tensor, list[Row]]:
    logits = torch.from_numpy(rng.normal(0, scale, (count, vocab_size)).astype(np.float32))
    rows = []
    for index in range(count):
        history = rng.integers(0, vocab_size, rng.integers(1, 60))
        prompt_tokens = int(rng.integers(0, len(history) + 1))
        barred = frozenset(rng.integers(0, vocab_size, 2).tolist() if index % 3 == 0 else ())
        rows.append(Row(PARAMS[index % len(PARAMS)], int(rng.integers(0, 5000)), history, prompt_tokens, barred))
    return logits, rows


@pytest.mark.parametrize(("vocab_size", "scale"), [(40, 2.0), (600, 3.0), (3000, 0.5)])
def test_equals_transformers_processors_row_by_row(vocab_size: int, scale: float) -> None:
    logits, rows = random_rows(np.random.default_rng(vocab_size), 220, vocab_size, scale)
    chosen = choose_tokens(logits, rows)
    assert chosen.dtype == torch.int64
    assert chosen.tolist() == [reference_choice(row_logits, row) for row_logits, row in zip(logits, rows, strict=True)]


def test_ties_at_the_edge_of_a_nucleus_stay() -> None:
    logits = torch.tensor([3.0, 1.0, 1.0, 0.0, 1.0, -1.0])
    kept = _scores(logits[None], [Row(SamplingParams(temperature=1.0, top_p=0.75), 1)])[0].isfinite()
    assert kept.tolist() == [True, True, True, False, True, False]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_tokens_on_cuda_are_those_of_the_cpu_and_nothing_waits() -> None:
    logits, rows = random_rows(np.random.default_rng(8), 220, 3000, 2.0)
    there = logits.cuda()
    choose_tokens(there, rows)
    torch.cuda.set_sync_debug_mode("error")
    try:
        chosen = choose_tokens(there, rows)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    # A softmax may round differently there: a token at the very edge of a nucleus may fall out.
    assert (chosen.cpu() == choose_tokens(logits, rows)).float().mean() > 0.99


def test_a_row_depends_on_itself_alone_and_logits_are_not_changed() -> None:
    logits, rows = random_rows(np.random.default_rng(0), 33, 300, 2.0)
    before = logits.clone()
    together = choose_tokens(logits, rows)
    top_drafts(logits, rows, 4)
    logprobs(logits, together.tolist(), 3)
    assert torch.equal(logits, before)
    order = np.random.default_rng(1).permutation(33)
    shuffled = choose_tokens(logits[order], [rows[index] for index in order])
    assert shuffled.tolist() == together[order].tolist()
    assert [int(choose_tokens(logits[i : i + 1], [rows[i]])) for i in range(33)] == together.tolist()


def test_the_first_of_equal_scores_is_chosen() -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0, 2.0], [0.0, 0.0, 0.0, 0.0], [-torch.inf, -torch.inf, 2.0, 2.0]])
    rows = [Row(SamplingParams(), 1)] * 3
    assert choose_tokens(logits, rows).tolist() == [1, 0, 2]
    assert choose_tokens(logits[:, ::2], rows).tolist() == [1, 0, 1]


def test_biases_of_tokens_that_a_draft_model_lacks_are_left_out() -> None:
    params = SamplingParams(logit_bias={2: 5.0, 99: 100.0})
    assert choose_tokens(torch.tensor([[1.0, 3.0, 0.0]]), [Row(params, 1)]).tolist() == [2]


def test_history_may_be_a_tensor_an_array_or_nothing() -> None:
    logits = torch.tensor([[5.0, 4.0, -1.0]])
    params = SamplingParams(repetition_penalty=2.0)
    assert choose_tokens(logits, [Row(params, 1, np.array([0, 0]))]).tolist() == [1]
    assert choose_tokens(logits, [Row(params, 1, torch.tensor([0]))]).tolist() == [1]
    assert choose_tokens(logits, [Row(params, 1)]).tolist() == [0]


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=1.0, seed=21),
        SamplingParams(temperature=0.7, seed=22),
        SamplingParams(temperature=1.0, top_k=5, seed=23),
        SamplingParams(temperature=1.3, top_p=0.8, seed=24),
        SamplingParams(temperature=1.1, top_k=9, top_p=0.9, seed=25),
    ],
    ids=["plain", "temperature", "top-k", "top-p", "all"],
)
def test_draws_follow_the_shaped_distribution(params: SamplingParams) -> None:
    count = 20_000
    logits = torch.from_numpy(np.random.default_rng(30).normal(0, 1.5, 16).astype(np.float32))
    rows = [Row(params, position) for position in range(count)]
    draws = choose_tokens(logits.expand(count, -1), rows).numpy()
    probs = shaped(logits, rows[0]).double().softmax(-1).numpy()
    counts = np.bincount(draws, minlength=16)
    assert counts[probs == 0].sum() == 0
    assert stats.chisquare(counts[probs > 0], probs[probs > 0] * count).pvalue > 0.01


def test_a_perfect_drafter_proposes_the_targets_own_token_first() -> None:
    logits, rows = random_rows(np.random.default_rng(2), 66, 500, 2.0)
    ids, probs = top_drafts(logits, rows, 6)
    assert ids[:, 0].tolist() == choose_tokens(logits, rows).tolist()
    assert (probs[:, :-1] >= probs[:, 1:]).all()
    assert all(len(set(row)) == 6 for row in ids.tolist())
    assert (probs > 0).all()
    assert (probs <= 1).all()


def test_draft_probabilities_are_those_of_the_perturbed_softmax() -> None:
    logits = torch.from_numpy(np.random.default_rng(3).normal(0, 2, (2, 50)).astype(np.float32))
    greedy, sampled = Row(SamplingParams(), 7), Row(SamplingParams(temperature=0.8, seed=4), 7)
    ids, probs = top_drafts(logits, [greedy, sampled], 3)
    perturbed = logits[1] / 0.8 + gumbel_noise(4, 7, 50, "cpu")
    for row, scores in enumerate((logits[0], perturbed)):
        expected = scores.softmax(-1).topk(3)
        assert ids[row].tolist() == expected.indices.tolist()
        torch.testing.assert_close(probs[row], expected.values)


def test_noise_shared_with_a_weaker_drafter_raises_agreement() -> None:
    rng = np.random.default_rng(4)
    target = torch.from_numpy(rng.normal(0, 1.5, (2000, 16)).astype(np.float32))
    draft = target + torch.from_numpy(rng.normal(0, 0.5, target.shape).astype(np.float32))
    rows = [Row(SamplingParams(temperature=1.0, seed=5), position) for position in range(2000)]
    other = [Row(SamplingParams(temperature=1.0, seed=6), position) for position in range(2000)]
    own = choose_tokens(target, rows)[:, None]
    shared = (top_drafts(draft, rows, 2)[0] == own).any(1).float().mean()
    separate = (top_drafts(draft, other, 2)[0] == own).any(1).float().mean()
    assert shared > 0.9
    assert separate < 0.7


def test_logprobs_are_of_the_raw_logits() -> None:
    logits = torch.from_numpy(np.random.default_rng(5).normal(0, 2, (3, 30)).astype(np.float32))
    chosen, top_ids, top_values = logprobs(logits, [4, 5, 6], 2)
    expected = logits.log_softmax(-1)
    torch.testing.assert_close(chosen, expected[torch.arange(3), torch.tensor([4, 5, 6])])
    torch.testing.assert_close(top_values, expected.topk(2).values)
    assert top_ids.tolist() == expected.topk(2).indices.tolist()
    assert logprobs(logits, [0, 0, 0], 0)[1].shape == (3, 0)
