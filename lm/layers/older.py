"""Families whose attention does not go through transformers' attention interface: Falcon, GPT-J, GPT-Neo, CodeGen."""

from __future__ import annotations

import functools
from importlib import import_module
from typing import Any

from torch import Tensor

from lm.attention import IMPLEMENTATION, interface_attention, is_attending

FAMILIES = {
    "codegen": ("CodeGenPreTrainedModel", "CodeGenAttention", None),
    "falcon": ("FalconPreTrainedModel", "FalconAttention", "FALCON_ATTENTION_CLASSES"),
    "gpt_neo": ("GPTNeoPreTrainedModel", "GPTNeoSelfAttention", "GPT_NEO_ATTENTION_CLASSES"),
    "gptj": ("GPTJPreTrainedModel", "GPTJAttention", "GPTJ_ATTENTION_CLASSES"),
}
"""By model type: names in transformers of the model's base class, of its attention, and of a table of attentions."""


@functools.cache
def lead_to_interface(model_type: str) -> None:
    """Let the attention of such a family be ours during our passes; all else stays as it is."""
    if model_type not in FAMILIES:
        return
    module: Any = import_module(f"transformers.models.{model_type}.modeling_{model_type}")
    base, name, table = FAMILIES[model_type]
    attention = getattr(module, name)
    getattr(module, base)._can_set_attn_implementation_cached_value = True
    if table is not None:
        getattr(module, table)[IMPLEMENTATION] = attention
    if model_type == "falcon":
        _redirect(attention, "forward", functools.partial(_falcon, module.apply_rotary_pos_emb))
    else:
        _redirect(attention, "_attn", _gpt)


def _redirect(attention: type, name: str, ours: Any) -> None:
    theirs = getattr(attention, name)

    @functools.wraps(theirs)
    def redirected(self: Any, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        return (ours if is_attending() else theirs)(self, *args, **kwargs)

    setattr(attention, name, redirected)


def _gpt(attention: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> tuple[Tensor, None]:
    """[1, heads, tokens, head_dim], as all four tensors."""
    scale = window = None
    if hasattr(attention, "layer_id"):  # GPT-Neo
        attention.layer_idx, scale = attention.layer_id, 1.0
        window = attention.config.window_size if attention.attention_type == "local" else None
    query, key = query.to(value.dtype), key.to(value.dtype)  # CodeGen turns them in float32.
    mixed, _ = interface_attention(attention, query, key, value, None, scale, sliding_window=window)
    return mixed.transpose(1, 2), None


def _falcon(
    rotated: Any, attention: Any, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor], **kwargs: Any
) -> tuple[Tensor, None]:
    query, key, value = attention._split_heads(attention.query_key_value(hidden_states))
    # The newer ones repeat each key and value for the queries that share it.
    copies = key.shape[2] // attention.num_kv_heads
    query, key, value = (part.transpose(1, 2) for part in (query, key[:, :, ::copies], value[:, :, ::copies]))
    query, key = rotated(query, key, *position_embeddings)
    mixed, _ = interface_attention(attention, query, key, value, None)
    return attention.dense(mixed.flatten(2)), None
