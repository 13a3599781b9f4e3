"""Families whose attention bypasses transformers' attention interface: Falcon, GPT-J, GPT-Neo, CodeGen, and those with
ALiBi biases (arXiv 2108.12409): MPT, BLOOM, old Falcon.

ALiBi adds slope * (position of the key) to a score, up to a per-query constant that softmax ignores. This bias is kept
in the KV cache: `LANES` extra key dimensions hold it, and the query has ones there. So every attention implementation
and every tree works unchanged, at the cost of 8 more dimensions of each key and value.
"""

from __future__ import annotations

import functools
import math
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lm.attention import (
    IMPLEMENTATION,
    UnsupportedAttentionError,
    interface_attention,
    is_attending,
    positions_of_pass,
)
from lm.cpu.native import LANES

FAMILIES = {
    "bloom": ("BloomPreTrainedModel", "BloomAttention", None),
    "codegen": ("CodeGenPreTrainedModel", "CodeGenAttention", None),
    "falcon": ("FalconPreTrainedModel", "FalconAttention", "FALCON_ATTENTION_CLASSES"),
    "gpt_neo": ("GPTNeoPreTrainedModel", "GPTNeoSelfAttention", "GPT_NEO_ATTENTION_CLASSES"),
    "gptj": ("GPTJPreTrainedModel", "GPTJAttention", "GPTJ_ATTENTION_CLASSES"),
    "mpt": ("MptPreTrainedModel", "MptAttention", None),
}
"""By model type: transformers' names of the model's base class, its attention class, and its table of such classes."""
BIASED = ("bloom", "mpt")
"""Model types that encode positions in biases alone, and take none."""
BIAS_PARTS = 3
"""bfloat16 numbers, of 8 significant bits each, whose sum is one float32."""
MPT_OPTIONS: dict[str, tuple[Any, ...]] = {
    "alibi": (True,),
    "alibi_bias_max": (8,),
    "attn_type": ("multihead_attention",),
    "expansion_ratio": (4,),
    "logit_scale": (None,),
    "no_bias": (True,),
    "norm_type": ("low_precision_layernorm", "layernorm"),
    "prefix_lm": (False,),
    "qk_ln": (False,),
    "rope": (False,),
}
"""Options that transformers' MPT assumes, whatever the config says."""


@functools.cache
def lead_to_interface(model_type: str) -> None:
    """Route the attention of such a family to ours during our passes; all else is unchanged."""
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
    elif model_type == "bloom":
        _redirect(attention, "forward", _bloom)
    elif model_type == "mpt":
        _redirect(attention, "forward", _mpt)
        # Neither is used, but MPT always builds them.
        _redirect(module, "create_causal_mask", lambda **_: torch.empty(0))
        _redirect(module.MptModel, "build_mpt_alibi_tensor", lambda *_, **__: None)
    else:
        _redirect(attention, "_attn", _gpt)


def ignored_option(config: Any) -> str | None:
    """A configuration option, with its value, that transformers ignores; None if there is none."""
    if config.model_type != "mpt":
        return None
    for name, computed in MPT_OPTIONS.items():
        value = getattr(config.attn_config, name, getattr(config, name, computed[0]))
        if value not in computed:
            return f"{name} ({value})"
    return None


def _redirect(owner: Any, name: str, ours: Any) -> None:
    theirs = getattr(owner, name)

    @functools.wraps(theirs)
    def redirected(*args: Any, **kwargs: Any) -> Any:
        return (ours if is_attending() else theirs)(*args, **kwargs)

    setattr(owner, name, redirected)


def _gpt(attention: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> tuple[Tensor, None]:
    """All four tensors are [1, heads, tokens, head_dim]."""
    scale = window = None
    if hasattr(attention, "layer_id"):  # GPT-Neo
        attention.layer_idx, scale = attention.layer_id, 1.0
        window = attention.config.window_size if attention.attention_type == "local" else None
    query, key = query.to(value.dtype), key.to(value.dtype)  # CodeGen rotates in float32.
    mixed, _ = interface_attention(attention, query, key, value, None, scale, sliding_window=window)
    return mixed.transpose(1, 2), None


def _falcon(
    rotated: Any, attention: Any, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor], **kwargs: Any
) -> tuple[Tensor, None]:
    query, key, value = attention._split_heads(attention.query_key_value(hidden_states))
    # Newer Falcons repeat each key and value for the queries that share it.
    copies = key.shape[2] // attention.num_kv_heads
    query, key, value = (part.transpose(1, 2) for part in (query, key[:, :, ::copies], value[:, :, ::copies]))
    if attention.config.alibi:
        # transformers rounds these to bfloat16, as training did, and adds them before it scales.
        biases = _biases(query.shape[1], torch.bfloat16).float()
        mixed = _attend_biased(attention, query, key, value, biases, attention.inv_norm_factor)
    else:
        query, key = rotated(query, key, *position_embeddings)
        mixed, _ = interface_attention(attention, query, key, value, None)
    return attention.dense(mixed.flatten(2)), None


def _bloom(attention: Any, hidden_states: Tensor, residual: Tensor, **kwargs: Any) -> tuple[Tensor, None]:
    query, key, value = attention._reshape(attention.query_key_value(hidden_states))
    scale = attention.inv_norm_factor
    # transformers rounds these to the dtype of the states, as training did.
    biases = _biases(query.shape[1], torch.float32).to(key.dtype).float() / scale
    mixed = _attend_biased(attention, query, key, value, biases, scale)
    return attention.dense(mixed.flatten(2)) + residual, None


def _mpt(attention: Any, hidden_states: Tensor, **kwargs: Any) -> tuple[Tensor, None]:
    qkv = attention.Wqkv(hidden_states)
    if attention.clip_qkv:
        qkv = qkv.clamp(-attention.clip_qkv, attention.clip_qkv)
    query, key, value = qkv.unflatten(2, (3, attention.n_heads, -1)).permute(2, 0, 3, 1, 4)
    biases = _biases(attention.n_heads, torch.float32) / attention.softmax_scale
    mixed = _attend_biased(attention, query, key, value, biases, attention.softmax_scale)
    return attention.out_proj(mixed.flatten(2)), None


def _biases(heads: int, dtype: torch.dtype) -> Tensor:
    """Biases [heads, tokens] of the running pass, slopes and products rounded to `dtype`.

    Example: slopes of 4 heads are 1/4, 1/16, 1/64, 1/256; of 3 heads 1/16, 1/256, 1/4.
    """
    positions = positions_of_pass()
    count = 2 ** math.ceil(math.log2(heads))
    slopes = 2.0 ** (torch.arange(1, count + 1, device=positions.device, dtype=torch.float64) * -8 / count)
    if count != heads:
        slopes = torch.cat((slopes[1::2], slopes[::2]))[:heads]
    return slopes.to(dtype)[:, None] * positions


def _attend_biased(attention: Any, query: Tensor, key: Tensor, value: Tensor, biases: Tensor, scale: float) -> Tensor:
    """As `interface_attention`, with float32 `biases` [heads, tokens] added to the products with these keys before
    scaling."""
    if key.shape[1] != query.shape[1]:
        raise UnsupportedAttentionError("heads of different ALiBi slopes share keys")
    rest, parts = biases, []
    for _ in range(BIAS_PARTS):
        parts.append(rest.to(key.dtype))
        rest = rest - parts[-1]
    key = torch.cat((key, F.pad(torch.stack(parts, -1), (0, LANES - BIAS_PARTS))[None]), dim=-1)
    query = F.pad(query, (0, LANES), value=1.0)
    value = F.pad(value, (0, LANES))  # torch's fused kernel wants keys and values of one size.
    mixed, _ = interface_attention(attention, query, key, value, None, scale)
    return mixed[..., :-LANES]
