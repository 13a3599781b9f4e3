"""The parts of the check."""

from __future__ import annotations

import platform
import shutil
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
import transformers
import triton
from torch import nn

from bench.gpu_check.arms import arms
from bench.gpu_check.host import host_work
from bench.gpu_check.scale import Scale
from bench.gpu_check.training import training
from bench.step.limits import ModelSize, Point, measure_limit, timed_s
from bench.step.shapes import random_head, random_model
from drafter_svc.head_proposer import HeadProposer
from lm.attention import AttentionOptions, TreeAttention
from lm.cuda.attention import PaddedBatch, attend
from lm.cuda.fp8 import Fp8Linear
from lm.cuda.layout import BUCKETS, bucket
from lm.cuda.static_pass import StaticPasses
from lm.kv_cache import KVCache, LayerShape
from lm.model import LanguageModel
from lm.packed import PackedBatch, PackedSequence, pack
from lm.sampling import Row, choose_tokens
from treeline.config import ModelConfig
from treeline.sampling import SamplingParams
from verifier_svc.service.profile import batch_at

Finding = dict[str, Any]


def parts(scale: Scale) -> Iterator[tuple[str, Callable[[], Finding]]]:
    """Most valuable first, in case time runs out."""
    yield "machine", lambda: machine(scale)
    yield "attention", lambda: attention(scale)
    yield "passes", lambda: passes(scale)
    yield "sampling", lambda: sampling(scale)
    yield "fp8", lambda: fp8(scale)
    yield "model", lambda: model(scale, scale.shapes[0], scale.points)
    yield "head", lambda: head(scale)
    yield "host work", lambda: host_work(scale)
    yield "arms", lambda: arms(scale)
    yield "second model", lambda: model(scale, scale.shapes[1], scale.points[:2])
    yield "training", lambda: training(scale)


def machine(scale: Scale) -> Finding:
    on_cuda = scale.device.type == "cuda"
    limit = measure_limit(scale.dtype, scale.device, 512 << 20 if on_cuda else 1 << 20)
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "triton": triton.__version__,
        "device": torch.cuda.get_device_name(scale.device) if on_cuda else "cpu",
        "free_bytes": torch.cuda.mem_get_info(scale.device)[0] if on_cuda else 0,
        "compiler": shutil.which("gcc"),
        "limit": vars(limit),
        "wrong": [] if not on_cuda or shutil.which("gcc") else ["no C compiler: Triton cannot start"],
    }


def attention(scale: Scale) -> Finding:
    """One layer's attention over scattered blocks, against packed attention in float64; microseconds a call."""
    rows, wrong = [], []
    for group, dim, tokens, context in scale.attention:
        batch, cache, query = _attention_case(scale, group, dim, tokens, context)
        options = AttentionOptions(dim**-0.5, None, None)
        padded = query.new_zeros(bucket(tokens), *query.shape[1:])
        padded[:tokens] = query
        given = _padded(batch, cache)

        def call(given: Any = given, padded: Any = padded, cache: Any = cache, options: Any = options) -> Any:
            return attend(given, padded, cache.keys[0], cache.values[0], cache.block_tokens, options)

        exact = _exact_attention(batch, cache, query, options)
        error = (call()[:tokens].double() - exact).abs().max().item()
        row = {"group": group, "head": dim, "tokens": tokens, "context": context, "error": error}
        rows.append(row | {"us": 1e6 * _seconds(call, scale)})
        if not error <= (2e-2 if scale.dtype == torch.bfloat16 else 2e-4):
            wrong.append(f"attention is off: {row}")
    return {"rows": rows, "wrong": wrong}


def _attention_case(
    scale: Scale, group: int, dim: int, tokens: int, context: int
) -> tuple[PackedBatch, KVCache, torch.Tensor]:
    cache = KVCache([LayerShape(2, dim, dim)], 4 * (context + tokens + 512), 128, scale.dtype, scale.device)
    for tensor in (cache.keys[0], cache.values[0]):
        tensor.normal_()
    held = [cache.allocate(128) for _ in range(cache.total_blocks)]
    for place in held[::2]:
        cache.free(place)  # type: ignore[arg-type]
    sequence = cache.allocate(context + tokens)
    assert sequence is not None
    sequence.length = context
    parents = np.array([-1 if node % 7 == 0 else node - 1 for node in range(tokens)], np.int32)
    query = torch.randn(tokens, 2 * group, dim, dtype=scale.dtype, device=scale.device)
    return pack([PackedSequence(sequence, [1] * tokens, parents)]), cache, query


def _padded(batch: PackedBatch, cache: KVCache) -> PaddedBatch:
    seen: list[Any] = []

    def body(token_ids: Any, positions: Any, states: Any, rows: Any, context: Any) -> Any:
        seen.append(context)
        return (token_ids[:, None].float(),)

    # The first run hands it the tensors that captured passes read too.
    StaticPasses(cache, {None}).run(body, batch)
    return seen[0].batch


def _exact_attention(
    batch: PackedBatch, cache: KVCache, query: torch.Tensor, options: AttentionOptions
) -> torch.Tensor:
    """float64, on the CPU."""
    shape = LayerShape(cache.keys[0].shape[1], cache.keys[0].shape[2], cache.values[0].shape[2])
    exact = KVCache([shape], cache.trash_slot, cache.block_tokens, torch.float64, torch.device("cpu"))
    exact.keys[0].copy_(cache.keys[0])
    exact.values[0].copy_(cache.values[0])
    key, value = exact.keys[0][batch.slots], exact.values[0][batch.slots]
    return TreeAttention(batch, exact).attend(0, query.double().cpu(), key, value, options).to(query.device)


def passes(scale: Scale) -> Finding:
    """Small models' captured passes over random batches against their packed ones, with garbage in free slots."""
    found = {shape: _passes(scale, shape) for shape in ("llama-tiny", "qwen3-tiny")}
    return {**found, "wrong": [problem for finding in found.values() for problem in finding["wrong"]]}


def _passes(scale: Scale, shape: str) -> Finding:
    small = random_model(shape, ModelConfig(device=scale.name, dtype="float32"))
    wrong: list[str] = []
    rng, cache = np.random.default_rng(0), small.new_cache(2048, 16)
    small.passes.padded = True
    if scale.device.type == "cuda":
        small.capture(cache)
    for sizes in scale.trees:
        packed = [_behind_a_prompt(small, cache, rng, size, scale.most_prompt) for size in sizes]
        padded = small.forward(packed, cache)
        if scale.device.type == "cuda" and small.passes.how != "replayed":
            wrong.append(f"a pass over {sum(sizes)} tokens was {small.passes.how}")
        for sequence in packed:
            sequence.cache.scratch = 0
        small.passes.padded = False
        error = (padded - small.forward(packed, cache)).abs().max().item()
        small.passes.padded = True
        if not error <= 1e-3:
            wrong.append(f"a padded pass over {sizes} tokens is off by {error:.1e}")
        for sequence in packed:
            cache.free(sequence.cache)
    return {"counts": dict(small.passes.counts), "wrong": wrong}


def _behind_a_prompt(
    model: LanguageModel, cache: KVCache, rng: np.random.Generator, nodes: int, most_prompt: int
) -> PackedSequence:
    prompt = rng.integers(0, 500, int(rng.integers(1, most_prompt + 1))).tolist()
    sequence = cache.allocate(len(prompt) + nodes)
    assert sequence is not None
    model.forward([PackedSequence(sequence, prompt, None, "none")], cache)
    cache.commit([(sequence, list(range(len(prompt))))])
    parents = np.array([rng.integers(-1, node) for node in range(nodes)], np.int32)
    return PackedSequence(sequence, rng.integers(0, 500, nodes).tolist(), parents)


def sampling(scale: Scale) -> Finding:
    """Sampled tokens against the CPU's from the same logits and noise; milliseconds and bytes."""
    found, wrong = [], []
    for count, vocab_size in scale.sampling:
        logits = torch.randn(count, vocab_size, device=scale.device) * 3
        rows = [Row(SamplingParams(temperature=0.8, top_p=0.9, top_k=50, seed=i), 7) for i in range(count)]
        if scale.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        own = choose_tokens(logits, rows).tolist()
        peak = torch.cuda.max_memory_allocated() if scale.device.type == "cuda" else 0
        checked = min(count, 64)
        right = choose_tokens(logits[:checked].cpu(), rows[:checked]).tolist()
        same = sum(a == b for a, b in zip(own, right, strict=False)) / checked

        def call(logits: torch.Tensor = logits, rows: list[Row] = rows) -> object:
            return choose_tokens(logits, rows).tolist()

        ms = 1e3 * _seconds(call, scale)
        found.append({"rows": count, "same": same, "ms": ms, "peak_bytes": peak})
        if same < 0.99:
            wrong.append(f"{count} rows: only {same:.2f} of the tokens are the CPU's")
    return {"rows": found, "wrong": wrong}


def fp8(scale: Scale) -> Finding:
    """An FP8 matrix product against the bfloat16 one it replaces; microseconds of both."""
    rows, wrong = [], []
    plain = nn.Linear(*scale.product, bias=False, dtype=torch.bfloat16, device=scale.device)
    rounded = Fp8Linear(plain)
    for tokens in scale.product_tokens:
        inputs = torch.randn(1, tokens, scale.product[0], dtype=torch.bfloat16, device=scale.device)
        exact = plain(inputs).float()
        error = ((rounded(inputs).float() - exact).norm() / exact.norm()).item()
        us = [1e6 * _seconds(partial(layer, inputs), scale) for layer in (rounded, plain)]
        rows.append({"tokens": tokens, "error": error, "us": us[0], "bfloat16_us": us[1]})
        if not error <= 0.1:  # Both factors are off by up to 1/16, and by 0.026 in the mean square.
            wrong.append(f"an FP8 product is off: {rows[-1]}")
    return {"rows": rows, "wrong": wrong}


def model(scale: Scale, shape: str, points: tuple[tuple[int, int, int], ...]) -> Finding:
    """Seconds to capture, and milliseconds of passes beside the machine's limit."""
    on_cuda = scale.device.type == "cuda"
    large = random_model(shape, ModelConfig(device=scale.name, dtype="bfloat16" if on_cuda else "float32"))
    large.passes.padded = True
    cache = large.new_cache(scale.store_tokens, "auto")
    for tensor in (*cache.keys, *cache.values):
        tensor.normal_()
    started_s = time.perf_counter()
    if on_cuda:
        large.capture(cache)
    capture_s = time.perf_counter() - started_s
    limit = measure_limit(large.dtype, scale.device, 512 << 20 if on_cuda else 1 << 20)
    size, rows, wrong = ModelSize.of(large.hf, large), [], []
    for point in (Point(*each) for each in points):
        packed = batch_at(cache, point.sequences, point.context, point.tokens)

        def call(packed: Any = packed) -> None:
            large.forward(packed, cache).argmax(-1).tolist()
            for sequence in packed:
                sequence.cache.scratch = 0

        ms, how = 1e3 * _seconds(call, scale), large.passes.how
        rows.append({**vars(point), "ms": ms, "limit_ms": limit.pass_ms(size, point), "how": how})
        if on_cuda and how != "replayed":
            wrong.append(f"a pass of {point} was {how}")
        for sequence in packed:
            cache.free(sequence.cache)
    return {"capture_s": capture_s, "rows": rows, "sizes": len(BUCKETS), "wrong": wrong}


def head(scale: Scale) -> Finding:
    """A draft head's captured passes against packed ones; milliseconds of a tree layer, and of each node in it."""
    on_cuda = scale.device.type == "cuda"
    drafts, wrong, rng = random_head(scale.shapes[0], scale.device, scale.dtype), [], np.random.default_rng(0)
    cache = drafts.new_cache(4096, "auto")
    drafts.passes.padded = True
    if on_cuda:
        drafts.capture(cache)
    for sizes in scale.trees:
        places = [cache.allocate(size) for size in sizes]
        trees = [np.array([rng.integers(-1, node) for node in range(size)], np.int32) for size in sizes]
        packed = [PackedSequence(p, [1] * len(t), t) for p, t in zip(places, trees, strict=True) if p is not None]
        states = torch.randn(sum(sizes), drafts.config.hidden_size, dtype=scale.dtype, device=scale.device)
        outputs = []
        for padded in (True, False):
            drafts.passes.padded = padded
            outputs.append(drafts.forward(packed, states, cache))
            cache.commit([(sequence.cache, []) for sequence in packed])
            if padded and on_cuda and drafts.passes.how != "replayed":
                wrong.append(f"a head's pass over {sum(sizes)} tokens was {drafts.passes.how}")
        for found, exact in zip(*outputs, strict=True):
            error = ((found - exact).float().norm() / exact.float().norm()).item()
            if not error <= 3e-2:  # A few roundings of bfloat16.
                wrong.append(f"a head's padded pass over {sizes} tokens is off by {error:.1e}")
        for sequence in packed:
            cache.free(sequence.cache)
    drafts.passes.padded = on_cuda
    layer_s, node_s = HeadProposer(drafts, cache, 64).measure()
    return {"layer_ms": 1e3 * layer_s, "node_ms": 1e3 * node_s, "wrong": wrong}


def _seconds(call: Callable[[], object], scale: Scale) -> float:
    """Median of several synchronised calls; the first ones, which compile, are not counted."""
    calls = 2 + scale.repeats if scale.device.type == "cuda" else 1
    return float(np.median([timed_s(call, scale.device) for _ in range(calls)][-scale.repeats :]))
