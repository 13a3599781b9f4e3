"""From logits to tokens: the target's own token at each row, the drafter's proposals, log-probabilities."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lm.cpu.choice import bar, best, largest
from lm.device import upload
from lm.noise import gumbel_noise
from treeline.sampling import SamplingParams

_NUCLEUS_TOKENS = 512
"""Most nuclei are smaller than this, so sorting this many tokens usually suffices."""
_ROWS_AT_ONCE = 64
"""With a vocabulary of 152,000 they take 78 MB in float32, copies included."""
_LEAST_PROB = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class Row:
    """How to choose the token that follows one row of logits.

    Attributes:
        position: absolute index in the sequence of the token to be chosen.
        history: int64 [t], all tokens before it on this row's own path; only penalties read it.
        prompt_tokens: how many of them, from the start, belong to the prompt.
        barred: ids of tokens that may not follow.
        allowed: int32 [vocab / 32, rounded up], one bit per token, lowest first, set if it may follow; None for all.
    """

    params: SamplingParams
    position: int
    history: Tensor | NDArray[np.int64] | None = None
    prompt_tokens: int = 0
    barred: Collection[int] = ()
    allowed: NDArray[np.int32] | None = None

    @property
    def is_argmax(self) -> bool:
        """Whether the token is the argmax of the raw logits, among those `allowed`."""
        return self.params.is_argmax and not self.barred


@torch.inference_mode()
def choose_tokens(logits: Tensor, rows: list[Row]) -> Tensor:
    """The target's own token after each row: argmax(log p + g), g being position-keyed noise, 0 for greedy rows.

    p is the row's distribution as `SamplingParams` says, over the tokens that are not barred.

    Args:
        logits: [rows, vocab]; not changed.

    Returns:
        int64 [rows]. A row's token depends on nothing but its own logits and parameters.
    """
    firsts = range(0, max(1, len(rows)), _ROWS_AT_ONCE)
    parts = [slice(first, first + _ROWS_AT_ONCE) for first in firsts]
    return torch.cat([_choose(logits[part], rows[part]) for part in parts])


def _choose(logits: Tensor, rows: list[Row]) -> Tensor:
    allowed = [row.allowed for row in rows if row.is_argmax and row.allowed is not None]
    if len(allowed) == len(rows) > 0:
        return largest(logits.float(), np.stack(allowed))  # Copying the scores first takes four times as long.
    return argmax(_scores(logits, rows))


def argmax(scores: Tensor) -> Tensor:
    """int64 [rows]: index of each row's largest score, the first of equals. `scores` is float32 [rows, vocab]."""
    return largest(scores)


@torch.inference_mode()
def top_drafts(logits: Tensor, rows: list[Row], k: int) -> tuple[Tensor, Tensor]:
    """What to propose after each row of a draft model's `logits` [rows, vocab], best first.

    Returns:
        ids int64 [rows, k], and probs float32 [rows, k] in (0, 1]: the draft model's probability for greedy rows, the
        softmax of the noise-perturbed scores for sampled ones. Tokens excluded by top-k or top-p have (almost) none.
    """
    return best(_scores(logits, rows), k, _LEAST_PROB)


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
    if all(row.is_argmax and row.allowed is None for row in rows):
        return scores
    scores = scores.clone()
    _adjust(scores, rows)
    if scores.device.type == "cuda" and not all(row.params.greedy for row in rows):
        from lm.cuda.sampling import perturbed  # Triton is not installed everywhere.

        return perturbed(scores, [row.params for row in rows], [row.position for row in rows])
    noise: dict[tuple[int, int], Tensor] = {}  # Nodes of one request at one depth share theirs.
    for row, row_scores in zip(rows, scores, strict=True):
        params = row.params
        if params.greedy:
            continue
        row_scores /= params.temperature
        if params.top_k:
            _keep_top_k(row_scores, params.top_k)
        if params.top_p < 1.0:
            _keep_top_p(row_scores, params.top_p)
        if params.min_p > 0.0:
            _keep_min_p(row_scores, params.min_p)
        key = params.seed, row.position
        if key not in noise:
            noise[key] = gumbel_noise(*key, logits.shape[1], logits.device)
        row_scores += noise[key]
    return scores


def _adjust(scores: Tensor, rows: list[Row]) -> None:
    """Add biases, bar tokens and apply penalties: in place, all rows at once, without waiting for the device.

    The repetition penalty is CTRL's (Keskar et al., 2019), the other two are OpenAI's.

    Example: after the answer [7, 7, 5], frequency penalty 0.5 and presence penalty 1 lower logit 7 by 2 and 5 by 1.5.
    """
    added, repeated, counted = _Entries(scores), _Entries(scores), _Entries(scores)
    for place, row in enumerate(rows):
        params = row.params
        if params.logit_bias or row.barred:
            bias = {**params.logit_bias, **dict.fromkeys(row.barred, -np.inf)}
            added.add(place, np.fromiter(bias, np.int64), np.fromiter(bias.values(), np.float32))
        if row.history is not None and params.repetition_penalty != 1.0:
            history = np.asarray(row.history, np.int64)
            repeated.add(place, history, np.full(len(history), params.repetition_penalty))
        if row.history is not None and params.counts_answer:
            ids, counts = np.unique(np.asarray(row.history, np.int64)[row.prompt_tokens :], return_counts=True)
            counted.add(place, ids, params.presence_penalty + params.frequency_penalty * counts)
    bound = {place: row.allowed for place, row in enumerate(rows) if row.allowed is not None}
    if bound:
        bar(scores, [*bound], np.stack([*bound.values()]))
    added.apply(torch.add)
    repeated.apply(lambda before, penalty: torch.where(before < 0, before * penalty, before / penalty))
    counted.apply(torch.sub)


class _Entries:
    """Numbers for some entries (row, token id) of `scores` float32 [rows, vocab], to change those entries by."""

    def __init__(self, scores: Tensor) -> None:
        self._scores = scores
        self._columns: list[tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]] = []

    def add(self, row: int, ids: NDArray[np.int64], values: NDArray[np.floating]) -> None:
        known = ids < self._scores.shape[1]  # A draft model may have fewer tokens than the target.
        if known.any():
            self._columns.append((np.full(known.sum(), row), ids[known], values[known].astype(np.float32)))

    def apply(self, change: Callable[[Tensor, Tensor], Tensor]) -> None:
        """Set each entry to `change(score, number)`."""
        if self._columns:
            columns = (np.concatenate(parts) for parts in zip(*self._columns, strict=True))
            rows, ids, values = (upload(column, self._scores.device) for column in columns)
            self._scores[rows, ids] = change(self._scores[rows, ids], values)


def _keep_top_k(scores: Tensor, top_k: int) -> None:
    """Drop all below the k-th largest score; ties with it stay."""
    if top_k < len(scores):
        scores.masked_fill_(scores < scores.topk(top_k).values[-1], -torch.inf)


def _keep_top_p(scores: Tensor, top_p: float) -> None:
    """Keep the smallest set of most likely tokens whose probabilities reach `top_p`; ties with the last one stay."""
    total = scores.logsumexp(0)
    highest = scores.topk(min(_NUCLEUS_TOKENS, len(scores))).values
    if (highest - total).exp().sum() < top_p:
        highest = scores.sort(descending=True).values
    probs = (highest - total).exp().double()
    kept = int((probs.cumsum(0) - probs < top_p).sum())
    scores.masked_fill_(scores < highest[kept - 1], -torch.inf)


def _keep_min_p(scores: Tensor, min_p: float) -> None:
    """Drop tokens less likely than `min_p` times the most likely one."""
    scores.masked_fill_(scores < scores.max() + math.log(min_p), -torch.inf)
