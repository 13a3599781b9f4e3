"""The best tokens of a row, and rows of which some tokens may not follow: by the kernels and by torch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lm.cpu import choice
from lm.cpu.native import library

NATIVE = pytest.mark.skipif(library() is None, reason="the kernels are not built")
BOTH = pytest.mark.parametrize("native", [pytest.param(True, marks=NATIVE), False])
few = settings(max_examples=40, deadline=None, derandomize=True)


@NATIVE
@few
@given(rows=st.integers(1, 9), columns=st.integers(1, 3000), k=st.integers(1, 16), barred=st.booleans())
def test_the_best_are_those_of_a_stable_sort(rows: int, columns: int, k: int, barred: bool) -> None:
    k = min(k, columns)
    scores = (20 * torch.randn(rows, columns)).round() / 4  # many are equal
    if barred:
        scores[:, k:][torch.rand(rows, columns - k) < 0.5] = -torch.inf
    ids, probs = choice.best(scores, k, 0.0)
    exact = scores.double().softmax(1).sort(dim=1, descending=True, stable=True)
    expected = scores.sort(dim=1, descending=True, stable=True).indices[:, :k]
    assert torch.equal(ids, expected)
    torch.testing.assert_close(probs.double(), exact.values[:, :k], rtol=2e-6, atol=1e-30)


@NATIVE
def test_rows_that_are_no_numbers_still_give_distinct_tokens() -> None:
    ids, _ = choice.best(torch.full((1, 200), torch.nan), 5, 0.0)
    assert len(set(ids[0].tolist())) == 5


@BOTH
@few
@given(rows=st.integers(1, 5), columns=st.integers(1, 300), seed=st.integers(0, 9))
def test_scores_whose_bit_is_0_are_barred(native: bool, rows: int, columns: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    scores, places = torch.randn(rows + 2, columns), rng.permutation(rows + 2)[:rows].tolist()
    bits = rng.integers(-(2**31), 2**31, (rows, -(-columns // 32)), dtype=np.int32)
    expected, free_expected = scores.clone(), torch.from_numpy(scores.numpy().argmax(1))
    for place, words in zip(places, bits, strict=True):
        allowed = np.unpackbits(words.view(np.uint8), bitorder="little")[:columns].astype(bool)
        expected[place, torch.from_numpy(~allowed)] = -torch.inf
    with pytest.MonkeyPatch.context() as patch:
        if not native:
            patch.setattr(choice, "library", lambda: None)
        own = choice.largest(scores[places], bits)
        free = choice.largest(scores)
        choice.bar(scores, places, bits)
    assert torch.equal(scores, expected)
    assert torch.equal(free, free_expected)
    assert torch.equal(own, torch.from_numpy(expected[places].numpy().argmax(1)))
