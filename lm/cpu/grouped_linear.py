"""Linear layers that multiply by weights of 4 or 8 bits in groups, with this project's own kernel."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn

from lm.cpu.native import library, typed
from lm.cpu.quantized import GroupedWeight


@functools.cache
def kernel() -> Callable[..., None] | None:
    """The product; None if there are no kernels here."""
    kernels = library()
    return None if kernels is None else typed(kernels.treeline_grouped_linear, "pnpppnnnn")


class GroupedLinear(nn.Module):
    """A frozen linear layer on the CPU, float32 in and out; needs the kernel.

    A row's result does not depend on the others.
    """

    def __init__(self, weight: GroupedWeight, bias: Tensor | None) -> None:
        super().__init__()
        multiply = kernel()
        assert multiply is not None
        self._multiply = multiply
        self.bits = weight.bits
        self.out_features, groups = weight.scale.shape
        self.in_features = groups * weight.codes.shape[2]
        self.tiles = weight.tiles()
        self.bias = None if bias is None else bias.detach().float().contiguous()

    def forward(self, inputs: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features]."""
        inputs = inputs.contiguous()
        outputs = inputs.new_empty(*inputs.shape[:-1], self.out_features)
        self._multiply(
            self.tiles.data_ptr(),
            self.bits,
            None if self.bias is None else self.bias.data_ptr(),
            inputs.data_ptr(),
            outputs.data_ptr(),
            inputs.numel() // self.in_features,
            self.in_features,
            self.out_features,
            torch.get_num_threads(),
        )
        return outputs
