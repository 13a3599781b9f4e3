"""The drafter's sessions: each request's tokens and its part of the draft model's KV cache."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from lm.kv_cache import KVCache, SequenceCache
from treeline.drafting import NO_FEATURES, DraftSequence
from treeline.forest import ROOT

GROWTH_TOKENS = 256
"""Least room for new tokens when KV is reserved for a session: one answer, so that few sessions are rebuilt."""

Key = tuple[int, int]
"""(verifier's stream, session id): session ids are unique for each verifier only."""


@dataclass(eq=False)
class Session:
    """One request.

    Attributes:
        tokens: the whole sequence, the last token being the next tree's root.
        unchanged: leading tokens that the latest update did not change.
        features: of the latest update (see `DraftSequence`).
        kv: its part of the draft model's cache: committed tokens, then the tree's nodes in scratch.
        kv_start: index of the first token in `kv`.
        parents: scratch index of each scratch entry's parent, ROOT for children of the root.
        entries: scratch index by (parent's scratch index, token).
    """

    key: Key
    tokens: list[int] = field(default_factory=list)
    unchanged: int = 0
    features: NDArray[np.uint16] = field(default_factory=lambda: NO_FEATURES)
    kv: SequenceCache | None = None
    kv_start: int = 0
    parents: list[int] = field(default_factory=list)
    entries: dict[tuple[int, int], int] = field(default_factory=dict)

    def update(self, start: int, token_ids: list[int], features: NDArray[np.uint16] = NO_FEATURES) -> None:
        """Replace the tokens from `start` on by `token_ids`."""
        self.features = features
        old = self.tokens[start:]
        same = next((i for i, (a, b) in enumerate(zip(old, token_ids, strict=False)) if a != b), None)
        self.unchanged = start + (min(len(old), len(token_ids)) if same is None else same)
        self.tokens[start:] = token_ids

    def forget_tree(self) -> None:
        self.parents, self.entries = [], {}

    def accepted_entries(self) -> list[int]:
        """Scratch entries of the last tree along the tokens committed since, the new root excepted."""
        path: list[int] = []
        if self.kv is None or self.unchanged < self.kv.length:
            return path
        for token_id in self.tokens[self.kv.length : -1]:
            entry = self.entries.get((path[-1] if path else ROOT, token_id))
            if entry is None:
                break
            path.append(entry)
        return path


class SessionMemory:
    """At most `max_sessions` sessions and their KV; the least recently used ones are evicted.

    The sessions of one step never evict one another. A session without KV is rebuilt from its tokens.
    """

    def __init__(self, max_sessions: int, cache: KVCache | None) -> None:
        """`cache`: of the draft model, if there is one."""
        self._max_sessions = max_sessions
        self._cache = cache
        self._sessions: OrderedDict[Key, Session] = OrderedDict()
        self._current: set[Key] = set()  # sessions of the present step

    def __len__(self) -> int:
        return len(self._sessions)

    def __iter__(self) -> Iterator[Key]:
        return iter([*self._sessions])

    def admit(self, verifier: int, sequences: list[DraftSequence]) -> tuple[list[Session | None], dict[int, int]]:
        """Bring the sessions of one step up to date.

        A session that lacks tokens before its sequence's `start` stays as it is; beyond `max_sessions` sequences the
        later ones are not admitted.

        Returns:
            The session of each sequence, None if it is not up to date; and the tokens that each of those holds.
        """
        keys = [(verifier, sequence.session_id) for sequence in sequences]
        self._current = set(keys)
        for key in keys:
            if key in self._sessions:
                self._sessions.move_to_end(key)
        held: dict[int, int] = {}
        admitted: list[Session | None] = []
        for key, sequence in zip(keys, sequences, strict=True):
            session = self._sessions.get(key)
            held_tokens = len(session.tokens) if session else 0
            if held_tokens < sequence.start or (session is None and not self._make_room()):
                held[sequence.session_id] = held_tokens
                admitted.append(None)
                continue
            if session is None:
                session = self._sessions[key] = Session(key)
            session.update(sequence.start, sequence.token_ids, sequence.features)
            admitted.append(session)
        return admitted, held

    def reserve_kv(self, session: Session, tokens: int, tree_nodes: int) -> SequenceCache | None:
        """KV for `tokens` tokens of a session of this step and a tree; its present KV if that is large enough.

        None if there is no room without evicting other sessions of this step.
        """
        assert self._cache is not None
        needed = tokens + tree_nodes
        if session.kv is not None and session.kv.capacity >= needed:
            return session.kv
        self.free_kv(session)  # rebuilt in a larger place
        idle = iter([s for key, s in self._sessions.items() if s.kv is not None and key not in self._current])
        for room in (max(tokens, GROWTH_TOKENS), GROWTH_TOKENS // 4):
            while needed + room <= self._cache.total_blocks * self._cache.block_tokens:
                session.kv = self._cache.allocate(needed + room)
                if session.kv is not None:
                    return session.kv
                oldest = next(idle, None)
                if oldest is None:
                    break
                self.free_kv(oldest)
        return None

    def free_kv(self, session: Session) -> None:
        """Give a session's KV back, if it has any."""
        if session.kv is not None and self._cache is not None:
            self._cache.free(session.kv)
        session.kv, session.kv_start = None, 0
        session.forget_tree()

    def release(self, keys: Iterable[Key]) -> None:
        """Forget sessions; unknown ones are ignored."""
        for key in keys:
            session = self._sessions.pop(key, None)
            if session is not None:
                self.free_kv(session)

    def _make_room(self) -> bool:
        """Make room for one more session; False if all sessions belong to this step."""
        if len(self._sessions) < self._max_sessions:
            return True
        oldest = next(iter(self._sessions))
        if oldest in self._current:
            return False
        self.release([oldest])
        return True
