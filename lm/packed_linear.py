"""Linear layers with weights laid out once for oneDNN's bfloat16 kernels, which plain torch would do at every call."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lm.device import has_bfloat16_kernels


class PackedLinear(nn.Module):
    """A frozen `nn.Linear` in bfloat16 on the CPU; keeps only the packed weight."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach())
        self.bias = None if linear.bias is None else linear.bias.detach()

    def forward(self, inputs: Tensor) -> Tensor:
        if inputs.shape[-2] == 1:
            # A single row would take another kernel that rounds differently; beside a second one it costs the same.
            return self._multiply(inputs.expand(*inputs.shape[:-2], 2, -1))[..., :1, :]
        return self._multiply(inputs)

    def _multiply(self, inputs: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(inputs, self.weight, self.bias, "none", [], "")


@torch.inference_mode()
def pack_linear_layers(model: nn.Module) -> None:
    """Replace the bfloat16 linear layers of `model` on the CPU by packed ones, if this processor has such kernels.

    Any other layer, float32 above all, stays as it is. A weight that the embedding shares stays there as well.
    """
    if not has_bfloat16_kernels():
        return
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            # Subclasses may compute something else.
            if type(layer) is nn.Linear and layer.weight.dtype is torch.bfloat16 and layer.weight.device.type == "cpu":
                setattr(parent, name, PackedLinear(layer))
