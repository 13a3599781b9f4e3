"""Tree attention by our own kernel (`lm/kernels/attention`): float32 on the CPU, read and written in place."""

from __future__ import annotations

import ctypes
import functools
from ctypes import c_float, c_int64, c_void_p
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from lm.attention import AttentionContext, AttentionOptions, TreeAttention
from lm.cpu.grouped_linear import Kernel, kernels
from lm.cpu.native import LANES, library, typed
from lm.kv_cache import KVCache
from lm.packed import PackedBatch

WIDE_LANES = 16
"""Numbers in an AVX-512 vector."""


class _Batch(ctypes.Structure):
    _fields_ = (("count", c_int64), ("threads", c_int64), ("spans", c_void_p))


class LayerAttention(ctypes.Structure):
    """How a layer attends, as the kernels read it."""

    _fields_ = (
        *((name, c_int64) for name in ("kv_heads", "group", "key_dim", "value_dim", "window")),
        *((name, c_float) for name in ("scale", "softcap")),
        ("wide", c_int64),
    )

    @classmethod
    def of(cls, kv_heads: int, group: int, key_dim: int, value_dim: int, options: AttentionOptions) -> LayerAttention:
        sizes = (kv_heads, group, key_dim, value_dim, options.window or 0)
        wide = value_dim % WIDE_LANES == 0 and Kernel.FLOAT32_WIDE in kernels()
        return cls(*sizes, options.scale, options.softcap or 0.0, wide)


_fitting: WeakKeyDictionary[KVCache, bool] = WeakKeyDictionary()


def attention_for(batch: PackedBatch, cache: KVCache) -> AttentionContext:
    """Attention of one packed forward pass: by the kernel where it can, else by torch."""
    kernels = library()
    if cache not in _fitting:  # It looks at all layers: once, not in every pass.
        _fitting[cache] = _fits(cache)
    if kernels is None or not _fitting[cache]:
        return TreeAttention(batch, cache)
    return NativeAttention(kernels, batch, cache)


def _fits(cache: KVCache) -> bool:
    first = cache.keys[0]
    return (
        first.dtype == torch.float32
        and first.device.type == "cpu"
        and all(kept.shape[2] % LANES == 0 for kept in (*cache.keys, *cache.values))
    )


class NativeAttention:
    """One packed forward pass. A token's bits depend only on what it sees: not on the rest of the pass, siblings in a
    tree, the placement of blocks, or the number of threads.

    Attributes:
        batch: a reference to the kernels' description of the pass.
    """

    def __init__(self, kernels: ctypes.CDLL, batch: PackedBatch, cache: KVCache) -> None:
        self._attend, self.cache = typed(kernels, "attend", "ppppp" + "np" * 3), cache
        spans = batch.spans
        table = np.empty((len(spans), 7), np.int64)
        table[:, :4] = batch.shapes
        table[:, 4:] = [(span.cache.slots_address, *span.tree.addresses) for span in spans]
        _, tokens, _, entries = batch.shapes.T
        table[:, 6] += (entries - tokens) * entries  # The new tokens' rows are the last ones.
        self._kept = (batch, table)  # The kernel reads them while this object lives.
        self.batch = ctypes.byref(_Batch(len(spans), torch.get_num_threads(), table.ctypes.data))

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, options: AttentionOptions) -> Tensor:
        keys, values = self.cache.keys[layer], self.cache.values[layer]
        tokens, heads, key_dim = query.shape
        kv_heads, value_dim = values.shape[1:]
        output = query.new_empty((tokens, heads, value_dim))
        query, key, value = _dense_heads(query), _dense_heads(key), _dense_heads(value)
        self._attend(
            self.batch,
            _layer(kv_heads, heads // kv_heads, key_dim, value_dim, options),
            keys.data_ptr(),
            values.data_ptr(),
            query.data_ptr(),
            query.stride(0),
            key.data_ptr(),
            key.stride(0),
            value.data_ptr(),
            value.stride(0),
            output.data_ptr(),
        )
        return output


@functools.lru_cache(256)
def _layer(kv_heads: int, group: int, key_dim: int, value_dim: int, options: AttentionOptions) -> Any:
    """A reference to the kernel's description of a layer."""
    return ctypes.byref(LayerAttention.of(kv_heads, group, key_dim, value_dim, options))


def _dense_heads(tensor: Tensor) -> Tensor:
    """[tokens, heads, dim] with each token's heads contiguous."""
    return tensor if tensor.stride()[1:] == (tensor.shape[2], 1) else tensor.contiguous()
