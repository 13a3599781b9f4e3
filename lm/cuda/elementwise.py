"""`lm.cpu.elementwise.Elementwise` by Triton kernels, for padded passes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from lm.cpu.elementwise import TORCH, TorchElementwise, is_silu
from lm.cuda.elementwise_kernels import copy_entries, gate_rows, norm_rows, rotate_and_store

GATE_BLOCK = 1024
WARP_NUMBERS = 512
"""Numbers of a row that one warp holds in registers, 16 a thread."""


class Rounded(NamedTuple):
    """Rows as e4m3 numbers [..., size], and the factor of each row: float32 [rows]."""

    numbers: Tensor
    scales: Tensor


class TritonElementwise(TorchElementwise):
    """One launch per operation; what is not Llama-like is left to torch."""

    def norm(self, hidden: Tensor, norm: Any) -> Any:
        """`Rounded` if the norm `rounds`."""
        return _norm(hidden, norm=norm)

    def add(self, hidden: Tensor, added: Tensor, post_norm: Any = None) -> Tensor:
        total = torch.empty_like(hidden)
        _norm(hidden, added, total, post_norm)
        return total

    def add_norm(self, hidden: Tensor, added: Tensor, norm: Any, post_norm: Any = None) -> tuple[Tensor, Any]:
        total = torch.empty_like(hidden)
        return total, _norm(hidden, added, total, post_norm, norm)

    def gated(self, gate_up: Tensor, activation: Callable[[Tensor], Tensor]) -> Tensor:
        gelu = type(activation).__name__ == "GELUTanh"  # transformers' "gelu_pytorch_tanh"
        if not (gelu or is_silu(activation)):
            return TORCH.gated(gate_up, activation)
        size = gate_up.shape[-1] // 2
        out = gate_up.new_empty(*gate_up.shape[:-1], size)
        grid = (out.numel() // size, triton.cdiv(size, GATE_BLOCK))
        gate_rows[grid](gate_up, out, SIZE=size, BLOCK=GATE_BLOCK, GELU=gelu, num_warps=4)
        return out


def store_rotated(
    heads: Tensor, counts: list[int], turns: Tensor, slots: Tensor, keys: Tensor, values: Tensor, norms: Any = None
) -> None:
    """Rotate query heads in place; write rotated keys, and values, to their slots of the KV cache.

    Args:
        heads: [tokens, all heads, head_dim]: `counts` of queries, keys and values.
        turns: complex64 [tokens, 1, head_dim / 2].
        norms: of query and key heads before rotation, if they have any.
    """
    query_norm, key_norm = norms or (None, None)
    tokens, _, dim = heads.shape
    queries, kept, _ = counts
    angles = torch.view_as_real(turns)
    rotate_and_store[(tokens, sum(counts))](
        heads, angles, slots, keys, values, *_weights(angles, query_norm, key_norm),
        heads.stride(0), keys.stride(0), values.stride(0),
        QUERIES=queries, KEYS=kept, DIM=dim, PAD=triton.next_power_of_2(dim // 2), NORMS=norms is not None, num_warps=1,
    )  # fmt: skip


def move_entries(store: Tensor, sources: Tensor, targets: Tensor) -> None:
    """Copy the entries in slots `sources` int64 [n] of `store` [tensors, slots, heads, dim] to `targets`.

    Two launches: torch's indexing takes dozens where a store has more than 2^31 numbers. They use a temporary buffer,
    since an entry may move to where another one was.
    """
    count, size = len(sources), store[0, 0].numel()
    aside = store.new_empty(len(store), count, size)
    grid = (count, len(store), triton.cdiv(size, GATE_BLOCK))
    for slots, back in ((sources, False), (targets, True)):
        copy_entries[grid](store, aside, slots, count, store.stride(0), SIZE=size, BLOCK=GATE_BLOCK, BACK=back)


def _norm(
    hidden: Tensor, added: Tensor | None = None, total: Tensor | None = None, post_norm: Any = None, norm: Any = None
) -> Tensor | Rounded | None:
    """One launch of `norm_rows`; what is not given is neither read nor written."""
    size, rounds = hidden.shape[-1], getattr(norm, "rounds", False)
    rows, pad = hidden.numel() // size, triton.next_power_of_2(size)
    post, weight, epsilon = _weights(hidden, post_norm, norm)
    out, scales = None, hidden.new_empty(rows, dtype=torch.float32) if rounds else hidden
    if norm is not None:
        out = torch.empty_like(hidden, dtype=torch.float8_e4m3fn if rounds else hidden.dtype)
    norm_rows[(rows,)](
        hidden, hidden if added is None else added, hidden if total is None else total, post, weight,
        hidden if out is None else out, scales, epsilon, SIZE=size, PAD=pad, ADDS=added is not None,
        POST=post_norm is not None, NORMS=norm is not None, ROUNDS=rounds,
        num_warps=max(1, min(16, pad // WARP_NUMBERS)),
    )  # fmt: skip
    return Rounded(out, scales) if rounds and out is not None else out


def _weights(instead: Tensor, first: Any, second: Any) -> tuple[Tensor, Tensor, float]:
    """Weights of two norms that may be missing, and the epsilon that they share."""
    left, right = (instead if norm is None else norm.weight for norm in (first, second))
    return left, right, max((norm.variance_epsilon for norm in (first, second) if norm is not None), default=0.0)
