"""Seconds of verification passes on this device, measured at start: the cost model's prior."""

from __future__ import annotations

import math
import time
from itertools import pairwise

import numpy as np
import torch
from scipy.optimize import isotonic_regression

from lm.cuda.layout import BUCKETS
from lm.kv_cache import KVCache
from lm.model import LanguageModel
from lm.packed import PackedSequence
from lm.sampling import Row, choose_tokens
from treeline.plan import CostCurve
from treeline.sampling import SamplingParams

TOKENS = (1, 2, 4, 8, 16, 32, 64, 128)
"""Measured token counts; padded passes are measured at their buckets instead. Doubling them shows every tile size of a
matrix product."""
REGIONS = ((1, 64), (8, 64), (32, 64), (1, 768))
"""(sequences, context tokens) of each curve: the batch sizes between which the cost model interpolates, and one long
context, from which it learns what context adds."""
ROUNDS = 4
"""Passes per token count. The fastest is used: other processes only add time."""
REFINEMENTS = 4
"""Most extra token counts per region, each in the middle of the steepest interval, to locate the curve's steps."""
BUDGET_S = 12.0
"""Time limit of a profile: it delays the first start on a device. The result is stored (`profile_cache.py`)."""
WARM_UP_TOKENS = (1, 8, 32)
"""Passes for one token, a tree and a prompt chunk: first calls of each take many times as long."""


def profile_verification(model: LanguageModel, cache: KVCache) -> tuple[CostCurve, ...]:
    """Time passes of several sizes on an idle engine's cache, within BUDGET_S unless a pass takes longer than 0.1 s.

    Regions that do not fit the cache or the model's context are left out; the first one always fits.
    """
    capacity, most_tokens = cache.total_blocks * cache.block_tokens, max(_sizes(model))
    fitting = [(1, min(REGIONS[0][1], capacity // 2, model.max_context_tokens // 2))]
    for sequences, context_tokens in REGIONS[1:]:
        room = sequences * (context_tokens + cache.block_tokens) + most_tokens <= capacity  # in whole blocks
        if room and context_tokens + most_tokens <= model.max_context_tokens:
            fitting.append((sequences, context_tokens))
    deadline_s = time.perf_counter() + BUDGET_S
    curves = []
    for index, (sequences, context_tokens) in enumerate(fitting):
        now_s = time.perf_counter()
        until_s = now_s + max(0.0, deadline_s - now_s) / (len(fitting) - index)
        curves.append(_curve(model, cache, sequences, context_tokens, until_s))
    return tuple(curves)


def warm_up(model: LanguageModel, cache: KVCache) -> None:
    """Run passes on an idle engine's cache, so that no request waits for first calls if the profile was stored."""
    for tokens in WARM_UP_TOKENS:
        timed_pass_s(model, cache, 1, 1, tokens)
    for top_p in (1.0, 0.9):  # Kernels that only sampled requests need.
        logits = torch.zeros(1, model.vocab_size, device=model.device)
        choose_tokens(logits, [Row(SamplingParams(temperature=1.0, top_p=top_p), 0)])


def _curve(model: LanguageModel, cache: KVCache, sequences: int, context_tokens: int, until_s: float) -> CostCurve:
    room = cache.total_blocks // sequences * cache.block_tokens - context_tokens
    longest = min(model.max_context_tokens - context_tokens, room) * sequences
    fastest = {tokens: math.inf for tokens in _sizes(model) if sequences <= tokens <= longest}

    def measure(counts: list[int], least_rounds: int) -> None:
        # Other processes only add time: the fastest of several interleaved passes is nearest the device's own.
        for done in range(ROUNDS):
            if done >= least_rounds and time.perf_counter() > until_s:
                return
            for tokens in counts:
                passed_s = timed_pass_s(model, cache, sequences, context_tokens, tokens)
                fastest[tokens] = min(fastest.get(tokens, math.inf), passed_s)

    measure(list(fastest), least_rounds=2)  # a first pass is also a warm-up
    for _ in range(0 if model.passes.padded else REFINEMENTS):
        middle = _steepest(fastest)
        if middle is None or time.perf_counter() > until_s:
            break
        measure([middle], least_rounds=2)
    if model.passes.padded:
        fastest |= _first_of_each(fastest)
    counts = sorted(fastest)
    monotone = isotonic_regression([fastest[tokens] for tokens in counts]).x
    return CostCurve(sequences, context_tokens, tuple(counts), tuple(monotone.tolist()))


def _sizes(model: LanguageModel) -> tuple[int, ...]:
    return BUCKETS if model.passes.padded else TOKENS


def _first_of_each(seconds: dict[int, float]) -> dict[int, float]:
    """A padded pass takes its bucket's time: each bucket's smallest token count gets the seconds of its largest."""
    return {low + 1: seconds[high] for low, high in pairwise(sorted(seconds)) if high - low > 1}


def _steepest(seconds: dict[int, float]) -> int | None:
    """The middle of the interval over which the seconds rise most; None if every count was measured."""
    counts = sorted(seconds)
    gaps = [(seconds[high] - seconds[low], (low + high) // 2) for low, high in pairwise(counts) if high - low > 1]
    return max(gaps)[1] if gaps else None


def timed_pass_s(model: LanguageModel, cache: KVCache, sequences: int, context_tokens: int, tokens: int) -> float:
    """Seconds of one pass over `batch_at`, choosing tokens included."""
    packed = batch_at(cache, sequences, context_tokens, tokens)
    started_s = time.perf_counter()
    logits = model.forward(packed, cache)
    choose_tokens(logits, [Row(SamplingParams(), 0, None)] * len(logits)).tolist()
    if logits.device.type == "cuda":
        torch.cuda.synchronize(logits.device)
    elapsed_s = time.perf_counter() - started_s
    for sequence in packed:
        cache.free(sequence.cache)
    return elapsed_s


def batch_at(cache: KVCache, sequences: int, context_tokens: int, tokens: int) -> list[PackedSequence]:
    """Sequences with an arbitrary context and the tokens spread evenly; a sequence's nodes are children of its root.

    Raises:
        RuntimeError: `cache` is too small, or not idle.
    """
    packed = []
    for index in range(sequences):
        share = tokens // sequences + (index < tokens % sequences)
        kv = cache.allocate(context_tokens + share)
        if kv is None:
            raise RuntimeError("the KV cache is not idle or too small to be profiled")
        kv.length = context_tokens
        parents = np.asarray([-1] + [0] * (share - 1), np.int32)
        packed.append(PackedSequence(kv, [1 + i for i in range(share)], parents, "all"))
    return packed
