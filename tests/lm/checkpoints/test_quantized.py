"""Quantised checkpoints as plain weights, and formats that are refused."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lm.checkpoints.quantized import unpack_checkpoint
from lm.cpu.quantized import find_groups
from tests.lm.checkpoints.packing import FORMATS, KEPT, checkpoint
from tests.lm.tiny import CONFIGS
from treeline.errors import ConfigError

SHAPE = (48, 64)
LLAMA = CONFIGS["llama"]


@pytest.mark.parametrize("case", FORMATS)
def test_every_format_is_unpacked_to_what_was_packed(case: str, tmp_path: Path, caplog: Any) -> None:
    quantization, parts, expected = FORMATS[case](SHAPE, 7)
    tensors = {f"x.{part}": tensor for part, tensor in parts.items()} | {
        "y.weight": torch.ones(3),
        "x.bias": torch.ones(4),
    }
    with caplog.at_level(logging.INFO):
        unpack_checkpoint(checkpoint(tmp_path / "model", LLAMA, quantization, tensors), tmp_path / "plain")
    plain = load_file(tmp_path / "plain/model-00000.safetensors")
    assert plain.keys() == {"x.weight", "x.bias", "y.weight"}
    kept = case in KEPT
    assert torch.equal(plain["x.weight"], expected if kept else expected.bfloat16())
    assert (find_groups(plain["x.weight"]) is not None) == kept
    assert len(caplog.messages) == 1
    assert ("kept in groups" if kept else "into bfloat16") in caplog.text
    assert "quantization_config" not in (tmp_path / "plain/config.json").read_text()


@pytest.mark.parametrize(
    ("quantization", "named"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"),
        ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "awq"),
        ({"quant_method": "gptq", "bits": 3}, "gptq 3 bits"),
        ({"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"}, "nvfp4-pack-quantized"),
        ({"quant_method": "compressed-tensors", "format": "int-quantized"}, "int-quantized"),
        (
            {"quant_method": "compressed-tensors", "sparsity_config": {"format": "sparse-24"}},
            "sparse-24",
        ),
    ],
)
def test_other_formats_are_refused_by_name(quantization: dict[str, Any], named: str, tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "model", LLAMA, quantization, {"x.weight": torch.ones(2)})
    with pytest.raises(ConfigError, match=f"{named}.*not supported; supported: awq") as caught:
        unpack_checkpoint(folder, tmp_path / "plain")
    assert "\n" not in str(caught.value)
