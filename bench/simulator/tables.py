"""Trees of one policy over all worlds, grown by the drafter's own code and kept while they would come out the same."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from bench.simulator.worlds import OUTCOMES, World
from drafter_svc.growth import GrowingTree
from drafter_svc.sessions import Session
from planner.cost import plain_decode_s
from planner.policies import Policy
from planner.rule import Candidate
from treeline.drafting import DraftSequence
from treeline.plan import Plan
from treeline.sampling import SamplingParams
from treeline.tree import ROOT, DraftTree, Source

LEVEL = math.log(1.25)
"""Prices are told apart in steps of a quarter: a tree is grown at the first price of a step that is met."""
LEAST_THRESHOLD = 1e-3
"""Nodes worth less than this are cut by the limit on nodes anyway."""
MAX_NODES = 64
MAX_DEPTH = 8


@dataclass(frozen=True)
class Cut:
    """A grown tree down to some depth. on_path: bool [OUTCOMES, nodes]."""

    candidate: Candidate
    on_path: NDArray[np.bool_]


@dataclass(frozen=True)
class Grown:
    """One world's tree, grown as deep as the policy alone would go.

    Attributes:
        frontiers: for each layer, path acceptance of the nodes run through the draft model for the layer below it.
        cuts: for each number of layers from 0 on, the tree that these give.
    """

    frontiers: list[NDArray[np.float32]]
    cuts: list[Cut]

    def cut(self, layers: int) -> Cut:
        return self.cuts[min(layers, len(self.cuts) - 1)]


class Table:
    """Trees of one policy over all worlds, under one plan.

    Attributes:
        trees: one per world.
    """

    def __init__(self, trees: list[Grown]) -> None:
        self.trees = trees

    @cached_property
    def nodes(self) -> NDArray[np.int64]:
        """int64 [worlds]: nodes of the whole trees."""
        return np.asarray([len(tree.cuts[-1].candidate.tree) for tree in self.trees])

    @cached_property
    def accepted(self) -> NDArray[np.int64]:
        """int64 [worlds, OUTCOMES]: accepted nodes of the whole trees."""
        return np.asarray([tree.cuts[-1].on_path.sum(1) for tree in self.trees]).reshape(-1, OUTCOMES)

    @cached_property
    def layer_nodes(self) -> NDArray[np.int64]:
        """int64 [worlds, MAX_DEPTH]: nodes run through the draft model for each layer of the whole trees."""
        counts = np.zeros((len(self.trees), MAX_DEPTH), np.int64)
        for row, tree in zip(counts, self.trees, strict=True):
            row[0] = len(tree.cuts) > 1
            sizes = [len(scores) for scores in tree.frontiers]
            row[1 : 1 + len(sizes)] = sizes
        return counts


class Tables:
    """Looks up, and grows where needed, the trees for the plan in force."""

    def __init__(self, policy: Policy, worlds: list[World]) -> None:
        self._policy, self._worlds = policy, worlds
        self._tables: dict[tuple[int, ...], Table] = {}
        self._fresh_until = 1

    def table(self, plan: Plan, requests: int, layers: int) -> Table:
        """The trees for a step that drafts `layers` layers for so many requests."""
        if plan.version >= self._fresh_until:
            # Calibration changes fast at first; later only the noise of its estimates does.
            self._tables, self._fresh_until = {}, 2 * plan.version
        key = (layers, *self._key(plan, requests))
        if key not in self._tables:
            self._tables[key] = Table([self._grow(world, plan, requests, layers) for world in self._worlds])
        return self._tables[key]

    def _key(self, plan: Plan, requests: int) -> tuple[int, ...]:
        """What the policy's `keep` and `expand` read of plan and batch, in levels."""
        if self._policy.prices_drafting:
            node_s = plan.cost.node_s
            worths = (plan.price * node_s, plan.price * (node_s + plan.cost.draft_node_s))
            return tuple(_level(max(LEAST_THRESHOLD, worth)) for worth in worths)
        if self._policy.spec == "smart-paper":
            return (requests, _level(plain_decode_s(plan.cost)))
        return ()

    def _grow(self, world: World, plan: Plan, requests: int, layers: int) -> Grown:
        nodes = plan.max_nodes if self._policy.prices_drafting else MAX_NODES
        wanted = DraftSequence(0, 0, [0], SamplingParams(), self._policy.spec, nodes, layers)
        tree = GrowingTree(Session(0, [0]), wanted, self._policy)
        frontiers, run = [], [ROOT] if tree.grows else []
        while run:
            tree.add_layer([(Source.SYNTHETIC, world.propose(tree, run))], plan, requests)
            run = []
            if tree.grows:
                run, frontier = tree.frontier(plan)
                if run:
                    frontiers.append(frontier.scores)
        finished = tree.finish()
        depths = finished.depths
        layers_run = 1 + len(frontiers) if wanted.max_depth else 0
        cuts = [self._cut(world, finished.select(depths <= depth)) for depth in range(layers_run + 1)]
        return Grown(frontiers, cuts)

    def _cut(self, world: World, tree: DraftTree) -> Cut:
        return Cut(Candidate(tree, self._policy, 1.0, False), world.on_path(tree.token_ids))


def _level(value: float) -> int:
    return round(math.log(value) / LEVEL)
