"""Growing draft trees layer by layer: one loop for every proposer and every policy."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from drafter_svc.proposer import Children, Proposer
from drafter_svc.sessions import Session
from planner.calibration import accepts
from planner.policies import Layer, Policy
from planner.rule import Frontier, another_layer
from treeline.drafting import DraftSequence
from treeline.plan import Calibration, Plan
from treeline.tree import ROOT, DraftTree, Source

MIN_PROB = np.finfo(np.float32).tiny


@dataclass(frozen=True)
class Candidates:
    """Distinct children that might join a tree as its next layer; columns [m], grouped under parents by rank."""

    parents: NDArray[np.int32]
    token_ids: NDArray[np.int32]
    probs: NDArray[np.float32]
    ranks: NDArray[np.uint8]
    sources: NDArray[np.uint8]
    accepts: NDArray[np.float32]

    def take(self, chosen: NDArray[np.intp] | NDArray[np.bool_]) -> Candidates:
        return Candidates(
            self.parents[chosen],
            self.token_ids[chosen],
            self.probs[chosen],
            self.ranks[chosen],
            self.sources[chosen],
            self.accepts[chosen],
        )


class GrowingTree:
    """One request's tree while it grows. Nodes are numbered parents-first, as in the finished tree.

    Attributes:
        layer: the nodes that joined last, whose children may come next; [ROOT] at first, empty when nothing joined.
        depth: of the nodes in `layer`.
        max_depth: no layer grows beyond this.
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
        self._probs: list[float] = []
        self._ranks: list[int] = []
        self._sources: list[int] = []
        self._scores: list[float] = []
        self._path_probs: list[float] = []
        self._path_ranks: list[int] = []
        self._decision: tuple[Layer, NDArray[np.bool_]] | None = None

    def __len__(self) -> int:
        return len(self.token_ids)

    @property
    def sampled(self) -> bool:
        return not self.sequence.sampling.greedy

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

    def add_layer(self, proposals: list[tuple[Source, Children]], plan: Plan, batch: int) -> None:
        """Let the policy choose the next layer among all that was proposed. `batch`: trees that grow together."""
        self.depth += 1
        if not any(children.parents for _, children in proposals):
            self.layer = []
            return
        first = len(self)
        new = merge(proposals, self.depth, self.sampled, plan.calibration)
        layer = Layer(
            depth=self.depth,
            parent_scores=_of_parents(self._scores, new.parents),
            probs=new.probs,
            path_probs=_of_parents(self._path_probs, new.parents) * new.probs,
            accepts=new.accepts,
            ranks=new.ranks,
            sources=new.sources,
            path_ranks=_path_ranks(self._path_ranks, new),
            scores_so_far=np.asarray(self._scores, np.float32),
            paths=max(1, len(self) - len({*self.parents} - {ROOT})),
            path_probs_so_far=sum(self._path_probs),
            weight=self.sequence.weight,
            sampled=self.sampled,
            batch=batch,
        )
        kept = self.policy.keep(layer, plan)
        if len(self) + np.count_nonzero(kept) > self.sequence.max_nodes:
            kept = kept & self._within_limit(np.where(kept, layer.scores, -1.0))
        joining = new.take(kept)
        self.parents += joining.parents.tolist()
        self.token_ids += joining.token_ids.tolist()
        self._probs += joining.probs.tolist()
        self._ranks += joining.ranks.tolist()
        self._sources += joining.sources.tolist()
        self._scores += layer.scores[kept].tolist()
        self._path_probs += layer.path_probs[kept].tolist()
        self._path_ranks += layer.path_ranks[kept].tolist()
        self.layer = list(range(first, len(self)))
        self._decision = (layer, kept)

    def frontier(self, plan: Plan) -> tuple[list[int], Frontier]:
        """The nodes of `layer` to run through a draft model next, and their value for the layer rule.

        The policy chooses; in a tree that is full, only nodes better than its last one can have children that stay.
        """
        assert self._decision is not None
        layer, kept = self._decision
        nodes = self.layer[0] + np.cumsum(kept)[self.policy.expand(layer, kept, plan)] - 1
        all_scores, limit = np.asarray(self._scores, np.float32), self.sequence.max_nodes
        if len(self) >= limit:
            nodes = nodes[all_scores[nodes] > np.partition(all_scores, -limit)[-limit]]
        acceptance = float(all_scores[nodes].sum())
        frontier = Frontier(self.policy, self.sequence.weight, len(nodes), acceptance, self.depth, self.sampled)
        return nodes.tolist(), frontier

    def finish(self) -> DraftTree:
        """The tree, after the policy's last cut."""
        if not self.token_ids:
            return DraftTree.empty()
        scores, parents = np.asarray(self._scores, np.float32), np.asarray(self.parents, np.int32)
        tree = DraftTree(
            np.asarray(self.token_ids, np.int32),
            parents,
            np.clip(np.asarray(self._probs, np.float32), MIN_PROB, 1.0),
            np.asarray(self._ranks, np.uint8),
            np.asarray(self._sources, np.uint8),
        )
        return tree.select(self.policy.finish(scores, parents) & best(scores, self.sequence.max_nodes))

    def _within_limit(self, scores: NDArray[np.float32]) -> NDArray[np.bool_]:
        """Which candidates are among the tree's best `max_nodes` so far; no others can be in the end."""
        both = np.concatenate([np.asarray(self._scores, np.float32), scores])
        return best(both, self.sequence.max_nodes)[len(self) :]


def _of_parents(values: list[float], parents: NDArray[np.int32]) -> NDArray[np.float32]:
    """float32 [m]: each parent's value, 1 for ROOT."""
    return np.asarray([*values, 1.0], np.float32)[parents]


def _path_ranks(of_nodes: list[int], new: Candidates) -> NDArray[np.uint64]:
    """uint64 [m]: ranks along each candidate's path, four bits each."""
    return np.asarray([*of_nodes, 0], np.uint64)[new.parents] << np.uint64(4) | new.ranks


def best(scores: NDArray[np.float32], count: int) -> NDArray[np.bool_]:
    """bool [n]: the `count` highest scores; the earlier of equals, so that parents come before children."""
    chosen = np.zeros(len(scores), np.bool_)
    chosen[np.argsort(-scores, kind="stable")[:count]] = True
    return chosen


def merge(proposals: list[tuple[Source, Children]], depth: int, sampled: bool, calibration: Calibration) -> Candidates:
    """All proposed children of one tree as one layer.

    Of a child that two sources propose, the one with the higher calibrated acceptance stays. Siblings from several
    sources are ranked anew by acceptance; a single source's ranks stay as they are.
    """

    proposals = [(source, children) for source, children in proposals if children.parents]

    def column(name: str, dtype: type) -> NDArray:
        columns = [getattr(children, name) for _, children in proposals]
        return np.asarray(columns[0] if len(columns) == 1 else list(chain.from_iterable(columns)), dtype)

    sources = np.asarray([source for source, _ in proposals], np.uint8).repeat([len(c.parents) for _, c in proposals])
    probs = column("probs", np.float32)
    acceptance = accepts(calibration, sources, np.full(len(probs), depth, np.int32), probs, sampled)
    both = Candidates(
        column("parents", np.int32),
        column("token_ids", np.int32),
        probs,
        column("ranks", np.uint8),
        sources,
        acceptance,
    )
    if len({source for source, _ in proposals}) < 2:
        return both
    order = np.lexsort((both.sources, both.ranks, -both.accepts, both.parents))
    seen: set[tuple[int, int]] = set()
    siblings: dict[int, int] = {}
    chosen, ranks = [], []
    for i in order.tolist():
        parent, child = int(both.parents[i]), (int(both.parents[i]), int(both.token_ids[i]))
        if child in seen:
            continue
        seen.add(child)
        chosen.append(i)
        ranks.append(siblings.get(parent, 0))
        siblings[parent] = ranks[-1] + 1
    return replace(both.take(np.asarray(chosen, np.intp)), ranks=np.asarray(ranks, np.uint8))


def grow(trees: list[GrowingTree], plan: Plan, lookups: list[Proposer], model: Proposer | None) -> None:
    """Grow all trees of a step, until no policy wants more.

    `lookups` are free and asked about every node. The `model` is asked about the nodes that each policy chooses, as
    long as another layer pays for the whole batch; the lookups may then go on alone.
    """
    growing = [tree for tree in trees if tree.grows]
    wanted = [(tree, tree.layer) for tree in growing if tree.models] if model else []
    while growing:
        proposals: dict[int, list[tuple[Source, Children]]] = {id(tree): [] for tree in growing}
        modelled = []
        if model and wanted:
            for (tree, _), children in zip(wanted, model.propose(wanted), strict=True):
                proposals[id(tree)].append((model.source, children))
                if children.parents:
                    modelled.append(tree)
        for lookup in lookups:
            asked = [(tree, tree.layer) for tree in growing]
            for tree, children in zip(growing, lookup.propose(asked), strict=True):
                proposals[id(tree)].append((lookup.source, children))
        for tree in growing:
            tree.add_layer(proposals[id(tree)], plan, batch=len(trees))
        growing = [tree for tree in growing if tree.grows]
        wanted = _next_model_layer([tree for tree in modelled if tree.models], plan)


def _next_model_layer(trees: list[GrowingTree], plan: Plan) -> list[tuple[GrowingTree, list[int]]]:
    """The nodes to run through the draft model next; none if another layer does not pay."""
    frontiers = [(tree, *tree.frontier(plan)) for tree in trees]
    frontiers = [entry for entry in frontiers if entry[1]]
    if not frontiers or not another_layer([frontier for _, _, frontier in frontiers], plan):
        return []
    return [(tree, nodes) for tree, nodes, _ in frontiers]
