"""The sampling kernels' own source, interpreted: the CPU's choices, without a sort and in little memory."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lm import sampling
from lm.cuda.sampling import perturbed
from lm.noise import gumbel_noise
from lm.sampling import Row, _scores, choose_tokens, top_drafts
from tests.lm.test_sampling import PARAMS, random_rows
from treeline.sampling import SamplingParams


def on_device(logits: torch.Tensor, rows: list[Row]) -> torch.Tensor:
    """What `_scores` gives on CUDA."""
    scores = logits.float().clone()
    sampling._adjust(scores, rows)
    return perturbed(scores, [row.params for row in rows], [row.position for row in rows])


@pytest.mark.parametrize(("vocab_size", "scale"), [(40, 2.0), (600, 3.0), (5000, 0.5)])
def test_scores_are_those_of_the_cpu(vocab_size: int, scale: float) -> None:
    logits, rows = random_rows(np.random.default_rng(vocab_size), 4 * len(PARAMS), vocab_size, scale)
    found, expected = on_device(logits, rows), _scores(logits, rows)
    assert torch.equal(found.isinf(), expected.isinf())
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(found.argmax(-1), choose_tokens(logits, rows))


@pytest.mark.parametrize(
    "params", [SamplingParams(temperature=1.0, top_k=3), SamplingParams(temperature=1.0, top_p=0.7)]
)
def test_ties_signs_and_zeros_are_cut_as_on_the_cpu(params: SamplingParams) -> None:
    rows = [Row(params, place) for place in range(3)]
    logits = torch.tensor([[3, 1, 1, 0, 1, -1], [0.0, -0.0, -1, -0.0, -5, -0.5], [-9, -9, -8, -torch.inf, -9, -9]])
    found = on_device(logits.float(), rows)
    assert torch.equal(found.isinf(), _scores(logits.float(), rows).isinf())


def test_noise_is_that_of_the_cpu() -> None:
    """To the bit, but for the last one where two logarithms of 64 bits differ."""
    keys = [(0, 0), (-1, 5), (2**64 - 1, 8191), (7, 3)]
    params = [SamplingParams(temperature=1.0, seed=seed % 2**63) for seed, _ in keys]
    found = perturbed(torch.zeros(4, 3000), params, [position for _, position in keys])
    expected = torch.stack([gumbel_noise(p.seed, k[1], 3000, "cpu") for p, k in zip(params, keys, strict=True)])
    torch.testing.assert_close(found, expected, rtol=2e-7, atol=1e-7)
    assert (found == expected).float().mean() > 0.9999


class Largest(TorchDispatchMode):
    """Bytes of the largest tensor that was made, and whether anything was sorted."""

    bytes, sorts = 0, False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.sorts |= func.overloadpacket.__name__ in ("sort", "topk")
        if isinstance(out, torch.Tensor) and not func._schema.name.startswith(("aten::slice", "aten::expand")):
            self.bytes = max(self.bytes, out.numel() * out.itemsize)
        return out


def test_memory_is_bounded_by_a_few_rows_and_nothing_is_sorted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "_scores", on_device)
    monkeypatch.setattr(sampling, "_ROWS_AT_ONCE", 4)
    logits = torch.randn(10, 3000)
    with Largest() as seen:
        choose_tokens(logits, [Row(PARAMS[9], place, np.array([1])) for place in range(10)])
    assert seen.bytes == 4 * 3000 * 4
    assert not seen.sorts


def test_drafts_come_from_the_same_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, rows = random_rows(np.random.default_rng(3), len(PARAMS), 300, 2.0)
    ids, probs = top_drafts(logits, rows, 4)
    monkeypatch.setattr(sampling, "_scores", on_device)
    found = top_drafts(logits, rows, 4)
    assert torch.equal(found[0][:, 0], ids[:, 0])
    torch.testing.assert_close(found[1], probs, rtol=1e-5, atol=1e-7)
