"""Products of 8-bit floating-point numbers (e4m3): weights are rounded once, by output row, and a token's inputs as
they come, by one kernel. torchao (0.18) launches about 15 operations a product for that unless it is compiled, which
costs more than the smaller weights save.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor, nn

from lm.cuda.elementwise_kernels import round_rows

LARGEST = torch.finfo(torch.float8_e4m3fn).max
MULTIPLE = 16
"""Of both sizes of a weight that torch multiplies so."""


class Fp8Linear(nn.Module):
    """A frozen `nn.Linear` with weights e4m3 [out, in] and a scale float32 for each row."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        wide = linear.weight.detach().float()
        self.scale = nn.Buffer(wide.abs().amax(dim=1).clamp(min=1e-12) / LARGEST)
        rounded = (wide / self.scale[:, None]).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)
        self.weight = nn.Parameter(rounded, requires_grad=False)
        self.bias = linear.bias
        self.in_features, self.out_features = linear.in_features, linear.out_features

    def forward(self, inputs: Tensor) -> Tensor:
        """[..., in] -> [..., out], in the inputs' type; sums in float32."""
        rows = inputs.reshape(-1, self.in_features)
        rounded, scales = rounded_rows(rows)
        out = torch._scaled_mm(
            rounded, self.weight.t(), scales[:, None], self.scale[None], bias=self.bias, out_dtype=inputs.dtype
        )
        return out.view(*inputs.shape[:-1], self.out_features)


def rounded_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows [n, size] as e4m3 numbers, and what each row is to be multiplied by: float32 [n]."""
    count, size = rows.shape
    out, scales = torch.empty_like(rows, dtype=torch.float8_e4m3fn), rows.new_empty(count, dtype=torch.float32)
    pad = triton.next_power_of_2(size)
    round_rows[(count,)](rows, out, scales, SIZE=size, PAD=pad, num_warps=max(1, min(16, pad // 512)))
    return out, scales


@torch.no_grad()
def round_linear_layers(model: nn.Module) -> None:
    """Put `Fp8Linear` in place of all plain linear layers whose sizes allow it."""
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            # Subclasses may compute something else.
            if type(layer) is nn.Linear and not any(size % MULTIPLE for size in layer.weight.shape):
                setattr(parent, name, Fp8Linear(layer))
