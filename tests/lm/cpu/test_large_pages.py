"""Memory in large pages, and weights that move there."""

from __future__ import annotations

import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import nn

from lm.cpu.grouped_linear import GroupedLinear, kernels
from lm.cpu.large_pages import PAGE_BYTES, zeros_in_large_pages
from lm.cpu.packed_linear import gather_weights, pack_linear_layers


def test_memory_is_zero_and_its_own():
    memory = zeros_in_large_pages(3 * PAGE_BYTES + 5)
    assert (memory.dtype, memory.numel(), memory.data_ptr() % PAGE_BYTES) == (torch.uint8, 3 * PAGE_BYTES + 5, 0)
    assert not memory.any()
    memory.fill_(7)
    assert not zeros_in_large_pages(memory.numel()).any()
    assert zeros_in_large_pages(0).numel() == 0


@pytest.mark.skipif(
    sys.platform != "linux" or not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="needs large pages"
)
def test_linux_is_asked_for_large_pages():
    memory = zeros_in_large_pages(PAGE_BYTES)
    flags, found = "", ""
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, _, last = line.partition(" ")[0].partition("-")
        if last and int(first, 16) <= memory.data_ptr() < int(last, 16):
            found = first
        elif found and line.startswith("VmFlags:"):
            flags = line
            break
    assert "hg" in flags.split()


@pytest.mark.skipif(not kernels(), reason="the kernels are not built")
def test_weights_lie_in_the_order_of_the_layers_and_give_the_same_products():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 96), nn.Sequential(nn.Linear(96, 64, bias=False)), nn.Linear(64, 33))
    pack_linear_layers(model, "int8")
    layers = [module for module in model.modules() if isinstance(module, GroupedLinear)]
    assert len(layers) == 3
    inputs = torch.randn(5, 64)
    before = model(inputs)
    gather_weights(model)
    assert torch.equal(model(inputs), before)
    for layer, after in pairwise(layers):
        assert layer.tiles.data_ptr() + layer.tiles.numel() == after.tiles.data_ptr()
        assert layer.struct.tiles == layer.tiles.data_ptr()
