"""A draft head's pass as one call of a kernel (`lm/kernels/decoder.c`)."""

from __future__ import annotations

import ctypes
from ctypes import c_float, c_int32, c_void_p
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

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
    """A head whose weights no longer move."""

    def __init__(self, module: Any, embedding: nn.Embedding, output: GroupedLinear) -> None:
        """`module`: a `HeadModule`."""
        self._module, self._embedding, self._output = module, embedding, output
        self._norms = [norm for norm in (module.input_norm, *(module.fc_norm or ())) if norm is not None]
        self._norm_weights = torch.cat([norm.weight for norm in self._norms]) if self._norms else None
        self._structs: WeakKeyDictionary[KVCache, _Head] = WeakKeyDictionary()
        kernels: Any = library()
        self._run = typed(kernels, "draft_head", "ppnnpppnppp")
        self._run_states = typed(kernels, "head_states", "pnpfnppn")

    def states(self, features: Tensor) -> Tensor | None:
        """`HeadModule.states` of bfloat16 features [n, feature_width]; None if the kernel cannot."""
        fc = self._module.fc
        if self._norm_weights is None or features.dtype != torch.bfloat16 or not features.is_contiguous():
            return None
        states = torch.empty(len(features), fc.out_features)
        norms = (len(self._norms), self._norm_weights.data_ptr(), self._norms[0].variance_epsilon)
        places = (features.data_ptr(), states.data_ptr())
        self._run_states(ctypes.byref(fc.struct), *norms, len(features), *places, torch.get_num_threads())
        return states

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
        following, logits = torch.empty_like(states), states.new_empty(len(rows), self._output.out_features)
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
        config, layer = self._module.config, self._module.layers[0]
        norms = (layer.hidden_norm, self._module.norm)
        return _Head(
            LayerStruct.of(layer, cache),
            self._output.struct,
            self._embedding.weight.data_ptr(),
            *(norm.weight.data_ptr() for norm in norms),
            *(norm.variance_epsilon for norm in norms),
            config.norm_before_residual,
            config.norm_output,
        )


def native_head(module: Any, embedding: nn.Embedding, output: nn.Module) -> NativeHead | None:
    """A `HeadModule` for the kernel, if it can: as `native_layers`, and all other weights in groups."""
    grouped = isinstance(output, GroupedLinear) and isinstance(module.fc, GroupedLinear)
    if not grouped or not isinstance(module.layers[0], FusedLayer) or native_layers(module.layers) is None:
        return None
    return NativeHead(module, embedding, output)  # type: ignore[arg-type]
