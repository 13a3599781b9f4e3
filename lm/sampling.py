"""From logits to tokens: the target's own token at each row, a drafter's proposals, and log-probabilities."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from lm.noise import gumbel_noise
from treeline.sampling import SamplingParams


@dataclass(frozen=True)
class Row:
    """How the next token is drawn at one row of logits.

    Attributes:
        position: absolute index of the token to be placed; keys the noise.
        history: int64 [t], every token before it on its own path; needed for a repetition penalty only.
    """

    params: SamplingParams
    position: int
    history: NDArray[np.int64] | None = None


def choose_tokens(logits: torch.Tensor, rows: list[Row]) -> torch.Tensor:
    """int64 [rows]: the target's own token, argmax(log p + g), g = 0 if greedy.

    p is softmax(logits [rows, vocab]) after repetition penalty, temperature, top-k and top-p, in this order.
    """
    chosen = logits.argmax(-1)
    for index, row in enumerate(rows):
        if row.params.greedy and row.params.repetition_penalty == 1.0:
            continue
        scores = _penalised(logits[index].float(), row)
        if row.params.greedy:
            chosen[index] = scores.argmax()
            continue
        kept, token_ids = _kept(scores / row.params.temperature, row.params)
        noise = gumbel_noise(row.params.seed, row.position, token_ids)
        chosen[index] = token_ids[(kept + noise).argmax()]
    return chosen


def top_drafts(logits: torch.Tensor, rows: list[Row], k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A drafter's best proposals per row, under the same noise as the target.

    Returns:
        Token ids int64 [rows, k] and probabilities float32 [rows, k], best first: of softmax(logits) for a greedy row,
        of the softmax of the noise-perturbed logits for a sampled one.
    """
    scores = logits.float()
    sampled = [index for index, row in enumerate(rows) if not row.params.greedy]
    if sampled:
        scores = scores.clone()
        all_ids = torch.arange(scores.shape[-1], device=scores.device)
        for index in sampled:
            params = rows[index].params
            noise = gumbel_noise(params.seed, rows[index].position, all_ids)
            scores[index] = scores[index] / params.temperature + noise
    top, token_ids = scores.topk(k, dim=-1)
    return token_ids, (top - scores.logsumexp(-1, keepdim=True)).exp()


def logprobs(logits: torch.Tensor, chosen: list[int], top: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Raw log-probabilities, before penalties and temperature.

    Returns:
        Those of the chosen tokens float32 [rows]; the ids int64 [rows, top] and values float32 [rows, top] of the top.
    """
    values = logits.float().log_softmax(-1)
    picked = values.gather(-1, torch.tensor(chosen, device=values.device)[:, None])[:, 0]
    top_values, top_ids = values.topk(top, dim=-1)
    return picked, top_ids, top_values


def _penalised(scores: torch.Tensor, row: Row) -> torch.Tensor:
    """Repetition penalty of CTRL (Keskar et al. 2019): seen tokens' positive logits shrink, negative ones grow."""
    penalty = row.params.repetition_penalty
    if penalty == 1.0 or row.history is None:
        return scores
    seen = torch.from_numpy(np.unique(row.history)).to(scores.device)
    seen_scores = scores[seen]
    return scores.index_put((seen,), torch.where(seen_scores > 0, seen_scores / penalty, seen_scores * penalty))


def _kept(scores: torch.Tensor, params: SamplingParams) -> tuple[torch.Tensor, torch.Tensor]:
    """(scores, token ids) of the tokens that top-k and top-p leave; the most likely one is always left."""
    all_ids = torch.arange(len(scores), device=scores.device)
    if params.top_k:
        scores, all_ids = scores.topk(min(params.top_k, len(scores)))
    elif params.top_p < 1.0:
        scores, all_ids = scores.sort(descending=True, stable=True)
    if params.top_p < 1.0:
        probs = scores.softmax(-1)
        before = probs.cumsum(-1) - probs
        kept = before < params.top_p
        kept[0] = True
        scores, all_ids = scores[kept], all_ids[kept]
    return scores, all_ids
