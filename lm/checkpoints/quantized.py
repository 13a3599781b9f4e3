"""Quantised checkpoints (AWQ, GPTQ, compressed-tensors, FP8) as plain weights.

Whatever has a scale becomes scale * (code - zero) in float32, which is exact: codes have at most 8 bits and scales 11.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from lm.cpu.quantized import find_groups
from treeline.errors import ConfigError

logger = logging.getLogger(__name__)

SHARD_BYTES = 4 << 30
"""Size of an output file, held in memory."""
AWQ_SHIFTS = (0, 16, 4, 20, 8, 24, 12, 28)
"""Bit offsets of AWQ's columns in a word."""
SUPPORTED = "awq of 4 bits, gptq of 2, 4 or 8, compressed-tensors (pack-quantized of 4 or 8, float-quantized), fp8"
DROPPED = (".input_scale", ".k_scale", ".v_scale", ".k_proj.output_scale", ".v_proj.output_scale")
"""Scales of activations, which stay unrounded here."""


def unpack_checkpoint(source: Path, folder: Path) -> None:
    """Write the checkpoint `source` with plain weights into `folder`: float32 if our groups can hold them without
    loss, else bfloat16.

    Raises:
        ConfigError: its format is not supported; one line that names it.
    """
    config = json.loads((source / "config.json").read_text())
    quantization = config.pop("quantization_config")
    unpack = _unpacker(source.name, quantization)
    weights = _Files(source)
    dtype = torch.float32 if weights.fits_groups(unpack) else torch.bfloat16
    logger.info(
        "%s: weights quantised by %s are unpacked %s",
        source.name,
        quantization["quant_method"],
        "and kept in groups" if dtype == torch.float32 else "into bfloat16",
    )
    folder.mkdir()
    for file in source.iterdir():
        if file.suffix in (".json", ".jinja", ".model", ".txt") and not file.name.endswith(".index.json"):
            shutil.copy(file, folder)
    (folder / "config.json").write_text(json.dumps({**config, "dtype": str(dtype).removeprefix("torch.")}, indent=2))
    shard: dict[str, Tensor] = {}
    shards = 0
    for name, weight in weights.unpacked(unpack):
        shard[name] = weight.to(dtype).contiguous()
        if sum(tensor.nbytes for tensor in shard.values()) > SHARD_BYTES:
            save_file(shard, folder / f"model-{shards:05}.safetensors", {"format": "pt"})
            shard, shards = {}, shards + 1
    save_file(shard, folder / f"model-{shards:05}.safetensors", {"format": "pt"})
    names = {name: path.name for path in folder.glob("*.safetensors") for name in safe_open(path, "pt").offset_keys()}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))


Parts = dict[str, Tensor]
"""Tensors of one module by the last part of their names."""


class _Files:
    """The tensors of a folder, by module."""

    def __init__(self, folder: Path) -> None:
        self._files = [safe_open(path, "pt") for path in sorted(folder.glob("*.safetensors"))]
        self._modules: dict[str, dict[str, Any]] = {}
        for file in self._files:
            for name in file.offset_keys():
                if not name.endswith(DROPPED):
                    module, _, part = name.rpartition(".")
                    self._modules.setdefault(module, {})[part] = file

    def unpacked(self, unpack: Callable[[Parts], Tensor | None]) -> Iterator[tuple[str, Tensor]]:
        for module in self._modules:
            parts = self._parts(module)
            weight = unpack(parts)
            if weight is not None:
                parts = {"weight": weight} | {part: tensor for part, tensor in parts.items() if part == "bias"}
            yield from ((f"{module}.{part}", tensor) for part, tensor in parts.items())

    def fits_groups(self, unpack: Callable[[Parts], Tensor | None]) -> bool:
        """Whether our groups hold all quantised weights exactly."""
        found = False
        for module in self._modules:
            weight = unpack(self._parts(module))
            if weight is not None:
                found = True
                if find_groups(weight) is None:
                    return False
        return found

    def _parts(self, module: str) -> Parts:
        return {part: file.get_tensor(f"{module}.{part}") for part, file in self._modules[module].items()}


def _unpacker(name: str, quantization: dict[str, Any]) -> Callable[[Parts], Tensor | None]:
    """Function from a module's tensors to a float32 weight [out, in], or None if the module is not quantised.

    Raises:
        ConfigError: the format is not supported.
    """
    method, bits, form = (quantization.get(key) for key in ("quant_method", "bits", "format"))
    what = None
    if method == "awq" and bits == 4 and quantization.get("version", "gemm").lower() == "gemm":
        return _awq
    if method == "gptq" and bits in (2, 4, 8):
        version = 2 if quantization.get("checkpoint_format") == "gptq_v2" else 1
        return lambda parts: _gptq(parts, bits, version)
    if method == "fp8":
        return lambda parts: _float8(parts, quantization.get("weight_block_size"))
    if method == "compressed-tensors":
        widths = {group["weights"]["num_bits"] for group in quantization.get("config_groups", {}).values()}
        sparse = (quantization.get("sparsity_config") or {}).get("format", "dense")
        if sparse != "dense":
            what = f"sparsity '{sparse}'"
        elif form == "pack-quantized" and widths <= {4, 8}:
            return _compressed
        elif form in ("float-quantized", "naive-quantized") and widths == {8}:
            blocks = [g["weights"].get("block_structure") for g in quantization["config_groups"].values()]
            return lambda parts: _float8(parts, blocks[0])
    what = what or " ".join(str(part) for part in (method, form, bits and f"{bits} bits") if part)
    raise ConfigError(f"model '{name}' is quantised as {what}, which is not supported; supported: {SUPPORTED}")


def _fields(words: Tensor, bits: int, dim: int, shifts: tuple[int, ...] | None = None) -> Tensor:
    """Split int32 words into fields of `bits`, lowest first, adjacent along `dim`.

    Example: words [[0x21]], 4 bits, dim 1 -> [[1, 2, 0, 0, 0, 0, 0, 0]].
    """
    places = torch.tensor(shifts or range(0, 32, bits), dtype=torch.int32)
    fields = (words.unsqueeze(-1) >> places) & (2**bits - 1)
    return fields.movedim(-1, dim + 1).flatten(dim, dim + 1)


def _awq(parts: Parts) -> Tensor | None:
    if "qweight" not in parts:
        return None
    codes, zeros = (_fields(parts[name], 4, 1, AWQ_SHIFTS) for name in ("qweight", "qzeros"))
    group = torch.arange(len(codes)) // (len(codes) // len(zeros))
    return (parts["scales"].float()[group] * (codes - zeros[group])).T


def _gptq(parts: Parts, bits: int, version: int) -> Tensor | None:
    """Version 1 stores each zero minus one, subtracted from whole words: a zero of 0 borrows from the next field.
    Adding to whole words undoes that, as in GPTQModel's `convert_gptq_v1_to_v2_format_module`.

    Example: 4 bits, zeros 0, 3 -> word 0x30 - 0x11 = 0x1f; 0x1f + 0x11 = 0x30.
    """
    if "qweight" not in parts:
        return None
    ones = (2**32 - 1) // (2**bits - 1)  # A one in every field: 0x11111111 for 4 bits.
    codes = _fields(parts["qweight"], bits, 0)
    zeros = _fields(parts["qzeros"] + (ones if version == 1 else 0), bits, 1)
    scales = parts["scales"].float()
    group = parts["g_idx"].long() if "g_idx" in parts else torch.arange(len(codes)) // (len(codes) // len(scales))
    return (scales[group] * (codes - zeros[group])).T


def _compressed(parts: Parts) -> Tensor | None:
    if "weight_packed" not in parts:
        return None
    rows, columns = parts["weight_shape"].tolist()
    scale = parts["weight_scale"].float()
    bits = parts["weight_packed"].shape[1] * 32 // columns
    zero: Tensor | int = 2 ** (bits - 1)
    codes = _fields(parts["weight_packed"], bits, 1)[:, :columns]
    group = torch.arange(columns) // (columns // scale.shape[1])
    if "weight_g_idx" in parts:
        group = parts["weight_g_idx"].long()
    if "weight_zero_point" in parts:
        zero = _fields(parts["weight_zero_point"], bits, 0)[:rows][:, group]
    return scale[:, group] * (codes - zero)


def _float8(parts: Parts, block: list[int] | None) -> Tensor | None:
    scale = parts.get("weight_scale", parts.get("weight_scale_inv"))  # Both are factors.
    if scale is None:
        return None
    weight, scale = parts["weight"].float(), scale.float()
    if block is not None and scale.ndim == 2:
        scale = scale.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
        scale = scale[: weight.shape[0], : weight.shape[1]]
    elif scale.ndim == 1 and len(scale) > 1:
        scale = scale[:, None]
    return weight * scale
