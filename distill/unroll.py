"""What the head is trained on: guesses from the target's features, and from its own output as it will be when drafting.

Unrolled `depth` times (training-time test, EAGLE-3, arXiv 2503.01840, section 3.2): in round s every token is seen as
the s-th draft token of a tree, whose ancestors took the head's output of the rounds before in place of features.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from distill.batches import TrainingBatch
from lm.attention import AttentionOptions
from lm.draft_head import HeadModule

DEPTH_DISCOUNT = 0.8
HARD_WEIGHT = 0.3


class UnrolledAttention:
    """Causal attention of a padded batch, round by round.

    In round s the token at position j sees round 0 up to position j - s, and of each later round i the one ancestor
    that is its draft token i, at position j - s + i.
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
    """How one round went.

    Attributes:
        loss: mean over the tokens that count.
        top1, top4: share of them whose most likely next token the head has first, or among its first four.
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
        final_norm: what the target's final norm multiplies by [hidden].
        measure: compute top1 and top4 (they are NaN otherwise).
    """
    size = module.config.hidden_size
    texts, tokens = batch.token_ids.shape[0], batch.token_ids.shape[1] - 1
    inputs = F.embedding(batch.token_ids[:, 1:], embedding).reshape(1, texts * tokens, size)
    positions = torch.arange(tokens, device=inputs.device).repeat(texts)[None]
    features = batch.features.to(output.dtype)
    teacher = F.linear(features[:, 1:, -size:].reshape(-1, size), output)
    # The head reads the last layer's states before the final norm, up to a factor that its own norm takes away.
    read = torch.cat((features[..., :-size], features[..., -size:] / final_norm), dim=-1)
    states = module.states(read[:, :-1]).reshape(1, texts * tokens, size)
    attention = UnrolledAttention(texts, tokens)
    rounds = []
    for number in range(depth):
        out, final = module(inputs, states, positions, attention)
        counts = batch.counts[:, 1:].clone()
        counts[:, :number] = False
        rounds.append(_score(final[0], output, teacher, counts.reshape(-1), measure))
        states = F.pad(out.view(texts, tokens, size)[:, :-1], (0, 0, 1, 0)).reshape(1, -1, size)
    return rounds


def _score(out: Tensor, output: Tensor, teacher: Tensor, counts: Tensor, measure: bool) -> Round:
    """Cross-entropy against the target's own distribution over the draft vocabulary, and against its first choice."""
    log_probs = F.log_softmax(F.linear(out[counts], output).float(), dim=-1)
    wanted = teacher[counts].float()
    first = wanted.argmax(dim=-1)
    soft = -(torch.softmax(wanted, dim=-1) * log_probs).sum(dim=-1).mean()
    loss = soft + HARD_WEIGHT * F.nll_loss(log_probs, first)
    if not measure:
        return Round(loss, float("nan"), float("nan"))
    found = log_probs.topk(4, dim=-1).indices == first[:, None]
    return Round(loss, float(found[:, 0].float().mean()), float(found.any(dim=1).float().mean()))
