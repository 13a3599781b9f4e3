"""Training batches out of the corpus: whole texts, padded to the longest of their batch."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from distill.corpus import Shard, read_shard

HELD_OUT_EVERY = 50


@dataclass(frozen=True)
class Sample:
    """The place of one text.

    Attributes:
        start, length: its tokens' range in the shard.
        turn_start: its first token that the target chose.
    """

    index: int
    shard: Shard
    start: int
    length: int
    turn_start: int

    @property
    def token_ids(self) -> Tensor:
        return self.shard.token_ids[self.start : self.start + self.length]


@dataclass(frozen=True)
class TrainingBatch:
    """Texts as rows, padded at the end.

    Attributes:
        token_ids: int64 [texts, tokens].
        features: [texts, tokens, width] of the target at these tokens.
        counts: bool [texts, tokens]: the target chose the next token, so it is trained on.
    """

    token_ids: Tensor
    features: Tensor
    counts: Tensor

    def to(self, device: torch.device) -> TrainingBatch:
        return TrainingBatch(self.token_ids.to(device), self.features.to(device), self.counts.to(device))


class Corpus:
    """The texts of a folder, without those that repeat another one's user turn; features stay on disk."""

    def __init__(self, folder: Path) -> None:
        samples = sorted(_samples(folder), key=lambda sample: sample.index)
        seen: set[tuple[int, ...]] = set()
        distinct = []
        for sample in samples:
            turn = tuple(sample.token_ids[sample.turn_start :].tolist())
            if turn not in seen:
                seen.add(turn)
                distinct.append(sample)
        self.held_out = [sample for sample in distinct if sample.index % HELD_OUT_EVERY == 0]
        self.training = [sample for sample in distinct if sample.index % HELD_OUT_EVERY]
        self._files: dict[Path, Any] = {}

    def frequent_tokens(self, count: int, vocab_size: int) -> Tensor:
        """int64 [count], increasing: the tokens the target wrote most, then the lowest it never wrote."""
        written = Counter[int]()
        for sample in self.training:
            written.update(sample.token_ids[sample.turn_start :].tolist())
        ranked = sorted(range(vocab_size), key=lambda token: (-written[token], token))
        return torch.tensor(sorted(ranked[:count]))

    def epoch(self, number: int, seed: int, batch_tokens: int) -> list[list[Sample]]:
        """All training texts once, in this epoch's own order, those of similar length together."""
        rng = random.Random(f"{seed} {number}")
        order = sorted(self.training, key=lambda sample: (sample.length // 16, rng.random()))
        batches = list(_grouped(order, batch_tokens))
        rng.shuffle(batches)
        return batches

    def held_out_batches(self, batch_tokens: int) -> Iterator[TrainingBatch]:
        for batch in _grouped(sorted(self.held_out, key=lambda sample: sample.length), batch_tokens):
            yield self.load(batch)

    def load(self, samples: list[Sample]) -> TrainingBatch:
        longest = max(sample.length for sample in samples)
        first = self._features(samples[0])
        token_ids = torch.zeros(len(samples), longest, dtype=torch.int64)
        features = torch.zeros(len(samples), longest, first.shape[1], dtype=first.dtype)
        counts = torch.zeros(len(samples), longest, dtype=torch.bool)
        for row, sample in enumerate(samples):
            token_ids[row, : sample.length] = sample.token_ids
            features[row, : sample.length] = self._features(sample)
            counts[row, sample.turn_start : sample.length - 1] = True
        return TrainingBatch(token_ids, features, counts)

    def _features(self, sample: Sample) -> Tensor:
        path = sample.shard.path
        if path not in self._files:
            self._files[path] = safe_open(path, "pt").__enter__()
        return self._files[path].get_slice("features")[sample.start : sample.start + sample.length]


def _samples(folder: Path) -> Iterator[Sample]:
    for path in sorted(folder.glob("*.safetensors")):
        shard = read_shard(path)
        start = 0
        for index, length, turn_start in zip(shard.indices, shard.lengths, shard.turn_starts, strict=True):
            yield Sample(index, shard, start, length, turn_start)
            start += length


def _grouped(samples: list[Sample], batch_tokens: int) -> Iterator[list[Sample]]:
    """Runs of samples whose padded size stays within `batch_tokens`."""
    batch: list[Sample] = []
    for sample in samples:
        longest = max([sample.length, *(other.length for other in batch)])
        if batch and longest * (len(batch) + 1) > batch_tokens:
            yield batch
            batch = []
        batch.append(sample)
    if batch:
        yield batch
