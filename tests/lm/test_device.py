"""What "auto" means is decided once, for everything that loads weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lm import device
from lm.cpu.grouped_linear import kernels
from lm.cpu.quantized import round_to_q4_1
from lm.device import torch_dtype
from lm.draft_head import load_plain
from lm.model import LanguageModel
from tests.lm.tiny import tiny_llama, tiny_tokenizer
from treeline.config import ModelConfig


@pytest.mark.parametrize("fast", [False, True])
def test_auto_on_the_cpu_is_what_its_kernels_are_made_for(monkeypatch: pytest.MonkeyPatch, fast: bool) -> None:
    monkeypatch.setattr(device, "has_bfloat16_kernels", lambda: fast)
    assert torch_dtype(ModelConfig(device="cpu")) == (torch.bfloat16 if fast else torch.float32)
    assert torch_dtype(ModelConfig(device="cpu", dtype="float32")) == torch.float32
    assert torch_dtype(ModelConfig(device="cpu", dtype="bfloat16")) == torch.bfloat16


@pytest.mark.skipif(not kernels(), reason="the kernels were not built")
def test_auto_is_float32_for_weights_that_the_kernels_read_in_fewer_bytes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(device, "has_bfloat16_kernels", lambda: True)
    weight = torch.randn(32, 64)
    for stored, dtype in (
        (round_to_q4_1(weight).floats(), torch.float32),
        (weight.bfloat16(), torch.float32),
        (weight, torch.bfloat16),
    ):
        save_file(
            {"norm": torch.ones(64), "large": torch.randn(64, 64), "small": stored}, tmp_path / "model.safetensors"
        )
        assert torch_dtype(ModelConfig(device="cpu"), tmp_path) == dtype
        assert torch_dtype(ModelConfig(device="cpu", quantization="none"), tmp_path) == torch.bfloat16
        assert torch_dtype(ModelConfig(device="cpu", dtype="bfloat16"), tmp_path) == torch.bfloat16


def test_auto_on_a_gpu_is_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "has_bfloat16_kernels", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert torch_dtype(ModelConfig()) == torch.bfloat16


def test_all_that_load_weights_agree(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    config = ModelConfig(model=str(tmp_path), device="cpu")
    assert LanguageModel.load(config).dtype == load_plain(config).dtype == torch_dtype(config)
