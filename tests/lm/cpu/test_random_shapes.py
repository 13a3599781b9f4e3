"""The kernels on random shapes; run by `.ci/sanitize` too, which notices what is read or written out of bounds."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lm.attention import AttentionOptions
from lm.cpu.elementwise import TORCH, elementwise_for
from lm.cpu.grouped_linear import GroupedLinear, Kernel
from lm.cpu.native import library
from tests.lm.cpu.test_elementwise import norm_layer
from tests.lm.cpu.test_native_attention import SHAPES, make
from tests.lm.cpu.test_quantized import FORMATS, some_weight

pytestmark = pytest.mark.skipif(library() is None, reason="the kernels are not built")
SPANS = st.lists(st.tuples(st.integers(0, 70), st.integers(1, 34), st.booleans()), min_size=1, max_size=4)
few = settings(max_examples=20, deadline=None, derandomize=True)


@few
@given(
    spans=SPANS,
    shape=st.sampled_from(sorted(SHAPES)),
    scattered=st.booleans(),
    window=st.none() | st.integers(1, 90),
    softcap=st.none() | st.floats(1, 30),
)
def test_attention(spans, shape, scattered, window, softcap):
    case = make(spans, shape, scattered=scattered)
    options = AttentionOptions(scale=0.25, softcap=softcap, window=window)
    torch.testing.assert_close(case.attend(options), case.attend(options, native=False), rtol=1e-5, atol=1e-5)


@few
@given(
    name=st.sampled_from(sorted(FORMATS)),
    rows=st.integers(1, 150),
    groups=st.integers(1, 7),
    tokens=st.integers(1, 70),
    bias=st.booleans(),
)
def test_products_of_grouped_weights(name, rows, groups, tokens, bias):
    weight = FORMATS[name][0](some_weight(rows, 32 * groups))
    added = torch.randn(rows) if bias else None
    inputs = torch.randn(1, tokens, 32 * groups)
    exact = nn.functional.linear(inputs.double(), weight.floats().double(), None if added is None else added.double())
    torch.testing.assert_close(
        GroupedLinear(weight, added, Kernel.FLOAT32)(inputs).double(), exact, rtol=1e-5, atol=1e-5
    )


@few
@given(tokens=st.integers(1, 40), lanes=st.integers(1, 20), heads=st.integers(1, 6), still=st.integers(0, 3))
@torch.inference_mode()
def test_norms_gates_and_rotations(tokens, lanes, heads, still):
    size = 8 * lanes
    hidden, added, norm = torch.randn(1, tokens, size), torch.randn(1, tokens, size), norm_layer(size)
    gate_up, rows = torch.randn(1, tokens, 2 * size), torch.randn(tokens, heads + still, size)
    turns = torch.polar(torch.ones(tokens, 1, size // 2), torch.randn(tokens, 1, size // 2))
    native = elementwise_for(hidden)
    for ours, theirs in (
        (native.add_norm(hidden, added, norm)[1], TORCH.add_norm(hidden, added, norm)[1]),
        (native.gated(gate_up, nn.SiLU()), TORCH.gated(gate_up, nn.SiLU())),
        (native.rotate(rows.clone(), heads, turns), TORCH.rotate(rows.clone(), heads, turns)),
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
