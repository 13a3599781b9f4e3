"""Which KV blocks hold which tokens, so that a prompt that begins like an earlier one need not be computed again."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterator

import numpy as np


class PrefixIndex:
    """Full blocks by content: a hash chained over their tokens and all tokens before them.

    Does not track who uses a block; the owner reports each use, and decides when to forget a block.
    """

    def __init__(self, block_tokens: int) -> None:
        self._block_tokens = block_tokens
        self._block_by_hash: dict[bytes, int] = {}
        self._hash_by_block: OrderedDict[int, bytes] = OrderedDict()  # Least recently used first.

    def __contains__(self, block: int) -> bool:
        return block in self._hash_by_block

    def match(self, token_ids: list[int]) -> list[int]:
        """The blocks that hold the longest known prefix of these tokens, in order."""
        blocks: list[int] = []
        for digest in self._chain(token_ids):
            block = self._block_by_hash.get(digest)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def add(self, token_ids: list[int], blocks: list[int]) -> None:
        """Record that `blocks` hold these tokens, full blocks only. Content known in another block stays there."""
        for digest, block in zip(self._chain(token_ids), blocks, strict=False):
            if digest not in self._block_by_hash and block not in self._hash_by_block:
                self._block_by_hash[digest] = block
                self._hash_by_block[block] = digest

    def touch(self, block: int) -> None:
        """This block was used just now."""
        if block in self._hash_by_block:
            self._hash_by_block.move_to_end(block)

    def oldest_first(self) -> Iterator[int]:
        return iter(self._hash_by_block)

    def forget(self, block: int) -> None:
        del self._block_by_hash[self._hash_by_block.pop(block)]

    def _chain(self, token_ids: list[int]) -> Iterator[bytes]:
        """A hash per full block."""
        tokens, digest = np.asarray(token_ids, np.int64), b""
        for start in range(0, len(tokens) - self._block_tokens + 1, self._block_tokens):
            digest = hashlib.sha256(digest + tokens[start : start + self._block_tokens].tobytes()).digest()
            yield digest
