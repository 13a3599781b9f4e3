"""The elementwise kernels' own source, interpreted, against torch; and how few launches a pass takes."""

from __future__ import annotations

from collections import Counter
from copy import deepcopy
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GemmaConfig, LlamaConfig, MistralConfig, Qwen2Config
from transformers.activations import ACT2FN, SiLUActivation
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from triton.runtime import interpreter

from lm.cpu.elementwise import TORCH
from lm.cuda.elementwise import TritonElementwise, move_entries, store_rotated
from lm.cuda.fp8 import round_linear_layers
from lm.layers.fuse import fuse_layers
from lm.layers.fused import Norm
from lm.model import LanguageModel
from lm.packed import PackedSequence
from tests.lm.helpers import pad_passes, random_tokens, reference_logits
from tests.lm.tiny import _GEMMA, _SHAPE, CONFIGS, tiny_model, tiny_tokenizer

OURS = TritonElementwise()
TYPES = [torch.float32, torch.bfloat16]


def rows(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(len(shape)).normal(size=shape)).to(dtype)


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal, but for the last bit: sums are made in another order, and the interpreter cuts bfloat16 numbers off."""
    tolerance = 1e-2 if found.dtype == torch.bfloat16 else 1e-6
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", TYPES)
def test_norm_and_sum(dtype: torch.dtype) -> None:
    norm = LlamaRMSNorm(80, 1e-5).to(dtype)
    norm.weight.data = rows(80, dtype=dtype)
    hidden, added = rows(1, 3, 80, dtype=dtype), rows(3, 80, dtype=dtype)[None]
    close(OURS.norm(hidden, norm), TORCH.norm(hidden, norm))
    (total, normed), (plain_total, plain_normed) = (work.add_norm(hidden, added, norm) for work in (OURS, TORCH))
    close(total, plain_total)
    close(normed, plain_normed)
    post = Norm(Gemma2RMSNorm(80, 1e-5).to(dtype))
    post.weight.data = rows(80)
    for found, expected in zip(*(work.add_norm(hidden, added, norm, post) for work in (OURS, TORCH)), strict=True):
        close(found, expected)
    close(OURS.add(hidden, added, post), TORCH.add(hidden, added, post))


@pytest.mark.parametrize("dtype", TYPES)
def test_gate(dtype: torch.dtype) -> None:
    gate_up = rows(1, 2, 2 * 1100, dtype=dtype)
    for activation in (SiLUActivation(), ACT2FN["gelu_pytorch_tanh"]):
        close(OURS.gated(gate_up, activation), TORCH.gated(gate_up, activation))
    assert torch.equal(OURS.gated(gate_up, torch.tanh), TORCH.gated(gate_up, torch.tanh))


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("dim", [8, 80])
def test_rotation_on_the_way_into_the_store(dtype: torch.dtype, dim: int) -> None:
    counts, slots = [6, 2, 2], torch.tensor([7, 0, 3])
    heads, angles = rows(3, 10, dim, dtype=dtype), rows(3, 1, dim // 2)
    turns = torch.polar(torch.ones_like(angles), angles).to(torch.complex64)
    keys, values = (torch.zeros(9, 2, dim, dtype=dtype) for _ in range(2))
    expected = TORCH.rotate(heads.clone(), 8, turns)
    value_heads = heads[:, 8:].clone()
    store_rotated(heads, counts, turns, slots, keys, values)
    close(heads[:, :6], expected[:, :6])
    close(keys[slots], expected[:, 6:8])
    assert torch.equal(values[slots], value_heads)
    assert not keys[[1, 2, 4, 5, 6, 8]].any()


def test_entries_move_at_once_also_to_where_others_were() -> None:
    store = rows(3, 9, 2, 700)
    expected, source, target = store.clone(), torch.tensor([3, 5, 8]), torch.tensor([2, 3, 5])
    expected[:, target] = store[:, source]
    move_entries(store, source, target)
    assert torch.equal(store, expected)


FUSED = {
    "llama": LlamaConfig(**_SHAPE),
    "qwen2": Qwen2Config(**_SHAPE),
    "mistral": MistralConfig(**_SHAPE),
    "qwen3": CONFIGS["qwen3"],
    "gemma": GemmaConfig(**_GEMMA),
    "gemma2": CONFIGS["gemma2-softcap"],
    "gemma3": CONFIGS["gemma3-mixed"],
}


@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "gemma3"])  # All that any of them has.
def test_fused_passes_by_the_kernels(kind: str) -> None:
    hf = tiny_model(FUSED[kind])
    tokens = random_tokens(np.random.default_rng(0), 5)
    expected = reference_logits(hf, tokens)
    model = fused(hf)
    cache = model.new_cache(32, 16)
    logits = model.forward([PackedSequence(cache.allocate(8), tokens)], cache)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=2e-5)


def fused(hf: Any) -> LanguageModel:
    plain = LanguageModel.from_hf(hf, tiny_tokenizer())
    fuse_layers(plain.hf)
    pad_passes(plain.passes, interpreted=True)
    return plain


class Launches(TorchDispatchMode):
    """Counts operations that a device would launch a kernel for, by name."""

    FREE = ("view", "empty", "slice", "select", "t", "transpose", "unsqueeze", "expand", "split", "detach", "reshape")
    NONE = ("alias", "unbind", "new_empty", "lift_fresh", "resolve_conj", "resolve_neg")
    """The last two on the CPU alone: there a table of turns grows with the positions."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        count = lambda own, *args, **kwargs: self.counts.update([own.fn.__name__])  # noqa: E731
        monkeypatch.setattr(interpreter.InterpretedFunction, "run", count)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if not name.startswith(self.FREE) and name not in self.NONE:
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", [*FUSED, "qwen3 in fp8"])
def test_a_pass_takes_few_launches(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside products at most 9 a layer, and 12 around the layers."""
    counts = []
    for layers in (2, 3):
        shape, rounds, _ = kind.partition(" in fp8")
        config = deepcopy(FUSED[shape])
        config.num_hidden_layers = layers
        if getattr(config, "layer_types", None):
            config.layer_types = (config.layer_types * 2)[:layers]
        hf = tiny_model(config)
        if rounds:
            fuse_layers(hf.to(torch.bfloat16), finish=round_linear_layers)
        model = fused(hf)
        cache = model.new_cache(32, 16)
        with monkeypatch.context() as patched:
            seen = Launches(patched)
            for _ in range(2):  # The first pass makes tables.
                seen.counts.clear()
                sequence = cache.allocate(8)
                with torch.inference_mode(), seen:
                    static = model.passes.run(model._run, [PackedSequence(sequence, [1, 2, 3, 4])], cache)
                cache.free(sequence)
            assert static
        products = sum(n for name, n in seen.counts.items() if name in ("linear", "mm", "addmm", "_scaled_mm"))
        assert products == 4 * layers + 1, seen.counts
        counts.append(sum(seen.counts.values()) - products)
    layer = counts[1] - counts[0]
    assert layer <= 9, seen.counts
    assert counts[0] - 2 * layer <= 12, seen.counts
