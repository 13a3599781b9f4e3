"""The attention kernels' own source, interpreted: against packed passes and a float64 reference, and bit for bit."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from lm.attention import AttentionOptions, TreeAttention
from lm.cuda import attention
from lm.cuda.layout import bucket
from lm.cuda.static_pass import StaticPasses
from lm.kv_cache import KVCache, LayerShape, SequenceCache
from lm.model import LanguageModel
from lm.packed import PackedSequence, pack
from tests.lm.helpers import KERNELS, pad_passes, prefill, random_parents, random_tokens, reference_logits
from tests.lm.tiny import tiny_model, tiny_tokenizer

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def splits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Contexts of few tiles are split as well."""
    monkeypatch.setattr(attention, "SPLITS", 4)
    monkeypatch.setattr(attention, "LEAST_TILES", 1)
    attention.kernel_constants.cache_clear()


@dataclass(frozen=True)
class Case:
    """Sequences of one pass: committed tokens, scratch and new ones of each."""

    group: int
    key_dim: int
    dtype: torch.dtype = torch.float32
    window: int | None = None
    softcap: float | None = None
    block_tokens: int = 16
    value_dim: int = 0
    sequences: tuple[tuple[int, int, int], ...] = ((70, 0, 5), (0, 0, 3), (33, 4, 1), (129, 2, 6))
    kv_heads: int = 2


CASES = {
    "group 1, head 64": Case(1, 64),
    "group 2, head 80, window": Case(2, 80, window=40),
    "group 3, head 96, softcap": Case(3, 96, softcap=2.0),
    "group 4, head 128, bfloat16": Case(4, 128, torch.bfloat16, block_tokens=128),
    "group 5, values of another size": Case(5, 16, value_dim=24, block_tokens=12),
    "group 6, window smaller than the trees": Case(6, 8, window=3),
    "group 7, head 128, bfloat16, window, softcap": Case(7, 128, torch.bfloat16, 60, 3.0, 128),
    "group 8, head 256, bfloat16": Case(8, 256, torch.bfloat16, block_tokens=32, sequences=((70, 0, 5), (20, 0, 1))),
    "head 256, float32": Case(4, 256, block_tokens=128, sequences=((40, 0, 9),), kv_heads=1),
    "a prompt of 512 tokens": Case(1, 16, block_tokens=128, sequences=((3, 0, 512),), kv_heads=1),
}


@dataclass
class Pass:
    """A random batch over a store with garbage in all slots that hold nothing."""

    cache: KVCache
    packed: list[PackedSequence]
    query: Tensor
    options: AttentionOptions

    @property
    def tokens(self) -> int:
        return sum(len(sequence.token_ids) for sequence in self.packed)

    def by_kernels(self) -> Tensor:
        """Attention of the padded pass."""
        seen: list[attention.PaddedAttention] = []

        def body(token_ids, positions, states, rows, context):
            seen.append(context)
            return (torch.zeros(len(token_ids), 1),)

        StaticPasses(self.cache, {self.options.window}).run(body, pack(self.packed))
        cache = self.cache
        query = torch.zeros(bucket(self.tokens), *self.query.shape[1:], dtype=self.query.dtype)
        query[: self.tokens] = self.query
        return KERNELS(seen[0].batch, query, cache.keys[0], cache.values[0], cache.block_tokens, self.options)

    def by_packing(self) -> Tensor:
        """The same by `TreeAttention`; it writes the new tokens' keys and values, here the same again."""
        batch = pack(self.packed)
        key, value = self.cache.keys[0][batch.slots], self.cache.values[0][batch.slots]
        return TreeAttention(batch, self.cache).attend(0, self.query, key, value, self.options)

    def reference(self) -> Tensor:
        """float64, token by token, from what packing says each one sees."""
        rows = []
        for span in pack(self.packed).spans:
            committed, entries = span.cache.length, len(span.depths)
            positions = np.concatenate([np.arange(committed), committed + span.depths])
            slots = span.cache.slots(0, committed + entries)
            group = self.query.shape[1] // self.cache.keys[0].shape[1]
            keys = self.cache.keys[0][slots].double().repeat_interleave(group, 1)
            values = self.cache.values[0][slots].double().repeat_interleave(group, 1)
            for new, visible in enumerate(span.visible):
                seen = np.concatenate([np.ones(committed, np.bool_), visible])
                if self.options.window is not None:
                    seen &= positions > positions[entries - len(span.visible) + committed + new] - self.options.window
                scores = torch.einsum("hd,shd->hs", self.query[span.start + new].double(), keys) * self.options.scale
                if self.options.softcap is not None:
                    scores = self.options.softcap * torch.tanh(scores / self.options.softcap)
                weights = scores.masked_fill(torch.from_numpy(~seen), -torch.inf).softmax(1)
                rows.append(torch.einsum("hs,shd->hd", weights, values))
        return torch.stack(rows)


def made(case: Case, seed: int = 0, blocks_by: int = 0) -> Pass:
    """`blocks_by`: seeds which blocks the sequences get; the numbers do not depend on it."""
    shape = LayerShape(case.kv_heads, case.key_dim, case.value_dim or case.key_dim)
    needed = [-(-sum(counts) // case.block_tokens) for counts in case.sequences]
    cache = KVCache([shape], 2 * sum(needed) * case.block_tokens, case.block_tokens, case.dtype, CPU)
    cache.keys[0][:], cache.values[0][:] = torch.nan, torch.nan
    order = np.random.default_rng(blocks_by).permutation(cache.total_blocks).tolist()
    packed = []
    for index, (committed, scratch, new) in enumerate(case.sequences):
        rng = np.random.default_rng((seed, index))
        blocks = [order.pop() for _ in range(needed[index])]
        place = SequenceCache(blocks, case.block_tokens, committed, scratch)
        slots = place.slots(0, committed + scratch + new)
        cache.keys[0][slots] = normal(rng, len(slots), case.kv_heads, shape.key_dim).to(case.dtype)
        cache.values[0][slots] = normal(rng, len(slots), case.kv_heads, shape.value_dim).to(case.dtype)
        parents: NDArray[np.int32] | None = random_parents(rng, scratch + new) if new < 100 else None
        packed.append(PackedSequence(place, [0] * new, parents))
    heads = case.kv_heads * case.group
    query = torch.cat([
        normal(np.random.default_rng((seed, index, 1)), new, heads, case.key_dim)
        for index, (_, _, new) in enumerate(case.sequences)
    ]).to(case.dtype)  # fmt: skip
    return Pass(cache, packed, query, AttentionOptions(case.key_dim**-0.5, case.softcap, case.window))


def normal(rng: np.random.Generator, *shape: int) -> Tensor:
    return torch.from_numpy(rng.normal(size=shape).astype(np.float32))


@pytest.mark.parametrize("name", CASES)
def test_kernels_say_what_float64_and_packed_passes_say(name: str) -> None:
    case = CASES[name]
    batch = made(case)
    found = batch.by_kernels()
    tolerance = 2e-2 if case.dtype == torch.bfloat16 else 2e-5
    assert (found[batch.tokens :] == 0).all(), "padding sees nothing"
    found = found[: batch.tokens]
    torch.testing.assert_close(found.double(), batch.reference(), rtol=tolerance, atol=tolerance)
    packed = made(case)
    for tensor in (packed.cache.keys[0], packed.cache.values[0]):
        tensor.nan_to_num_(0.0)  # torch multiplies what is hidden by 0.
    torch.testing.assert_close(found, packed.by_packing(), rtol=tolerance, atol=tolerance)


def test_bits_depend_neither_on_where_blocks_lie_nor_on_the_rest_of_the_pass() -> None:
    case = Case(4, 32, block_tokens=16, sequences=((70, 0, 5), (150, 3, 2)))
    found = made(case).by_kernels()
    assert torch.equal(made(case, blocks_by=1).by_kernels(), found)
    crowd = Case(4, 32, block_tokens=16, sequences=(*case.sequences, (290, 0, 1), (5, 0, 30)))
    assert torch.equal(made(crowd).by_kernels()[:7], found[:7])


def test_bits_do_not_depend_on_the_size_of_blocks() -> None:
    results = [made(Case(4, 32, block_tokens=size, sequences=((150, 3, 2),))).by_kernels() for size in (12, 16, 128)]
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_as_many_splits_as_on_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    attention.kernel_constants.cache_clear()
    batch = made(Case(4, 128, block_tokens=128, sequences=((700, 0, 3),), kv_heads=1))
    torch.testing.assert_close(batch.by_kernels()[:3].double(), batch.reference(), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("kind", ["llama", "gemma2-softcap"])
def test_whole_passes_by_the_kernels(kind: str) -> None:
    """Prompts whose first blocks are shared, then trees, against transformers."""
    rng = np.random.default_rng(7)
    model = LanguageModel.from_hf(tiny_model(kind), tiny_tokenizer())
    pad_passes(model.passes, interpreted=True)
    prompt, tails = random_tokens(rng, 32), [random_tokens(rng, 5), random_tokens(rng, 3)]
    cache = model.new_cache(256, 16)
    first = prefill(model, cache, prompt, 8)
    cache.remember(first, prompt)
    second = cache.allocate(40, prompt)
    assert second is not None
    assert second.blocks[:2] == first.blocks[:2]
    packed = [PackedSequence(s, tail, None, "last") for s, tail in zip((first, second), tails, strict=True)]
    logits = model.forward(packed, cache)
    assert model.passes.how == "eager"
    for row, tail in zip(logits, tails, strict=True):
        torch.testing.assert_close(row, reference_logits(model.hf, prompt + tail)[-1], rtol=1e-4, atol=2e-5)
