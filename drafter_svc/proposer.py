"""What a proposer of draft tokens is, and the columns it answers with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median
from time import perf_counter
from typing import TYPE_CHECKING, Protocol

import numpy as np

from drafter_svc.sessions import Session
from lm.sampling import Row
from treeline.tree import Source

if TYPE_CHECKING:
    from drafter_svc.growth import GrowingTree


@dataclass(frozen=True)
class Children:
    """Proposed children of some nodes of one growing tree, columns of equal length.

    Attributes:
        parents: index of the parent node, or ROOT.
        token_ids: distinct under one parent.
        probs: the proposer's probability of each child given its parent, in (0, 1].
        ranks: 0 for the proposer's first choice under this parent; children come in this order.
    """

    parents: list[int] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    probs: list[float] = field(default_factory=list)
    ranks: list[int] = field(default_factory=list)


class Proposer(Protocol):
    """A source of draft tokens. It keeps a state per session that it can always rebuild from the session's tokens."""

    source: Source

    def begin(self, sessions: list[Session]) -> None:
        """A step begins: follow these sessions' tokens."""
        ...

    def propose(self, wanted: list[tuple[GrowingTree, list[int]]]) -> list[Children]:
        """Children, in the same order, of some nodes of each tree: [ROOT] at first, then nodes of its last layer."""
        ...

    def release(self, session_id: int) -> None:
        """Drop a session's state; unknown sessions are ignored."""
        ...


@dataclass
class LayerStats:
    """What one step ran through a draft model, tree layer by tree layer (see `DraftStats`)."""

    nodes: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    catch_up_tokens: int = 0


class ModelledProposer(Proposer, Protocol):
    """A proposer that runs a model, one pass a layer.

    Attributes:
        stats: of the current step.
    """

    stats: LayerStats

    def measure(self) -> tuple[float, float]:
        """(seconds of a tree layer, seconds of each node in it), from a few passes; called before any session."""
        ...


def sampling_row(tree: GrowingTree, node: int) -> Row:
    """How the token below `node` is chosen."""
    path, params = tree.path(node), tree.sequence.sampling
    history = None
    if params.repetition_penalty != 1.0:
        history = np.asarray(tree.session.tokens + [tree.token_ids[n] for n in path], np.int64)
    return Row(params, len(tree.session.tokens) + len(path), history)


def collect_children(
    wanted: list[tuple[GrowingTree, list[int]]],
    rows: list[tuple[GrowingTree, int]],
    ids: list[list[int]],
    probs: list[list[float]],
) -> list[Children]:
    """The children of each wanted tree, from the best tokens below each row's node, best first."""
    children = {id(tree): Children() for tree, _ in wanted}
    for (tree, node), row_ids, row_probs in zip(rows, ids, probs, strict=True):
        count, columns = min(tree.policy.max_children, len(row_ids)), children[id(tree)]
        columns.parents.extend([node] * count)
        columns.token_ids.extend(row_ids[:count])
        columns.probs.extend(row_probs[:count])
        columns.ranks.extend(range(count))
    return [children[id(tree)] for tree, _ in wanted]


PROFILE_NODES = 16
PROFILE_S = 2.0


def time_layers(run: Callable[[int], None]) -> tuple[float, float]:
    """(seconds of a tree layer, seconds of each node in it). `run` runs a layer of so many nodes.

    Takes at most a few seconds beyond its first passes.
    """
    seconds: dict[int, list[float]] = {1: [], PROFILE_NODES: []}
    deadline_s = perf_counter() + PROFILE_S
    for repeat in range(6):
        for count, taken_s in seconds.items():
            started_s = perf_counter()
            run(count)
            if repeat:  # the first passes only warm up
                taken_s.append(perf_counter() - started_s)
        if repeat and perf_counter() > deadline_s:
            break
    one_s, many_s = median(seconds[1]), median(seconds[PROFILE_NODES])
    node_s = max(0.0, many_s - one_s) / (PROFILE_NODES - 1)
    return max(0.0, one_s - node_s), node_s
