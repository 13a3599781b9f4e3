"""Layers in one call of a kernel give what the same layers give one by one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from transformers import LlamaConfig, PreTrainedConfig, Qwen2Config

from lm.cpu.native import library
from lm.cpu.native_layers import native_layers
from lm.cpu.packed_linear import pack_linear_layers
from lm.features import FeatureTap
from lm.layers import fuse
from lm.layers.fuse import fuse_layers
from lm.model import LanguageModel
from lm.packed import PackedSequence
from tests.lm.helpers import prefill, random_parents, random_tokens
from tests.lm.tiny import _SHAPE, tiny_model, tiny_tokenizer

pytestmark = pytest.mark.skipif(library() is None, reason="the kernels are not built")

SHAPE = {**_SHAPE, "hidden_size": 64, "num_attention_heads": 8}
"""Whole groups of weights."""
KINDS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**SHAPE),
    "llama-biased": LlamaConfig(**SHAPE, attention_bias=True),
    "qwen2-mixed": Qwen2Config(**SHAPE, use_sliding_window=True, sliding_window=5, max_window_layers=1),
}


def packed(kind: PreTrainedConfig) -> LanguageModel:
    hf = tiny_model(kind)
    fuse_layers(hf)
    pack_linear_layers(hf, "int8")
    return LanguageModel.from_hf(hf, tiny_tokenizer())


def pass_over(model: LanguageModel, taps: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and features of a pass over a tree behind one prompt and a chunk of another one."""
    rng = np.random.default_rng(0)
    tap = FeatureTap(model.hf, taps)
    cache = model.new_cache(128, 4)
    first, second = prefill(model, cache, random_tokens(rng, 21), 16), cache.allocate(16)
    assert second is not None
    tap.parts()
    tree = PackedSequence(first, random_tokens(rng, 12), random_parents(rng, 12))
    logits = model.forward([tree, PackedSequence(second, random_tokens(rng, 7))], cache)
    features = tap.take()
    tap.close()
    return logits, features


@pytest.mark.parametrize("taps", [(1,), (3, 1, 2)])
@pytest.mark.parametrize("kind", KINDS)
def test_every_bit_is_that_of_single_layers(kind: str, taps: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    model = packed(KINDS[kind])
    assert native_layers(model.hf.base_model.layers) is not None
    logits, features = pass_over(model, taps)
    monkeypatch.setattr(fuse, "native_layers", lambda layers: None)
    expected_logits, expected_features = pass_over(packed(KINDS[kind]), taps)
    assert torch.equal(logits, expected_logits)
    assert torch.equal(features, expected_features)
    assert features.shape == (19, 64 * len(taps))


def test_layers_of_other_makes_are_left_alone() -> None:
    for change in ({"hidden_act": "gelu"}, {}):
        hf = tiny_model(LlamaConfig(**SHAPE, **change))
        fuse_layers(hf)
        assert native_layers(hf.base_model.layers) is None  # weights without groups
        pack_linear_layers(hf, "int8")
        assert (native_layers(hf.base_model.layers) is None) == bool(change)
    hf.base_model.layers[0].gate_up_proj = nn.Identity()
    assert native_layers(hf.base_model.layers) is None
