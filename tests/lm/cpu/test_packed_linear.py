"""Packed linear layers compute what plain ones do, and replace nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from lm.cpu.packed_linear import PackedLinear, pack_linear_layers, packed_dtypes, padded_rows
from lm.model import LanguageModel
from tests.lm.tiny import tiny_llama, tiny_tokenizer
from treeline.config import ModelConfig

packed = pytest.mark.skipif(not packed_dtypes(), reason="oneDNN is not at hand")
DTYPES = sorted(packed_dtypes(), key=str)
ROUNDING = {torch.float32: 2**-20, torch.bfloat16: 2**-8}


class Scaled(nn.Linear):
    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(inputs)


@packed
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("tokens", [1, 5, 70])
@torch.inference_mode()
def test_equals_the_plain_layer_up_to_rounding(dtype: torch.dtype, bias: bool, tokens: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(48, 70, bias=bias)).to(dtype)
    inputs = torch.randn(1, tokens, 48).to(dtype)
    exact = model.double()(inputs.double())
    model.to(dtype)
    pack_linear_layers(model)
    assert isinstance(model[0], PackedLinear)
    output = model(inputs)
    assert (output.dtype, output.shape) == (dtype, exact.shape)
    torch.testing.assert_close(output.double(), exact, rtol=ROUNDING[dtype], atol=1e-3)


@packed
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(576, 960), (1536, 576), (48, 70)])
@torch.inference_mode()
def test_a_row_has_the_same_bits_whatever_is_beside_it(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    layer = PackedLinear(nn.Linear(*shape).to(dtype))
    inputs = torch.randn(1, 544, shape[0]).to(dtype)
    whole = layer(inputs)
    for rows in (1, 2, 3, 7, 16, 33, 65, 130, 300, 513):
        assert torch.equal(layer(inputs[:, :rows]), whole[:, :rows])


def test_few_sizes_of_batches_come_to_onednn() -> None:
    """Of 512 there are 39: with five shapes of layers, about as many kernels as `lm` lets it keep."""
    padded = {rows: padded_rows(rows) for rows in range(1, 1025)}
    assert len(set(list(padded.values())[:512])) == 39
    assert all(0 <= size - rows <= max(7, min(rows / 8, 31)) for rows, size in padded.items())
    assert all(padded[size] == size for size in padded.values())


@packed
def test_other_layers_stay() -> None:
    model = nn.ModuleDict({"exact": nn.Linear(4, 4).double(), "scaled": Scaled(4, 4), "norm": nn.LayerNorm(4)})
    before = dict(model.items())
    pack_linear_layers(model)
    assert dict(model.items()) == before


@packed
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_models_are_packed_when_loaded(tmp_path: Path, dtype: str) -> None:
    tiny_llama().save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    model = LanguageModel.load(ModelConfig(model=str(tmp_path), dtype=dtype, device="cpu"))
    linear = 9 if getattr(torch, dtype) in packed_dtypes() else 0
    assert sum(isinstance(layer, PackedLinear) for layer in model.hf.modules()) == linear
    assert (model.device.type, str(model.dtype)) == ("cpu", f"torch.{dtype}")
