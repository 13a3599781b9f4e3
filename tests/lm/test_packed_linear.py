"""Packed linear layers compute what plain ones do, and replace nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from lm.model import LanguageModel
from lm.packed_linear import PackedLinear, pack_linear_layers
from tests.lm.tiny import tiny_llama, tiny_tokenizer
from treeline.config import ModelConfig

has_kernels = pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="no bfloat16 kernels for this processor"
)


class Scaled(nn.Linear):
    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(inputs)


@has_kernels
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("tokens", [1, 5, 70])
@torch.inference_mode()
def test_equals_the_plain_layer_up_to_rounding(bias: bool, tokens: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(48, 70, bias=bias)).bfloat16()
    inputs = torch.randn(1, tokens, 48).bfloat16()
    exact = model.double()(inputs.double())
    model.bfloat16()
    pack_linear_layers(model)
    assert isinstance(model[0], PackedLinear)
    output = model(inputs)
    assert (output.dtype, output.shape) == (torch.bfloat16, exact.shape)
    torch.testing.assert_close(output.double(), exact, rtol=2**-8, atol=1e-3)


@has_kernels
def test_float32_and_other_layers_stay() -> None:
    model = nn.ModuleDict({"exact": nn.Linear(4, 4), "scaled": Scaled(4, 4).bfloat16(), "norm": nn.LayerNorm(4)})
    before = dict(model.items())
    pack_linear_layers(model)
    assert dict(model.items()) == before


@has_kernels
def test_only_bfloat16_models_are_packed_when_loaded(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    for dtype, packed in (("float32", 0), ("bfloat16", 15)):
        model = LanguageModel.load(ModelConfig(model=str(tmp_path), dtype=dtype, device="cpu"))
        assert sum(isinstance(layer, PackedLinear) for layer in model.hf.modules()) == packed
        assert (model.device.type, str(model.dtype)) == ("cpu", f"torch.{dtype}")
