"""Random weights in every quantised format, packed by other means than the runtime unpacks them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import PreTrainedConfig

Parts = dict[str, torch.Tensor]
Packed = tuple[dict[str, Any], Parts, torch.Tensor]
"""A checkpoint's quantization_config, tensors of one module, and the float32 weight [out, in] that they stand for."""
Shape = tuple[int, int]


def words(codes: np.ndarray, bits: int) -> torch.Tensor:
    """[rows, n] -> int32 [rows, ceil(n * bits / 32)]: one long string of bits a row."""
    string = ((codes[..., None].astype(np.int64) >> np.arange(bits)) & 1).reshape(len(codes), -1)
    string = np.pad(string, ((0, 0), (0, -string.shape[1] % 32))).reshape(len(codes), -1, 32)
    return torch.from_numpy((string << np.arange(32)).sum(2).astype(np.uint32).view(np.int32))


class Random:
    """Codes, scales and zeros of a matrix whose weights are spread about 0.15 widely."""

    def __init__(self, shape: Shape, seed: int, bits: int, group: int) -> None:
        rng = np.random.default_rng(seed)
        self.codes = rng.integers(0, 2**bits, shape)
        self.scale = (rng.uniform(0.4, 0.6, (shape[0], -(-shape[1] // group))) / 2**bits).astype(np.float16)
        self.zeros = rng.integers(0, 2**bits, self.scale.shape)
        self.group = np.arange(shape[1]) // group

    def weight(self, zeros: Any) -> torch.Tensor:
        zeros = np.broadcast_to(zeros, self.scale.shape)[:, self.group]
        return torch.from_numpy((self.codes - zeros) * self.scale.astype(np.float32)[:, self.group]).float()


def t(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array))


def awq(shape: Shape, seed: int) -> Packed:
    r = Random(shape, seed, 4, 32)
    order = [0, 2, 4, 6, 1, 3, 5, 7]  # Which column of eight lies at each place of a word.
    columns = np.arange(shape[0]).reshape(-1, 8)[:, order].ravel()
    parts = {"qweight": words(r.codes.T[:, columns], 4), "qzeros": words(r.zeros.T[:, columns], 4)}
    return {"quant_method": "awq", "bits": 4, "zero_point": True}, parts | {"scales": t(r.scale.T)}, r.weight(r.zeros)


def gptq(shape: Shape, seed: int, bits: int, version: int, order: bool, symmetric: bool = False) -> Packed:
    r = Random(shape, seed, bits, 32)
    r.zeros = np.full_like(r.zeros, 8) if symmetric else r.zeros
    if order:
        r.group = np.random.default_rng(3).permutation(r.group)
    stored = words(r.zeros.T, bits)
    if version == 1:
        stored -= sum(1 << place for place in range(0, 32, bits))  # A zero of 0 borrows from the next.
    parts = {"qweight": words(r.codes, bits).T, "qzeros": stored, "scales": t(r.scale.T)}
    config = {"quant_method": "gptq", "bits": bits, "group_size": 32, "desc_act": order}
    config |= {"checkpoint_format": "gptq_v2"} if version == 2 else {}
    return config, parts | {"g_idx": t(r.group.astype(np.int32))}, r.weight(r.zeros)


def compressed(shape: Shape, seed: int, bits: int, group: int, asymmetric: bool = False) -> Packed:
    r = Random(shape, seed, bits, group)
    parts = {"weight_packed": words(r.codes, bits), "weight_scale": t(r.scale), "weight_shape": torch.tensor(shape)}
    if asymmetric:
        parts["weight_zero_point"] = words(r.zeros.T, bits).T
    groups = {"group_0": {"weights": {"num_bits": bits, "type": "int"}, "targets": ["Linear"]}}
    config = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": groups}
    return config, parts, r.weight(r.zeros if asymmetric else 2 ** (bits - 1))


def float8(shape: Shape, seed: int, kind: str) -> Packed:
    rng = torch.Generator().manual_seed(seed)
    codes = torch.randn(shape, generator=rng).to(torch.float8_e4m3fn)
    groups = {"group_0": {"weights": {"num_bits": 8, "type": "float"}}}
    config: dict[str, Any] = {"quant_method": "compressed-tensors", "format": "float-quantized"}
    config["config_groups"] = groups
    if kind == "block":
        rows, columns = (np.arange(size) // block for size, block in zip(shape, (32, 40), strict=True))
        scale = torch.rand(rows[-1] + 1, columns[-1] + 1, generator=rng) / 4  # Not all sides are whole blocks.
        config = {"quant_method": "fp8", "weight_block_size": [32, 40]}
        return config, {"weight": codes, "weight_scale_inv": scale}, codes.float() * scale[rows][:, columns]
    scale = torch.rand((shape[0], 1) if kind == "channel" else (), generator=rng) / 4
    return config, {"weight": codes, "weight_scale": scale, "input_scale": torch.ones(1)}, codes.float() * scale


FORMATS: dict[str, Callable[[Shape, int], Packed]] = {
    "awq": awq,
    "gptq": lambda shape, seed: gptq(shape, seed, 4, 1, order=False),
    "gptq-act-order": lambda shape, seed: gptq(shape, seed, 4, 1, order=True),
    "gptq-v2": lambda shape, seed: gptq(shape, seed, 4, 2, order=True),
    "gptq-symmetric": lambda shape, seed: gptq(shape, seed, 4, 1, order=False, symmetric=True),
    "gptq-2": lambda shape, seed: gptq(shape, seed, 2, 1, order=False),
    "gptq-8": lambda shape, seed: gptq(shape, seed, 8, 1, order=False),
    "w4a16": lambda shape, seed: compressed(shape, seed, 4, 32),
    "w4a16-asymmetric": lambda shape, seed: compressed(shape, seed, 4, 32, asymmetric=True),
    "w8a16-channel": lambda shape, seed: compressed(shape, seed, 8, shape[1]),
    "fp8-tensor": lambda shape, seed: float8(shape, seed, "tensor"),
    "fp8-channel": lambda shape, seed: float8(shape, seed, "channel"),
    "fp8-block": lambda shape, seed: float8(shape, seed, "block"),
}
"""Each gives a weight of this shape for a seed."""
KEPT = ("w4a16", "gptq-symmetric", "gptq-2")
"""Formats that our groups hold without loss; others are unpacked into bfloat16."""


def checkpoint(folder: Path, model: PreTrainedConfig, quantization: dict[str, Any], tensors: Parts) -> Path:
    folder.mkdir()
    model.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": quantization}))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    return folder
