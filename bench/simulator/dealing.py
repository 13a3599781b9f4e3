"""What requests meet, worlds and answers of the target: dealt for many steps at once, which is cheaper."""

from __future__ import annotations

from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from bench.simulator.tables import Table
from bench.simulator.worlds import MAX_DEPTH, OUTCOMES, WORLDS
from treeline.plan import NodeOutcomes

DRAWN = 4096
"""Random numbers are drawn this many at a time."""
DEALT_STEPS = 32


class Drawn(NamedTuple):
    """The trees of some requests, one behind the other.

    Attributes:
        table: the trees of all worlds.
        tree_of: intp [nodes]; whose node it is.
        nodes: intp [nodes]; place of each node among those of all worlds.
        spots: intp [nodes]; the same in [OUTCOMES, nodes of all worlds].
        depths: intp [nodes].
        on_path: bool [nodes]; whether the target goes through it.
    """

    table: Table
    tree_of: NDArray[np.intp]
    nodes: NDArray[np.intp]
    spots: NDArray[np.intp]
    depths: NDArray[np.intp]
    on_path: NDArray[np.bool_]

    def part(self, nodes: slice, first: int) -> Drawn:
        """Those from request `first` on, whose nodes these are."""
        return Drawn(
            self.table, self.tree_of[nodes] - first, self.nodes[nodes], self.spots[nodes], self.depths[nodes],
            self.on_path[nodes],
        )  # fmt: skip

    def accepted(self, chosen: NDArray[np.bool_], requests: int) -> NDArray[np.intp]:
        """intp [requests]: accepted nodes of each where only `chosen` [nodes] are verified."""
        return np.bincount(self.tree_of[self.on_path & chosen], minlength=requests)

    def observed(self, chosen: NDArray[np.bool_] | None) -> NodeOutcomes:
        """What the target's walks have shown of every chosen child of every node they reached. None: all are chosen."""
        reached, forest = self.table.reached.ravel()[self.spots], self.table.forest
        seen = (reached if chosen is None else reached & chosen).nonzero()[0]
        nodes = self.nodes[seen]
        return NodeOutcomes(
            sources=forest.sources[nodes],
            depths=forest.depths[nodes].astype(np.uint8),
            ranks=forest.ranks[nodes],
            sampled=np.zeros(len(nodes), np.bool_),
            draft_probs=forest.draft_probs[nodes],
            accepted=self.on_path[seen],
        )


def draw(table: Table, layers: int, fates: NDArray[np.int64]) -> Drawn:
    """Trees of so many layers, of requests that meet these fates.

    Args:
        fates: int64 [requests]; world * OUTCOMES + outcome.
    """
    worlds, outcomes = np.divmod(fates, OUTCOMES)
    sizes = table.sizes[layers, worlds]
    tree_of = np.arange(len(fates)).repeat(sizes)
    ends: NDArray[np.int64] = sizes.cumsum()
    before: NDArray[np.int64] = table.firsts[worlds] - (ends - sizes)
    nodes = before[tree_of] + np.arange(len(tree_of))
    spots = (outcomes * table.on_path.shape[1])[tree_of] + nodes
    return Drawn(table, tree_of, nodes, spots, table.forest.depths[nodes], table.on_path.ravel()[spots])


class Deal:
    """Fates for some steps on end, and what one policy's trees have to do with them.

    Attributes:
        fates: int64 [requests]; world * OUTCOMES + outcome.
        layer_nodes: int64 [1 + requests, MAX_DEPTH + 1]; nodes that the draft model is run on for each layer, and those
            of the whole tree, summed up over the requests before.
        layer_acceptance: float64 [requests, MAX_DEPTH]; the sum of their path acceptance.
    """

    def __init__(self, table: Table, fates: NDArray[np.int64]) -> None:
        self.table, self.fates = table, fates
        worlds = fates // OUTCOMES
        self.layer_nodes = np.zeros((1 + len(fates), MAX_DEPTH + 1), np.int64)
        table.run_and_grown[worlds].cumsum(0, out=self.layer_nodes[1:])
        self.layer_acceptance = table.layer_acceptance[worlds]
        self._drawn: dict[int, tuple[Drawn, list[int]]] = {}

    @cached_property
    def emitted(self) -> NDArray[np.int64]:
        """int64 [requests]: tokens where whole trees are verified."""
        return self.table.emitted[self.fates]

    def drawn(self, layers: int) -> tuple[Drawn, list[int]]:
        """Trees of so many layers, and where each request's nodes begin, with the end of the last one."""
        if layers not in self._drawn:
            ends = self.table.sizes[layers, self.fates // OUTCOMES].cumsum().tolist()
            self._drawn[layers] = draw(self.table, layers, self.fates), [0, *ends]
        return self._drawn[layers]


class Hand(NamedTuple):
    """One step's share of a deal: `requests` of it, from `first` on."""

    deal: Deal
    first: int
    requests: int

    @property
    def emitted(self) -> NDArray[np.int64]:
        """int64 [requests]: tokens where whole trees are verified."""
        return self.deal.emitted[self.first : self.first + self.requests]

    def layer_nodes(self) -> list[int]:
        """Nodes that the draft model is run on for each layer, and those of the whole trees; over all requests."""
        rows = self.deal.layer_nodes
        return (rows[self.first + self.requests] - rows[self.first]).tolist()

    def layer_acceptance(self, weights: NDArray[np.float64] | None) -> list[float]:
        """For each layer the path acceptance of those nodes, over all requests. weights: None if all are 1."""
        rows = self.deal.layer_acceptance[self.first : self.first + self.requests]
        return (rows.sum(0) if weights is None else weights[: self.requests] @ rows).tolist()

    def drawn(self, layers: int) -> Drawn:
        """The requests' trees of so many layers."""
        drawn, begins = self.deal.drawn(layers)
        return drawn.part(slice(begins[self.first], begins[self.first + self.requests]), self.first)

    def observed(self) -> NodeOutcomes:
        """What the target's walks have shown where whole trees were verified."""
        fates = self.deal.fates[self.first : self.first + self.requests]
        return draw(self.deal.table, MAX_DEPTH, fates).observed(None)


class Dealer:
    """Deals one verifier's requests what they meet; the same whatever their trees are."""

    def __init__(self, random: np.random.Generator) -> None:
        self._random = random
        self._fates, self._next = np.zeros(0, np.int64), 0
        self._deal: Deal | None = None
        self._dealt_from = 0

    def hand(self, table: Table, requests: int) -> Hand:
        """What the next requests meet."""
        if self._next + requests > len(self._fates):
            self._fates, self._next = self._random.integers(WORLDS * OUTCOMES, size=DRAWN), 0
            self._deal = None
        first, deal = self._next - self._dealt_from, self._deal
        if deal is None or deal.table is not table or first + requests > len(deal.fates):
            self._dealt_from, first = self._next, 0
            deal = self._deal = Deal(table, self._fates[self._next : self._next + DEALT_STEPS * requests])
        self._next += requests
        return Hand(deal, first, requests)
