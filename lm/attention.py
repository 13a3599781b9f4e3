"""Tree attention over the block KV cache, plugged into transformers' attention interface.

Every transformers decoder layer calls the registered function with its queries, keys and values. The context, a
keyword argument of the forward pass, does the rest. Each sequence reads only its own live entries, as views of the
storage. Query heads that share a key/value head are folded into the query length, so nothing is repeated.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lm.kv_cache import KVCache, LayerShape
from lm.packed import PackedBatch, Span

IMPLEMENTATION = "treeline"
"""Name in transformers' attention interface."""
CONTEXT = "treeline_context"
"""Keyword argument that carries the AttentionContext through transformers' modules."""

LANE_ENTRIES = 16
MIN_ROWS = 6

_BEYOND_PLAIN = ("s_aux", "position_bias", "head_mask")
"""Keyword arguments for attention sinks, learned biases and head masks, which are not supported."""


class AttentionContext(Protocol):
    """Attention of one forward pass, as each layer calls it."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, options: AttentionOptions) -> Tensor:
        """query [tokens, heads, key_dim], key and value [tokens, kv_heads, dim] -> [tokens, heads, value_dim]."""


@dataclass(frozen=True)
class AttentionOptions:
    """How a layer attends.

    Attributes:
        scale: multiplies the scores.
        softcap: scores become softcap * tanh(score / softcap), if set.
        window: a token sees only positions greater than its own minus this, if set.
    """

    scale: float
    softcap: float | None
    window: int | None


_current: ContextVar[tuple[AttentionContext, Tensor] | None] = ContextVar("attention", default=None)


@contextmanager
def attending(context: AttentionContext, positions: Tensor) -> Iterator[None]:
    """Set the context for layers that drop keyword arguments before attention (StableLM, Nemotron), and the tokens'
    positions, int64 [tokens], for attention that needs them (ALiBi)."""
    token = _current.set((context, positions))
    try:
        yield
    finally:
        _current.reset(token)


def is_attending() -> bool:
    """Whether one of our passes is running."""
    return _current.get() is not None


def positions_of_pass() -> Tensor:
    """Positions int64 [tokens] of the tokens of our running pass."""
    current = _current.get()
    assert current is not None
    return current[1]


class UnsupportedAttentionError(Exception):
    """A layer needs a feature that this attention does not support."""


def interface_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What `lm.model` registers with transformers: [1, heads, tokens, dim] in, [1, tokens, heads, dim] out."""
    current = _current.get()
    context: AttentionContext | None = kwargs.get(CONTEXT) or (current and current[0])
    if context is None:
        raise UnsupportedAttentionError("its modules do not pass keyword arguments on to attention")
    beyond = [name for name in _BEYOND_PLAIN if kwargs.get(name) is not None]
    if beyond:
        raise UnsupportedAttentionError(f"its attention needs '{beyond[0]}'")
    if not getattr(module, "is_causal", True):
        raise UnsupportedAttentionError("its attention is not causal")
    options = AttentionOptions(query.shape[-1] ** -0.5 if scaling is None else scaling, softcap, sliding_window)
    q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    layer: int = module.layer_idx  # type: ignore[assignment]
    return context.attend(layer, q, k, v, options).unsqueeze(0), None


class Probe:
    """Records each layer's KV shape and window in a forward pass."""

    def __init__(self) -> None:
        self.shapes: dict[int, LayerShape] = {}
        self.windows: dict[int, int | None] = {}

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, options: AttentionOptions) -> Tensor:
        if layer in self.shapes:
            raise UnsupportedAttentionError("a layer attends more than once")
        self.shapes[layer] = LayerShape(key.shape[1], key.shape[2], value.shape[2])
        self.windows[layer] = options.window
        return query.new_zeros(*query.shape[:2], value.shape[2])


@dataclass(frozen=True)
class _View:
    """Slots that one sequence's new tokens read, and an additive mask [n * group, entries] if needed.

    Consecutive slots are read in place. Others are gathered, which costs one copy; rounding is the same either way.
    """

    span: Span
    entries: slice | Tensor
    mask: Tensor | None


class TreeAttention:
    """Attention of one packed forward pass. Views and masks are made once and serve all layers alike."""

    def __init__(self, batch: PackedBatch, cache: KVCache) -> None:
        self._spans = batch.spans
        self._cache = cache
        self._slots = torch.from_numpy(batch.slots).to(cache.keys[0].device)
        self._views: dict[tuple[int | None, int], list[_View]] = {}

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, options: AttentionOptions) -> Tensor:
        keys, values = self._cache.keys[layer], self._cache.values[layer]
        keys.index_copy_(0, self._slots, key)
        values.index_copy_(0, self._slots, value)
        tokens, heads, key_dim = query.shape
        kv_heads, group = key.shape[1], heads // key.shape[1]
        grouped = query.reshape(tokens, kv_heads, group, key_dim)
        output = query.new_empty(tokens, kv_heads, group, values.shape[2])
        for view in self._views_for(options.window, group):
            place = slice(view.span.start, view.span.stop)
            folded = grouped[place].transpose(0, 1).reshape(kv_heads, -1, key_dim)
            attend = _attend if options.softcap is None else _attend_with_softcap
            seen_keys, seen_values = (kept[view.entries].transpose(0, 1) for kept in (keys, values))
            mixed = attend(folded, seen_keys, seen_values, view.mask, options)
            output[place] = mixed.view(kv_heads, -1, group, values.shape[2]).transpose(0, 1)
        return output.view(tokens, heads, -1)

    def _views_for(self, window: int | None, group: int) -> list[_View]:
        views = self._views.get((window, group))
        if views is None:
            dtype, device = self._cache.keys[0].dtype, self._cache.keys[0].device
            views = [_view(span, window, group, dtype, device) for span in self._spans]
            self._views[window, group] = views
        return views


def _view(span: Span, window: int | None, group: int, dtype: torch.dtype, device: torch.device) -> _View:
    length = span.cache.length
    seen = span.visible
    new, entries = seen.shape
    positions = length + span.depths[entries - new :]
    # Committed entries before the earliest token's window are not even read.
    first = 0 if window is None else min(length, max(0, int(positions.min()) - window + 1))
    # Read whole lanes of entries, with the excess masked: the kernels round differently in the remainder after full
    # lanes, which would make a token's sums depend on the number of its neighbours.
    end = min(span.cache.capacity, first + -(-(length + entries - first) // LANE_ENTRIES) * LANE_ENTRIES)
    runs = span.cache.runs(first, end)
    slots = runs[0] if len(runs) == 1 else torch.from_numpy(span.cache.slots(first, end)).to(device)
    visible = np.zeros((new, end - first), np.bool_)
    visible[:, : length - first] = True
    visible[:, length - first : length - first + entries] = seen
    if window is not None:
        entry_positions = np.concatenate([np.arange(first, length), length + span.depths])
        visible[:, : len(entry_positions)] &= entry_positions > positions[:, None] - window
    if visible.all():
        return _View(span, slots, None)
    hidden = torch.from_numpy(~visible).to(device).repeat_interleave(group, dim=0)
    return _View(span, slots, torch.zeros(hidden.shape, dtype=dtype, device=device).masked_fill_(hidden, -torch.inf))


def _attend(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, options: AttentionOptions) -> Tensor:
    """By torch's fused kernel.

    query [kv_heads, n, key_dim], keys and values [kv_heads, entries, dim] -> [kv_heads, n, value_dim].
    """
    rows = query.shape[1]
    if rows < MIN_ROWS:  # fewer rows take a kernel that rounds differently
        query = query.repeat(1, MIN_ROWS, 1)
        mask = None if mask is None else mask.repeat(MIN_ROWS, 1)
    mixed = F.scaled_dot_product_attention(query[None], keys[None], values[None], mask, scale=options.scale)[0]
    return mixed[:, :rows]


def _attend_with_softcap(
    query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, options: AttentionOptions
) -> Tensor:
    """The same with a softcap, which torch's kernel lacks; scores in float32."""
    assert options.softcap is not None
    scores = (query @ keys.transpose(1, 2)).float() * options.scale
    scores = options.softcap * torch.tanh(scores / options.softcap)
    if mask is not None:
        scores += mask
    return torch.softmax(scores, dim=2).to(query.dtype) @ values
