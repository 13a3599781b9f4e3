"""The decoder layer of a draft head, like Llama's or Qwen 3's. Tensor names follow transformers, which is not loaded:
a drafter that runs a head starts in half the time without it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lm.attention import AttentionContext, AttentionOptions
from lm.cpu.elementwise import TORCH, elementwise_for

if TYPE_CHECKING:
    from lm.checkpoints.eagle3 import HeadConfig

Turns = tuple[Tensor, Tensor]
"""Cosines and sines [1, tokens, head_dim] of a rotary embedding's angles."""


class HeadLayer(nn.Module):
    """Attends over a token's embedding joined with a state, also in training; `FusedLayer` can replace it."""

    def __init__(self, config: HeadConfig) -> None:
        super().__init__()
        self.self_attn, self.mlp = _Attention(config), _FeedForward(config.hidden_size, config.intermediate_size)
        self.input_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.hidden_norm = RMSNorm(config.hidden_size, config.norm_eps)

    @property
    def input_norm(self) -> RMSNorm:
        return self.input_layernorm

    def mix(self, inputs: Tensor, hidden_states: Tensor, turns: Turns, context: AttentionContext) -> Tensor:
        """Attention over normed `inputs` [1, tokens, 2 * hidden] and the feed-forward part, both added to
        `hidden_states` [1, tokens, hidden]."""
        hidden_states = hidden_states + self.self_attn(inputs, turns, context)
        return hidden_states + self.mlp(normed(hidden_states, self.post_attention_layernorm))


class _Attention(nn.Module):
    layer_idx = 0

    def __init__(self, config: HeadConfig) -> None:
        super().__init__()
        self.head_dim, self.scaling = config.head_dim, config.head_dim**-0.5
        width = 2 * config.hidden_size
        self.q_proj = nn.Linear(width, config.heads * config.head_dim, bias=False)
        self.k_proj = nn.Linear(width, config.kv_heads * config.head_dim, bias=False)
        self.v_proj = nn.Linear(width, config.kv_heads * config.head_dim, bias=False)
        self.o_proj = nn.Linear(config.heads * config.head_dim, config.hidden_size, bias=False)
        self.q_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else None

    def forward(self, inputs: Tensor, turns: Turns, context: AttentionContext) -> Tensor:
        tokens = inputs.shape[1]
        query, key, value = (
            projection(inputs).view(tokens, -1, self.head_dim) for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.q_norm is not None and self.k_norm is not None:
            query, key = normed(query, self.q_norm), normed(key, self.k_norm)
        options = AttentionOptions(self.scaling, None, None)
        mixed = context.attend(self.layer_idx, _turned(query, turns), _turned(key, turns), value, options)
        return self.o_proj(mixed.reshape(1, tokens, -1))


class _FeedForward(nn.Module):
    def __init__(self, size: int, inner: int) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(size, inner, bias=False), nn.Linear(size, inner, bias=False)
        self.down_proj, self.act_fn = nn.Linear(inner, size, bias=False), nn.SiLU()

    def forward(self, hidden: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(hidden)) * self.up_proj(hidden))


class RMSNorm(nn.Module):
    """A weight and an epsilon; `normed` applies them."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight, self.variance_epsilon = nn.Parameter(torch.ones(size)), eps


class Rotary(nn.Module):
    """Rotary embedding without scaling (RoFormer, arXiv 2104.09864): dimensions i and i + d/2 of a head rotate by
    position / theta^(2i/d).

    Angles are float32 for any weight dtype.
    """

    rope_type = "default"

    def __init__(self, head_dim: int, theta: float) -> None:
        super().__init__()
        self._head_dim, self._theta = head_dim, theta

    @torch.no_grad()
    def forward(self, hidden_states: Tensor, position_ids: Tensor) -> Turns:
        """position_ids int64 [1, tokens]; the result has the dtype of `hidden_states`."""
        steps = torch.arange(0, self._head_dim, 2, dtype=torch.float32, device=hidden_states.device)
        half = position_ids[..., None].float() * (1.0 / self._theta ** (steps / self._head_dim))
        angles = torch.cat((half, half), dim=-1)
        return angles.cos().to(hidden_states.dtype), angles.sin().to(hidden_states.dtype)


def rotary_of(config: HeadConfig) -> nn.Module:
    """A head's rotary embedding; those with scaling are transformers' own."""
    if config.rope.keys() == {"rope_type", "rope_theta"} and config.rope["rope_type"] == "default":
        return Rotary(config.head_dim, config.rope["rope_theta"])
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    shape: Any = LlamaConfig(
        hidden_size=config.hidden_size,
        num_attention_heads=config.heads,
        head_dim=config.head_dim,
        rope_parameters=config.rope,
    )
    return LlamaRotaryEmbedding(shape)


def normed(hidden: Tensor, norm: nn.Module) -> Tensor:
    """By a kernel, unless gradients are wanted."""
    return (TORCH if torch.is_grad_enabled() else elementwise_for(hidden)).norm(hidden, norm)


def _turned(heads: Tensor, turns: Turns) -> Tensor:
    """Rotate heads [tokens, heads, head_dim] by their angles."""
    cos, sin = (part[0, :, None] for part in turns)
    first, second = heads.chunk(2, dim=-1)
    return heads * cos + torch.cat((-second, first), dim=-1) * sin
