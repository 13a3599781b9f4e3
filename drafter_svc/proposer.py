"""The interface of draft models: a frontier in, its proposed children out, as columns over all trees of a step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from drafter_svc.sessions import Session, SessionMemory
from planner.policies import Policy
from treeline.drafting import DraftSequence
from treeline.forest import Source


class Root(NamedTuple):
    """What one tree grows from."""

    session: Session
    sequence: DraftSequence
    policy: Policy

    @property
    def max_depth(self) -> int:
        return min(self.sequence.max_depth, self.policy.max_depth) if self.sequence.max_nodes > 0 else 0


@dataclass(frozen=True)
class Frontier:
    """Nodes of one depth whose children are asked for, columns [r]; those of a tree stand together.

    Attributes:
        depth: of the nodes; 0 for the roots themselves.
        tree_of: intp; index of each node's tree in the step.
        token_ids: int32.
        above: intp; index of each node's parent in the previous frontier, 0 at depth 0.
        paths: draft tokens down to each node, itself included; only if a request of the step has a penalty.
    """

    depth: int
    tree_of: NDArray[np.intp]
    token_ids: NDArray[np.int32]
    above: NDArray[np.intp]
    paths: list[list[int]] | None = None


@dataclass(frozen=True)
class Children:
    """Proposed children, columns [m], in the order of the frontier and there best first.

    Attributes:
        above: intp; index of the parent in the frontier. Nodes that could not be run have no children.
        token_ids: int32; distinct under one parent.
        probs: float32; the drafter's probability of each child given its parent.
        ranks: uint8; 0 for the first choice under this parent.
    """

    above: NDArray[np.intp]
    token_ids: NDArray[np.int32]
    probs: NDArray[np.float32]
    ranks: NDArray[np.uint8]

    @staticmethod
    def best(nodes: NDArray[np.intp], ids: NDArray[np.int64], probs: NDArray[np.float32]) -> Children:
        """The choices `ids`, `probs` [r, k], best first, below the frontier's `nodes` [r]."""
        choices = ids.shape[1]
        ranks = (np.arange(ids.size) % choices).astype(np.uint8)
        return Children(nodes.repeat(choices), ids.ravel().astype(np.int32), probs.ravel(), ranks)

    @staticmethod
    def none() -> Children:
        return Children(np.zeros(0, np.intp), np.zeros(0, np.int32), np.zeros(0, np.float32), np.zeros(0, np.uint8))


class Proposer(Protocol):
    """A source of draft tokens."""

    source: Source

    def begin(self, sessions: list[Session], memory: SessionMemory) -> None:
        """Begin a step: catch up with these sessions' tokens."""
        ...

    def propose(self, roots: list[Root], frontier: Frontier) -> Children:
        """Children of all nodes of `frontier`: first the `roots`, then layer by layer.

        At least as many per node as its policy asks for; policies that ask for fewer ignore the rest.
        """
        ...
