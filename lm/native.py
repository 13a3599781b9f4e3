"""The kernels of `lm/kernels`, compiled when this package was installed."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
from pathlib import Path

import torch  # noqa: F401  (loads the OpenMP library that the kernels share)

logger = logging.getLogger(__name__)

OPENMP_NAMES = ("libgomp", "libiomp", "libomp")


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels; None if they were not built, or cannot run here."""
    for path in Path(__file__).parent.glob("_kernels*.so"):
        try:
            _share_openmp()
            kernels = ctypes.CDLL(str(path))
        except OSError as error:
            logger.warning("the compiled kernels cannot be loaded, torch's own are used: %s", error)
            return None
        return kernels if kernels.treeline_processor_fits() else None
    return None


@functools.cache
def fingerprint() -> str:
    """Hex digest of the compiled kernels; empty without any. What was measured with one may not hold for another."""
    kernels = library()
    return "" if kernels is None else hashlib.sha256(Path(kernels._name).read_bytes()).hexdigest()


def _share_openmp() -> None:
    """Let the kernels find the OpenMP library that torch has loaded, under whatever name.

    They are linked to none: threads of a second one would get in the way of torch's, which spin for a while.
    """
    mapped = (line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines())
    for path in mapped:
        if Path(path).name.startswith(OPENMP_NAMES):
            ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)
            return
    raise OSError("torch has loaded no OpenMP library")
