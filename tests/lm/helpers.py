"""What the tests of the runtime share: transformers' own answer, random trees, and steps over the cache."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

import tests.lm.interpreter  # noqa: F401  # Before the kernels.
from lm.attention import AttentionOptions
from lm.cpu import elementwise, native_attention
from lm.cpu.native import library
from lm.cuda import attention
from lm.kv_cache import KVCache, SequenceCache
from lm.model import LanguageModel
from lm.packed import PackedSequence
from lm.passes import Passes

KERNELS, WORK = attention.attend, attention.PaddedAttention.work


def pad_passes(passes: Passes, interpreted: bool = False) -> None:
    """Run them padded on the CPU as well, uncaptured.

    It is then by plain twins of the kernels, or by their own source in Triton's interpreter, which is slow.
    """
    passes.padded = True
    attention.attend = KERNELS if interpreted else dense_attention
    attention.PaddedAttention.work = WORK if interpreted else None


def dense_attention(
    batch: attention.PaddedBatch,
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    block_tokens: int,
    options: AttentionOptions,
) -> torch.Tensor:
    """What `lm.cuda.attention.attend` computes, from the same tensors, in float64."""
    out = query.new_zeros(*query.shape[:2], values.shape[2])
    group, words = query.shape[1] // keys.shape[1], batch.words[options.window]
    for first, count, sequence, end in batch.queries.tolist():
        length, place = batch.sequences[sequence].tolist()
        entries, tokens = torch.arange(end), torch.arange(first, first + count if end else first)
        slots = batch.table[place + entries // block_tokens] * block_tokens + entries % block_tokens
        seen_keys, seen_values = (kept[slots].double().repeat_interleave(group, dim=1) for kept in (keys, values))
        behind = (entries - length).clamp(0)
        visible = words[tokens[:, None], behind // 32] >> behind % 32 & 1 == 1
        horizon = batch.positions[tokens, None] - (options.window or attention.NO_WINDOW)
        visible = torch.where(entries < length, entries > horizon, visible)
        scores = torch.einsum("thd,shd->hts", query[tokens].double(), seen_keys) * options.scale
        if options.softcap is not None:
            scores = options.softcap * torch.tanh(scores / options.softcap)
        weights = scores.masked_fill(~visible, -torch.inf).softmax(dim=2)
        out[tokens] = torch.einsum("hts,shd->thd", weights, seen_values).to(out.dtype)
    return out


WAYS = [
    pytest.param("kernels", marks=pytest.mark.skipif(library() is None, reason="the kernels are not built")),
    "torch",
]
"""Attention and elementwise work by our kernels, or by torch as where they are not built."""


def compute(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Take one of `WAYS` for the rest of a test."""
    if way == "torch":
        for module in (elementwise, native_attention):
            monkeypatch.setattr(module, "library", lambda: None)


@torch.inference_mode()
def reference_logits(hf: PreTrainedModel, token_ids: list[int]) -> torch.Tensor:
    """float32 [tokens, vocab] by transformers' eager attention, without any cache."""
    before = hf.config._attn_implementation
    hf.set_attn_implementation("eager")
    try:
        return hf(input_ids=torch.tensor([token_ids]), use_cache=False).logits[0].float()
    finally:
        hf.set_attn_implementation(before)


def random_tokens(rng: np.random.Generator, count: int, vocab_size: int = 250) -> list[int]:
    return rng.integers(0, vocab_size, count).tolist()


def random_parents(rng: np.random.Generator, nodes: int) -> NDArray[np.int32]:
    """A random tree with several roots, parents before children."""
    return np.array([rng.integers(-1, node) for node in range(nodes)], np.int32)


def path_to(parents: NDArray[np.int32], node: int) -> list[int]:
    """The node's ancestors and itself, oldest first."""
    path = [node]
    while parents[path[0]] >= 0:
        path.insert(0, int(parents[path[0]]))
    return path


def prefill(model: LanguageModel, cache: KVCache, token_ids: list[int], room: int) -> SequenceCache:
    """A sequence with `token_ids` committed and room for that many more."""
    sequence = cache.allocate(len(token_ids) + room)
    assert sequence is not None
    model.forward([PackedSequence(sequence, token_ids, None, "none")], cache)
    cache.commit([(sequence, list(range(len(token_ids))))])
    return sequence


def fragmented(model: LanguageModel, num_tokens: int = 512, block_tokens: int = 4) -> KVCache:
    """A cache in which no two free blocks are neighbours."""
    cache = model.new_cache(num_tokens, block_tokens)
    holders = [cache.allocate(block_tokens) for _ in range(cache.total_blocks)]
    for holder in holders[::2]:
        assert holder is not None
        cache.free(holder)
    return cache
