"""The loss and its gradient, which are computed together in chunks, are those of the textbook formula."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from distill.unroll import CHUNK_ROWS, HARD_WEIGHT, CrossEntropy


def test_loss_and_gradient_are_autograds_own() -> None:
    torch.manual_seed(0)
    guesses = torch.randn(CHUNK_ROWS + 7, 16, dtype=torch.float64, requires_grad=True)
    output, wanted = torch.randn(50, 16, dtype=torch.float64), torch.randn(CHUNK_ROWS + 7, 50).softmax(dim=-1)
    log_probs = F.log_softmax(F.linear(guesses, output), dim=-1)
    plain = -(wanted * log_probs).sum(-1).mean() + HARD_WEIGHT * F.nll_loss(log_probs, wanted.argmax(-1))
    (expected,) = torch.autograd.grad(3 * plain, guesses)
    loss: torch.Tensor = CrossEntropy.apply(guesses, output, wanted)  # type: ignore[no-untyped-call]
    (gradient,) = torch.autograd.grad(3 * loss, guesses)
    assert torch.allclose(loss, plain.float(), rtol=1e-5)
    assert torch.allclose(gradient, expected, rtol=1e-4, atol=1e-6)
