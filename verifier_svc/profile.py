"""What verification passes cost on this device: measured at start, the cost model's first knowledge."""

from __future__ import annotations

import time

import numpy as np
import torch
from scipy.optimize import isotonic_regression

from lm.kv_cache import KVCache
from lm.model import LanguageModel
from lm.packed import PackedSequence
from lm.sampling import Row, choose_tokens
from treeline.plan import CostCurve
from treeline.sampling import SamplingParams

TOKENS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64)
REGIONS = ((1, 64), (8, 64), (1, 768))
"""(sequences, context tokens) of each curve."""
REPEATS = 4


def profile_verification(model: LanguageModel, cache: KVCache) -> tuple[CostCurve, ...]:
    """Time passes of several sizes on an idle engine's cache; about ten seconds for the default model on two cores.

    Regions that do not fit the cache or the model's context are left out; the first one always fits.
    """
    capacity = cache.total_blocks * cache.block_tokens
    curves: list[CostCurve] = []
    for sequences, context_tokens in REGIONS:
        room = sequences * (context_tokens + max(TOKENS)) <= capacity
        if curves and not (room and context_tokens + max(TOKENS) <= model.max_context_tokens):
            continue
        curves.append(_curve(model, cache, sequences, context_tokens))
    return tuple(curves)


def _curve(model: LanguageModel, cache: KVCache, sequences: int, context_tokens: int) -> CostCurve:
    counts = [tokens for tokens in TOKENS if tokens >= sequences]
    # Whatever else the machine does only adds time: the fastest of several interleaved passes is nearest to the truth.
    fastest = [float("inf")] * len(counts)
    for _ in range(REPEATS):
        for index, tokens in enumerate(counts):
            fastest[index] = min(fastest[index], _pass_s(model, cache, sequences, context_tokens, tokens))
    monotone = isotonic_regression(fastest).x
    return CostCurve(sequences, context_tokens, tuple(counts), tuple(monotone.tolist()))


def _pass_s(model: LanguageModel, cache: KVCache, sequences: int, context_tokens: int, tokens: int) -> float:
    """Seconds of one pass in which the tokens are spread evenly, each sequence's nodes hanging from its root."""
    packed = []
    for index in range(sequences):
        share = tokens // sequences + (index < tokens % sequences)
        kv = cache.allocate(context_tokens + share)
        if kv is None:
            raise RuntimeError("the KV cache is not idle or too small to be profiled")
        kv.length = context_tokens
        parents = np.asarray([-1] + [0] * (share - 1), np.int32)
        packed.append(PackedSequence(kv, [1 + i for i in range(share)], parents, "all"))
    started_s = time.perf_counter()
    logits = model.forward(packed, cache)
    choose_tokens(logits, [Row(SamplingParams(), 0, None)] * len(logits)).tolist()
    if logits.device.type == "cuda":
        torch.cuda.synchronize(logits.device)
    elapsed_s = time.perf_counter() - started_s
    for sequence in packed:
        cache.free(sequence.cache)
    return elapsed_s
