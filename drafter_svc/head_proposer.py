"""Drafts by a head that reads the target's hidden states: all requests of a step together, one tree layer a pass."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from drafter_svc.growth import GrowingTree
from drafter_svc.places import Places
from drafter_svc.proposer import (
    PROFILE_NODES,
    Children,
    LayerStats,
    collect_children,
    sampling_row,
    time_layers,
)
from drafter_svc.sessions import Session
from lm.draft_head import DraftHead
from lm.kv_cache import KVCache, SequenceCache
from lm.packed import PackedSequence
from treeline.tree import ROOT, Source

PROFILE_CONTEXT_TOKENS = 128


@dataclass
class _Followed:
    """A session's place in the head's cache.

    Attributes:
        kv: of the session's tokens from `first` on, root included; the tree's nodes in scratch.
        parents: scratch index of each scratch entry's parent, ROOT for children of the root.
        nodes: scratch index by node of the growing tree.
        states: the head's output [hidden] at the root and at these nodes.
    """

    kv: SequenceCache
    first: int = 0
    parents: list[int] = field(default_factory=list)
    nodes: dict[int, int] = field(default_factory=dict)
    states: dict[int, Tensor] = field(default_factory=dict)


class HeadProposer:
    """Proposes a draft head's top tokens, under the target's own noise where a request samples.

    Committed tokens are run with the target's features, as they come; what was run for a tree is dropped, since its
    nodes took the head's own output in their place. Tokens whose features are missing are not run: the head then
    begins anew with those it has.

    Attributes:
        stats: of the current step.
    """

    source = Source.MODEL

    def __init__(self, head: DraftHead, cache: KVCache, max_nodes: int) -> None:
        """`max_nodes`: most draft nodes of one tree."""
        self.stats = LayerStats()
        self._head = head
        self._cache = cache
        self._max_nodes = max_nodes
        self._places: Places[_Followed] = Places(cache, _Followed)
        self._root_logits: dict[int, Tensor] = {}
        """float32 [draft_vocab_size] below the root of each session of this step that is up to date."""

    def begin(self, sessions: list[Session]) -> None:
        started_s = time.perf_counter()
        self.stats = LayerStats()
        self._root_logits = {}
        self._run_committed(sessions)
        self._begin_s = time.perf_counter() - started_s

    def propose(self, wanted: list[tuple[GrowingTree, list[int]]]) -> list[Children]:
        started_s = time.perf_counter()
        rows, logits = self._root_rows(wanted) if wanted[0][1] == [ROOT] else self._run_layer(wanted)
        if not rows:
            return [Children() for _ in wanted]
        limit = max(tree.policy.max_children for tree, _ in rows)
        ids, probs = self._head.top_drafts(logits, [sampling_row(tree, node) for tree, node in rows], limit)
        children = collect_children(wanted, rows, ids.tolist(), probs.tolist())
        self.stats.seconds[-1] += time.perf_counter() - started_s
        return children

    def release(self, session_id: int) -> None:
        self._places.release(session_id)

    def measure(self) -> tuple[float, float]:
        """(seconds of a tree layer, seconds of each node in it), from a few passes; called before any session."""
        kv = self._cache.allocate(min(PROFILE_CONTEXT_TOKENS + PROFILE_NODES, self._places.capacity_tokens))
        assert kv is not None
        state = torch.zeros(1, self._head.config.hidden_size, dtype=self._head.dtype, device=self._head.device)
        context = PackedSequence(kv, [0] * (kv.capacity - PROFILE_NODES), logits="last")
        self._head.forward([context], state.expand(kv.capacity - PROFILE_NODES, -1), self._cache)
        self._cache.commit([(kv, list(range(kv.scratch)))])

        def run(count: int) -> None:
            siblings = PackedSequence(kv, [0] * count, np.full(count, ROOT, np.int32))
            self._head.forward([siblings], state.expand(count, -1), self._cache)[0][0, 0].item()
            self._cache.commit([(kv, [])])

        measured = time_layers(run)
        self._cache.free(kv)
        return measured

    def _run_committed(self, sessions: list[Session]) -> None:
        """Run the committed tokens that are not in the cache, root included, with the target's features."""
        current = {session.session_id for session in sessions}
        runs: list[tuple[Session, _Followed, PackedSequence]] = []
        features = []
        for session in sessions:
            followed = self._places.use(session.session_id)
            if followed is not None:
                followed.parents, followed.nodes, followed.states = [], {}, {}
            length, given = len(session.tokens), len(session.features)
            if not given:
                continue
            followed = self._places.reserve(session.session_id, length, self._max_nodes, current)
            if followed is None:
                continue
            start = _valid_tokens(followed, session)
            runs.append((session, followed, PackedSequence(followed.kv, session.tokens[start:], logits="last")))
            features.append(session.features[given - (length - start) :])
        if not runs:
            return
        bits = torch.from_numpy(np.concatenate(features).view(np.int16)).view(torch.bfloat16)
        packed = [run for _, _, run in runs]
        logits, states = self._head.forward(packed, self._head.states(bits), self._cache)
        self._cache.commit([(run.cache, list(range(run.cache.scratch))) for run in packed])
        ends = np.cumsum([len(run.token_ids) for run in packed]) - 1
        for (session, followed, _), row, end in zip(runs, logits, ends.tolist(), strict=True):
            followed.states = {ROOT: states[end]}
            self._root_logits[session.session_id] = row

    def _root_rows(self, wanted: list[tuple[GrowingTree, list[int]]]) -> tuple[list[tuple[GrowingTree, int]], Tensor]:
        rows = [(tree, ROOT) for tree, _ in wanted if tree.session.session_id in self._root_logits]
        if not rows:
            return [], torch.empty(0)
        self.stats.nodes.append(len(rows))
        self.stats.seconds.append(self._begin_s)
        return rows, torch.stack([self._root_logits[tree.session.session_id] for tree, _ in rows])

    def _run_layer(self, wanted: list[tuple[GrowingTree, list[int]]]) -> tuple[list[tuple[GrowingTree, int]], Tensor]:
        """Run nodes whose parents were run; below others, which a lookup alone had proposed, there is no state."""
        packed, rows, states = [], [], []
        for tree, nodes in wanted:
            followed = self._places[tree.session.session_id]
            room = followed.kv.capacity - followed.kv.length - followed.kv.scratch
            ready = [node for node in nodes if tree.parents[node] in followed.states][:room]
            for node in ready:
                parent = tree.parents[node]
                followed.nodes[node] = len(followed.parents)
                followed.parents.append(ROOT if parent == ROOT else followed.nodes[parent])
                states.append(followed.states[parent])
                rows.append((tree, node))
            if ready:
                parents = np.asarray(followed.parents, np.int32)
                packed.append(PackedSequence(followed.kv, [tree.token_ids[node] for node in ready], parents))
        if not packed:
            return [], torch.empty(0)
        logits, outputs = self._head.forward(packed, torch.stack(states), self._cache)
        for (tree, node), output in zip(rows, outputs, strict=True):
            self._places[tree.session.session_id].states[node] = output
        self.stats.nodes.append(len(rows))
        self.stats.seconds.append(0.0)
        return rows, logits


def _valid_tokens(followed: _Followed, session: Session) -> int:
    """How many of the session's tokens need not run again; drops what the cache holds beyond them.

    The root always runs again, with its features. Where features are missing in between, the place begins anew.
    """
    known_from = len(session.tokens) - len(session.features)
    valid = min(followed.first + followed.kv.length, session.unchanged, len(session.tokens) - 1)
    if valid < max(known_from, followed.first):
        followed.first = valid = known_from
    followed.kv.scratch = 0
    followed.kv.truncate(valid - followed.first)
    return valid
