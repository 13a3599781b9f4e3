"""Linear layers with weights laid out once for oneDNN, which plain torch would do at every call, if at all."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lm.device import has_bfloat16_kernels


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
            # A single row would take another kernel that rounds differently; beside a second one it costs the same.
            return self._multiply(inputs.expand(*inputs.shape[:-2], 2, -1))[..., :1, :]
        return self._multiply(inputs)

    def _multiply(self, inputs: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(inputs, self.weight, self.bias, "none", [], "")


def packed_dtypes() -> set[torch.dtype]:
    """Which weights oneDNN can pack for this processor."""
    if not torch.backends.mkldnn.is_available():
        return set()
    return {torch.float32, torch.bfloat16} if has_bfloat16_kernels() else {torch.float32}


@torch.inference_mode()
def pack_linear_layers(model: nn.Module) -> None:
    """Replace the linear layers of `model` on the CPU by packed ones, where this processor has kernels for them.

    Any other layer stays as it is. A weight that the embedding shares stays there as well.
    """
    packable = packed_dtypes()
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            # Subclasses may compute something else.
            if type(layer) is nn.Linear and layer.weight.dtype in packable and layer.weight.device.type == "cpu":
                setattr(parent, name, PackedLinear(layer))
