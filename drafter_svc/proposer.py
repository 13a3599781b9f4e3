"""What a proposer of draft tokens is, the growing trees that it is shown, and the columns it answers with."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from drafter_svc.sessions import Session
from planner.policies import Policy
from treeline.drafting import DraftSequence
from treeline.tree import ROOT, Source


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


class GrowingTree:
    """One request's tree while it grows: what proposers see of it. Nodes are numbered parents-first.

    Attributes:
        parents, token_ids: of all nodes so far.
        layer: the nodes that joined last, whose children may come next; [ROOT] at first, empty when nothing joined.
        depth: of the nodes in `layer`.
        max_depth: no layer grows beyond this.
        proposed: what each source said of the layer, until the next one is chosen among it.
    """

    def __init__(self, session: Session, sequence: DraftSequence, policy: Policy) -> None:
        self.session = session
        self.sequence = sequence
        self.policy = policy
        self.max_depth = min(sequence.max_depth, policy.max_depth)
        self.depth = 0
        self.layer = [ROOT]
        self.parents: list[int] = []
        self.token_ids: list[int] = []
        self.proposed: list[tuple[Source, Children]] = []

    @property
    def grows(self) -> bool:
        """Whether there may be another layer."""
        return bool(self.layer) and self.depth < self.max_depth and self.sequence.max_nodes > 0

    @property
    def models(self) -> bool:
        """Whether the draft model may be asked for the next layer."""
        return self.grows and self.depth < self.sequence.max_layers

    def path(self, node: int) -> list[int]:
        """Nodes from a child of the root down to `node`, itself included; empty for ROOT."""
        nodes = []
        while node != ROOT:
            nodes.append(node)
            node = self.parents[node]
        return nodes[::-1]

    def add_layer(self, parents: list[int], token_ids: list[int]) -> None:
        """These nodes join."""
        self.depth += 1
        first = len(self.parents)
        self.parents += parents
        self.token_ids += token_ids
        self.layer = list(range(first, len(self.parents)))


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
