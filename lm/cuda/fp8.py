"""Products of 8-bit floating-point numbers (e4m3). Weights are rounded once, by output row. Inputs are rounded per
token, by the kernel of the preceding norm or by one of their own. torchao (0.18) launches about 15 operations a product
for that unless it is compiled, which costs more than the smaller weights save.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor, nn

from lm.cuda.elementwise import Rounded
from lm.cuda.elementwise_kernels import round_rows
from lm.layers.fused import FusedLayer

LARGEST = torch.finfo(torch.float8_e4m3fn).max
MULTIPLE = 16
"""torch requires it of both sizes of a weight."""


class Fp8Linear(nn.Module):
    """A frozen `nn.Linear` with weights e4m3 [out, in] and a scale float32 for each row."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        wide = linear.weight.detach().float()
        self.scale = nn.Buffer(wide.abs().amax(dim=1).clamp(min=1e-12) / LARGEST)
        rounded = (wide / self.scale[:, None]).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)
        self.weight = nn.Parameter(rounded, requires_grad=False)
        self.bias, self.dtype = linear.bias, linear.weight.dtype
        self.in_features, self.out_features = linear.in_features, linear.out_features

    def forward(self, inputs: Tensor | Rounded) -> Tensor:
        """[..., in] -> [..., out], in the dtype of the original weights; sums in float32."""
        numbers, scales = inputs if isinstance(inputs, Rounded) else rounded_rows(inputs)
        out = torch._scaled_mm(
            numbers.reshape(-1, self.in_features), self.weight.t(), scales[:, None], self.scale[None], bias=self.bias,
            out_dtype=self.dtype,
        )  # fmt: skip
        return out.view(*numbers.shape[:-1], self.out_features)


def rounded_rows(rows: Tensor) -> Rounded:
    """`rows` [..., size], one scale each."""
    rows, size = rows.contiguous(), rows.shape[-1]
    count, pad = rows.numel() // size, triton.next_power_of_2(size)
    out, scales = torch.empty_like(rows, dtype=torch.float8_e4m3fn), rows.new_empty(count, dtype=torch.float32)
    round_rows[(count,)](rows, out, scales, SIZE=size, PAD=pad, num_warps=max(1, min(16, pad // 512)))
    return Rounded(out, scales)


@torch.no_grad()
def round_linear_layers(model: nn.Module) -> None:
    """Put `Fp8Linear` in place of all plain linear layers whose sizes allow it."""
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            # Subclasses may compute something else.
            if type(layer) is nn.Linear and not any(size % MULTIPLE for size in layer.weight.shape):
                setattr(parent, name, Fp8Linear(layer))
        if isinstance(parent, FusedLayer):
            for norm, product in ((parent.input_norm, parent.qkv_proj), (parent.mlp_norm, parent.gate_up_proj)):
                norm.rounds = isinstance(product, Fp8Linear)
