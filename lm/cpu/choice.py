"""From scores to tokens by our kernels (`lm/kernels/choice.c`), or by torch where those cannot."""

from __future__ import annotations

from ctypes import CDLL

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lm.cpu.native import library, typed
from lm.device import upload


def best(scores: Tensor, k: int, least: float) -> tuple[Tensor, Tensor]:
    """The k best columns of each row of `scores` float32 [rows, columns], best first.

    Returns:
        Columns int64 [rows, k]; and their probabilities float32 [rows, k] by softmax over the row, `least` or more.
    """
    kernels = _kernels_for(scores)
    if kernels is None:
        probs, ids = torch.softmax(scores, dim=-1).topk(k, dim=-1)
        return ids, probs.clamp_min_(least)
    rows, columns = scores.shape
    ids, probs = torch.empty(rows, k, dtype=torch.int64), torch.empty(rows, k)
    kernel = typed(kernels, "best", "nnpnfppi")
    kernel(rows, columns, scores.data_ptr(), k, least, ids.data_ptr(), probs.data_ptr(), torch.get_num_threads())
    return ids, probs


def bar(scores: Tensor, rows: list[int], bits: NDArray[np.int32]) -> None:
    """Set scores to minus infinity where bits are 0, in place.

    Args:
        scores: float32 [all rows, columns].
        rows: of `scores`, one per row of bits.
        bits: [rows, words]; a word's lowest bit is for the first of its 32 columns.
    """
    places, columns, kernels = np.asarray(rows, np.int64), scores.shape[1], _kernels_for(scores)
    if kernels is None:
        words = upload(bits, scores.device)[:, :, None]
        barred = (words >> torch.arange(32, dtype=torch.int32, device=scores.device) & 1 == 0).flatten(1)
        index = upload(places, scores.device)
        scores[index] = scores[index].masked_fill(barred[:, :columns], -torch.inf)
        return
    where = (len(rows), places.ctypes.data, bits.shape[1], bits.ctypes.data)
    typed(kernels, "bar", "npnpnpi")(*where, columns, scores.data_ptr(), torch.get_num_threads())


def largest(scores: Tensor, bits: NDArray[np.int32] | None = None) -> Tensor:
    """int64 [rows]: the first column of the largest score; with bits as in `bar`, among those whose bit is 1."""
    kernels = _kernels_for(scores)
    if kernels is None:
        if bits is not None:
            scores = scores.clone()
            bar(scores, [*range(len(scores))], bits)
        # On CPUs torch's own takes up to eight times as long as numpy's.
        return torch.from_numpy(scores.numpy().argmax(-1)) if scores.is_cpu else scores.argmax(dim=-1)
    ids = torch.empty(len(scores), dtype=torch.int64)
    words, address = (0, None) if bits is None else (bits.shape[1], bits.ctypes.data)
    where = (len(scores), words, address, scores.shape[1], scores.data_ptr())
    typed(kernels, "largest", "nnpnppi")(*where, ids.data_ptr(), torch.get_num_threads())
    return ids


def _kernels_for(scores: Tensor) -> CDLL | None:
    return library() if scores.is_cpu and scores.is_contiguous() else None
