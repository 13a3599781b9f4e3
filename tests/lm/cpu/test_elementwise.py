"""The kernels of a fused layer against float64, and the bits of their rows."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from lm.cpu.elementwise import TORCH, Elementwise, NativeElementwise, elementwise_for
from lm.cpu.native import library

kernels = pytest.mark.skipif(library() is None, reason="the kernels are not built")
BOTH = pytest.mark.parametrize("native", [pytest.param(True, marks=kernels), False])


def work(native: bool) -> Elementwise:
    chosen = elementwise_for(torch.zeros(8)) if native else TORCH
    assert isinstance(chosen, NativeElementwise) == native
    return chosen


def norm_layer(size: int) -> nn.Module:
    norm = LlamaRMSNorm(size, 1e-5)
    norm.weight.data.normal_()
    return norm


@BOTH
@torch.inference_mode()
def test_norms(native: bool) -> None:
    torch.manual_seed(0)
    hidden, added, norm = 3 * torch.randn(1, 5, 72), torch.randn(1, 5, 72), norm_layer(72)
    rows = hidden.double()
    expected = rows * (rows.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * norm.weight
    torch.testing.assert_close(work(native).norm(hidden, norm).double(), expected, rtol=1e-6, atol=1e-6)
    total, normed = work(native).add_norm(hidden, added, norm)
    assert torch.equal(total, hidden + added)
    assert torch.equal(normed, work(native).norm(total, norm))


@BOTH
@torch.inference_mode()
def test_rotation_turns_the_first_heads_alone(native: bool) -> None:
    torch.manual_seed(0)
    heads, turns = torch.randn(5, 7, 16), torch.polar(torch.ones(5, 1, 8), torch.randn(5, 1, 8))
    pairs = torch.view_as_complex(heads.double().unflatten(-1, (-1, 2))) * turns
    expected = torch.cat((torch.view_as_real(pairs).flatten(2)[:, :4], heads[:, 4:].double()), 1)
    torch.testing.assert_close(work(native).rotate(heads, 4, turns).double(), expected, rtol=1e-6, atol=1e-6)


@BOTH
@pytest.mark.parametrize("activation", ["silu", "gelu"])
@torch.inference_mode()
def test_gated(native: bool, activation: str) -> None:
    torch.manual_seed(0)
    gate_up, function = 4 * torch.randn(1, 5, 48), ACT2FN[activation]
    gate, up = gate_up.double().chunk(2, -1)
    output = work(native).gated(gate_up, function)
    torch.testing.assert_close(output.double(), function(gate) * up, rtol=1e-6, atol=1e-6)


@kernels
@torch.inference_mode()
def test_silu_of_any_number() -> None:
    """Its exponential is ours: as near as float32 comes, over all it may be given (a multiple of 8 numbers)."""
    gate = torch.cat((torch.linspace(-100, 100, 200_004), torch.tensor([0.0, 1e-30, 1e30, 7.0])))
    output = work(True).gated(torch.cat((gate, torch.ones_like(gate)))[None], ACT2FN["silu"])[0]
    torch.testing.assert_close(output.double(), nn.functional.silu(gate.double()), rtol=4e-7, atol=1e-36)


@kernels
@torch.inference_mode()
def test_a_row_has_the_same_bits_whatever_is_beside_it_and_however_many_threads_run() -> None:
    torch.manual_seed(0)
    rows, size = 96, 1024
    hidden, added, norm = torch.randn(rows, size), torch.randn(rows, size), norm_layer(size)
    turns = torch.polar(torch.ones(rows, 1, 32), torch.randn(rows, 1, 32))

    def all_of(some: slice) -> list[torch.Tensor]:
        heads = hidden[some].clone().view(-1, size // 64, 64)
        return [
            *work(True).add_norm(hidden[some], added[some], norm),
            work(True).rotate(heads, 12, turns[some]),
            work(True).gated(hidden[some], ACT2FN["silu"]),
        ]

    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        together = all_of(slice(None))
    finally:
        torch.set_num_threads(threads)
    for row in (0, 41, 95):
        for whole, alone in zip(together, all_of(slice(row, row + 1)), strict=True):
            assert torch.equal(whole[row : row + 1], alone)


@torch.inference_mode()
def test_other_types_go_to_torch() -> None:
    assert elementwise_for(torch.zeros(8, dtype=torch.bfloat16)) is TORCH


def test_rows_of_broken_vectors_go_to_torch() -> None:
    assert elementwise_for(torch.zeros(8, 12)) is TORCH
