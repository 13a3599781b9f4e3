"""Quantised checkpoints, packed here by other means than they are unpacked by, as the model that is served."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from lm.checkpoints.quantized import unpack_checkpoint
from lm.cpu.quantized import find_groups
from lm.model import LanguageModel
from lm.store import resolve_model
from tests.lm.tiny import CONFIGS, tiny_model, tiny_tokenizer
from treeline.config import ModelConfig
from treeline.errors import ConfigError

ROWS, COLUMNS = 48, 64
Parts = dict[str, torch.Tensor]


def words(codes: np.ndarray, bits: int) -> torch.Tensor:
    """[rows, n] -> int32 [rows, ceil(n * bits / 32)]: one long string of bits a row."""
    string = ((codes[..., None].astype(np.int64) >> np.arange(bits)) & 1).reshape(len(codes), -1)
    string = np.pad(string, ((0, 0), (0, -string.shape[1] % 32))).reshape(len(codes), -1, 32)
    return torch.from_numpy((string << np.arange(32)).sum(2).astype(np.uint32).view(np.int32))


class Random:
    def __init__(self, shape: tuple[int, int], bits: int, group: int) -> None:
        rng = np.random.default_rng(7)
        self.codes = rng.integers(0, 2**bits, shape)
        self.scale = rng.uniform(0.01, 0.02, (shape[0], -(-shape[1] // group))).astype(np.float16)
        self.zeros = rng.integers(0, 2**bits, self.scale.shape)
        self.group = np.arange(shape[1]) // group

    def weight(self, zeros: Any) -> torch.Tensor:
        zeros = np.broadcast_to(zeros, self.scale.shape)[:, self.group]
        return torch.from_numpy((self.codes - zeros) * self.scale.astype(np.float32)[:, self.group]).float()


def t(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array))


def awq() -> tuple[dict[str, Any], Parts, torch.Tensor]:
    r = Random((ROWS, COLUMNS), 4, 32)
    order = [0, 2, 4, 6, 1, 3, 5, 7]  # Which column of eight lies at each place of a word.
    columns = np.arange(ROWS).reshape(-1, 8)[:, order].ravel()
    parts = {"qweight": words(r.codes.T[:, columns], 4), "qzeros": words(r.zeros.T[:, columns], 4)}
    return {"quant_method": "awq", "bits": 4, "zero_point": True}, parts | {"scales": t(r.scale.T)}, r.weight(r.zeros)


def gptq(bits: int, version: int, order: bool, symmetric: bool = False) -> tuple[dict[str, Any], Parts, torch.Tensor]:
    r = Random((ROWS, COLUMNS), bits, 32)
    r.zeros = np.full_like(r.zeros, 8) if symmetric else r.zeros
    if order:
        r.group = np.random.default_rng(3).permutation(r.group)
    stored = words(r.zeros.T, bits)
    if version == 1:
        stored -= sum(1 << place for place in range(0, 32, bits))  # A zero of 0 borrows from the next.
    parts = {"qweight": words(r.codes, bits).T.contiguous(), "qzeros": stored, "scales": t(r.scale.T)}
    config = {"quant_method": "gptq", "bits": bits, "group_size": 32, "desc_act": order}
    config |= {"checkpoint_format": "gptq_v2"} if version == 2 else {}
    return config, parts | {"g_idx": t(r.group.astype(np.int32))}, r.weight(r.zeros)


def compressed(bits: int, group: int, asymmetric: bool = False) -> tuple[dict[str, Any], Parts, torch.Tensor]:
    r = Random((ROWS, COLUMNS), bits, group)
    parts = {"weight_packed": words(r.codes, bits), "weight_scale": t(r.scale)}
    parts["weight_shape"] = torch.tensor([ROWS, COLUMNS])
    if asymmetric:
        parts["weight_zero_point"] = words(r.zeros.T, bits).T.contiguous()
    groups = {"group_0": {"weights": {"num_bits": bits, "type": "int"}, "targets": ["Linear"]}}
    config = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": groups}
    return config, parts, r.weight(r.zeros if asymmetric else 2 ** (bits - 1))


def float8(kind: str) -> tuple[dict[str, Any], Parts, torch.Tensor]:
    rng = torch.Generator().manual_seed(5)
    codes = torch.randn(ROWS, COLUMNS, generator=rng).to(torch.float8_e4m3fn)
    groups = {"group_0": {"weights": {"num_bits": 8, "type": "float"}}}
    config: dict[str, Any] = {"quant_method": "compressed-tensors", "format": "float-quantized"}
    config["config_groups"] = groups
    if kind == "block":
        scale = torch.rand(2, 2, generator=rng)  # Of 32 x 40: neither side is whole blocks.
        whole = torch.stack([torch.stack([scale[i // 32, j // 40] for j in range(COLUMNS)]) for i in range(ROWS)])
        config = {"quant_method": "fp8", "weight_block_size": [32, 40]}
        return config, {"weight": codes, "weight_scale_inv": scale}, codes.float() * whole
    scale = torch.rand((ROWS, 1) if kind == "channel" else (), generator=rng)
    return config, {"weight": codes, "weight_scale": scale, "input_scale": torch.ones(1)}, codes.float() * scale


CASES: dict[str, Callable[[], tuple[dict[str, Any], Parts, torch.Tensor]]] = {
    "awq": awq,
    "gptq": lambda: gptq(4, 1, order=False),
    "gptq-act-order": lambda: gptq(4, 1, order=True),
    "gptq-v2": lambda: gptq(4, 2, order=True),
    "gptq-symmetric": lambda: gptq(4, 1, order=False, symmetric=True),
    "gptq-2": lambda: gptq(2, 1, order=False),
    "gptq-8": lambda: gptq(8, 1, order=False),
    "w4a16": lambda: compressed(4, 32),
    "w4a16-asymmetric": lambda: compressed(4, 32, asymmetric=True),
    "w8a16-channel": lambda: compressed(8, COLUMNS),
    "fp8-tensor": lambda: float8("tensor"),
    "fp8-channel": lambda: float8("channel"),
    "fp8-block": lambda: float8("block"),
}


def checkpoint(folder: Path, quantization: dict[str, Any], tensors: Parts) -> Path:
    folder.mkdir()
    CONFIGS["llama"].save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": quantization}))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("case", CASES)
def test_every_format_is_unpacked_to_what_was_packed(case: str, tmp_path: Path, caplog: Any) -> None:
    quantization, parts, expected = CASES[case]()
    tensors = {f"x.{part}": tensor for part, tensor in parts.items()} | {
        "y.weight": torch.ones(3),
        "x.bias": torch.ones(4),
    }
    with caplog.at_level(logging.INFO):
        unpack_checkpoint(checkpoint(tmp_path / "model", quantization, tensors), tmp_path / "plain")
    plain = load_file(tmp_path / "plain/model-00000.safetensors")
    assert plain.keys() == {"x.weight", "x.bias", "y.weight"}
    kept = case in ("w4a16", "gptq-symmetric", "gptq-2")
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
    folder = checkpoint(tmp_path / "model", quantization, {"x.weight": torch.ones(2)})
    with pytest.raises(ConfigError, match=f"{named}.*not supported; supported: awq") as caught:
        unpack_checkpoint(folder, tmp_path / "plain")
    assert "\n" not in str(caught.value)


def test_a_quantised_folder_is_served_and_unpacked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its down projections are quantised, all else is on the list of what is ignored."""
    monkeypatch.setenv("TREELINE_CACHE", str(tmp_path / "cache"))
    hf, tensors = tiny_model("llama"), {}
    quantization, parts, expected = compressed(4, 32)
    for name, tensor in hf.state_dict().items():
        if name.endswith("down_proj.weight"):
            tensors |= {name.removesuffix("weight") + part: tensor.clone() for part, tensor in parts.items()}
        else:
            tensors[name] = tensor
    folder = checkpoint(tmp_path / "model", quantization, tensors)
    tiny_tokenizer().save_pretrained(folder)
    model = LanguageModel.load(ModelConfig(model=str(folder), dtype="float32", device="cpu", quantization="none"))
    down = load_file(resolve_model(str(folder)) / "model-00000.safetensors")["model.layers.1.mlp.down_proj.weight"]
    assert torch.equal(down, expected)
    assert model.name == "model"
    assert len(list((tmp_path / "cache/models").glob("[!.]*"))) == 1
