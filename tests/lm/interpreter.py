"""Triton's interpreter for tests on the CPU. Import it before any of our kernels; with a GPU at hand it does nothing.

It runs the kernels' own source on CPU tensors, one program at a time. Two things of Triton 3.9 are mended here: it
patches all of `triton.language` anew at every call of a helper, and multiplies bfloat16 numbers as if they were
integers.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

import triton.language as tl
from triton.runtime import interpreter

_patch_language = interpreter._patch_lang
_patched: set[int] = set()


def _patch_once(kernel: Any) -> Any:
    """The language as one module sees it stays patched: no kernel of this process is compiled."""
    if id(kernel.__globals__) not in _patched:
        _patched.add(id(kernel.__globals__))
        _patch_language(kernel)
    return interpreter._LangPatchScope()


def _dot(self: interpreter.InterpreterBuilder, a: Any, b: Any, d: Any, *precision: Any) -> Any:
    left, right = (_wide(operand) for operand in (a, b))
    return interpreter.TensorHandle(np.matmul(left, right, dtype=d.data.dtype) + d.data, d.dtype.scalar)


def _wide(operand: Any) -> Any:
    if operand.dtype.scalar != tl.bfloat16:
        return operand.data
    return (operand.data.astype(np.uint32) << 16).view(np.float32)


interpreter._patch_lang = _patch_once
interpreter.InterpreterBuilder.create_dot = _dot
object.__setattr__(interpreter.interpreter_builder.options, "sanitize_overflow", False)
