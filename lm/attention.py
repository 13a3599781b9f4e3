"""Tree attention over the paged KV cache, registered with transformers under the name "treeline"."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface

from lm.kv_cache import KVCache
from lm.packed import PackedPass, Span

NAME = "treeline"


def tree_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    *,
    packed_pass: PackedPass,
    kv_cache: KVCache,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Write this layer's new keys and values, then let each sequence attend to its own live entries.

    Args:
        query: [1, heads, N, head_dim].
        key, value: [1, kv_heads, N, head_dim].

    Returns:
        [1, N, heads, head_dim], and no weights.
    """
    keys, values = kv_cache.storage[module.layer_idx].unbind(0)  # [kv_heads, slots, head_dim]
    keys[:, packed_pass.slots] = key[0]
    values[:, packed_pass.slots] = value[0]
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    biases = _biases(packed_pass, sliding_window, query)
    out = torch.empty_like(query[0])  # [heads, N, head_dim]
    kv_heads = key.shape[1]
    for span, bias in zip(packed_pass.spans, biases, strict=True):
        # The heads that share a key head are folded into the query rows, so nothing is repeated.
        rows = query[0, :, span.start : span.end].reshape(kv_heads, -1, query.shape[-1])
        folded = rows.shape[1] // (span.end - span.start)
        mask = bias if bias is None or folded == 1 else bias.repeat(folded, 1)
        if len(span.runs) == 1 and softcap is None:
            first, count = span.runs[0]
            run = slice(first, first + count)
            attended = scaled_dot_product_attention(
                rows[None], keys[None, :, run], values[None, :, run], attn_mask=mask, scale=scaling
            )[0]
        else:
            attended = _attend_runs(rows, keys, values, span.runs, mask, scaling, softcap)
        out[:, span.start : span.end] = attended.reshape(-1, span.end - span.start, query.shape[-1])
    return out.transpose(0, 1)[None], None


def _attend_runs(
    rows: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    runs: list[tuple[int, int]],
    mask: torch.Tensor | None,
    scaling: float,
    softcap: float | None,
) -> torch.Tensor:
    """Attention over several stretches of the cache, in fp32, without bringing them together first.

    Each stretch gives exp-weighted sums relative to a running maximum (online softmax).
    """
    rows = rows.float() * scaling
    top = torch.full(rows.shape[:2], -torch.inf, device=rows.device)
    total = torch.zeros_like(top)
    summed = torch.zeros_like(rows)
    seen = 0
    for first, count in runs:
        scores = rows @ keys[:, first : first + count].float().transpose(1, 2)  # [kv_heads, rows, count]
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        if mask is not None:
            scores = scores + mask[:, seen : seen + count]
        new_top = torch.maximum(top, scores.amax(-1))
        safe_top = new_top.masked_fill(new_top == -torch.inf, 0.0)
        weights = torch.exp(scores - safe_top[..., None])
        shrink = torch.exp(top - safe_top)
        total = total * shrink + weights.sum(-1)
        summed = summed * shrink[..., None] + weights @ values[:, first : first + count].float()
        top = new_top
        seen += count
    return (summed / total[..., None]).to(values.dtype)


def _biases(packed_pass: PackedPass, window: int | None, like: torch.Tensor) -> list[torch.Tensor | None]:
    """Additive masks [n, live] of every span for layers with this sliding window; None where all is visible."""
    if window not in packed_pass.biases:
        packed_pass.biases[window] = [_bias(span, window, like) for span in packed_pass.spans]
    return packed_pass.biases[window]


def _bias(span: Span, window: int | None, like: torch.Tensor) -> torch.Tensor | None:
    visible = span.visible
    if window is not None and span.query_positions.max() >= window:
        near = span.query_positions[:, None] - span.key_positions[None, :] < window
        visible = near if visible is None else visible & near
    if visible is None:
        return None
    bias = np.where(visible, 0.0, -np.inf).astype(np.float32)
    return torch.from_numpy(bias).to(like.device, like.dtype)


AttentionInterface.register(NAME, tree_attention)
# Masks are ours and differ by sequence: transformers must not build any.
AttentionMaskInterface.register(NAME, lambda *args, **kwargs: None)
