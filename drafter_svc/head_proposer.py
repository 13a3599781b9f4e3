"""Proposes the tokens of a draft head, which reads the target's hidden states: one pass per tree layer."""

from __future__ import annotations

from itertools import accumulate

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from drafter_svc.layered_proposer import LayeredProposer, packed_nodes
from drafter_svc.proposer import Frontier, Root
from drafter_svc.sessions import Key, Session, SessionMemory
from lm.device import upload
from lm.draft_head import DraftHead
from lm.kv_cache import KVCache, SequenceCache
from lm.packed import PackedSequence
from lm.sampling import Row


class HeadProposer(LayeredProposer):
    """Proposes a draft head's top tokens.

    Committed tokens run with the target's features. Tree nodes run with the head's own output instead, so their KV is
    dropped after the step. Tokens without features are not run: the head then starts over with the features it has.
    """

    def __init__(self, head: DraftHead, cache: KVCache, max_nodes: int) -> None:
        super().__init__(cache, head.passes, max_nodes)
        self._head = head
        # Output states of the last pass, and the index of each node's state among them.
        self._states = torch.empty(0)
        self._state_of: NDArray[np.intp] = np.zeros(0, np.intp)
        self._state_of_root: dict[Key, int] = {}

    def _top(self, logits: Tensor, rows: list[Row], k: int) -> tuple[Tensor, Tensor]:
        return self._head.top_drafts(logits, rows, k)

    def _pass(self, kv: SequenceCache, tokens: int, parents: np.ndarray | None) -> Tensor:
        states = torch.zeros(tokens, self._head.config.hidden_size, dtype=self._head.dtype, device=self._head.device)
        return self._head.forward([PackedSequence(kv, [0] * tokens, parents)], states, self.cache)[0]

    def _follow(self, sessions: list[Session], memory: SessionMemory) -> tuple[list[Key], Tensor]:
        """Run the committed tokens that are not in the cache, root included, with the target's features."""
        self._state_of_root = {}
        runs: list[tuple[Session, PackedSequence]] = []
        features = []
        for session in sessions:
            session.forget_tree()
            length, given = len(session.tokens), len(session.features)
            if not given:
                continue
            kv = memory.reserve_kv(session, length, self._max_nodes)
            if kv is None:
                continue
            start = _valid_tokens(session, kv)
            runs.append((session, PackedSequence(kv, session.tokens[start:], logits="last")))
            features.append(session.features[given - (length - start) :])
        if not runs:
            return [], torch.empty(0)
        bits = torch.from_numpy(np.concatenate(features).view(np.int16)).view(torch.bfloat16)
        packed = [run for _, run in runs]
        self.stats.catch_up_tokens += sum(len(run.token_ids) - 1 for run in packed)
        logits, self._states = self._head.forward(packed, self._head.states(bits), self.cache)
        self.cache.commit([(run.cache, list(range(run.cache.scratch))) for run in packed])
        keys = [session.key for session, _ in runs]
        ends = accumulate(len(run.token_ids) for run in packed)
        self._state_of_root = {key: end - 1 for key, end in zip(keys, ends, strict=True)}
        return keys, logits

    def _run_layer(self, roots: list[Root], frontier: Frontier) -> tuple[NDArray[np.intp], Tensor]:
        if frontier.depth == 1:  # the parents are roots: their states come from the pass over committed tokens
            keys = [roots[tree].session.key for tree in frontier.tree_of.tolist()]
            above = np.asarray([self._state_of_root[key] for key in keys], np.intp)
        else:
            above = self._state_of[frontier.above]
        runs = self._append(roots, frontier)
        if not runs:
            return np.zeros(0, np.intp), torch.empty(0)
        nodes = np.concatenate([nodes for _, nodes in runs])
        states = self._states.index_select(0, upload(above[nodes], self._states.device))
        logits, self._states = self._head.forward(packed_nodes(runs, frontier), states, self.cache)
        self._state_of = np.zeros(len(frontier.tree_of), np.intp)
        self._state_of[nodes] = np.arange(len(nodes))
        self.stats.nodes.append(len(nodes))
        self.stats.seconds.append(0.0)
        return nodes, logits


def _valid_tokens(session: Session, kv: SequenceCache) -> int:
    """How many of the session's tokens need not run again; drops the rest of the cache.

    The root always runs again, with its features. If features are missing in between, the cache starts over.
    """
    known_from = len(session.tokens) - len(session.features)
    valid = min(session.kv_start + kv.length, session.unchanged, len(session.tokens) - 1)
    if valid < max(known_from, session.kv_start):
        session.kv_start = valid = known_from
    kv.scratch = 0
    kv.truncate(valid - session.kv_start)
    return valid
