"""Proposers that run a network: one pass per layer, for all trees of a step together."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from drafter_svc.proposer import Children, Frontier, Root
from drafter_svc.sessions import Key, Session, SessionMemory
from lm.kv_cache import KVCache, SequenceCache
from lm.packed import PackedSequence
from lm.passes import Passes
from lm.sampling import Row
from treeline.forest import ROOT, Source

PROFILE_NODES, PROFILE_CONTEXT_TOKENS = 16, 128
"""The pass whose time, less that of one node, gives the cost of a node: an ordinary tree behind a short prompt."""
PROFILE_ROUNDS, PROFILE_S = 6, 2.0
"""Passes of each size, the first one a warm-up, and the seconds after which no further round begins."""


@dataclass
class LayerStats:
    """What one step ran through the network, by tree layer (see `DraftStats`)."""

    nodes: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    catch_up_tokens: int = 0


class LayeredProposer(ABC):
    """Proposes a network's top tokens; for sampled requests, with the target's own noise added.

    Attributes:
        cache: the network's; `SessionMemory` divides it among the sessions.
        passes: of the network.
        stats: of the current step.
    """

    source = Source.MODEL

    def __init__(self, cache: KVCache, passes: Passes, max_nodes: int) -> None:
        """`max_nodes`: most draft nodes of one tree."""
        self.cache, self.passes = cache, passes
        self.stats = LayerStats()
        self._max_nodes = max_nodes
        self._root_logits, self._row_of_root = torch.empty(0), dict[Key, int]()
        """A row for the root of each up-to-date session of this step, and that row's index by session."""
        self._entries: NDArray[np.intp] = np.zeros(0, np.intp)
        """intp [frontier]: scratch index of each node of the last frontier; ROOT for roots and nodes not run."""

    def begin(self, sessions: list[Session], memory: SessionMemory) -> None:
        started_s = time.perf_counter()
        self.stats = LayerStats()
        keys, self._root_logits = self._follow(sessions, memory)
        self._row_of_root = {key: row for row, key in enumerate(keys)}
        self._begin_s = time.perf_counter() - started_s

    def propose(self, roots: list[Root], frontier: Frontier) -> Children:
        started_s = time.perf_counter()
        nodes, logits = self._run_layer(roots, frontier) if frontier.depth else self._root_rows(roots, frontier)
        if not len(nodes):
            return Children.none()
        paths, choices = frontier.paths, 1
        rows = []
        for tree, node in zip(frontier.tree_of[nodes].tolist(), nodes.tolist(), strict=True):
            root = roots[tree]
            rows.append(_sampling_row(root, frontier.depth, paths[node] if paths is not None else []))
            choices = max(choices, root.policy.max_children)
        ids, probs = self._top(logits, rows, choices)
        children = Children.best(nodes, ids.cpu().numpy(), probs.cpu().numpy())
        self.stats.seconds[-1] += time.perf_counter() - started_s
        return children

    def measure(self) -> tuple[float, float]:
        """(seconds of a tree layer, seconds of each node in it), from a few passes over scratch nodes.

        Takes about PROFILE_S, and needs a little room in the cache.
        """
        capacity = self.cache.total_blocks * self.cache.block_tokens
        kv = self.cache.allocate(min(PROFILE_CONTEXT_TOKENS + PROFILE_NODES, capacity))
        assert kv is not None
        context = kv.capacity - PROFILE_NODES
        self._time_pass(kv, context, None)
        self.cache.commit([(kv, list(range(context)))])
        seconds: dict[int, list[float]] = {1: [], PROFILE_NODES: []}
        deadline_s = time.perf_counter() + PROFILE_S
        for repeat in range(PROFILE_ROUNDS):
            for count, taken_s in seconds.items():
                pass_s = self._time_pass(kv, count, np.full(count, ROOT, np.int32))
                self.cache.commit([(kv, [])])
                if repeat:  # the first round only warms up
                    taken_s.append(pass_s)
            if repeat and time.perf_counter() > deadline_s:
                break
        self.cache.free(kv)
        # Other processes only add time: the services start together, so the fastest pass counts.
        one_s, many_s = min(seconds[1]), min(seconds[PROFILE_NODES])
        node_s = max(0.0, many_s - one_s) / (PROFILE_NODES - 1)
        return max(0.0, one_s - node_s), node_s

    @abstractmethod
    def _follow(self, sessions: list[Session], memory: SessionMemory) -> tuple[list[Key], Tensor]:
        """Bring the cache up to date. Returns the sessions that are, and a row of logits for the root of each."""

    @abstractmethod
    def _run_layer(self, roots: list[Root], frontier: Frontier) -> tuple[NDArray[np.intp], Tensor]:
        """Run the frontier's nodes and count their pass in `stats`.

        Returns:
            intp [r], increasing: the nodes of the frontier that were run; and a row of logits for each.
        """

    @abstractmethod
    def _top(self, logits: Tensor, rows: list[Row], k: int) -> tuple[Tensor, Tensor]:
        """Token ids and probabilities [rows, at most k], best first."""

    @abstractmethod
    def _pass(self, kv: SequenceCache, tokens: int, parents: np.ndarray | None) -> Tensor:
        """The logits of a pass over this many arbitrary tokens."""

    def _time_pass(self, kv: SequenceCache, tokens: int, parents: np.ndarray | None) -> float:
        started_s = time.perf_counter()
        self._pass(kv, tokens, parents)[0, 0].item()
        return time.perf_counter() - started_s

    def _root_rows(self, roots: list[Root], frontier: Frontier) -> tuple[NDArray[np.intp], Tensor]:
        self._entries = np.full(len(frontier.tree_of), ROOT, np.intp)
        keys = [roots[tree].session.key for tree in frontier.tree_of.tolist()]
        nodes = [node for node, key in enumerate(keys) if key in self._row_of_root]
        if not nodes:
            return np.zeros(0, np.intp), torch.empty(0)
        self.stats.nodes.append(len(nodes))
        self.stats.seconds.append(self._begin_s)
        rows = [self._row_of_root[keys[node]] for node in nodes]
        logits = self._root_logits
        return np.asarray(nodes), logits if rows == [*range(len(logits))] else logits[rows]

    def _append(
        self, roots: list[Root], frontier: Frontier, most_tokens: int | None = None
    ) -> list[tuple[Session, NDArray[np.intp]]]:
        """Assign scratch entries to the frontier's nodes while there is room; returns each session's nodes to run.

        Args:
            most_tokens: the longest sequence that the network supports.
        """
        parents = self._entries[frontier.above]
        self._entries = np.full(len(frontier.tree_of), ROOT, np.intp)
        # A frontier of trees 0, 0, 2 has bounds 0, 2, 3.
        firsts = np.concatenate(([True], frontier.tree_of[1:] != frontier.tree_of[:-1])).nonzero()[0]
        runs = []
        for first, end in zip(firsts.tolist(), [*firsts[1:].tolist(), len(parents)], strict=True):
            session = roots[frontier.tree_of.item(first)].session
            kv = session.kv
            assert kv is not None
            if most_tokens is not None and kv.length - 1 + frontier.depth >= most_tokens:
                continue
            nodes = np.arange(first, min(end, first + kv.capacity - kv.length - kv.scratch))
            if not len(nodes):
                continue
            entries = np.arange(kv.scratch, kv.scratch + len(nodes))
            self._entries[nodes] = entries
            new_parents = parents[nodes].tolist()
            session.parents += new_parents
            tokens = frontier.token_ids[nodes].tolist()
            session.entries.update(zip(zip(new_parents, tokens, strict=True), entries.tolist(), strict=True))
            runs.append((session, nodes))
        return runs


def packed_nodes(runs: list[tuple[Session, NDArray[np.intp]]], frontier: Frontier) -> list[PackedSequence]:
    """A pass over these nodes of the frontier, the newest entries in their sessions' scratch."""
    packed = []
    for session, nodes in runs:
        assert session.kv is not None
        parents = np.asarray(session.parents, np.int32)
        packed.append(PackedSequence(session.kv, frontier.token_ids[nodes].tolist(), parents))
    return packed


def _sampling_row(root: Root, depth: int, path: list[int]) -> Row:
    """How a child of a node at this depth is drawn. `path`: draft tokens down to the node."""
    params, tokens = root.sequence.sampling, root.session.tokens
    history = np.asarray(tokens + path, np.int64) if params.penalises else None
    return Row(params, len(tokens) + depth, history, root.sequence.prompt_tokens)
