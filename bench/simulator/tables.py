"""Trees of one policy over all worlds, grown by the drafter's own code and kept while they would come out the same."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from bench.simulator.worlds import MAX_DEPTH, OUTCOMES, World
from drafter_svc.growth import GrowingForest
from drafter_svc.proposer import GrowingTree
from drafter_svc.sessions import Session
from planner.fast.cost import plain_decode_s
from planner.fast.rule import path_acceptance
from planner.policies import Policy
from planner.policies.smart import PAPER_BUDGET_NODES, SmartPaper
from treeline.drafting import DraftSequence
from treeline.forest import Forest
from treeline.plan import Calibration, Plan
from treeline.sampling import SamplingParams
from treeline.tree import ROOT, DraftTree, Source

LEVEL = math.log(1.25)
"""Prices are told apart in steps of a quarter: a tree is grown at the first price of a step that is met."""
LEAST_THRESHOLD = 3e-3
"""Nodes worth less than this are cut by the limit on nodes anyway."""
MAX_NODES = 64
FRESH_GROWTH = (10, 100)
"""Calibration changes fast at first, later only the noise of its estimates does: when each replica has had so many
plans, trees are grown anew."""


@dataclass(frozen=True)
class Grown:
    """One world's tree, grown as deep as the policy alone would go.

    Attributes:
        tree: all of it.
        run: for each layer, how many nodes the draft model was run on, and the sum of their path acceptance; the root
            first.
    """

    tree: DraftTree
    run: list[tuple[int, float]]


class Table:
    """Trees of one policy over all worlds, under one plan, as one forest.

    Attributes:
        firsts: int64 [worlds]; the first node of each tree.
        sizes: int64 [MAX_DEPTH + 1, worlds]; nodes of each tree down to each depth: they come before the deeper ones.
        on_path: bool [OUTCOMES, nodes]; whether the target goes through a node.
        layer_nodes: int64 [worlds, MAX_DEPTH]; nodes that the draft model is run on for each layer.
        layer_acceptance: float64 [worlds, MAX_DEPTH]; the sum of their path acceptance.
    """

    def __init__(self, worlds: list[World], grown: list[Grown]) -> None:
        trees = [one.tree for one in grown]
        paths = [world.on_path(tree.token_ids) for world, tree in zip(worlds, trees, strict=True)]
        self.forest, self.on_path = Forest.of(trees), np.ascontiguousarray(np.concatenate(paths, axis=1))
        places = self.forest.depths * len(trees) + self.forest.tree_of
        of_depths = np.bincount(places, minlength=(MAX_DEPTH + 1) * len(trees))
        self.sizes = of_depths.reshape(-1, len(trees)).cumsum(0)
        self.firsts = self.sizes[-1].cumsum() - self.sizes[-1]
        self.layer_nodes = np.zeros((len(grown), MAX_DEPTH), np.int64)
        self.layer_acceptance = np.zeros((len(grown), MAX_DEPTH))
        for world, one in enumerate(grown):
            for layer, (nodes, acceptance) in enumerate(one.run):
                self.layer_nodes[world, layer], self.layer_acceptance[world, layer] = nodes, acceptance
        self._calibration: Calibration | None = None
        self._scores = np.zeros(0, np.float32)

    def scores(self, calibration: Calibration) -> NDArray[np.float32]:
        """float32 [nodes]: a(u)."""
        if calibration is not self._calibration:
            greedy = [False] * len(self.firsts)
            self._calibration, self._scores = calibration, path_acceptance(self.forest, greedy, calibration)
        return self._scores

    @cached_property
    def reached(self) -> NDArray[np.bool_]:
        """bool [OUTCOMES, nodes]: whether the target goes through a node's parent."""
        with_root = np.concatenate([np.ones((OUTCOMES, 1), np.bool_), self.on_path], axis=1)
        return np.ascontiguousarray(with_root[:, self.forest.jumps[0][1:]])

    @cached_property
    def emitted(self) -> NDArray[np.int64]:
        """int64 [worlds * OUTCOMES]: tokens where all nodes are verified: those accepted and the target's own."""
        worlds = len(self.firsts)
        counts = [np.bincount(self.forest.tree_of[row], minlength=worlds) for row in self.on_path]
        return np.stack(counts, axis=1).ravel() + 1

    @cached_property
    def run_and_grown(self) -> NDArray[np.int64]:
        """int64 [worlds, MAX_DEPTH + 1]: `layer_nodes`, and the nodes of the whole tree."""
        return np.column_stack([self.layer_nodes, self.sizes[-1]])


class Tables:
    """Looks up, and grows where needed, the trees for the plan in force."""

    def __init__(self, policy: Policy, worlds: list[World], replicas: int) -> None:
        self._policy, self._worlds = policy, worlds
        self._tables: dict[tuple[int, ...], Table] = {}
        # Chains are the same whatever is calibrated, and the paper goes by the drafter's own probabilities.
        calibrated = policy.max_children > 1 and policy.spec != SmartPaper.spec
        self._fresh_versions = [plans * replicas for plans in FRESH_GROWTH] if calibrated else []

    def table(self, plan: Plan, requests: int, layers: int) -> Table:
        """The trees for a step that drafts `layers` layers for so many requests."""
        while self._fresh_versions and plan.version >= self._fresh_versions[0]:
            self._tables = {}
            del self._fresh_versions[0]
        key = (layers, *self._key(plan, requests))
        if key not in self._tables:
            self._tables[key] = Table(self._worlds, self._grow(plan, requests, layers))
        return self._tables[key]

    def _key(self, plan: Plan, requests: int) -> tuple[int, ...]:
        """What the policy's `keep` and `expand` read of plan and batch, in levels."""
        if self._policy.priced:
            kept, expanded = plan.price * plan.cost.node_s, plan.price * (plan.cost.node_s + plan.cost.draft_node_s)
            kept, expanded = max(LEAST_THRESHOLD, kept), max(LEAST_THRESHOLD, expanded)
            return _level(kept), _level(expanded / kept)
        if self._policy.spec == SmartPaper.spec:
            return (min(MAX_NODES, PAPER_BUDGET_NODES // requests), _level(plain_decode_s(plan.cost)))
        return ()

    def _grow(self, plan: Plan, requests: int, layers: int) -> list[Grown]:
        """Every world's tree; `requests` of them would grow together."""
        nodes = plan.max_nodes if self._policy.priced else MAX_NODES
        wanted = DraftSequence(0, 0, [0], SamplingParams(), self._policy.spec, nodes, layers)
        trees = [GrowingTree(Session(index, [0]), wanted, self._policy) for index in range(len(self._worlds))]
        forest = GrowingForest(trees)
        runs, layer = [[(1, 1.0)] for _ in trees], [(tree, [ROOT]) for tree in trees]
        while layer:
            for tree, parents in layer:
                proposed = self._worlds[tree.session.session_id].propose(tree, parents)
                tree.proposed.append((Source.SYNTHETIC, proposed))
            forest.add_layer(plan, requests)
            found = forest.expansions(plan)
            for one in found:
                runs[one.tree.session.session_id].append((one.frontier.nodes, one.frontier.acceptance))
            layer = [(one.tree, one.nodes) for one in found]
        return [Grown(tree, run) for tree, run in zip(forest.finish(), runs, strict=True)]


def _level(value: float) -> int:
    return round(math.log(value) / LEVEL)
