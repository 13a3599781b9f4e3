"""Memory in 2 MiB pages: with 4 KiB pages, translating the addresses of weights takes about as long as reading them."""

from __future__ import annotations

import mmap
from contextlib import suppress

import torch
from torch import Tensor

PAGE_BYTES = 2 << 20
"""Of a large page on x86-64, and on AArch64 with base pages of 4 KiB."""


def zeros_in_large_pages(nbytes: int) -> Tensor:
    """uint8 [nbytes], allocated by the system when first written; in large pages where Linux has them."""
    memory = mmap.mmap(-1, nbytes + PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # A kernel without large pages.
            memory.madvise(mmap.MADV_HUGEPAGE)
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    first = -whole.data_ptr() % PAGE_BYTES
    return whole[first : first + nbytes]
