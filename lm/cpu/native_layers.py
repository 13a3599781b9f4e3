"""Consecutive fused layers as one kernel call (`lm/kernels/decoder.c`), without Python overhead per layer."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from ctypes import c_float, c_void_p
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from lm.cpu.elementwise import is_silu
from lm.cpu.grouped_linear import GroupedLinear, LinearStruct
from lm.cpu.native import library, typed
from lm.cpu.native_attention import LayerAttention, NativeAttention
from lm.kv_cache import KVCache
from lm.layers.fused import FusedLayer


class LayerStruct(ctypes.Structure):
    _fields_ = (
        *((name, LinearStruct) for name in ("qkv", "o", "gate_up", "down")),
        *((name, c_void_p) for name in ("input_norm", "mlp_norm")),
        *((name, c_float) for name in ("input_epsilon", "mlp_epsilon")),
        ("attention", LayerAttention),
        *((name, c_void_p) for name in ("keys", "values")),
    )

    @classmethod
    def of(cls, layer: FusedLayer, cache: KVCache) -> LayerStruct:
        queries, kv_heads, _ = layer.heads
        keys, values = cache.keys[layer.index], cache.values[layer.index]
        norms = (layer.input_norm, layer.mlp_norm)
        return cls(
            *(linear.struct for linear in _linears(layer)),
            *(norm.weight.data_ptr() for norm in norms),
            *(norm.variance_epsilon for norm in norms),
            LayerAttention.of(kv_heads, queries // kv_heads, layer.head_dim, layer.head_dim, layer.options),
            keys.data_ptr(),
            values.data_ptr(),
        )


class NativeLayers:
    """Layers of one model, whose weights no longer move. A layer's forward hooks see its output."""

    def __init__(self, layers: Sequence[FusedLayer]) -> None:
        self._layers = layers
        self._tables: WeakKeyDictionary[KVCache, ctypes.Array[LayerStruct]] = WeakKeyDictionary()
        self._run = typed(library(), "decoder_layers", "nppnnppp")  # type: ignore[arg-type]

    def forward(self, hidden: Tensor, turns: Tensor, context: NativeAttention) -> Tensor:
        """float32 hidden states [1, tokens, hidden] -> those after the last layer; `turns` from `ComplexRotary`."""
        table = self._tables.get(context.cache)
        if table is None:
            table = (LayerStruct * len(self._layers))(*(LayerStruct.of(layer, context.cache) for layer in self._layers))
            self._tables[context.cache] = table
        for start, stop in self._runs():
            hidden = self._call(table, start, stop, context, turns, hidden.contiguous())
            last = self._layers[stop - 1]
            for hook in last._forward_hooks.values():
                hook(last, (), hidden)
        return hidden

    def _runs(self) -> Iterator[tuple[int, int]]:
        """Ranges of layers of which only the last output is needed: by a hook, or as the result."""
        start = 0
        for stop, layer in enumerate(self._layers, start=1):
            if layer._forward_hooks or stop == len(self._layers):
                yield start, stop
                start = stop

    def _call(
        self,
        table: ctypes.Array[LayerStruct],
        start: int,
        stop: int,
        context: NativeAttention,
        turns: Tensor,
        hidden: Tensor,
    ) -> Tensor:
        out = torch.empty_like(hidden)
        self._run(
            stop - start,
            ctypes.byref(table, start * ctypes.sizeof(LayerStruct)),
            context.batch,
            *hidden.shape[1:],
            turns.data_ptr(),
            hidden.data_ptr(),
            out.data_ptr(),
        )
        return out


def native_layers(layers: nn.ModuleList) -> NativeLayers | None:
    """The layers for the kernel, if it can run them: all of one shape, with weights in groups and SiLU."""
    fused: list[FusedLayer] = list(layers)  # type: ignore[arg-type]
    if library() is None or not all(map(_fits, fused)):
        return None
    shapes = {(*layer.heads, layer.head_dim, *(each.out_features for each in _linears(layer))) for layer in fused}
    return NativeLayers(fused) if len(shapes) == 1 else None


def _fits(layer: FusedLayer) -> bool:
    more = layer.head_norms is not None or layer.post_norms is not None
    return (
        not more
        and layer.whole_lanes
        and is_silu(layer.activation)
        and {*map(type, _linears(layer))} == {GroupedLinear}
    )


def _linears(layer: FusedLayer) -> tuple[GroupedLinear, ...]:
    return layer.qkv_proj, layer.o_proj, layer.gate_up_proj, layer.down_proj  # type: ignore[return-value]
