"""Which cores the threads of a pass run on."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from ctypes import c_int

import torch

from lm.cpu.native import library, typed


@contextmanager
def own_cores(device: torch.device | None) -> Iterator[None]:
    """Pin each thread of this thread's passes to a core of its own, if there are as many threads as cores.

    Anything else this thread starts meanwhile is pinned to its core too.

    A neighbour that takes half a core then makes passes twice as long. Unpinned, two of the threads would now and then
    share a core, where each spins before it yields: five times as slow again.

    Args:
        device: of the model; None if none runs here.
    """
    kernels, threads = library(), torch.get_num_threads()
    cores = sorted(os.sched_getaffinity(0)) if kernels is not None else []
    if kernels is None or device is None or device.type != "cpu" or len(cores) != threads:
        yield
        return

    kernel = typed(kernels, "place_threads", "pii")

    def place(each: list[int]) -> None:
        kernel((c_int * len(each))(*each), len(each) // threads, threads)

    place(cores)
    try:
        yield
    finally:
        place(cores * threads)
