"""From logits to tokens: the target's own token at each row, the drafter's proposals, log-probabilities."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lm.device import upload
from lm.noise import gumbel_noise, gumbel_noise_rows
from treeline.sampling import SamplingParams

_NUCLEUS_TOKENS = 512
"""Most nuclei are smaller than this, so sorting so many tokens usually finds them."""
_LEAST_PROB = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class Row:
    """How to choose the token that follows one row of logits.

    Attributes:
        position: absolute index, in the whole sequence, of the token to be placed.
        history: int64 [t], all tokens before it on this row's own path; only the repetition penalty reads it.
    """

    params: SamplingParams
    position: int
    history: Tensor | NDArray[np.int64] | None = None


@torch.inference_mode()
def choose_tokens(logits: Tensor, rows: list[Row]) -> Tensor:
    """The target's own token after each row: argmax(log p + g), g being position-keyed noise, 0 for greedy rows.

    p is the row's distribution after repetition penalty, temperature, top-k and top-p, in this order.

    Args:
        logits: [rows, vocab]; not changed.

    Returns:
        int64 [rows]. A row's token depends on nothing but its own logits and parameters.
    """
    return argmax(_scores(logits, rows))


def argmax(scores: Tensor) -> Tensor:
    """int64 [rows]: index of each row's largest score, the first of equals. `scores` is float32 [rows, vocab]."""
    if scores.device.type == "cpu":
        # torch's own takes up to eight times as long here.
        return torch.from_numpy(scores.numpy().argmax(axis=-1))
    return scores.argmax(dim=-1)


@torch.inference_mode()
def top_drafts(logits: Tensor, rows: list[Row], k: int) -> tuple[Tensor, Tensor]:
    """What to propose after each row of a draft model's `logits` [rows, vocab], best first.

    Returns:
        ids int64 [rows, k], and probs float32 [rows, k] in (0, 1]: the draft model's probability for greedy rows, the
        softmax of the noise-perturbed scores for sampled ones. What top-k or top-p exclude has (almost) none.
    """
    probs, ids = torch.softmax(_scores(logits, rows), dim=-1).topk(k, dim=-1)
    return ids, probs.clamp_min_(_LEAST_PROB)


@torch.inference_mode()
def logprobs(logits: Tensor, chosen: list[int] | Tensor, top: int) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities of the raw `logits` [rows, vocab]: before penalties, temperature and filters.

    Returns:
        Those of the chosen tokens float32 [rows]; ids int64 [rows, top] and values float32 [rows, top] of the best.
    """
    values = torch.log_softmax(logits.float(), dim=-1)
    chosen = torch.as_tensor(chosen, dtype=torch.int64, device=logits.device)
    top_values, top_ids = values.topk(top, dim=-1)
    return values.gather(1, chosen[:, None])[:, 0], top_ids, top_values


def _scores(logits: Tensor, rows: list[Row]) -> Tensor:
    """float32 [rows, vocab]: shaped log p (up to a constant per row) + g; -inf where p is 0."""
    scores = logits.float()
    if all(row.params.is_argmax for row in rows):
        return scores
    scores = scores.clone()
    if scores.device.type == "cuda":
        return scores_at_once(scores, rows)
    noise: dict[tuple[int, int], Tensor] = {}  # Nodes of one request at one depth share theirs.
    for row, row_scores in zip(rows, scores, strict=True):
        _penalise(row_scores, row)
        params = row.params
        if params.greedy:
            continue
        row_scores /= params.temperature
        if params.top_k:
            _keep_top_k(row_scores, params.top_k)
        if params.top_p < 1.0:
            _keep_top_p(row_scores, params.top_p)
        key = params.seed, row.position
        if key not in noise:
            noise[key] = gumbel_noise(*key, logits.shape[1], logits.device)
        row_scores += noise[key]
    return scores


def _penalise(scores: Tensor, row: Row) -> None:
    """CTRL's repetition penalty (Keskar et al., 2019): once per distinct token of the history."""
    penalty = row.params.repetition_penalty
    if penalty == 1.0 or row.history is None:
        return
    seen = torch.as_tensor(row.history, dtype=torch.int64, device=scores.device)
    before = scores[seen]
    scores[seen] = torch.where(before < 0, before * penalty, before / penalty)


def _keep_top_k(scores: Tensor, top_k: int) -> None:
    """Drop all below the k-th largest score; ties with it stay."""
    if top_k < len(scores):
        scores.masked_fill_(scores < scores.topk(top_k).values[-1], -torch.inf)


def _keep_top_p(scores: Tensor, top_p: float) -> None:
    """Keep the smallest set of most likely tokens whose probabilities reach `top_p`."""
    probs = torch.softmax(scores, dim=0)
    best, ids = probs.topk(min(_NUCLEUS_TOKENS, len(probs)))
    if best.sum() < top_p:
        best, ids = probs.sort(descending=True, stable=True)
    more_likely = best.double().cumsum(0) - best.double()
    kept = ids[more_likely < top_p]
    dropped = torch.ones_like(scores, dtype=torch.bool).index_fill_(0, kept, False)
    scores.masked_fill_(dropped, -torch.inf)


def scores_at_once(scores: Tensor, rows: list[Row]) -> Tensor:
    """What the loop over rows in `_scores` does, for all rows together and without waiting for the device.

    Args:
        scores: float32 [rows, vocab], changed in place.
    """
    device, vocab_size = scores.device, scores.shape[1]

    def column(values: list[int] | list[float], dtype: type[np.generic]) -> Tensor:
        return upload(np.asarray(values, dtype), device)

    penalised = [i for i, row in enumerate(rows) if row.params.repetition_penalty != 1.0 and row.history is not None]
    if penalised:
        histories = [np.asarray(rows[i].history, np.int64) for i in penalised]
        counts = [len(history) for history in histories]
        owners = upload(np.repeat(np.asarray(penalised, np.int64), counts), device)
        seen = upload(np.concatenate(histories), device)
        penalties = np.asarray([rows[i].params.repetition_penalty for i in penalised], np.float32)
        penalty = upload(np.repeat(penalties, counts), device)
        before = scores[owners, seen]
        scores[owners, seen] = torch.where(before < 0, before * penalty, before / penalty)
    sampled = [i for i, row in enumerate(rows) if not row.params.greedy]
    if not sampled:
        return scores
    params = [rows[i].params for i in sampled]
    chosen = column(sampled, np.int64)
    shaped = scores[chosen] / column([p.temperature for p in params], np.float32)[:, None]
    cut = [i for i, p in enumerate(params) if 0 < p.top_k < vocab_size]
    if cut:
        _keep_top_k_of(shaped, column(cut, np.int64), column([params[i].top_k for i in cut], np.int64))
    nuclei = [i for i, p in enumerate(params) if p.top_p < 1.0]
    if nuclei:
        _keep_top_p_of(shaped, column(nuclei, np.int64), column([params[i].top_p for i in nuclei], np.float64))
    keys = [(rows[i].params.seed, rows[i].position) for i in sampled]
    distinct = {key: place for place, key in enumerate(dict.fromkeys(keys))}
    noise = gumbel_noise_rows(list(distinct), vocab_size, device)
    scores[chosen] = shaped + noise[column([distinct[key] for key in keys], np.int64)]
    return scores


def _keep_top_k_of(scores: Tensor, rows: Tensor, top_k: Tensor) -> None:
    """`_keep_top_k` of these rows."""
    own = scores[rows]
    least = own.sort(dim=1, descending=True).values.gather(1, top_k[:, None] - 1)
    scores[rows] = own.masked_fill(own < least, -torch.inf)


def _keep_top_p_of(scores: Tensor, rows: Tensor, top_p: Tensor) -> None:
    """`_keep_top_p` of these rows."""
    own = scores[rows]
    best, ids = torch.softmax(own, dim=1).sort(dim=1, descending=True, stable=True)
    more_likely = best.double().cumsum(1) - best.double()
    dropped = torch.zeros_like(own, dtype=torch.bool).scatter_(1, ids, more_likely >= top_p[:, None])
    scores[rows] = own.masked_fill(dropped, -torch.inf)
