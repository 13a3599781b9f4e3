"""Leaner decoder layers for models of Llama's kind: fewer and larger products, and a rotation in one operation.

They take the place of the layers of transformers inside its model, with the same weights; all else stays its own.
Rotary embedding turns dimension i of a head together with dimension i + d/2. Here the rows of the query and key weights
are reordered so that such pairs lie side by side, and a turn is one product of complex numbers. Scores are sums over
pairs, so that the order does not matter to them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from transformers.models.mistral.modeling_mistral import MistralDecoderLayer
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer

from lm.attention import CONTEXT, AttentionContext, AttentionOptions
from lm.cpu.elementwise import TORCH, elementwise_for
from lm.cpu.native import LANES
from lm.cpu.native_attention import NativeAttention
from lm.cpu.native_layers import NativeLayers, native_layers

FUSED = (LlamaDecoderLayer, MistralDecoderLayer, Qwen2DecoderLayer)
"""Layers that compute just what `FusedLayer` does; their subclasses may not."""
LENGTH_DEPENDENT_ROPE = ("longrope", "dynamic")
"""Kinds of rotary embedding that turn by other angles once a sequence of the batch is long."""
FIRST_POSITIONS = 1024


class FusedLayer(nn.Module):
    """Computes what one layer of `FUSED` does, in inference.

    Args:
        layer: whose weights are taken.
        window: a token sees only positions greater than its own minus this, if set.
    """

    def __init__(self, layer: Any, window: int | None) -> None:
        super().__init__()
        attention, mlp = layer.self_attn, layer.mlp
        self.index: int = attention.layer_idx
        self.head_dim: int = attention.head_dim
        self.options = AttentionOptions(attention.scaling, None, window)
        projections = [attention.q_proj, attention.k_proj, attention.v_proj]
        self.heads = [projection.out_features // self.head_dim for projection in projections]
        queries, keys, values = self.heads
        pairs = torch.arange(self.head_dim).view(2, -1).T.flatten()
        turned = (torch.arange(queries + keys)[:, None] * self.head_dim + pairs).flatten()
        still = torch.arange((queries + keys) * self.head_dim, (queries + keys + values) * self.head_dim)
        self.qkv_proj = _joined(projections, torch.cat((turned, still)))
        self.o_proj = attention.o_proj
        self.gate_up_proj = _joined([mlp.gate_proj, mlp.up_proj])
        self.down_proj, self.activation = mlp.down_proj, mlp.act_fn
        self.input_norm, self.mlp_norm = layer.input_layernorm, layer.post_attention_layernorm
        sizes = (self.o_proj.out_features, self.head_dim, mlp.down_proj.in_features)
        self.whole_lanes = all(size % LANES == 0 for size in sizes)

    def forward(self, hidden_states: Tensor, position_embeddings: Tensor, **kwargs: Any) -> Tensor:
        """hidden_states [1, tokens, hidden] -> the same; position_embeddings as `ComplexRotary` gives them."""
        context: AttentionContext = kwargs[CONTEXT]
        work = elementwise_for(hidden_states) if self.whole_lanes else TORCH
        queries, keys, _ = self.heads
        qkv = self.qkv_proj(work.norm(hidden_states, self.input_norm))
        heads = work.rotate(qkv.view(-1, sum(self.heads), self.head_dim), queries + keys, position_embeddings)
        query, key, value = heads.split_with_sizes(self.heads, 1)
        mixed = context.attend(self.index, query, key, value, self.options)
        attended = self.o_proj(mixed.reshape(1, mixed.shape[0], -1))
        hidden_states, normed = work.add_norm(hidden_states, attended, self.mlp_norm)
        return hidden_states + self.down_proj(work.gated(self.gate_up_proj(normed), self.activation))


class ComplexRotary(nn.Module):
    """A rotary embedding's turns as complex numbers, made once a pass; on the CPU, once for each position."""

    def __init__(self, rotary: nn.Module) -> None:
        super().__init__()
        self.rotary = rotary
        self._turns_at = torch.empty(0)

    def forward(self, hidden_states: Tensor, position_ids: Tensor) -> Tensor:
        """complex64 [tokens, 1, head_dim / 2]."""
        if not hidden_states.is_cpu or self.rotary.rope_type in LENGTH_DEPENDENT_ROPE:
            return self._turns(hidden_states, position_ids)
        needed = int(position_ids.max()) + 1
        if needed > len(self._turns_at):
            ahead = max(FIRST_POSITIONS, 2 * needed)
            self._turns_at = self._turns(hidden_states, torch.arange(ahead)[None])
        return self._turns_at[position_ids[0]]

    def _turns(self, hidden_states: Tensor, position_ids: Tensor) -> Tensor:
        cos, sin = self.rotary(hidden_states.float(), position_ids)
        half = cos.shape[-1] // 2
        return torch.complex(cos[0, :, None, :half], sin[0, :, None, :half])


@torch.no_grad()
def fuse_layers(hf: PreTrainedModel, finish: Callable[[nn.Module], object] = lambda layer: None) -> None:
    """Put fused layers in place of those of `hf`, if it is of Llama's kind; any other model stays as it is.

    Args:
        finish: called with each layer once it is in place; meanwhile only one layer's weights are there twice.
    """
    body: Any = hf.base_model
    layers = getattr(body, "layers", None)
    if not isinstance(layers, nn.ModuleList) or not all(type(layer) in FUSED for layer in layers):
        return
    for index, layer in enumerate(layers):
        layers[index] = FusedLayer(layer, _window(layer))
        finish(layers[index])
    body.rotary_emb = ComplexRotary(body.rotary_emb)
    # Looked for at the first pass: only then are the weights as they will stay.
    body.forward = functools.partial(_forward, body, functools.cache(lambda: native_layers(layers)))


def _forward(
    body: Any,
    native: Callable[[], NativeLayers | None],
    input_ids: Tensor | None = None,
    position_ids: Tensor | None = None,
    inputs_embeds: Tensor | None = None,
    **kwargs: Any,
) -> BaseModelOutputWithPast:
    """What the body's own forward pass does around its layers, but for masks and a cache that are not ours."""
    hidden_states = body.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
    turns = body.rotary_emb(hidden_states, position_ids)
    context = kwargs[CONTEXT]
    if isinstance(context, NativeAttention) and (layers := native()) is not None:
        hidden_states = layers.forward(hidden_states, turns, context)
    else:
        for layer in body.layers:
            hidden_states = layer(hidden_states, position_embeddings=turns, **kwargs)
    normed = elementwise_for(hidden_states).norm(hidden_states, body.norm)
    return BaseModelOutputWithPast(last_hidden_state=normed)  # type: ignore[arg-type]


def _window(layer: Any) -> int | None:
    """How far a layer of `FUSED` sees."""
    if isinstance(layer, MistralDecoderLayer):
        return layer.self_attn.config.sliding_window
    return layer.self_attn.sliding_window if isinstance(layer, Qwen2DecoderLayer) else None


def _joined(projections: list[nn.Linear], order: Tensor | None = None) -> nn.Linear:
    """One layer whose outputs are those of all `projections`, in this order of rows."""
    rows = slice(None) if order is None else order
    weight = torch.cat([projection.weight for projection in projections])[rows]
    joined = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    joined.weight = nn.Parameter(weight, requires_grad=False)
    if projections[0].bias is not None:
        bias = torch.cat([projection.bias for projection in projections])[rows]
        joined.bias = nn.Parameter(bias, requires_grad=False)
    return joined
