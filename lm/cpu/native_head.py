"""A draft head's pass as one call of a kernel (`lm/kernels/decoder.c`)."""

from __future__ import annotations

import ctypes
from ctypes import c_float, c_int32, c_void_p
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from lm.checkpoints.eagle3 import HeadConfig
from lm.cpu.grouped_linear import GroupedLinear, LinearStruct
from lm.cpu.native import library, typed
from lm.cpu.native_attention import NativeAttention
from lm.cpu.native_layers import LayerStruct, native_layers
from lm.kv_cache import KVCache
from lm.layers.fused import FusedLayer


class _Head(ctypes.Structure):
    _fields_ = (
        ("layer", LayerStruct),
        ("output", LinearStruct),
        *((name, c_void_p) for name in ("embedding", "state_norm", "norm")),
        *((name, c_float) for name in ("state_epsilon", "epsilon")),
        *((name, c_int32) for name in ("norm_before_residual", "norm_output")),
    )


class NativeHead:
    """A head whose weights are in place."""

    def __init__(
        self, config: HeadConfig, layer: FusedLayer, norm: Any, embedding: nn.Embedding, output: GroupedLinear
    ) -> None:
        self._parts, self._features_out = (config, layer, norm, embedding, output), output.out_features
        self._structs: WeakKeyDictionary[KVCache, _Head] = WeakKeyDictionary()
        self._run = typed(library().treeline_draft_head, "ppnnpppnppp")  # type: ignore[union-attr]

    def forward(
        self, token_ids: Tensor, turns: Tensor, states: Tensor, rows: Tensor, context: NativeAttention
    ) -> tuple[Tensor, Tensor]:
        """One draft step of tokens int64 [n], whose predecessors have `states` float32 [n, hidden].

        Returns:
            Logits [rows, draft_vocab_size] of the tokens `rows`, and the states [n, hidden] for their children.
        """
        struct = self._structs.get(context.cache)
        if struct is None:
            struct = self._structs[context.cache] = self._struct(context.cache)
        states = states.contiguous()
        following, logits = torch.empty_like(states), states.new_empty(len(rows), self._features_out)
        self._run(
            ctypes.byref(struct),
            context.batch,
            *states.shape,
            token_ids.data_ptr(),
            turns.data_ptr(),
            states.data_ptr(),
            len(rows),
            rows.data_ptr(),
            following.data_ptr(),
            logits.data_ptr(),
        )
        return logits, following

    def _struct(self, cache: KVCache) -> _Head:
        config, layer, norm, embedding, output = self._parts
        norms: list[Any] = [layer.hidden_norm, norm]
        return _Head(
            LayerStruct.of(layer, cache),
            output.struct,
            embedding.weight.data_ptr(),
            *(norm.weight.data_ptr() for norm in norms),
            *(norm.variance_epsilon for norm in norms),
            config.norm_before_residual,
            config.norm_output,
        )


def native_head(
    config: HeadConfig, layers: nn.ModuleList, norm: nn.Module, embedding: nn.Embedding, output: nn.Module
) -> NativeHead | None:
    """This head as the kernel runs it, if it can: as `native_layers`, and with output rows in groups."""
    layer = layers[0]
    if not isinstance(layer, FusedLayer) or not isinstance(output, GroupedLinear) or native_layers(layers) is None:
        return None
    return NativeHead(config, layer, norm, embedding, output)
