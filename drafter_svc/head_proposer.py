"""Drafts by a head that reads the target's hidden states: all requests of a step together, one tree layer a pass."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from drafter_svc.layered_proposer import LayeredProposer, TreeRow
from drafter_svc.proposer import GrowingTree
from drafter_svc.sessions import Session
from lm.draft_head import DraftHead
from lm.kv_cache import KVCache, SequenceCache
from lm.packed import PackedSequence
from lm.sampling import Row
from treeline.tree import ROOT


@dataclass
class _Followed:
    """A session's place in the head's cache.

    Attributes:
        kv: of the session's tokens from `first` on, root included; the tree's nodes in scratch.
        parents: scratch index of each scratch entry's parent, ROOT for children of the root.
        nodes: scratch index by node of the growing tree.
    """

    kv: SequenceCache
    first: int = 0
    parents: list[int] = field(default_factory=list)
    nodes: dict[int, int] = field(default_factory=dict)


class HeadProposer(LayeredProposer[_Followed]):
    """Proposes a draft head's top tokens.

    Committed tokens are run with the target's features, as they come; what was run for a tree is dropped, since its
    nodes took the head's own output in their place. Tokens whose features are missing are not run: the head then
    begins anew with those it has.
    """

    def __init__(self, head: DraftHead, cache: KVCache, max_nodes: int) -> None:
        super().__init__(cache, _Followed, max_nodes)
        self._head = head
        # The last pass: its output states, and which of them is that of (session, node of its tree).
        self._states = torch.empty(0)
        self._rows: dict[tuple[int, int], int] = {}

    def _top(self, logits: Tensor, rows: list[Row], k: int) -> tuple[Tensor, Tensor]:
        return self._head.top_drafts(logits, rows, k)

    def _pass(self, kv: SequenceCache, tokens: int, parents: np.ndarray | None) -> Tensor:
        states = torch.zeros(tokens, self._head.config.hidden_size, dtype=self._head.dtype, device=self._head.device)
        return self._head.forward([PackedSequence(kv, [0] * tokens, parents)], states, self._cache)[0]

    def _follow(self, sessions: list[Session]) -> dict[int, Tensor]:
        """Run the committed tokens that are not in the cache, root included, with the target's features."""
        current, self._rows = {session.session_id for session in sessions}, {}
        runs: list[tuple[Session, _Followed, PackedSequence]] = []
        features = []
        for session in sessions:
            followed = self._places.use(session.session_id)
            if followed is not None:
                followed.parents, followed.nodes = [], {}
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
            return {}
        bits = torch.from_numpy(np.concatenate(features).view(np.int16)).view(torch.bfloat16)
        packed = [run for _, _, run in runs]
        self.stats.catch_up_tokens += sum(len(run.token_ids) - 1 for run in packed)
        logits, self._states = self._head.forward(packed, self._head.states(bits), self._cache)
        self._cache.commit([(run.cache, list(range(run.cache.scratch))) for run in packed])
        ends = np.cumsum([len(run.token_ids) for run in packed]) - 1
        self._rows = {(session.session_id, ROOT): end for (session, _, _), end in zip(runs, ends.tolist(), strict=True)}
        return {session.session_id: row for (session, _, _), row in zip(runs, logits, strict=True)}

    def _run_layer(self, wanted: list[tuple[GrowingTree, list[int]]]) -> tuple[list[TreeRow], Tensor]:
        """Run nodes whose parents were run; below others, which a lookup alone had proposed, there is no state."""
        packed, rows, above = [], list[TreeRow](), []
        for tree, nodes in wanted:
            session_id = tree.session.session_id
            followed = self._places[session_id]
            room = followed.kv.capacity - followed.kv.length - followed.kv.scratch
            ready = [node for node in nodes if (session_id, tree.parents[node]) in self._rows][:room]
            for node in ready:
                parent = tree.parents[node]
                followed.nodes[node] = len(followed.parents)
                followed.parents.append(ROOT if parent == ROOT else followed.nodes[parent])
                above.append(self._rows[session_id, parent])
                rows.append((tree, node))
            if ready:
                parents = np.asarray(followed.parents, np.int32)
                packed.append(PackedSequence(followed.kv, [tree.token_ids[node] for node in ready], parents))
        if not packed:
            return [], torch.empty(0)
        states = self._states[torch.as_tensor(above, device=self._states.device)]
        logits, self._states = self._head.forward(packed, states, self._cache)
        self._rows = {(tree.session.session_id, node): row for row, (tree, node) in enumerate(rows)}
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
