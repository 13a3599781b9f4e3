"""What proposers that run a network have in common: one pass a layer, for all trees of a step together."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Generic

import numpy as np
import torch
from torch import Tensor

from drafter_svc.places import P, Places
from drafter_svc.proposer import Children, GrowingTree
from drafter_svc.sessions import Session
from lm.kv_cache import KVCache, SequenceCache
from lm.sampling import Row
from treeline.tree import ROOT, Source

PROFILE_NODES = 16
PROFILE_CONTEXT_TOKENS = 128
PROFILE_S = 2.0

TreeRow = tuple[GrowingTree, int]
"""A node of a tree below which a row of logits is at hand."""


@dataclass
class LayerStats:
    """What one step ran through the network, tree layer by tree layer (see `DraftStats`)."""

    nodes: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    catch_up_tokens: int = 0


class LayeredProposer(ABC, Generic[P]):
    """Proposes a network's top tokens, under the target's own noise where a request samples.

    When the cache is full, the sessions used least recently lose their place in it and are rebuilt when they return.

    Attributes:
        stats: of the current step.
    """

    source = Source.MODEL

    def __init__(self, cache: KVCache, make: Callable[[SequenceCache], P], max_nodes: int) -> None:
        """`make`: a new session's place. `max_nodes`: most draft nodes of one tree."""
        self.stats = LayerStats()
        self._cache = cache
        self._max_nodes = max_nodes
        self._places: Places[P] = Places(cache, make)
        self._root_logits: dict[int, Tensor] = {}
        """A row of logits below the root of each session of this step that is up to date."""

    def begin(self, sessions: list[Session]) -> None:
        started_s = time.perf_counter()
        self.stats = LayerStats()
        self._root_logits = self._follow(sessions)
        self._begin_s = time.perf_counter() - started_s

    def propose(self, wanted: list[tuple[GrowingTree, list[int]]]) -> list[Children]:
        started_s = time.perf_counter()
        rows, logits = self._root_rows(wanted) if wanted[0][1] == [ROOT] else self._run_layer(wanted)
        children = {id(tree): Children() for tree, _ in wanted}
        if rows:
            limit = max(tree.policy.max_children for tree, _ in rows)
            ids, probs = self._top(logits, [_sampling_row(tree, node) for tree, node in rows], limit)
            for (tree, node), row_ids, row_probs in zip(rows, ids.tolist(), probs.tolist(), strict=True):
                count, columns = min(tree.policy.max_children, len(row_ids)), children[id(tree)]
                columns.parents.extend([node] * count)
                columns.token_ids.extend(row_ids[:count])
                columns.probs.extend(row_probs[:count])
                columns.ranks.extend(range(count))
            self.stats.seconds[-1] += time.perf_counter() - started_s
        return [children[id(tree)] for tree, _ in wanted]

    def release(self, session_id: int) -> None:
        self._places.release(session_id)

    def measure(self) -> tuple[float, float]:
        """(seconds of a tree layer, seconds of each node in it), from a few passes over scratch nodes.

        Takes at most a few seconds beyond its first passes; needs a little room in the cache.
        """
        kv = self._cache.allocate(min(PROFILE_CONTEXT_TOKENS + PROFILE_NODES, self._places.capacity_tokens))
        assert kv is not None
        context = kv.capacity - PROFILE_NODES
        self._time_pass(kv, context, None)
        self._cache.commit([(kv, list(range(context)))])
        seconds: dict[int, list[float]] = {1: [], PROFILE_NODES: []}
        deadline_s = time.perf_counter() + PROFILE_S
        for repeat in range(6):
            for count, taken_s in seconds.items():
                pass_s = self._time_pass(kv, count, np.full(count, ROOT, np.int32))
                self._cache.commit([(kv, [])])
                if repeat:  # the first passes only warm up
                    taken_s.append(pass_s)
            if repeat and time.perf_counter() > deadline_s:
                break
        self._cache.free(kv)
        # Whatever else the machine does only adds time: other services start at the same moment.
        one_s, many_s = min(seconds[1]), min(seconds[PROFILE_NODES])
        node_s = max(0.0, many_s - one_s) / (PROFILE_NODES - 1)
        return max(0.0, one_s - node_s), node_s

    @abstractmethod
    def _follow(self, sessions: list[Session]) -> dict[int, Tensor]:
        """Bring the cache up to date; a row of logits below the root of each session that is."""

    @abstractmethod
    def _run_layer(self, wanted: list[tuple[GrowingTree, list[int]]]) -> tuple[list[TreeRow], Tensor]:
        """Run nodes of the trees; a row of logits below each that was run, its pass counted in `stats`."""

    @abstractmethod
    def _top(self, logits: Tensor, rows: list[Row], k: int) -> tuple[Tensor, Tensor]:
        """Token ids and probabilities [rows, at most k], best first."""

    @abstractmethod
    def _pass(self, kv: SequenceCache, tokens: int, parents: np.ndarray | None) -> Tensor:
        """A pass over so many tokens of any kind; its logits."""

    def _time_pass(self, kv: SequenceCache, tokens: int, parents: np.ndarray | None) -> float:
        started_s = time.perf_counter()
        self._pass(kv, tokens, parents)[0, 0].item()
        return time.perf_counter() - started_s

    def _root_rows(self, wanted: list[tuple[GrowingTree, list[int]]]) -> tuple[list[TreeRow], Tensor]:
        rows = [(tree, ROOT) for tree, _ in wanted if tree.session.session_id in self._root_logits]
        if not rows:
            return [], torch.empty(0)
        self.stats.nodes.append(len(rows))
        self.stats.seconds.append(self._begin_s)
        return rows, torch.stack([self._root_logits[tree.session.session_id] for tree, _ in rows])


def _sampling_row(tree: GrowingTree, node: int) -> Row:
    """How the token below `node`, one of the last layer's, is chosen."""
    params, history = tree.sequence.sampling, None
    if params.repetition_penalty != 1.0:
        history = np.asarray(tree.session.tokens + [tree.token_ids[n] for n in tree.path(node)], np.int64)
    return Row(params, len(tree.session.tokens) + tree.depth, history)
