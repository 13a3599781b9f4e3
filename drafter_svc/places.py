"""Who has a place in a drafter's KV cache: the sessions used last, as many as there is room for."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

from lm.kv_cache import KVCache, SequenceCache

GROWTH_TOKENS = 256
"""Least room for new tokens when a session's cache is reserved."""


class Place(Protocol):
    """What a proposer keeps of a session beside its part of the cache."""

    @property
    def kv(self) -> SequenceCache: ...


P = TypeVar("P", bound=Place)


class Places(Generic[P]):
    """Sessions and their places, the least recently used first; those give way when room is needed.

    Args:
        make: a new session's place.
    """

    def __init__(self, cache: KVCache, make: Callable[[SequenceCache], P]) -> None:
        self._cache = cache
        self._make = make
        self._places: OrderedDict[int, P] = OrderedDict()

    @property
    def capacity_tokens(self) -> int:
        return self._cache.total_blocks * self._cache.block_tokens

    def __getitem__(self, session_id: int) -> P:
        return self._places[session_id]

    def use(self, session_id: int) -> P | None:
        """A session's place, if it has one; it is now the one used last."""
        place = self._places.get(session_id)
        if place is not None:
            self._places.move_to_end(session_id)
        return place

    def reserve(self, session_id: int, tokens: int, tree_nodes: int, current: set[int]) -> P | None:
        """A place for a session of `tokens` tokens and a tree, its old one if that is large enough.

        None if there is no room without touching the sessions of `current`.
        """
        place, needed = self._places.get(session_id), tokens + tree_nodes
        if place is not None and place.kv.capacity >= needed:
            return place
        self.release(session_id)  # a place that is too small is given up and rebuilt elsewhere
        for room in (max(tokens, GROWTH_TOKENS), GROWTH_TOKENS // 4):
            while needed + room <= self.capacity_tokens:
                kv = self._cache.allocate(needed + room)
                if kv is not None:
                    place = self._places[session_id] = self._make(kv)
                    return place
                oldest = next(iter(self._places), None)
                if oldest is None or oldest in current:
                    break
                self.release(oldest)
        return None

    def release(self, session_id: int) -> None:
        """Give a session's place back; one that has none is ignored."""
        place = self._places.pop(session_id, None)
        if place is not None:
            self._cache.free(place.kv)
