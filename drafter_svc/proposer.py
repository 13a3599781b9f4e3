"""What a proposer of draft tokens is, and the columns it answers with."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from drafter_svc.sessions import Session
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
