"""`lm.cpu.elementwise.Elementwise` by Triton kernels, for padded passes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
from torch import Tensor

from lm.cpu.elementwise import TORCH, TorchElementwise, is_silu
from lm.cuda.elementwise_kernels import gate_rows, norm_rows, rotate_and_store

GATE_BLOCK = 1024
WARP_NUMBERS = 512
"""Numbers of a row that one warp holds in registers, 16 a thread."""


class TritonElementwise(TorchElementwise):
    """One launch for each of them; what is not of Llama's kind is torch's."""

    def norm(self, hidden: Tensor, norm: Any) -> Tensor:
        out = torch.empty_like(hidden)
        _norm(hidden, hidden, out, norm, out, False)
        return out

    def add_norm(self, hidden: Tensor, added: Tensor, norm: Any) -> tuple[Tensor, Tensor]:
        total, out = torch.empty_like(hidden), torch.empty_like(hidden)
        _norm(hidden, added, total, norm, out, True)
        return total, out

    def gated(self, gate_up: Tensor, activation: Callable[[Tensor], Tensor]) -> Tensor:
        if not is_silu(activation):
            return TORCH.gated(gate_up, activation)
        size = gate_up.shape[-1] // 2
        out = gate_up.new_empty(*gate_up.shape[:-1], size)
        grid = (out.numel() // size, triton.cdiv(size, GATE_BLOCK))
        gate_rows[grid](gate_up, out, SIZE=size, BLOCK=GATE_BLOCK, num_warps=4)
        return out


def store_rotated(heads: Tensor, counts: list[int], turns: Tensor, slots: Tensor, keys: Tensor, values: Tensor) -> None:
    """Turn query heads in place, and write turned keys, and values, to their slots of the store.

    Args:
        heads: [tokens, all heads, head_dim]: `counts` of queries, keys and values.
        turns: complex64 [tokens, 1, head_dim / 2].
    """
    tokens, _, dim = heads.shape
    queries, kept, _ = counts
    rotate_and_store[(tokens, sum(counts))](
        heads, torch.view_as_real(turns), slots, keys, values, heads.stride(0), keys.stride(0), values.stride(0),
        QUERIES=queries, KEYS=kept, DIM=dim, PAD=triton.next_power_of_2(dim // 2), num_warps=1,
    )  # fmt: skip


def _norm(hidden: Tensor, added: Tensor, total: Tensor, norm: Any, out: Tensor, adds: bool) -> None:
    size = hidden.shape[-1]
    pad = triton.next_power_of_2(size)
    norm_rows[(hidden.numel() // size,)](
        hidden, added, total, norm.weight, out, norm.variance_epsilon, SIZE=size, PAD=pad, ADDS=adds,
        num_warps=max(1, min(16, pad // WARP_NUMBERS)),
    )  # fmt: skip
