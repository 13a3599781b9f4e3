"""Block KV cache shared by many sequences. Storage never moves; a sequence owns a block table.

A block is `block_tokens` consecutive slots of the storage. Consecutive blocks form a run, which attention reads as one
view; so the allocator hands out the smallest single run that fits, and several only if it must. Full blocks whose
tokens are known may be shared, and stay readable after they are freed until they are reused.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import islice, pairwise
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lm.blocks.free_runs import FreeRuns
from lm.blocks.prefix_index import PrefixIndex
from lm.cpu.large_pages import zeros_in_large_pages
from lm.device import upload
from treeline.errors import ConfigError

CPU_TOKENS = 16384
CUDA_SHARE = 0.9
"""Share of the memory left free after loading weights."""
RESERVED_BYTES = 6 << 30
"""For captured passes (2 GiB), and logits and sampling of 512 rows of a vocabulary of 152,000 (4 GiB in float32)."""


@dataclass(frozen=True)
class LayerShape:
    """What one layer stores per token: keys [kv_heads, key_dim] and values [kv_heads, value_dim]."""

    kv_heads: int
    key_dim: int
    value_dim: int


@dataclass(eq=False)
class SequenceCache:
    """One sequence's blocks in the cache.

    Attributes:
        blocks: indices of its blocks, in token order; empty once freed.
        length: committed tokens.
        scratch: entries after them, from forward passes since the last commit.
        shared_tokens: in the first blocks, which other sequences may read too; never written.
        table: `blocks` as int32.
        slots_address: address of the slots of all entries, int64 [capacity].
    """

    blocks: list[int]
    block_tokens: int
    length: int = 0
    scratch: int = 0
    shared_tokens: int = 0
    table: NDArray[np.int32] = field(init=False, repr=False)
    slots_address: int = field(init=False, repr=False)
    _slots: NDArray[np.int64] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.place(self.blocks)

    def place(self, blocks: list[int]) -> None:
        """Use these blocks from now on; committed entries stay where they are."""
        self.blocks = blocks
        self.table = np.asarray(blocks, np.int32)
        first_slots = self.table.astype(np.int64) * self.block_tokens
        self._slots = (first_slots[:, None] + np.arange(self.block_tokens)).ravel()
        self.slots_address = self._slots.ctypes.data

    @property
    def capacity(self) -> int:
        """Entries that fit, committed and scratch together."""
        return len(self._slots)

    def truncate(self, length: int) -> None:
        """Keep only the first `length` committed tokens and no scratch.

        Raises:
            ValueError: fewer are committed, or the rest of a shared block would be written.
        """
        if not self.shared_tokens <= length <= self.length:
            raise ValueError(f"cannot truncate {self.length} committed tokens to {length}")
        self.length = length
        self.scratch = 0

    def slots(self, start: int, stop: int) -> NDArray[np.int64]:
        """int64 [stop - start]: storage slots of these entries.

        Raises:
            ValueError: they exceed the capacity.
        """
        if stop > self.capacity:
            raise ValueError(f"{stop} KV entries exceed the sequence's {self.capacity}")
        return self._slots[start:stop]

    def runs(self, start: int, stop: int) -> list[slice]:
        """The storage slots of these entries as maximal runs of consecutive slots, in order."""
        slots = self.slots(start, stop)
        breaks = np.flatnonzero(np.diff(slots) != 1) + 1
        return [slice(int(run[0]), int(run[-1]) + 1) for run in np.split(slots, breaks)] if len(slots) else []


class KVCache:
    """Keys and values of all layers for `total_blocks * block_tokens` tokens.

    Args:
        layers: one shape per layer.
        num_tokens: rounded down to whole blocks, at least one.

    Attributes:
        keys, values: per layer [slots, kv_heads, head_dim], views of the storage.
        trash_slot: the slot after all blocks; what is written there is ignored.
        announce: as in `Passes`; called when entries move.
    """

    def __init__(
        self, layers: list[LayerShape], num_tokens: int, block_tokens: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.announce: Callable[..., None] | None = None
        self.block_tokens = block_tokens
        self.total_blocks = max(1, num_tokens // block_tokens)
        self._users = np.zeros(self.total_blocks, np.int64)
        self._blank = FreeRuns(self.total_blocks)
        """Blocks that nobody uses and that hold no known prefix."""
        self._index = PrefixIndex(block_tokens)
        # One storage [tensors, slots, kv_heads, head_dim] per distinct shape: a plain model has one for all its layers.
        shapes = [(s.kv_heads, dim) for s in layers for dim in (s.key_dim, s.value_dim)]
        self.trash_slot = self.total_blocks * block_tokens
        storages = {
            shape: _zeros((count, self.trash_slot + 1, *shape), dtype, device)
            for shape, count in Counter(shapes).items()
        }
        tensors = {shape: iter(storage.unbind(0)) for shape, storage in storages.items()}
        views = [next(tensors[shape]) for shape in shapes]
        self._storages = list(storages.values())
        self.keys, self.values = views[::2], views[1::2]

    @classmethod
    def sized(
        cls,
        layers: list[LayerShape],
        num_tokens: int | Literal["auto"],
        block_tokens: int | Literal["auto"],
        dtype: torch.dtype,
        device: torch.device,
    ) -> KVCache:
        """A cache; "auto" picks a size and block size that suit the device.

        Raises:
            ConfigError: the device has no room for it.
        """
        on_cuda = device.type == "cuda"
        # A block of whole tiles needs one lookup per tile, and the host sends an eighth of the indices.
        block_tokens = (128 if on_cuda else 16) if block_tokens == "auto" else block_tokens
        token_bytes = dtype.itemsize * sum(shape.kv_heads * (shape.key_dim + shape.value_dim) for shape in layers)
        if num_tokens == "auto":
            num_tokens = CPU_TOKENS
            if on_cuda:
                free_bytes = torch.cuda.mem_get_info(device)[0]
                num_tokens = int((free_bytes * CUDA_SHARE - RESERVED_BYTES) // token_bytes)
        try:
            if num_tokens < block_tokens:
                raise torch.OutOfMemoryError("no block fits")
            return cls(layers, num_tokens, block_tokens, dtype, device)
        except torch.OutOfMemoryError as error:
            size = f"{num_tokens} tokens of {token_bytes >> 10} KiB"
            raise ConfigError(f"a KV cache of {size} does not fit the device; set kv_cache_tokens") from error

    @property
    def free_blocks(self) -> int:
        """Blocks that no sequence uses, whether or not a known prefix could still be read from them."""
        return int((self._users == 0).sum())

    @property
    def used_blocks(self) -> int:
        return self.total_blocks - self.free_blocks

    def blocks_for(self, tokens: int) -> int:
        """How many blocks hold `tokens` entries."""
        return -(-tokens // self.block_tokens)

    def allocate(self, tokens: int, prefix: list[int] | None = None, headroom: int = 0) -> SequenceCache | None:
        """Reserve blocks for `tokens` entries; None if too few are free.

        Args:
            prefix: first tokens of the sequence; full blocks that already hold them are shared, as committed tokens.
            headroom: blocks that must stay free.
        """
        shared = self._index.match(prefix or [])
        needed = self.blocks_for(tokens) - len(shared)
        self._users[shared] += 1  # First, so that they cannot be evicted.
        if needed + headroom > self.free_blocks:
            self._users[shared] -= 1
            return None
        known = len(shared) * self.block_tokens
        return SequenceCache(shared + self._take(needed), self.block_tokens, known, shared_tokens=known)

    def extend(self, sequence: SequenceCache, tokens: int) -> bool:
        """Grow `sequence` to hold `tokens` entries; False, and nothing changes, if too few blocks are free."""
        needed = self.blocks_for(tokens) - len(sequence.blocks)
        if needed <= 0:
            return True
        if needed > self.free_blocks:
            return False
        sequence.place(sequence.blocks + self._take(needed, after=sequence.blocks[-1] if sequence.blocks else -1))
        return True

    def shrink(self, sequence: SequenceCache, tokens: int) -> None:
        """Free the blocks after the first `tokens` entries, except committed ones; there must be no scratch."""
        kept = self.blocks_for(max(tokens, sequence.length))
        spare = sequence.blocks[kept:]
        if spare:  # Neither shared nor in the prefix index: nothing is committed there.
            self._users[spare] -= 1
            self._blank.add(spare)
            sequence.place(sequence.blocks[:kept])

    def remember(self, sequence: SequenceCache, token_ids: list[int]) -> None:
        """Let others share the full blocks of these tokens, the sequence's first committed ones."""
        known = token_ids[: sequence.length]
        self._index.add(known, sequence.blocks)
        sequence.shared_tokens = len(known) // self.block_tokens * self.block_tokens

    def free(self, sequence: SequenceCache) -> None:
        """Free all blocks of `sequence`, which then has no capacity. Freeing twice is harmless."""
        self._users[sequence.blocks] -= 1
        self._blank.add([block for block in sequence.blocks if not self._users[block] and block not in self._index])
        for block in reversed(sequence.blocks):  # The end of a text is evicted before its beginning.
            self._index.touch(block)
        sequence.__init__([], self.block_tokens)  # type: ignore[misc]

    def _take(self, needed: int, after: int = -1) -> list[int]:
        """Take `needed` free blocks. Known prefixes are evicted, oldest first, only if no others are left.

        Blocks that follow block `after` come first: attention reads a run at once.
        """
        unused = (block for block in self._index.oldest_first() if not self._users[block])
        forgotten = list(islice(unused, max(0, needed - len(self._blank))))
        for block in forgotten:
            self._index.forget(block)
        self._blank.add(forgotten)
        blocks = self._blank.take(needed, after)
        self._users[blocks] = 1
        return blocks

    @torch.inference_mode()
    def commit(self, moves: list[tuple[SequenceCache, list[int]]]) -> None:
        """For each sequence append these scratch entries (increasing), in order, to its committed ones.

        All other scratch is dropped. One gather and one scatter for all layers and sequences.

        Raises:
            ValueError: an entry is not in the scratch, or they do not increase.
        """
        sources, targets = [], []
        for sequence, kept in moves:
            if kept and (kept[0] < 0 or kept[-1] >= sequence.scratch or any(b <= a for a, b in pairwise(kept))):
                raise ValueError(f"not increasing indices into {sequence.scratch} scratch entries: {kept}")
            start, end = sequence.length, sequence.length + len(kept)
            moved = [entry for place, entry in enumerate(kept) if entry != place]  # The last ones, since they increase.
            if moved:
                sources.append(sequence.slots(start, start + sequence.scratch)[moved])
                targets.append(sequence.slots(end - len(moved), end))
            sequence.length, sequence.scratch = end, 0
        if not sources:
            return
        source, target = np.concatenate(sources), np.concatenate(targets)
        if self.announce is not None:
            self.announce("move", source, target)
        self.move(source, target)

    @torch.inference_mode()
    def move(self, sources: NDArray[np.int64], targets: NDArray[np.int64]) -> None:
        """Copy entries from some slots to others."""
        device = self._storages[0].device
        source, target = upload(sources, device), upload(targets, device)
        if device.type == "cuda":
            from lm.cuda.elementwise import move_entries  # Triton is not installed everywhere.

            for storage in self._storages:
                move_entries(storage, source, target)
        else:
            for storage in self._storages:
                storage.index_copy_(1, target, storage.index_select(1, source))


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    return zeros_in_large_pages(math.prod(shape) * dtype.itemsize).view(dtype).view(shape)
