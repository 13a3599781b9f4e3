"""Training loss of the head: guesses from the target's features, and from its own output as when drafting.

Unrolled `depth` times (training-time test, EAGLE-3, arXiv 2503.01840, section 3.2): in round s every token is treated
as the s-th draft token of a tree, whose ancestors used the head's output of earlier rounds instead of features.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from distill.batches import TrainingBatch
from lm.attention import AttentionOptions
from lm.draft_head import HeadModule

DEPTH_DISCOUNT = 0.8
"""Weight of a round's loss relative to the previous round's, as in EAGLE-3's training code."""
HARD_WEIGHT = 0.3
"""Loss weight of the target's first choice beside its distribution: greedy decoding needs only that. The shipped head
was trained with it."""
CHUNK_ROWS = 256
"""Rows of logits at a time: 8 MB for 8,192 tokens, which a processor's cache holds."""


class UnrolledAttention:
    """Causal attention of a padded batch, round by round.

    In round s the token at position j sees round 0 up to position j - s, and in each later round i its one ancestor,
    draft token i, at position j - s + i.
    """

    def __init__(self, texts: int, tokens: int) -> None:
        self._texts, self._tokens = texts, tokens
        self._rounds: dict[int, list[tuple[Tensor, Tensor]]] = {}

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, options: AttentionOptions) -> Tensor:
        q, k, v = (
            part.view(self._texts, self._tokens, part.shape[1], part.shape[2]).transpose(1, 2)
            for part in (query, key, value)
        )
        rounds = self._rounds.setdefault(layer, [])
        rounds.append((k, v))
        if len(rounds) == 1:
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=options.scale, enable_gqa=True)
        else:
            keys, values = (torch.cat(parts, dim=2) for parts in zip(*rounds, strict=True))
            mask = _visible(self._tokens, len(rounds) - 1, query.device)
            mixed = F.scaled_dot_product_attention(q, keys, values, mask, scale=options.scale, enable_gqa=True)
        return mixed.transpose(1, 2).reshape(query.shape[0], query.shape[1], -1)


def _visible(tokens: int, round_number: int, device: torch.device) -> Tensor:
    """bool [tokens, (round_number + 1) * tokens]."""
    ones = torch.ones(tokens, tokens, dtype=torch.bool, device=device)
    parts = [ones.tril(-round_number)]
    parts += [ones.tril(i - round_number).triu(i - round_number) for i in range(1, round_number + 1)]
    return torch.cat(parts, dim=1)


@dataclass(frozen=True)
class Round:
    """Result of a round.

    Attributes:
        loss: mean over the tokens that count.
        top1, top4: share of them whose most likely next token the head ranks first, or in its first four.
    """

    loss: Tensor
    top1: float
    top4: float


def unroll(
    module: HeadModule,
    embedding: Tensor,
    output: Tensor,
    final_norm: Tensor,
    batch: TrainingBatch,
    depth: int,
    *,
    measure: bool,
) -> list[Round]:
    """Run `depth` rounds over a batch.

    Args:
        embedding: the target's [vocab, hidden].
        output: the target's output rows of the draft vocabulary [draft_vocab, hidden].
        final_norm: factors [hidden] of the target's final norm.
        measure: compute top1 and top4 (they are NaN otherwise).
    """
    size = module.config.hidden_size
    texts, tokens = batch.token_ids.shape[0], batch.token_ids.shape[1] - 1
    inputs = F.embedding(batch.token_ids[:, 1:], embedding).reshape(1, texts * tokens, size)
    positions = torch.arange(tokens, device=inputs.device).repeat(texts)[None]
    features = batch.features.to(output.dtype)
    counts = batch.counts[:, 1:].clone()
    counts[:, : depth - 1] = False
    rows = counts.reshape(-1).nonzero()[:, 0]
    with torch.no_grad():
        wanted = F.linear(features[:, 1:, -size:].reshape(-1, size)[rows], output).float().softmax(dim=-1)
    # The head reads the last layer's states before the final norm, up to a factor that its own norm removes.
    read = torch.cat((features[..., :-size], features[..., -size:] / final_norm), dim=-1)
    states = module.states(read[:, :-1]).reshape(1, texts * tokens, size)
    attention = UnrolledAttention(texts, tokens)
    rounds = []
    for _ in range(depth):
        out, final = module(inputs, states, positions, attention)
        guesses = final[0, rows]
        loss: Tensor = CrossEntropy.apply(guesses, output, wanted)  # type: ignore[no-untyped-call]
        rounds.append(Round(loss, *(_shares_found(guesses, output, wanted) if measure else (math.nan, math.nan))))
        states = F.pad(out.view(texts, tokens, size)[:, :-1], (0, 0, 1, 0)).reshape(1, -1, size)
    return rounds


class CrossEntropy(torch.autograd.Function):
    """Mean cross-entropy against the target's distribution, plus HARD_WEIGHT times that against its first choice.

    The gradient with respect to logits is (1 + HARD_WEIGHT) * softmax(logits) - wanted - HARD_WEIGHT * one_hot(first).
    It is computed along with the loss, in chunks, so that no matrix of all logits is ever kept.

    Inputs: guesses [n, hidden], output rows [draft_vocab, hidden], wanted probabilities float32 [n, draft_vocab].
    """

    @staticmethod
    def forward(ctx: Any, guesses: Tensor, output: Tensor, wanted: Tensor) -> Tensor:
        total, gradient = torch.zeros((), device=guesses.device), torch.empty_like(guesses)
        for start in range(0, len(guesses), CHUNK_ROWS):
            chunk = slice(start, start + CHUNK_ROWS)
            logits, aims = F.linear(guesses[chunk], output).float(), wanted[chunk]
            first = aims.argmax(dim=-1, keepdim=True)
            reached = (aims * logits).sum(dim=-1) + HARD_WEIGHT * logits.gather(1, first)[:, 0]
            total += ((1 + HARD_WEIGHT) * logits.logsumexp(dim=-1) - reached).sum()
            if not ctx.needs_input_grad[0]:  # held-out texts are only measured
                continue
            slope = logits.softmax(dim=-1).mul_(1 + HARD_WEIGHT).sub_(aims)
            slope.scatter_add_(1, first, torch.full_like(first, -HARD_WEIGHT, dtype=slope.dtype))
            gradient[chunk] = F.linear(slope.to(output.dtype), output.T)
        ctx.save_for_backward(gradient / len(guesses))
        return total / len(guesses)

    @staticmethod
    def backward(ctx: Any, *above: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return above[0] * gradient, None, None


def _shares_found(guesses: Tensor, output: Tensor, wanted: Tensor) -> tuple[float, float]:
    """How often the target's first choice is the first guess, and how often among the first four."""
    found = F.linear(guesses, output).topk(4, dim=-1).indices == wanted.argmax(dim=-1)[:, None]
    return float(found[:, 0].float().mean()), float(found.any(dim=1).float().mean())
