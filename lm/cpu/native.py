"""The kernels of `lm/kernels`, compiled when this package was installed."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
from ctypes import c_float, c_int, c_int64, c_void_p
from pathlib import Path
from typing import Any

import torch  # noqa: F401  (loads the OpenMP library that the kernels share)

logger = logging.getLogger(__name__)

OPENMP_NAMES = ("libgomp", "libiomp", "libomp")
LANES = 8
"""Numbers in a vector of the kernels: all sizes are multiples of it, except those of products."""


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels; None if they were not built, or cannot run here."""
    for path in Path(__file__).parent.parent.glob("_kernels*.so"):
        try:
            _share_openmp()
            kernels = ctypes.CDLL(str(path))
            return kernels if kernels.treeline_runs(0) else None
        except (OSError, AttributeError) as error:  # Not loadable, or built from older sources.
            logger.warning("the compiled kernels cannot be loaded, torch's own are used: %s", error)
            return None
    return None


@functools.cache
def typed(kernels: ctypes.CDLL, name: str, kinds: str) -> Any:
    """The kernels' function `name` with argument types declared: n is int64, i int, f float, p a pointer."""
    types = {"n": c_int64, "i": c_int, "f": c_float, "p": c_void_p}
    function = getattr(kernels, f"treeline_{name}")
    function.argtypes, function.restype = [types[kind] for kind in kinds], None
    return function


@functools.cache
def fingerprint() -> str:
    """Hex digest of the compiled kernels; empty without any. Measurements may not hold for another digest."""
    kernels = library()
    return "" if kernels is None else hashlib.sha256(Path(kernels._name).read_bytes()).hexdigest()


def _share_openmp() -> None:
    """Let the kernels find the OpenMP library that torch has loaded, whatever its name.

    They link to none: threads of a second library would compete with torch's, which spin for a while.
    """
    mapped = (line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines())
    for path in mapped:
        if Path(path).name.startswith(OPENMP_NAMES):
            ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)
            return
    raise OSError("torch has loaded no OpenMP library")
