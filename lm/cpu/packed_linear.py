"""Linear layers with weights packed once for oneDNN; plain torch would pack them at every call, if at all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lm.cpu.grouped_linear import GroupedLinear, kernel_for, kernels
from lm.cpu.large_pages import zeros_in_large_pages
from lm.cpu.quantized import GROUP, Bfloat16Weight, GroupedWeight, find_smaller, round_to_q4_1, round_to_q8_0
from lm.device import has_bfloat16_kernels
from treeline.config import Arithmetic, Quantization

ROUNDING: dict[Quantization, Callable[[Tensor], GroupedWeight | Bfloat16Weight | None]] = {
    "auto": find_smaller,
    "none": lambda weight: None,
    "int8": round_to_q8_0,
    "int4": round_to_q4_1,
}


ROW_STEP, MOST_ROW_STEP = 8, 32
"""oneDNN compiles a kernel of half a MiB for each number of rows, in some ms, and `lm` bounds how many it keeps. Rows
are padded to multiples of 8 from 8 rows on, of 16 from 128, of 32 from 256: few enough kernels to keep. Five layers of
48 columns with 1 to 300 random rows take 5 ms a pass instead of 26. Four of 576 with 65 to 300 rows are as fast, in a
quarter of the memory. With 1 to 16 rows: 15 % slower than with all kernels kept."""


def padded_rows(rows: int) -> int:
    """For example 5 -> 5, 9 -> 16, 130 -> 144, 513 -> 544."""
    if rows <= ROW_STEP:
        return rows
    step = min(MOST_ROW_STEP, max(ROW_STEP, 1 << (rows - 1).bit_length() - 4))
    return -(-rows // step) * step


class PackedLinear(nn.Module):
    """A frozen `nn.Linear` on the CPU; keeps only the packed weight. A row's result does not depend on the others."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight)
        self.bias = None if linear.bias is None else linear.bias.detach()
        row = weight[:1]
        self._pairs_up = not torch.equal(self._multiply(row), self._multiply(row.expand(2, -1))[:1])

    def forward(self, inputs: Tensor) -> Tensor:
        if self._pairs_up and inputs.shape[-2] == 1:
            # A single row would select another kernel, which rounds differently; two rows cost the same.
            return self._multiply(inputs.expand(*inputs.shape[:-2], 2, -1))[..., :1, :]
        rows = inputs.shape[-2]
        padding = padded_rows(rows) - rows
        return self._multiply(F.pad(inputs, (0, 0, 0, padding)))[..., :rows, :] if padding else self._multiply(inputs)

    def _multiply(self, inputs: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(inputs, self.weight, self.bias, "none", [], "")


def packed_dtypes() -> set[torch.dtype]:
    """Weight dtypes that oneDNN can pack on this processor."""
    if not torch.backends.mkldnn.is_available():
        return set()
    return {torch.float32, torch.bfloat16} if has_bfloat16_kernels() else {torch.float32}


@torch.inference_mode()
def pack_linear_layers(model: nn.Module, quantization: Quantization = "auto", arithmetic: Arithmetic = "auto") -> None:
    """Replace the linear layers of `model` on the CPU by faster ones, where this processor has kernels for them.

    Any other layer stays unchanged. A weight shared with the embedding stays there too.

    Args:
        quantization, arithmetic: as in `ModelConfig`; rounding needs a kernel, float32, and whole groups.
    """
    outputs: Any = getattr(model, "get_output_embeddings", None)  # a model of transformers has it
    head = outputs() if outputs is not None else None
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            # Subclasses may compute something else.
            if type(layer) is nn.Linear and layer.weight.device.type == "cpu":
                rounding = "int8" if quantization == "int4" and layer is head else quantization
                setattr(parent, name, _packed(layer, rounding, arithmetic))


def _packed(layer: nn.Linear, quantization: Quantization, arithmetic: Arithmetic) -> nn.Module:
    weight = layer.weight.detach()
    if kernels() and weight.dtype == torch.float32 and weight.shape[1] % GROUP == 0:
        smaller = ROUNDING[quantization](weight)
        kernel = kernel_for("float32" if smaller is not None and smaller.bits == 16 else arithmetic)
        if smaller is not None and kernel is not None:
            return GroupedLinear(smaller, layer.bias, kernel)
    return PackedLinear(layer) if weight.dtype in packed_dtypes() else layer


def gather_weights(model: nn.Module) -> None:
    """Move the weights in groups to large pages, in the order of the modules. The first pass takes their addresses."""
    layers = [module for module in model.modules() if isinstance(module, GroupedLinear)]
    sizes = [layer.tiles.numel() for layer in layers]
    for layer, memory in zip(layers, zeros_in_large_pages(sum(sizes)).split(sizes), strict=True):
        layer.move(memory)


def read_bytes(model: nn.Module) -> int:
    """Bytes of the weights that every pass over `model` reads in full, so without embedding tables."""
    weights: dict[int, Tensor] = {}
    for module in model.modules():
        if isinstance(module, GroupedLinear):
            weights[id(module)] = module.tiles
        elif isinstance(module, PackedLinear):
            weights[id(module)] = module.weight
        elif not isinstance(module, nn.Embedding):
            weights.update((id(weight), weight) for weight in module.parameters(recurse=False))
    return sum(weight.numel() * weight.element_size() for weight in weights.values())


def arithmetic_of(model: nn.Module) -> str:
    """How our kernels compute products, for display: "int8 by avx512_vnni"; empty if they compute none."""
    kernels = {module.kernel for module in model.modules() if isinstance(module, GroupedLinear)}
    return ", ".join(f"{kernel.arithmetic} by {kernel.instructions}" for kernel in sorted(kernels))
