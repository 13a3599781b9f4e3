"""Proposes the tokens of a draft language model: one forward pass per tree layer."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from drafter_svc.layered_proposer import LayeredProposer, packed_nodes
from drafter_svc.proposer import Frontier, Root
from drafter_svc.sessions import Key, Session, SessionMemory
from lm.kv_cache import KVCache, SequenceCache
from lm.model import LanguageModel
from lm.packed import PackedSequence
from lm.sampling import Row, top_drafts

MAX_CATCH_UP_TOKENS = 512
"""Most catch-up tokens per step, over all sessions that are far behind: two prompt chunks of the target by default, in
a model that is several times faster."""
SHORT_RUN_TOKENS = 40
"""Sessions missing up to this many tokens always catch up: the deepest tree's path (MAX_TREE_DEPTH), the root, a few
to spare."""


class ModelProposer(LayeredProposer):
    """Proposes a language model's top tokens.

    Its cache follows each session: the accepted path of the last tree stays, and only missing tokens run.
    """

    def __init__(self, model: LanguageModel, cache: KVCache, max_nodes: int) -> None:
        super().__init__(cache, model.passes, max_nodes)
        self._model = model

    def _follow(self, sessions: list[Session], memory: SessionMemory) -> tuple[list[Key], Tensor]:
        self._keep_accepted(sessions)
        return self._run_missing(self._reserve(sessions, memory))

    def _top(self, logits: Tensor, rows: list[Row], k: int) -> tuple[Tensor, Tensor]:
        return top_drafts(logits, rows, min(k, self._model.vocab_size))

    def _pass(self, kv: SequenceCache, tokens: int, parents: np.ndarray | None) -> Tensor:
        return self._model.forward([PackedSequence(kv, [0] * tokens, parents)], self.cache)

    def _keep_accepted(self, sessions: list[Session]) -> None:
        """Commit accepted draft nodes; drop the KV of changed tokens, and of the root, which runs again."""
        moves, lengths = [], []
        for session in sessions:
            if session.kv is None:
                continue
            path = session.accepted_entries()
            moves.append((session.kv, path))
            valid = min(session.kv.length, session.unchanged) + len(path)
            lengths.append((session, session.kv, min(valid, len(session.tokens) - 1)))
        self.cache.commit(moves)
        for session, kv, length in lengths:
            session.forget_tree()
            if kv.length > length:
                kv.truncate(length)

    def _reserve(self, sessions: list[Session], memory: SessionMemory) -> list[tuple[Session, SequenceCache]]:
        """The sessions with room for their tokens and a tree."""
        reserved = []
        for session in sessions:
            if len(session.tokens) > self._model.max_context_tokens:
                memory.free_kv(session)
                continue
            kv = memory.reserve_kv(session, len(session.tokens), self._max_nodes)
            if kv is not None:
                reserved.append((session, kv))
        return reserved

    def _run_missing(self, sessions: list[tuple[Session, SequenceCache]]) -> tuple[list[Key], Tensor]:
        """Run the tokens missing from the cache, root included; sessions far behind share MAX_CATCH_UP_TOKENS."""
        budget = MAX_CATCH_UP_TOKENS
        runs: list[tuple[Key, PackedSequence]] = []
        for session, kv in sessions:
            missing = session.tokens[kv.length :]
            if len(missing) > SHORT_RUN_TOKENS:
                caught_up = len(missing) <= budget
                missing = missing[:budget]
                budget -= len(missing)
            else:
                caught_up = True
            if missing:
                run = PackedSequence(kv, missing, logits="last" if caught_up else "none")
                runs.append((session.key, run))
                self.stats.catch_up_tokens += len(missing) - caught_up
        logits = self._model.forward([run for _, run in runs], self.cache)
        self.cache.commit([(run.cache, list(range(run.cache.scratch))) for _, run in runs])
        return [key for key, run in runs if run.logits == "last"], logits

    def _run_layer(self, roots: list[Root], frontier: Frontier) -> tuple[NDArray[np.intp], Tensor]:
        runs = self._append(roots, frontier, self._model.max_context_tokens)
        if not runs:
            return np.zeros(0, np.intp), torch.empty(0)
        nodes = np.concatenate([nodes for _, nodes in runs])
        self.stats.nodes.append(len(nodes))
        self.stats.seconds.append(0.0)
        return nodes, self._model.forward(packed_nodes(runs, frontier), self.cache)
