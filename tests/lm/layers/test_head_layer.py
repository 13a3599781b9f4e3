"""A draft head's layer against transformers' decoder layers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, Qwen3Config
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer

from lm.checkpoints.eagle3 import HeadConfig
from lm.layers.head_layer import HeadLayer, Rotary, rotary_of
from tests.lm.tiny_head import CausalAttention

SIZE, INNER, HEADS, KV_HEADS, DIM, TOKENS = 32, 64, 4, 2, 8, 6
ROPE = {"rope_type": "default", "rope_theta": 5000.0}


def head_config(qk_norm: bool, rope: dict[str, Any]) -> HeadConfig:
    shape = (SIZE, INNER, HEADS, KV_HEADS, DIM, 1e-5, rope, (1,), SIZE, 100, 100)
    return HeadConfig(*shape, qk_norm=qk_norm)


@pytest.mark.parametrize(
    ("qk_norm", "rope"),
    [
        (False, ROPE),
        (True, ROPE),
        (False, {"rope_type": "linear", "rope_theta": 5000.0, "factor": 4.0}),
    ],
)
def test_the_layer_computes_what_transformers_does_with_two_states_side_by_side(qk_norm, rope):
    torch.manual_seed(0)
    config = head_config(qk_norm, rope)
    layer, rotary = HeadLayer(config), rotary_of(config)
    shape: Any = (Qwen3Config if qk_norm else LlamaConfig)(
        hidden_size=SIZE,
        intermediate_size=INNER,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=DIM,
        rms_norm_eps=1e-5,
        rope_parameters=rope,
    )
    shape._attn_implementation = "sdpa"
    theirs: Any = (Qwen3DecoderLayer if qk_norm else LlamaDecoderLayer)(shape, 0)
    for name in ("q_proj", "k_proj", "v_proj"):
        setattr(theirs.self_attn, name, nn.Linear(2 * SIZE, getattr(theirs.self_attn, name).out_features, bias=False))
    for weight in layer.parameters():
        weight.data.normal_(1.0 if weight.dim() == 1 else 0.0, 0.2)
    own = {name: weight for name, weight in layer.state_dict().items() if name != "hidden_norm.weight"}
    assert own.keys() == theirs.state_dict().keys()
    theirs.load_state_dict(own)
    inputs, hidden = torch.randn(1, TOKENS, 2 * SIZE), torch.randn(1, TOKENS, SIZE)
    positions = torch.arange(3, 3 + TOKENS)[None]
    attended, _ = theirs.self_attn(inputs, LlamaRotaryEmbedding(shape)(hidden, positions), None)
    after = hidden + attended
    wanted = after + theirs.mlp(theirs.post_attention_layernorm(after))
    mixed = layer.mix(inputs, hidden, rotary(hidden, positions), CausalAttention())
    torch.testing.assert_close(mixed, wanted, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(layer.mix(inputs, hidden, rotary(hidden, positions), CausalAttention()), wanted)


def test_angles_stay_precise_in_bfloat16():
    shape: Any = LlamaConfig(hidden_size=SIZE, num_attention_heads=HEADS, head_dim=DIM, rope_parameters=ROPE)
    rotary, positions = Rotary(DIM, 5000.0).to(torch.bfloat16), torch.tensor([[0, 1, 1000]])
    hidden = torch.zeros(1, 3, SIZE)
    for own, theirs in zip(rotary(hidden, positions), LlamaRotaryEmbedding(shape)(hidden, positions), strict=True):
        torch.testing.assert_close(own, theirs)
