"""The paged KV cache: one storage for all sequences, block tables, and scratch entries behind each sequence.

Blocks of one sequence are handed out as one contiguous run where there is one, so that attention can read them as a
view. A block table may have any number of runs all the same.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import groupby

import numpy as np
import torch
from numpy.typing import NDArray


@dataclass
class SequenceCache:
    """One sequence's part of the cache.

    Attributes:
        blocks: block table; entry i holds tokens i * block_tokens and following.
        slots: int64 [capacity]; storage slot of each entry.
        length: committed tokens.
        scratch: entries behind them, written by forward passes since the last commit.
    """

    blocks: list[int]
    slots: NDArray[np.int64]
    length: int = 0
    scratch: int = 0
    runs: list[tuple[int, int]] = field(default_factory=list)

    @property
    def capacity(self) -> int:
        return len(self.slots)

    def truncate(self, length: int) -> None:
        """Forget committed tokens from `length` on, and all scratch."""
        self.length = min(self.length, length)
        self.scratch = 0


class KVCache:
    """Keys and values of all layers.

    Attributes:
        storage: [layers, 2, kv_heads, slots, head_dim]; index 1 of the second dimension holds values.
    """

    def __init__(
        self,
        layers: int,
        kv_heads: int,
        head_dim: int,
        num_tokens: int,
        block_tokens: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.block_tokens = block_tokens
        self.total_blocks = -(-num_tokens // block_tokens)
        slots = self.total_blocks * block_tokens
        self.storage = torch.zeros(layers, 2, kv_heads, slots, head_dim, dtype=dtype, device=device)
        self._free = list(range(self.total_blocks))  # sorted

    @property
    def free_blocks(self) -> int:
        return len(self._free)

    @property
    def used_blocks(self) -> int:
        return self.total_blocks - len(self._free)

    def allocate(self, tokens: int) -> SequenceCache | None:
        """Reserve blocks for `tokens` entries; None if too few are free."""
        needed = -(-tokens // self.block_tokens)
        if needed > len(self._free):
            return None
        blocks = self._take(needed)
        offsets = np.arange(self.block_tokens, dtype=np.int64)
        slots = (np.asarray(blocks, np.int64)[:, None] * self.block_tokens + offsets).reshape(-1)
        runs = [(start * self.block_tokens, count * self.block_tokens) for start, count in _runs(blocks)]
        return SequenceCache(blocks, slots, runs=runs)

    def free(self, sequence: SequenceCache) -> None:
        """Give a sequence's blocks back. It must not be used afterwards."""
        self._free = sorted(self._free + sequence.blocks)
        sequence.blocks, sequence.slots, sequence.runs = [], np.zeros(0, np.int64), []
        sequence.length = sequence.scratch = 0

    def commit(self, moves: list[tuple[SequenceCache, list[int]]]) -> None:
        """Keep these scratch entries (indices into each one's scratch, root first), in order; drop all other scratch.

        Only entries that are not yet in place are copied, those of all sequences and layers in one go.
        """
        sources, targets = [], []
        for sequence, path in moves:
            start = sequence.length
            source = sequence.slots[start + np.asarray(path, np.int64)]
            target = sequence.slots[start : start + len(path)]
            moved = source != target
            sources.append(source[moved])
            targets.append(target[moved])
            sequence.length += len(path)
            sequence.scratch = 0
        if sum(map(len, sources)):
            device = self.storage.device
            source_slots = torch.from_numpy(np.concatenate(sources)).to(device)
            target_slots = torch.from_numpy(np.concatenate(targets)).to(device)
            self.storage[:, :, :, target_slots] = self.storage[:, :, :, source_slots]

    def _take(self, needed: int) -> list[int]:
        """Remove `needed` blocks from the free list: the smallest run that holds them all, else the longest runs."""
        runs = sorted(_runs(self._free), key=lambda run: run[1])
        fitting = next(((start, needed) for start, count in runs if count >= needed), None)
        if fitting is not None:
            taken = list(range(fitting[0], fitting[0] + needed))
        else:
            taken = []
            for start, count in reversed(runs):
                taken += range(start, start + min(count, needed - len(taken)))
                if len(taken) == needed:
                    break
        gone = set(taken)
        self._free = [block for block in self._free if block not in gone]
        return taken


def _runs(blocks: list[int]) -> list[tuple[int, int]]:
    """(first, count) of each stretch of consecutive block numbers, in order."""
    stretches = groupby(enumerate(blocks), key=lambda pair: pair[1] - pair[0])
    return [(members[0][1], len(members)) for _, group in stretches if (members := list(group))]
