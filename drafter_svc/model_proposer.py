"""Drafts by a language model: all requests of a step together, one tree layer a forward pass."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from drafter_svc.layered_proposer import LayeredProposer, TreeRow
from drafter_svc.proposer import GrowingTree
from drafter_svc.sessions import Session
from lm.kv_cache import KVCache, SequenceCache
from lm.model import LanguageModel
from lm.packed import PackedSequence
from lm.sampling import Row, top_drafts
from treeline.tree import ROOT

CATCH_UP_TOKENS = 512
"""Most tokens per step for sessions that are far behind, all of them together."""
SHORT_RUN_TOKENS = 40
"""What an ordinary step may leave to run (a path and its root). Sessions no further behind are always served."""


@dataclass
class _Followed:
    """A session's place in the draft model's cache.

    Attributes:
        kv: committed up to and including the root once the session has caught up; the tree's nodes in scratch.
        parents: scratch index of each scratch entry's parent, ROOT for children of the root.
        entries: scratch index by (parent's scratch index, token): finds the accepted path in the next step.
        nodes: scratch index by node of the growing tree.
    """

    kv: SequenceCache
    parents: list[int] = field(default_factory=list)
    entries: dict[tuple[int, int], int] = field(default_factory=dict)
    nodes: dict[int, int] = field(default_factory=lambda: {ROOT: ROOT})

    def accepted(self, tokens: list[int], unchanged: int) -> list[int]:
        """Scratch entries whose tokens turned out to be those behind the committed ones, the new root excepted."""
        path: list[int] = []
        if unchanged < self.kv.length:
            return path
        for token_id in tokens[self.kv.length : -1]:
            entry = self.entries.get((path[-1] if path else ROOT, token_id))
            if entry is None:
                break
            path.append(entry)
        return path

    def forget_tree(self) -> None:
        self.parents, self.entries, self.nodes = [], {}, {ROOT: ROOT}


class ModelProposer(LayeredProposer[_Followed]):
    """Proposes a language model's top tokens.

    Its cache follows each session: of the last step's tree the accepted path stays, and only what is missing is run.
    """

    def __init__(self, model: LanguageModel, cache: KVCache, max_nodes: int) -> None:
        super().__init__(cache, _Followed, max_nodes)
        self._model = model

    def _follow(self, sessions: list[Session]) -> dict[int, Tensor]:
        self._keep_accepted(sessions)
        return self._run_missing(self._reserve(sessions))

    def _top(self, logits: Tensor, rows: list[Row], k: int) -> tuple[Tensor, Tensor]:
        return top_drafts(logits, rows, min(k, self._model.vocab_size))

    def _pass(self, kv: SequenceCache, tokens: int, parents: np.ndarray | None) -> Tensor:
        return self._model.forward([PackedSequence(kv, [0] * tokens, parents)], self._cache)

    def _keep_accepted(self, sessions: list[Session]) -> None:
        """Commit what was drafted and accepted; drop what the tokens contradict, and the root, which runs again."""
        moves, lengths = [], []
        for session in sessions:
            followed = self._places.use(session.session_id)
            if followed is None:
                continue
            path = followed.accepted(session.tokens, session.unchanged)
            moves.append((followed.kv, path))
            valid = min(followed.kv.length, session.unchanged) + len(path)
            lengths.append((followed, min(valid, len(session.tokens) - 1)))
        self._cache.commit(moves)
        for followed, length in lengths:
            followed.forget_tree()
            if followed.kv.length > length:
                followed.kv.truncate(length)

    def _reserve(self, sessions: list[Session]) -> list[tuple[Session, _Followed]]:
        """The sessions that have room for their tokens and a tree."""
        current = {session.session_id for session in sessions}
        reserved = []
        for session in sessions:
            if len(session.tokens) > self._model.max_context_tokens:
                self.release(session.session_id)
                continue
            followed = self._places.reserve(session.session_id, len(session.tokens), self._max_nodes, current)
            if followed is not None:
                reserved.append((session, followed))
        return reserved

    def _run_missing(self, sessions: list[tuple[Session, _Followed]]) -> dict[int, Tensor]:
        """Run the tokens that are not in the cache, root included; those far behind go a bounded way."""
        budget = CATCH_UP_TOKENS
        runs: list[tuple[int, PackedSequence]] = []
        for session, followed in sessions:
            missing = session.tokens[followed.kv.length :]
            if len(missing) > SHORT_RUN_TOKENS:
                caught_up = len(missing) <= budget
                missing = missing[:budget]
                budget -= len(missing)
            else:
                caught_up = True
            if missing:
                run = PackedSequence(followed.kv, missing, logits="last" if caught_up else "none")
                runs.append((session.session_id, run))
                self.stats.catch_up_tokens += len(missing) - caught_up
        logits = self._model.forward([run for _, run in runs], self._cache)
        self._cache.commit([(run.cache, list(range(run.cache.scratch))) for _, run in runs])
        caught_up_ids = [session_id for session_id, run in runs if run.logits == "last"]
        return dict(zip(caught_up_ids, logits, strict=True))

    def _run_layer(self, wanted: list[tuple[GrowingTree, list[int]]]) -> tuple[list[TreeRow], Tensor]:
        """Run nodes, and those of their ancestors that only a lookup had proposed."""
        packed, rows, row_indices, total = [], [], [], 0
        for tree, nodes in wanted:
            followed = self._places[tree.session.session_id]
            position = followed.kv.length - 1 + tree.depth
            if position >= self._model.max_context_tokens:
                continue
            first, new = followed.kv.scratch, list[int]()
            for node in nodes:
                missing = [n for n in tree.path(node) if n not in followed.nodes]
                if followed.kv.length + first + len(new) + len(missing) > followed.kv.capacity:
                    break
                for n in missing:
                    parent, entry = followed.nodes[tree.parents[n]], first + len(new)
                    followed.nodes[n] = followed.entries[parent, tree.token_ids[n]] = entry
                    followed.parents.append(parent)
                    new.append(n)
                rows.append((tree, node))
                row_indices.append(total + len(new) - 1)
            if new:
                parents = np.asarray(followed.parents, np.int32)
                packed.append(PackedSequence(followed.kv, [tree.token_ids[n] for n in new], parents))
                total += len(new)
        if not packed:
            return [], torch.empty(0)
        self.stats.nodes.append(total)
        self.stats.seconds.append(0.0)
        return rows, self._model.forward(packed, self._cache)[row_indices]
