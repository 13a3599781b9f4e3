"""Replaces the decoder layers of a Llama-like transformers model by fused ones with the same weights."""

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

from lm.attention import CONTEXT
from lm.cpu.elementwise import elementwise_for
from lm.cpu.native_attention import NativeAttention
from lm.cpu.native_layers import NativeLayers, native_layers
from lm.layers.fused import ComplexRotary, FusedLayer

FUSED = (LlamaDecoderLayer, MistralDecoderLayer, Qwen2DecoderLayer)
"""Layers that `FusedLayer` can replace. Subclasses may compute something else, so only these exact types are."""


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
    if any(isinstance(part, nn.Linear) and type(part) is not nn.Linear for part in layers.modules()):
        return  # Products of quantised weights have scales beside them, which joining would lose.
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
    work = getattr(context, "work", None) or elementwise_for(hidden_states)
    normed = work.norm(hidden_states, body.norm)
    return BaseModelOutputWithPast(last_hidden_state=normed)  # type: ignore[arg-type]


def _window(layer: Any) -> int | None:
    """How far a layer of `FUSED` sees."""
    if isinstance(layer, MistralDecoderLayer):
        return layer.self_attn.config.sliding_window
    return layer.self_attn.sliding_window if isinstance(layer, Qwen2DecoderLayer) else None
