"""Operations of a fused layer besides products and attention: by our kernels (`lm/kernels/layer.c`), or by torch.

With either, a token's bits do not depend on the rest of the pass.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from ctypes import CDLL
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lm.cpu.native import LANES, library, typed


class Elementwise(Protocol):
    """Operations on rows [..., tokens, size]."""

    def norm(self, hidden: Tensor, norm: Any) -> Tensor:
        """RMS norm of each row, with the weight and epsilon of a transformers norm."""

    def add(self, hidden: Tensor, added: Tensor, post_norm: Any = None) -> Tensor:
        """Their sum; `post_norm`, if given, is applied to `added` first."""

    def add_norm(self, hidden: Tensor, added: Tensor, norm: Any, post_norm: Any = None) -> tuple[Tensor, Tensor]:
        """The same sum, and its norm."""

    def rotate(self, heads: Tensor, turned: int, turns: Tensor) -> Tensor:
        """Rotate the adjacent pairs in the first `turned` of the heads [tokens, heads, head_dim].

        `turns`: complex64 [tokens, 1, head_dim / 2]. May overwrite `heads`.
        """

    def gated(self, gate_up: Tensor, activation: Callable[[Tensor], Tensor]) -> Tensor:
        """Activation of the first half of each row, times the second: [..., tokens, size / 2]."""


class TorchElementwise:
    """By torch, for any device and type."""

    def norm(self, hidden: Tensor, norm: Any) -> Tensor:
        if norm.weight.dtype != hidden.dtype:  # Gemma's weights stay in float32.
            return F.rms_norm(hidden.float(), norm.weight.shape, norm.weight, norm.variance_epsilon).to(hidden.dtype)
        return F.rms_norm(hidden, norm.weight.shape, norm.weight, norm.variance_epsilon)

    def add(self, hidden: Tensor, added: Tensor, post_norm: Any = None) -> Tensor:
        return hidden + (added if post_norm is None else self.norm(added, post_norm))

    def add_norm(self, hidden: Tensor, added: Tensor, norm: Any, post_norm: Any = None) -> tuple[Tensor, Tensor]:
        total = self.add(hidden, added, post_norm)
        return total, self.norm(total, norm)

    def rotate(self, heads: Tensor, turned: int, turns: Tensor) -> Tensor:
        pairs = torch.view_as_complex(heads[:, :turned].float().unflatten(-1, (-1, 2)))
        heads[:, :turned] = torch.view_as_real(pairs * turns).flatten(2)
        return heads

    def gated(self, gate_up: Tensor, activation: Callable[[Tensor], Tensor]) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return activation(gate) * up


class NativeElementwise(TorchElementwise):
    """By our kernels: float32 on the CPU, sizes that are multiples of `LANES`."""

    def __init__(self, kernels: CDLL) -> None:
        self._rms_norm, self._rotate, self._silu_times = (
            typed(kernels, "rms_norm", "nnppppfpi"),
            typed(kernels, "rotate", "nnnpnpi"),
            typed(kernels, "silu_times", "nnppi"),
        )

    def norm(self, hidden: Tensor, norm: Any) -> Tensor:
        return self._norm(hidden.contiguous(), None, None, norm)

    def add_norm(self, hidden: Tensor, added: Tensor, norm: Any, post_norm: Any = None) -> tuple[Tensor, Tensor]:
        if post_norm is not None:
            added = self.norm(added, post_norm)
        hidden, added, total = hidden.contiguous(), added.contiguous(), torch.empty_like(hidden)
        return total, self._norm(hidden, added.data_ptr(), total.data_ptr(), norm)

    def _norm(self, hidden: Tensor, added: int | None, total: int | None, norm: Any) -> Tensor:
        out, size = torch.empty_like(hidden), hidden.shape[-1]
        places = (hidden.data_ptr(), added, total, norm.weight.data_ptr())
        threads = torch.get_num_threads()
        self._rms_norm(hidden.numel() // size, size, *places, norm.variance_epsilon, out.data_ptr(), threads)
        return out

    def rotate(self, heads: Tensor, turned: int, turns: Tensor) -> Tensor:
        tokens, _, head_dim = heads.shape
        place = (heads.data_ptr(), heads.stride(0), turns.data_ptr())
        self._rotate(tokens, turned, head_dim, *place, torch.get_num_threads())
        return heads

    def gated(self, gate_up: Tensor, activation: Callable[[Tensor], Tensor]) -> Tensor:
        if not is_silu(activation):
            return TORCH.gated(gate_up, activation)
        gate_up, size = gate_up.contiguous(), gate_up.shape[-1] // 2
        out = gate_up.new_empty(*gate_up.shape[:-1], size)
        self._silu_times(out.numel() // size, size, gate_up.data_ptr(), out.data_ptr(), torch.get_num_threads())
        return out


def is_silu(activation: object) -> bool:
    """torch's SiLU or transformers' `SiLUActivation`, by name: a drafter with a head does not load transformers."""
    return isinstance(activation, nn.SiLU) or type(activation).__name__ == "SiLUActivation"


TORCH = TorchElementwise()
_native = functools.cache(NativeElementwise)


def elementwise_for(hidden: Tensor) -> Elementwise:
    """Our kernels if they support such rows, else torch."""
    fits = hidden.dtype == torch.float32 and hidden.is_cpu and hidden.shape[-1] % LANES == 0
    kernels = library() if fits else None
    return TORCH if kernels is None else _native(kernels)
