"""The kernels of `lm/kernels`, compiled when this package was installed."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

# Brings OpenMP's library; loaded after it, ours shares its threads.
import torch  # noqa: F401


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels; None if they were not built, or this processor cannot run them."""
    for path in Path(__file__).parent.glob("_kernels*.so"):
        kernels = ctypes.CDLL(str(path))
        return kernels if kernels.treeline_processor_fits() else None
    return None
