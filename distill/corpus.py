"""Texts that the target wrote, on disk: shards of whole texts with their features, each shard written atomically."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from distill.writer import Text
from treeline.errors import ConfigError

SHARD_TOKENS = 16384
META = "corpus.json"


@dataclass(frozen=True)
class CorpusMeta:
    """Settings that all texts of a corpus share."""

    target: str
    vocabulary_sha256: str
    feature_layers: tuple[int, ...]
    max_tokens: int
    seed: int
    prompts_sha256: str


class CorpusWriter:
    """Appends texts to a folder. Those not yet in a whole shard when the process is killed are written again.

    Attributes:
        done: indices of the texts on disk.
        tokens: how many are on disk.
    """

    def __init__(self, folder: Path, meta: CorpusMeta) -> None:
        """Raises ConfigError if the folder's texts have other settings."""
        folder.mkdir(parents=True, exist_ok=True)
        described = json.dumps(asdict(meta), indent=2) + "\n"
        path = folder / META
        if path.exists() and path.read_text() != described:
            raise ConfigError(f"{folder} holds texts that were written otherwise ({META}); choose another folder")
        path.write_text(described)
        self._folder = folder
        self._pending: list[Text] = []
        shards = [read_shard(shard) for shard in sorted(folder.glob("*.safetensors"))]
        self.done = {index for shard in shards for index in shard.indices}
        self.tokens = sum(len(shard.token_ids) for shard in shards)
        self._shards = len(shards)

    def add(self, text: Text) -> None:
        self._pending.append(text)
        if sum(len(text.token_ids) for text in self._pending) >= SHARD_TOKENS:
            self.flush()

    def flush(self) -> None:
        if not self._pending:
            return
        lengths = torch.tensor([len(text.token_ids) for text in self._pending])
        columns = {
            "indices": torch.tensor([text.index for text in self._pending]),
            "lengths": lengths,
            "turn_starts": torch.tensor([text.turn_start for text in self._pending]),
            "token_ids": torch.tensor([token for text in self._pending for token in text.token_ids], dtype=torch.int32),
            "features": torch.cat([rows for text in self._pending for rows in text.features]).to("cpu", torch.bfloat16),
        }
        path = self._folder / f"{self._shards:05d}.safetensors"
        save_file(columns, path.with_suffix(".tmp"))
        path.with_suffix(".tmp").rename(path)
        self.done.update(text.index for text in self._pending)
        self.tokens += int(lengths.sum())
        self._shards += 1
        self._pending.clear()


@dataclass(frozen=True)
class Shard:
    """Some texts, concatenated.

    Attributes:
        indices, lengths, turn_starts: one per text.
        token_ids: int32 [tokens].
    """

    path: Path
    indices: list[int]
    lengths: list[int]
    turn_starts: list[int]
    token_ids: Tensor


def read_shard(path: Path) -> Shard:
    with safe_open(path, "pt") as file:
        columns = {name: file.get_tensor(name) for name in ("indices", "lengths", "turn_starts", "token_ids")}
    indices, lengths, turn_starts = (columns[name].tolist() for name in ("indices", "lengths", "turn_starts"))
    return Shard(path, indices, lengths, turn_starts, columns["token_ids"])
