"""Where the time of a pass goes: its operators, seen by torch's profiler, sorted into phases."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile, record_function
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from bench.passes import Pass
from lm.attention import IMPLEMENTATION
from lm.cpu.elementwise import NativeElementwise
from lm.cpu.grouped_linear import GroupedLinear
from lm.cpu.native_attention import NativeAttention
from lm.cpu.native_layers import TIMED, NativeLayers

PHASES = ("linear", "attention", "norm_rotary", "head", "sampling")
"""norm_rotary is all work element by element: norms, rotary embedding, activation, residual sums, embedding rows."""
PROFILED_PASSES = 3

_ATTENTION, _SAMPLING, _KERNEL = "bench::attention", "bench::sampling", "kernel::"
_KERNELS: tuple[tuple[type, str, str], ...] = (
    (NativeAttention, "attend", "attention"),
    *((NativeElementwise, method, "norm_rotary") for method in ("norm", "add_norm", "rotate", "gated")),
    (GroupedLinear, "forward", "linear"),
)
"""Calls of our own kernels, which are no operators of torch, and their phases."""
_ATTENTION_OPERATORS = ("scaled_dot_product", "bmm", "softmax", "index_copy_", _ATTENTION)
_LINEAR_OPERATORS = ("linear", "addmm", "aten::mm", "pack_mm")


def phases_ms(measured: Pass, context: int, on_cuda: bool) -> dict[str, float]:
    """Milliseconds of one pass by phase: time within operators. The rest of a pass is Python, or waiting.

    Args:
        context: of the pass; by it the copying of a growing KV cache is told from other concatenations.
        on_cuda: count the time of kernels on the device, not of the calls that launch them.
    """
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_cuda else [])]
    vocab_size = 0
    with (
        _marked_attention(),
        _marked_kernels(),
        _timed_layers() as spent_ns,
        profile(activities=activities, record_shapes=True) as profiler,
    ):
        for _ in range(PROFILED_PASSES):
            logits = measured.forward()
            with record_function(_SAMPLING):
                measured.choose(logits)
            vocab_size = logits.shape[-1]
            del logits
            measured.reset()
    total_us = dict.fromkeys(PHASES, 0.0) | {phase: ns / 1e3 for phase, ns in zip(TIMED, spent_ns, strict=True)}
    for event in profiler.events() or []:
        spent_us = event.self_device_time_total if on_cuda else event.self_cpu_time_total
        if not event.name.startswith("bench::"):  # a mark's own time is Python's, between its operators
            total_us[_phase(event, vocab_size, context)] += spent_us
    return {phase: us / 1e3 / PROFILED_PASSES for phase, us in total_us.items()}


def _phase(event: FunctionEvent, vocab_size: int, context: int) -> str:
    """The phase of an operator: by the marks around it, by what it computes, by the shapes it works on."""
    lineage = list(_lineage(event))
    names = [ancestor.name for ancestor in lineage]
    shapes = [shape for ancestor in lineage for shape in _shapes(ancestor)]
    if _SAMPLING in names:
        return "sampling"
    kernel = next((name.removeprefix(_KERNEL) for name in names if name.startswith(_KERNEL)), None)
    if kernel is not None:
        phase, _, width = kernel.partition(" ")
        return "head" if width == str(vocab_size) else phase
    if any(part in name for name in names for part in _ATTENTION_OPERATORS):
        return "attention"
    if "aten::cat" in names and any(len(shape) == 4 and shape[-2] == context for shape in shapes):
        return "attention"
    if "aten::embedding" not in names and any(vocab_size in shape for shape in shapes):
        return "head"
    if any(part in name for name in names for part in _LINEAR_OPERATORS):
        return "linear"
    return "norm_rotary"


def _lineage(event: FunctionEvent | None) -> Iterator[FunctionEvent]:
    while event is not None:
        yield event
        event = event.cpu_parent


def _shapes(event: FunctionEvent) -> list[list[int]]:
    return [shape for shape in cast(list[Any], event.input_shapes or []) if isinstance(shape, list) and shape]


@contextmanager
def _marked_attention() -> Iterator[None]:
    """All that our attention function or transformers' own does is meanwhile marked as attention."""
    before = {name: ALL_ATTENTION_FUNCTIONS[name] for name in (IMPLEMENTATION, "sdpa")}
    for name, function in before.items():
        AttentionInterface.register(name, _marked(function))
    try:
        yield
    finally:
        for name, function in before.items():
            AttentionInterface.register(name, function)


def _marked(function: Callable[..., Any]) -> Callable[..., Any]:
    def marked(*arguments: Any, **options: Any) -> Any:
        with record_function(_ATTENTION):
            return function(*arguments, **options)

    return marked


@contextmanager
def _timed_layers() -> Iterator[ctypes.Array[ctypes.c_int64]]:
    """Nanoseconds that layers run by one kernel spend meanwhile, by `TIMED`."""
    NativeLayers.spent_ns = spent_ns = (ctypes.c_int64 * len(TIMED))()
    try:
        yield spent_ns
    finally:
        NativeLayers.spent_ns = None


@contextmanager
def _marked_kernels() -> Iterator[None]:
    """Every call of `_KERNELS` is meanwhile marked as such, that of a linear layer with its width."""
    before = [(owner, method, getattr(owner, method)) for owner, method, _ in _KERNELS]
    for owner, method, phase in _KERNELS:
        setattr(owner, method, _marked_kernel(getattr(owner, method), phase))
    try:
        yield
    finally:
        for owner, method, function in before:
            setattr(owner, method, function)


def _marked_kernel(function: Callable[..., Any], phase: str) -> Callable[..., Any]:
    def marked(owner: Any, *arguments: Any) -> Any:
        with record_function(f"{_KERNEL}{phase} {getattr(owner, 'out_features', '')}"):
            return function(owner, *arguments)

    return marked
