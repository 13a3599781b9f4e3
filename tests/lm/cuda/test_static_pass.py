"""Padded passes: the same answers as packed ones, whatever the padding."""

from __future__ import annotations

import cProfile
import gc
from typing import Literal

import numpy as np
import pytest
import torch
from transformers import LlamaConfig

from bench.gpu_check.host import many_sequences
from lm.cuda.graphs import Graphs
from lm.cuda.layout import BUCKETS, FEW_ROWS, MOST_SEQUENCES, Layout, bucket, row_counts
from lm.cuda.static_pass import StaticPasses, _query_blocks
from lm.kv_cache import KVCache
from lm.model import LanguageModel
from lm.packed import PackedSequence, pack
from tests.lm.helpers import fragmented, pad_passes, prefill, random_parents, random_tokens, reference_logits
from tests.lm.tiny import _SHAPE, tiny_llama, tiny_model, tiny_tokenizer
from tests.lm.tiny_head import tiny_head

CLOSE = {"rtol": 1e-4, "atol": 2e-5}
MOST_CALLS = 20
"""On the host, for each sequence of a pass."""
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.fixture
def padded() -> LanguageModel:
    model = LanguageModel.from_hf(tiny_llama(), tiny_tokenizer())
    pad_passes(model.passes)
    return model


def random_batch(model: LanguageModel, cache: KVCache, seed: int, sizes: list[int]) -> list[PackedSequence]:
    """Trees of these sizes, each behind a context of its own."""
    rng = np.random.default_rng(seed)
    packed = []
    for size in sizes:
        sequence = prefill(model, cache, random_tokens(rng, int(rng.integers(1, 40))), size)
        packed.append(PackedSequence(sequence, random_tokens(rng, size), random_parents(rng, size)))
    return packed


def forget(packed: list[PackedSequence]) -> None:
    for sequence in packed:
        sequence.cache.scratch = 0


def test_every_number_of_tokens_has_the_next_bucket() -> None:
    assert [bucket(n) for n in (1, 2, 3, 5, 17, 33, 500, 512)] == [1, 2, 4, 8, 24, 48, 512, 512]


@pytest.mark.parametrize("sizes", [[1], [3], [5, 1, 9], [16, 17], [1] * 11, [90, 40]])
def test_padded_equals_packed_and_no_padding_is_seen(padded: LanguageModel, sizes: list[int]) -> None:
    """Garbage in slots that belong to nobody changes nothing: they are read by nobody but the padding itself."""
    cache = fragmented(padded, 2048)
    packed = random_batch(padded, cache, 0, sizes)
    padded.passes.padded = False
    expected = padded.forward(packed, cache)
    forget(packed)
    padded.passes.padded = True
    held = torch.zeros(len(cache.keys[0]), dtype=torch.bool)
    for sequence in packed:
        held[sequence.cache.slots(0, sequence.cache.length)] = True
    for tensor in (*cache.keys, *cache.values):
        tensor[~held] = 1e4
    torch.testing.assert_close(padded.forward(packed, cache), expected, **CLOSE)
    assert torch.equal(padded.passes.largest, expected.argmax(-1))
    assert all(tensor.isfinite().all() for tensor in (*cache.keys, *cache.values))


def test_query_blocks_hold_the_tokens_of_one_sequence_each() -> None:
    starts, stops, ends = np.array([0, 6, 7]), np.array([6, 7, 15]), np.array([106, 31, 8])
    expected = [(0, 4, 0, 104), (4, 2, 0, 106), (6, 1, 1, 31), (7, 4, 2, 4), (11, 4, 2, 8)]
    assert _query_blocks(starts, stops, ends).tolist() == [list(each) for each in expected]


@pytest.mark.parametrize("size", BUCKETS)
def test_the_worst_batch_of_each_size_fits_its_query_blocks(size: int) -> None:
    for sequences in {1, size // 5, size // 2, size - 1, size} - {0}:
        counts = np.full(min(sequences, MOST_SEQUENCES), 1)
        counts[0] += (size - counts.sum()) // 2
        stops = np.cumsum(counts)
        padding = -(-(size - stops[-1]) // 4)
        assert len(_query_blocks(stops - counts, stops, stops)) + padding <= Layout.of(size, 1).queries[0]


def test_buffers_are_refilled_for_every_pass(padded: LanguageModel) -> None:
    """Passes of many shapes in turn, whose sequences come and go, over the same tensors."""
    plain = LanguageModel.from_hf(tiny_llama(), tiny_tokenizer())
    cache, other = padded.new_cache(1024, 16), plain.new_cache(1024, 16)
    for seed, sizes in enumerate([[4, 7], [1], [2, 2, 2, 20], [1, 1], [6]]):
        results = []
        for model, place in ((padded, cache), (plain, other)):
            packed = random_batch(model, place, seed, sizes)
            results.append(model.forward(packed, place))
            for sequence in packed:
                place.free(sequence.cache)
        torch.testing.assert_close(results[0], results[1], **CLOSE)


@pytest.mark.parametrize("prompt", [20, FEW_ROWS + 30])
def test_only_wanted_rows_come_back(padded: LanguageModel, prompt: int) -> None:
    rng = np.random.default_rng(2)
    texts = [random_tokens(rng, prompt), random_tokens(rng, 9)]
    cache = padded.new_cache(512, 16)
    wanted = ["last", "none"]
    packed = [PackedSequence(cache.allocate(len(t)), t, None, w) for t, w in zip(texts, wanted, strict=True)]
    logits = padded.forward(packed, cache)
    assert logits.shape == (1, padded.vocab_size)
    torch.testing.assert_close(logits, reference_logits(padded.hf, texts[0])[-1:], **CLOSE)


def test_a_batch_that_does_not_fit_one_pass_runs_as_several(padded: LanguageModel) -> None:
    tokens = random_tokens(np.random.default_rng(3), BUCKETS[-1] - 52)
    cache = padded.new_cache(2048, 16)
    before = padded.passes.counts["eager"]
    sequences = [cache.allocate(len(tokens)) for _ in range(2)]
    logits = padded.forward([PackedSequence(s, tokens, None, "last") for s in sequences], cache)
    torch.testing.assert_close(logits, reference_logits(padded.hf, tokens)[-1:].expand(2, -1), **CLOSE)
    assert padded.passes.how == "eager"
    assert padded.passes.counts["eager"] - before == 2
    assert torch.equal(padded.passes.largest, logits.argmax(-1)), "one part behind the other"


def test_outputs_are_not_overwritten_by_the_next_pass(padded: LanguageModel) -> None:
    cache = padded.new_cache(128, 16)
    sequence = cache.allocate(32)
    first = padded.forward([PackedSequence(sequence, [5])], cache)
    kept = first.clone()
    cache.commit([(sequence, [0])])
    padded.forward([PackedSequence(sequence, [9])], cache)
    assert torch.equal(first, kept)


def test_features_are_those_of_a_packed_pass(padded: LanguageModel) -> None:
    tokens, features = random_tokens(np.random.default_rng(4), 13), []
    for pads in (False, True):
        padded.passes.padded = pads
        tap = padded.tap((1, 2, 3))
        cache = padded.new_cache(64, 16)
        for _ in range(2):  # the second pass would be a replay
            sequence = cache.allocate(13)
            padded.forward([PackedSequence(sequence, tokens)], cache)
            cache.free(sequence)
        features.append(tap.take())
        assert features[-1].shape == (13, tap.width)
    torch.testing.assert_close(features[1], features[0], **CLOSE)


def test_capturing_takes_every_size_that_fits_and_leaves_the_cache_idle(
    padded: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[object] = []
    monkeypatch.setattr(Graphs, "run", lambda self, size, body: (sizes.append(size), (body(), "eager"))[1])
    cache = padded.new_cache(96, 16)
    padded.capture(cache)
    assert sizes == [(96, 64), (96, 96), *((size, size) for size in (64, 48, 32, 24, 16, 8, 4, 2, 1))]
    assert cache.used_blocks == 0
    plain = LanguageModel.from_hf(tiny_llama(), tiny_tokenizer())
    plain.capture(plain.new_cache(64, 16))
    assert len(sizes) == 11, "packed passes are not captured"


def test_passes_end_with_their_cache(padded: LanguageModel) -> None:
    cache = padded.new_cache(64, 16)
    padded.forward([PackedSequence(cache.allocate(4), [1, 2])], cache)
    assert len(padded.passes._static) == 1
    del cache
    gc.collect()
    assert len(padded.passes._static) == 0


@pytest.mark.parametrize("wanted", ["all", "last"])
def test_a_draft_head_says_the_same_padded(padded: LanguageModel, wanted: Literal["all", "last"]) -> None:
    rng = np.random.default_rng(8)
    tokens, parents = [random_tokens(rng, 6), random_tokens(rng, 3)], [random_parents(rng, 6), random_parents(rng, 3)]
    states = torch.from_numpy(rng.normal(size=(9, 48)).astype(np.float32))
    results = []
    for pads in (False, True):
        head = tiny_head(padded.hf)
        head.passes.padded = pads
        cache = head.new_cache(64, 16)
        places = [cache.allocate(16) for _ in tokens]
        packed = [PackedSequence(*each, wanted) for each in zip(places, tokens, parents, strict=True)]
        results.append(head.forward(packed, states, cache))
        assert [place.scratch for place in places] == [6, 3]
    for pads, plain in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(pads, plain, **CLOSE)


def test_shared_prefix_blocks_are_seen_by_all_who_share_them(padded: LanguageModel) -> None:
    rng = np.random.default_rng(7)
    prompt, tails = random_tokens(rng, 32), [random_tokens(rng, 5), random_tokens(rng, 3)]
    cache = padded.new_cache(256, 16)
    first = prefill(padded, cache, prompt, 8)
    cache.remember(first, prompt)
    second = cache.allocate(40, prompt)
    assert second is not None
    assert second.blocks[:2] == first.blocks[:2]
    packed = [PackedSequence(s, tail, None, "last") for s, tail in zip((first, second), tails, strict=True)]
    logits = padded.forward(packed, cache)
    for row, tail in zip(logits, tails, strict=True):
        torch.testing.assert_close(row, reference_logits(padded.hf, prompt + tail)[-1], **CLOSE)


def test_many_sequences_are_packed() -> None:
    model = LanguageModel.from_hf(tiny_llama(), tiny_tokenizer())
    cache = model.new_cache(16 * (MOST_SEQUENCES + 1), 16)
    batch = pack([PackedSequence(cache.allocate(1), [1]) for _ in range(MOST_SEQUENCES + 1)])
    assert not StaticPasses.fit(batch)


@pytest.mark.parametrize("nodes", [0, 3])
def test_host_work_of_a_pass_does_not_grow_with_the_context(nodes: int) -> None:
    """By calls, of Python and of C: milliseconds are told by `bench.gpu_check`."""
    counts = []
    for context in (128, 4096):
        batch, passes = many_sequences(nodes, context)
        passes.fill(pack(batch), len(batch) * (1 + nodes))  # Shapes of trees are worked out once.
        with cProfile.Profile() as profile:
            passes.fill(pack(batch), len(batch) * (1 + nodes))
        counts.append(sum(entry.callcount for entry in profile.getstats()))
    assert counts[0] == counts[1] < MOST_CALLS * len(batch)


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("heads", [(8, 2), (6, 2)])
@pytest.mark.parametrize("more", [{}, {"sliding_window": 7}])
def test_replayed_passes_equal_packed_ones_on_cuda(heads: tuple[int, int], more: dict[str, int]) -> None:
    """Every bucket captured, then replayed over other batches, against the same model without graphs."""
    from transformers import MistralConfig

    shape = {**_SHAPE, "num_attention_heads": heads[0], "num_key_value_heads": heads[1], "head_dim": 32}
    config = MistralConfig(**shape, **more) if more else LlamaConfig(**shape)
    model = LanguageModel.from_hf(tiny_model(config).to("cuda"), tiny_tokenizer())
    cache = model.new_cache(4096, 16)
    model.capture(cache)
    assert model.passes.padded, "capturing failed"
    assert len(model.passes._static[cache].graphs) == sum(len(row_counts(size)) for size in BUCKETS)
    for seed, sizes in enumerate([[1], [1] * 9, [5, 1, 9], [33], [60, 60], [300], [16] * 8, [7]]):
        packed = random_batch(model, cache, seed, sizes)
        replayed = model.forward(packed, cache)
        forget(packed)
        model.passes.padded = False
        torch.testing.assert_close(replayed, model.forward(packed, cache), rtol=1e-3, atol=1e-3)
        model.passes.padded = True
        for sequence in packed:
            cache.free(sequence.cache)
    assert model.passes.padded


@pytest.mark.gpu
@on_gpu
def test_a_replay_waits_for_nothing() -> None:
    shape = {**_SHAPE, "head_dim": 32}
    model = LanguageModel.from_hf(tiny_model(LlamaConfig(**shape)).to("cuda"), tiny_tokenizer())
    cache = model.new_cache(1024, 16)
    packed = random_batch(model, cache, 0, [4, 4])
    model.forward(packed, cache)
    forget(packed)
    torch.cuda.set_sync_debug_mode("error")
    try:
        logits = model.forward(packed, cache)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert model.passes.padded
    assert logits.isfinite().all()
