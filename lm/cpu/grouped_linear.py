"""Linear layers whose weights take fewer bytes than float32, multiplied by this project's own kernels."""

from __future__ import annotations

import ctypes
import functools
from ctypes import c_int32, c_int64, c_void_p
from enum import IntEnum
from typing import Literal

import torch
from torch import Tensor, nn

from lm.cpu.native import library, typed
from lm.cpu.quantized import Bfloat16Weight, GroupedWeight


class Kernel(IntEnum):
    """How a product is computed; numbered as in `lm/kernels/kernels.h`."""

    FLOAT32 = 0
    FLOAT32_WIDE = 1
    AVX2 = 2
    AVX_VNNI = 3
    AVX512_VNNI = 4
    NEON = 5

    @property
    def arithmetic(self) -> Literal["float32", "int8"]:
        return "float32" if self <= Kernel.FLOAT32_WIDE else "int8"

    @property
    def instructions(self) -> str:
        """For display."""
        return {Kernel.FLOAT32: "vectors of 8", Kernel.FLOAT32_WIDE: "vectors of 16"}.get(self, self.name.lower())


class LinearStruct(ctypes.Structure):
    """A layer as the kernels read it."""

    _fields_ = (
        *((name, c_void_p) for name in ("tiles", "bias")),
        *((name, c_int32) for name in ("bits", "scale_bytes")),
        *((name, c_int64) for name in ("features_in", "features_out", "kernel")),
    )


@functools.cache
def kernels() -> tuple[Kernel, ...]:
    """Those that this processor runs, the fastest of each arithmetic last; none if they were not built."""
    native = library()
    return () if native is None else tuple(kernel for kernel in Kernel if native.treeline_runs(int(kernel)))


def kernel_for(arithmetic: Literal["auto", "float32", "int8"]) -> Kernel | None:
    """The fastest kernel of this arithmetic; "auto" is int8 where there is one, else float32."""
    fitting = [kernel for kernel in kernels() if arithmetic in ("auto", kernel.arithmetic)]
    return fitting[-1] if fitting else None


class GroupedLinear(nn.Module):
    """A frozen linear layer on the CPU, float32 in and out. 16-bit weights need a float32 kernel.

    An int8 kernel rounds each 32 neighbouring inputs of a token to 255 steps between plus and minus their largest
    magnitude. A row's result does not depend on other rows, and all int8 kernels give the same bits.
    """

    def __init__(self, weight: GroupedWeight | Bfloat16Weight, bias: Tensor | None, kernel: Kernel) -> None:
        super().__init__()
        self.kernel = kernel
        self.out_features, self.in_features = weight.shape
        self.tiles = weight.tiles()
        self.bias = None if bias is None else bias.detach().float().contiguous()
        self.struct = LinearStruct(
            self.tiles.data_ptr(),
            None if self.bias is None else self.bias.data_ptr(),
            weight.bits,
            weight.scale_bytes,
            self.in_features,
            self.out_features,
            kernel,
        )

    def move(self, memory: Tensor) -> None:
        """Move the weights into `memory`, uint8 of the same size."""
        self.tiles = memory.view_as(self.tiles).copy_(self.tiles)
        self.struct.tiles = self.tiles.data_ptr()

    def forward(self, inputs: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features]."""
        inputs = inputs.contiguous()
        outputs = inputs.new_empty(*inputs.shape[:-1], self.out_features)
        tokens, threads = inputs.numel() // self.in_features, torch.get_num_threads()
        multiply = typed(library(), "linear", "pppnn")  # type: ignore[arg-type]
        multiply(ctypes.byref(self.struct), inputs.data_ptr(), outputs.data_ptr(), tokens, threads)
        return outputs
