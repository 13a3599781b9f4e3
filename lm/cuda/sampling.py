"""Scores of sampled rows by Triton kernels: as `lm.sampling` computes them by row, without sorting or waiting."""

from __future__ import annotations

import math

import numpy as np
import torch
import triton
from torch import Tensor

from lm.cuda.sampling_kernels import find_cuts, perturb_rows
from lm.device import upload
from lm.noise import signed_key
from treeline.sampling import SamplingParams

CUT_BLOCK = 2048
DRAW_BLOCK = 1024


def perturbed(scores: Tensor, params: list[SamplingParams], positions: list[int]) -> Tensor:
    """float32 [rows, vocab]: log p (up to a constant per row) + noise, -inf where p is 0; greedy rows as they are.

    Args:
        scores: float32 [rows, vocab], with biases and penalties.
    """
    rows, vocab_size = scores.shape
    fields = [
        (1.0, 1.0, -math.inf, 0.0) if p.greedy
        else (p.temperature, p.top_p, math.log(p.min_p) if p.min_p > 0 else -math.inf, 1.0)
        for p in params
    ]  # fmt: skip
    top_ks = [0 if p.greedy or p.top_k >= vocab_size else p.top_k for p in params]
    keys = [signed_key(p.seed, position) for p, position in zip(params, positions, strict=True)]
    about = upload(np.asarray(fields, np.float64), scores.device)
    cut = any(top_ks) or any(top_p < 1.0 or floor > -math.inf for _, top_p, floor, _ in fields)
    cuts = torch.empty(rows, dtype=torch.int32, device=scores.device)
    if cut:
        find_cuts[(rows,)](
            scores, about, upload(np.asarray(top_ks, np.int32), scores.device), cuts, scores.stride(0), vocab_size,
            BLOCK=CUT_BLOCK, num_warps=16,
        )  # fmt: skip
    out = torch.empty_like(scores, memory_format=torch.contiguous_format)
    perturb_rows[(rows, triton.cdiv(vocab_size, DRAW_BLOCK))](
        scores, about, upload(np.asarray(keys, np.int64), scores.device), cuts, out, scores.stride(0), vocab_size,
        CUTS=cut, BLOCK=DRAW_BLOCK, num_warps=4,
    )  # fmt: skip
    return out
