"""A draft head's pass in one call of a kernel gives what its parts give one by one."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lm import draft_head
from lm.checkpoints.eagle3 import HeadConfig
from lm.cpu.native import library
from lm.cpu.packed_linear import pack_linear_layers
from lm.draft_head import DraftHead, HeadModule
from lm.packed import PackedSequence
from tests.lm.helpers import random_parents, random_tokens

pytestmark = pytest.mark.skipif(library() is None, reason="the kernels are not built")

CONFIG = HeadConfig(
    hidden_size=64,
    intermediate_size=96,
    heads=8,
    kv_heads=2,
    head_dim=8,
    norm_eps=1e-5,
    rope={"rope_type": "default", "rope_theta": 10_000.0},
    feature_layers=(1, 2),
    target_hidden_size=64,
    target_vocab_size=260,
    draft_vocab_size=100,
)


def grouped_head(config: HeadConfig) -> DraftHead:
    """With weights in groups of 8 bits."""
    torch.manual_seed(0)
    module = HeadModule(config)
    for parameter in module.parameters():
        parameter.data.normal_(1.0 if parameter.dim() == 1 else 0.0, 0.15)
    module.fuse(512)
    parts = nn.ModuleDict({"module": module, "output": nn.Linear(64, 100, bias=False)})
    pack_linear_layers(parts, "int8")
    return DraftHead("grouped", module, nn.Embedding(260, 64), parts["output"], torch.arange(100))


@torch.inference_mode()
def outputs_of(head: DraftHead) -> list[Tensor]:
    """Logits and states of a pass over two prompts, and of a tree behind the first one while the other goes on."""
    rng, cache = np.random.default_rng(0), head.new_cache(128, 4)
    first, second = cache.allocate(48), cache.allocate(48)
    assert first is not None
    assert second is not None
    prompts = [PackedSequence(kv, random_tokens(rng, 15), logits="last") for kv in (first, second)]
    features = torch.randn(30, 128, generator=torch.Generator().manual_seed(1)).bfloat16()
    logits, states = head.forward(prompts, head.states(features), cache)
    cache.commit([(first, list(range(15))), (second, list(range(15)))])
    tree = PackedSequence(first, random_tokens(rng, 12), random_parents(rng, 12))
    more = PackedSequence(second, random_tokens(rng, 7), logits="none")
    return [logits, states, *head.forward([tree, more], states[:19], cache)]


@pytest.mark.parametrize("names", [(), ("norm_before_residual", "fc_norm"), ("norm_output", "norm_before_fc")])
def test_every_bit_is_that_of_its_parts(names: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(CONFIG, **dict.fromkeys(names, True))
    head = grouped_head(config)
    assert head._native() is not None
    outputs = outputs_of(head)
    monkeypatch.setattr(draft_head, "native_head", lambda *parts: None)
    for ours, expected in zip(outputs, outputs_of(grouped_head(config)), strict=True):
        assert torch.equal(ours, expected)
    assert [output.shape for output in outputs] == [(2, 100), (30, 64), (12, 100), (19, 64)]


def test_heads_of_other_makes_run_in_parts() -> None:
    assert grouped_head(replace(CONFIG, qk_norm=True))._native() is None
