"""Device and dtype of a model: the only place that resolves "auto"."""

from __future__ import annotations

import platform
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lm.cpu.grouped_linear import kernel_for
from lm.cpu.native import library
from lm.cpu.quantized import suits_kernels
from treeline.config import ModelConfig
from treeline.errors import ConfigError


def torch_device(name: str, rank: int | None = None) -> torch.device:
    """`rank`: of this process among those on the machine; rank 0 uses CUDA device 0.

    Raises:
        ConfigError: CUDA is requested but unavailable, or has too few devices.
    """
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise ConfigError("device 'cuda' is not available on this machine")
    if not available or name == "cpu":
        return torch.device("cpu")
    if rank is None:
        return torch.device("cuda")
    if rank >= torch.cuda.device_count():
        raise ConfigError(f"tensor_parallel: this process sees {torch.cuda.device_count()} devices")
    return torch.device("cuda", rank)


def torch_dtype(config: ModelConfig, folder: Path | None = None) -> torch.dtype:
    """The dtype of weights and states. "auto" is bfloat16 where the device multiplies it faster than float32, except
    for CPU weights that our kernels read in fewer bytes. Those are multiplied in float32 or integers, where a token's
    bits do not depend on the rest of the pass.

    Args:
        folder: of the weight files, if there is one.

    Raises:
        ConfigError: as `torch_device`, or the weights cannot be quantised here.
    """
    if config.arithmetic == "int8":
        _check_grouped(config, "arithmetic 'int8'", kernel_for("int8") is not None)
    if config.quantization in ("int8", "int4"):
        _check_grouped(config, f"quantization '{config.quantization}'", library() is not None)
        return torch.float32
    if config.quantization == "fp8":
        _check_fp8(config)
        return torch.bfloat16
    if config.dtype != "auto":
        return getattr(torch, config.dtype)
    device = torch_device(config.device)
    if not multiplies_bfloat16(device):
        return torch.float32
    ours = device.type == "cpu" and config.quantization == "auto" and library() is not None
    return torch.float32 if ours and folder is not None and suits_kernels(folder) else torch.bfloat16


def _check_grouped(config: ModelConfig, asked: str, has_kernel: bool) -> None:
    if torch_device(config.device).type != "cpu":
        raise ConfigError(f"{asked} is for the CPU; set device: cpu")
    if config.dtype == "bfloat16":
        raise ConfigError(f"{asked} takes float32 inputs, not bfloat16")
    if not has_kernel:
        raise ConfigError(f"{asked} needs this package's kernels, which were not built or do not fit this processor")


def _check_fp8(config: ModelConfig) -> None:
    device = torch_device(config.device)
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 9):
        raise ConfigError("quantization 'fp8' needs a GPU of compute capability 8.9 or more")
    if config.dtype == "float32":
        raise ConfigError("quantization 'fp8' takes bfloat16 inputs, not float32")


def multiplies_bfloat16(device: torch.device) -> bool:
    """True if `device` multiplies few rows faster in bfloat16 than in float32: reading the weights dominates."""
    return device.type == "cuda" or has_bfloat16_kernels()


def trains_in_bfloat16(device: torch.device) -> bool:
    """True if large bfloat16 products are faster than float32 ones.

    On a processor without AMX they are slower: 140 against 250 GFLOP/s on two AVX512-BF16 cores.
    """
    return device.type == "cuda" or bool(torch.cpu.get_capabilities().get("amx_bf16"))


def has_bfloat16_kernels() -> bool:
    """True if oneDNN has bfloat16 kernels for this processor; torch's own are slower than float32."""
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def upload(array: NDArray[np.generic], device: torch.device) -> Tensor:
    """`array` on `device`: on CUDA copied asynchronously through pinned memory, on the CPU not copied."""
    tensor = torch.from_numpy(array)
    # torch reuses pinned memory only after the copies that read it are done.
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def upload_into(array: NDArray[np.generic], target: Tensor) -> None:
    """Copy `array` to the beginning of `target`, as `upload`."""
    tensor = torch.from_numpy(array)
    staged = tensor.pin_memory() if target.device.type == "cuda" else tensor
    target[: len(array)].copy_(staged, non_blocking=True)


def download(tensor: Tensor) -> tuple[Tensor, Callable[[], None]]:
    """`tensor` on the host, and a function that waits for it: on CUDA the copy to pinned memory is asynchronous."""
    if tensor.device.type != "cuda":
        return tensor, lambda: None
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    host.copy_(tensor, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record()
    return host, arrived.synchronize


def processor_name() -> str:
    """Model name of this machine's processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")
