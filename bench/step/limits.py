"""The machine's limits, measured on the spot, and the least time that a model's pass can take."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from lm.model import LanguageModel

READ_BYTES = 512 << 20
"""Far more than any cache holds."""
GEMM_SIZE = {"cpu": 1024, "cuda": 8192}
REPEATS = 6


@dataclass(frozen=True)
class Point:
    """A pass: new tokens spread evenly over sequences, each behind `context` tokens that are in the KV cache."""

    tokens: int
    sequences: int
    context: int


@dataclass(frozen=True)
class ModelSize:
    """What a pass has to read and to compute.

    Attributes:
        weight_bytes: of all weights that every pass reads, as stored: all but embedding tables, of which it reads rows.
        token_flops: of the linear layers, for one token.
        entry_bytes: of one token's keys and values.
        entry_flops: of attention, for one token looking at one other.
    """

    weight_bytes: int
    token_flops: int
    entry_bytes: int
    entry_flops: int

    @classmethod
    def of(cls, hf: PreTrainedModel, ours: LanguageModel) -> ModelSize:
        """The size of a model: weight bytes as our runtime stores them, FLOPs as transformers' `hf` computes."""
        output = hf.get_output_embeddings()
        tables = {id(module.weight) for module in hf.modules() if isinstance(module, nn.Embedding)}
        tables -= {id(output.weight)} if output is not None else set()
        used = [weight for weight in hf.parameters() if id(weight) not in tables and weight.dim() > 1]
        stored = sum(shape.kv_heads * (shape.key_dim + shape.value_dim) for shape in ours.layers)
        heads: int = hf.config.get_text_config().num_attention_heads
        return cls(
            weight_bytes=ours.weight_bytes,
            token_flops=2 * sum(weight.numel() for weight in used),
            entry_bytes=stored * hf.dtype.itemsize,
            entry_flops=2 * heads * sum(shape.key_dim + shape.value_dim for shape in ours.layers),
        )


@dataclass(frozen=True)
class MachineLimit:
    """How fast this machine reads memory and multiplies matrices of one type, with all threads."""

    read_gb_s: float
    gemm_gflop_s: float

    def pass_ms(self, size: ModelSize, point: Point) -> float:
        """The least milliseconds of a pass: reading everything once, or computing it, whichever takes longer.

        This is the roofline (Williams et al., 2009) of weights, keys and values, linear layers and attention.
        """
        entries = point.sequences * point.context
        read_bytes = size.weight_bytes + entries * size.entry_bytes
        flops = point.tokens * (size.token_flops + point.context * size.entry_flops)
        return 1e3 * max(read_bytes / (self.read_gb_s * 1e9), flops / (self.gemm_gflop_s * 1e9))


@torch.inference_mode()
def measure_limit(dtype: torch.dtype, device: torch.device, read_bytes: int = READ_BYTES) -> MachineLimit:
    """The best of several runs: other work on the machine only makes them slower."""
    rows = torch.ones(read_bytes // 4 // 1024, 1024, device=device)
    vector = torch.ones(1024, device=device)
    size = GEMM_SIZE[device.type]
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    read_s = _fastest_s(lambda: torch.mv(rows, vector), device)
    gemm_s = _fastest_s(lambda: torch.mm(left, right), device)
    return MachineLimit(rows.nbytes / read_s / 1e9, 2 * size**3 / gemm_s / 1e9)


def _fastest_s(run: Callable[[], object], device: torch.device) -> float:
    return min(timed_s(run, device) for _ in range(REPEATS))


def timed_s(run: Callable[[], object], device: torch.device) -> float:
    """Seconds of a call, its work on the device included."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started_s = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started_s
