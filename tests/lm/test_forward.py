"""The packed forward pass against transformers, for every architecture family."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lm.model import LanguageModel
from lm.packed import PackedSequence
from tests.lm.helpers import (
    WAYS,
    compute,
    fragmented,
    pad_passes,
    path_to,
    prefill,
    random_parents,
    random_tokens,
    reference_logits,
)
from tests.lm.tiny import CONFIGS, tiny_model, tiny_tokenizer

TIGHT = {"rtol": 1e-4, "atol": 2e-5}


PADDED = ["llama", "mistral-sliding", "gemma2-softcap", "gpt2", "mpt-alibi"]


@pytest.fixture(scope="module", params=[*CONFIGS, *(f"{kind}, padded" for kind in PADDED)])
def model(request: pytest.FixtureRequest) -> LanguageModel:
    kind, _, padded = request.param.partition(", ")
    made = LanguageModel.from_hf(tiny_model(kind), tiny_tokenizer())
    if padded:
        pad_passes(made.passes)
    return made


@pytest.fixture(autouse=True, params=WAYS)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    compute(request.param, monkeypatch)


def test_the_reference_tells_tokens_apart(model: LanguageModel) -> None:
    """Guards the other tests: a change of one far token must change the logits by more than their tolerance."""
    tokens = random_tokens(np.random.default_rng(0), 12)
    other = [*tokens[:8], (tokens[8] + 1) % 250, *tokens[9:]]
    assert (reference_logits(model.hf, tokens)[-1] - reference_logits(model.hf, other)[-1]).abs().max() > 1e-2


def test_ragged_prefill_equals_each_sequence_alone(model: LanguageModel) -> None:
    rng = np.random.default_rng(1)
    texts = [random_tokens(rng, count) for count in (1, 7, 23, 40)]
    wanted = ["all", "last", "none", "all"]
    cache = model.new_cache(256, 4)
    packed = [PackedSequence(cache.allocate(len(t)), t, None, w) for t, w in zip(texts, wanted, strict=True)]
    logits = model.forward(packed, cache)
    expected = [reference_logits(model.hf, texts[0]), reference_logits(model.hf, texts[1])[-1:]]
    expected.append(reference_logits(model.hf, texts[3]))
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, torch.cat(expected), **TIGHT)


def test_chunks_and_single_tokens_continue_the_context(model: LanguageModel) -> None:
    tokens = random_tokens(np.random.default_rng(2), 30)
    expected = reference_logits(model.hf, tokens)
    cache = model.new_cache(64, 4)
    sequence = cache.allocate(len(tokens))
    start = 0
    for count in (5, 1, 9, 1, 1, 13):
        logits = model.forward([PackedSequence(sequence, tokens[start : start + count])], cache)
        cache.commit([(sequence, list(range(count)))])
        torch.testing.assert_close(logits, expected[start : start + count], **TIGHT)
        start += count


@pytest.mark.parametrize("broken_up", [False, True])
def test_every_tree_node_equals_its_path_decoded_alone(model: LanguageModel, broken_up: bool) -> None:
    rng = np.random.default_rng(3)
    cache = fragmented(model) if broken_up else model.new_cache(512, 4)
    contexts = [random_tokens(rng, count) for count in (3, 11, 26)]
    trees = [(random_tokens(rng, n), random_parents(rng, n)) for n in (1, 9, 17)]
    sequences = [prefill(model, cache, context, 20) for context in contexts]
    if broken_up:
        assert len(sequences[2].runs(0, 26)) > 1
    packed = [PackedSequence(s, nodes, parents) for s, (nodes, parents) in zip(sequences, trees, strict=True)]
    logits = iter(model.forward(packed, cache))
    for context, (nodes, parents) in zip(contexts, trees, strict=True):
        for node in range(len(nodes)):
            path = [nodes[ancestor] for ancestor in path_to(parents, node)]
            torch.testing.assert_close(next(logits), reference_logits(model.hf, context + path)[-1], **TIGHT)


def test_a_tree_grown_layer_by_layer_equals_the_tree_at_once(model: LanguageModel) -> None:
    rng = np.random.default_rng(4)
    context, nodes = random_tokens(rng, 14), random_tokens(rng, 12)
    parents = np.array([-1, 0, 0, 0, 1, 1, 2, 3, 4, 6, 6, 9], np.int32)
    cache = model.new_cache(128, 4)
    grown, whole = (prefill(model, cache, context, 12) for _ in range(2))
    at_once = model.forward([PackedSequence(whole, nodes, parents)], cache)
    layers = []
    for start, stop in ((0, 1), (1, 4), (4, 8), (8, 9), (9, 12)):
        layers.append(model.forward([PackedSequence(grown, nodes[start:stop], parents[:stop])], cache))
        assert grown.scratch == stop
    torch.testing.assert_close(torch.cat(layers), at_once, **TIGHT)


@pytest.mark.parametrize("broken_up", [False, True])
def test_commit_then_continue_equals_plain(model: LanguageModel, broken_up: bool) -> None:
    """Random trees, random accepted paths, a batch of three: at every step all caches hold the accepted text."""
    rng = np.random.default_rng(5)
    cache = fragmented(model) if broken_up else model.new_cache(512, 4)
    texts = [random_tokens(rng, count) for count in (2, 9, 17)]
    sequences = [prefill(model, cache, text, 60) for text in texts]
    for _ in range(4):
        moves, packed, kept = [], [], []
        for sequence in sequences:
            size = int(rng.integers(1, 10))
            nodes, parents = random_tokens(rng, size), random_parents(rng, size)
            path = path_to(parents, int(rng.integers(size)))
            packed.append(PackedSequence(sequence, nodes, parents))
            moves.append((sequence, path))
            kept.append([nodes[node] for node in path])
        model.forward(packed, cache)
        cache.commit(moves)
        for text, tokens in zip(texts, kept, strict=True):
            text += tokens
        assert [s.length for s in sequences] == list(map(len, texts))
    next_tokens = random_tokens(rng, 3)
    logits = model.forward([PackedSequence(s, [t]) for s, t in zip(sequences, next_tokens, strict=True)], cache)
    for row, text, token in zip(logits, texts, next_tokens, strict=True):
        torch.testing.assert_close(row, reference_logits(model.hf, [*text, token])[-1], **TIGHT)


def test_truncate_then_continue_equals_plain(model: LanguageModel) -> None:
    rng = np.random.default_rng(6)
    text, branch = random_tokens(rng, 20), random_tokens(rng, 4)
    cache = model.new_cache(64, 4)
    sequence = prefill(model, cache, text, 8)
    model.forward([PackedSequence(sequence, branch)], cache)
    sequence.truncate(13)
    logits = model.forward([PackedSequence(sequence, branch)], cache)
    torch.testing.assert_close(logits, reference_logits(model.hf, text[:13] + branch)[13:], **TIGHT)


def test_bfloat16_stays_near_transformers() -> None:
    """Same weights, same rounding of the inputs: only the order of operations differs."""
    hf = tiny_model("llama", dtype=torch.bfloat16)
    model = LanguageModel.from_hf(hf, tiny_tokenizer())
    tokens = random_tokens(np.random.default_rng(7), 24)
    cache = model.new_cache(64, 4)
    logits = model.forward([PackedSequence(cache.allocate(24), tokens)], cache)
    expected = reference_logits(hf, tokens)
    assert (logits - expected).abs().max() < 0.03 * expected.abs().max()


def test_a_pass_without_wanted_logits_or_sequences_is_empty() -> None:
    model = LanguageModel.from_hf(tiny_model("llama"), tiny_tokenizer())
    cache = model.new_cache(16, 4)
    assert model.forward([], cache).shape == (0, model.vocab_size)
    assert model.forward([PackedSequence(cache.allocate(3), [1, 2, 3], None, "none")], cache).shape[0] == 0
