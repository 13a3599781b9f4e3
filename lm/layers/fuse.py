"""Replaces the decoder layers of a model like Llama by fused ones with the same weights."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.gemma.modeling_gemma import GemmaDecoderLayer
from transformers.models.gemma2.modeling_gemma2 import Gemma2DecoderLayer
from transformers.models.gemma3.modeling_gemma3 import Gemma3DecoderLayer
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from transformers.models.mistral.modeling_mistral import MistralDecoderLayer
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer

from lm.attention import CONTEXT
from lm.cpu.elementwise import elementwise_for
from lm.cpu.native_attention import NativeAttention
from lm.cpu.native_layers import NativeLayers, native_layers
from lm.layers.fused import ComplexRotary, FusedLayer, Norm

GEMMA = (GemmaDecoderLayer, Gemma2DecoderLayer, Gemma3DecoderLayer)
FUSED = (LlamaDecoderLayer, MistralDecoderLayer, Qwen2DecoderLayer, Qwen3DecoderLayer, *GEMMA)
"""Layers that `FusedLayer` can replace. Subclasses may compute something else, so types must match exactly."""


def is_fusable(hf: PreTrainedModel) -> bool:
    """Whether all layers are causal ones of `FUSED`, with plain weights."""
    layers: Any = getattr(hf.base_model, "layers", None)
    if not isinstance(layers, nn.ModuleList) or not all(type(layer) in FUSED for layer in layers):
        return False
    # Quantised linear layers have separate scales, which joining would lose.
    plain = all(type(part) is nn.Linear for part in layers.modules() if isinstance(part, nn.Linear))
    return plain and all(getattr(layer.self_attn, "is_causal", False) for layer in layers)


@torch.no_grad()
def fuse_layers(hf: PreTrainedModel, finish: Callable[[nn.Module], object] = lambda layer: None) -> None:
    """Replace the layers of `hf` by fused ones if it is Llama-like; any other model stays unchanged.

    Args:
        finish: called with each layer once it is in place, so that only one layer's weights exist twice at a time.
    """
    if not is_fusable(hf):
        return
    body: Any = hf.base_model
    layers: Any = body.layers
    kinds = set()
    for index, layer in enumerate(layers):
        layers[index] = fused = _fused(layer)
        finish(fused)
        kinds.add(fused.turned_by)
    rotary, one = body.rotary_emb, kinds == {"all"}
    longest = rotary.config.max_position_embeddings
    body.rotary_emb = nn.ModuleDict(
        {kind: ComplexRotary(rotary, longest, None if one else kind) for kind in sorted(kinds)}
    )
    body.norm = Norm(body.norm)
    # Created at the first pass: only then are the weights at their final address.
    body.forward = functools.partial(_forward, body, functools.cache(lambda: native_layers(layers)))


def _forward(
    body: Any,
    native: Callable[[], NativeLayers | None],
    input_ids: Tensor | None = None,
    position_ids: Tensor | None = None,
    inputs_embeds: Tensor | None = None,
    **kwargs: Any,
) -> BaseModelOutputWithPast:
    """The body's own forward pass, without its masks and cache, which are not ours."""
    hidden_states = body.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
    turns = {kind: rotary(hidden_states, position_ids) for kind, rotary in body.rotary_emb.items()}
    context = kwargs[CONTEXT]
    if isinstance(context, NativeAttention) and (layers := native()) is not None:
        hidden_states = layers.forward(hidden_states, turns["all"], context)
    else:
        for layer in body.layers:
            hidden_states = layer(hidden_states, position_embeddings=turns[layer.turned_by], **kwargs)
    work = getattr(context, "work", None) or elementwise_for(hidden_states)
    normed = work.norm(hidden_states, body.norm)
    return BaseModelOutputWithPast(last_hidden_state=normed)  # type: ignore[arg-type]


def _fused(layer: Any) -> FusedLayer:
    """Replacement of a `FUSED` layer."""
    attention = layer.self_attn
    window = attention.config if isinstance(layer, MistralDecoderLayer) else attention
    softcap = attention.attn_logit_softcapping if isinstance(layer, Gemma2DecoderLayer) else None
    turned_by = attention.layer_type if isinstance(layer, Gemma3DecoderLayer) else "all"
    return FusedLayer(layer, getattr(window, "sliding_window", None), softcap, turned_by)
