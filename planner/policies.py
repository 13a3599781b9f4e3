"""How trees are grown: every policy behind one interface, spelled as a short string.

The drafter calls `keep`, `expand` and `finish` on one request's tree; `prunes` says that the verifier then chooses
among the nodes of the whole batch (`planner.rule.prune_batch`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from planner.cost import cheapest_node_s, paper_layer_s, plain_decode_s
from treeline.plan import PaperFit, Plan

SPELLINGS = "off, chain:K, static:B1-B2-..., eagle2:DEPTH,TOPK,NODES, smart-paper, smart"
MAX_DEPTH = 32
MAX_CHILDREN = 16
MAX_NODES = 256
SMART_CHILDREN = 6
PAPER_CHILDREN = 8
PAPER_ALPHA = 0.8
PAPER_BUDGET_NODES = 200
"""B of the paper for the whole batch: its best setting (ablation at batch 16)."""


@dataclass(frozen=True)
class Layer:
    """Candidates for the next layer of one request's tree, one row each.

    Attributes:
        depth: 1 for children of the root.
        parent_scores: float32 [m]; calibrated path acceptance of each candidate's parent.
        probs: float32 [m]; the drafter's probability given the parent.
        path_probs: float32 [m]; product of the drafter's probabilities over the whole path, this candidate included.
        accepts: float32 [m]; calibrated acceptance given the parent.
        ranks, sources: uint8 [m].
        nodes_so_far, paths: of the tree that the layer would join; the bare root is one path.
        path_probs_so_far: sum of path_probs over the nodes of that tree.
        weight: value of this request's tokens.
        sampled: sampled or greedy.
        batch: requests drafted together.
    """

    depth: int
    parent_scores: NDArray[np.float32]
    probs: NDArray[np.float32]
    path_probs: NDArray[np.float32]
    accepts: NDArray[np.float32]
    ranks: NDArray[np.uint8]
    sources: NDArray[np.uint8]
    nodes_so_far: int
    paths: int
    path_probs_so_far: float
    weight: float
    sampled: bool
    batch: int

    @property
    def scores(self) -> NDArray[np.float32]:
        """float32 [m]: calibrated path acceptance, never above the parent's."""
        return self.parent_scores * np.minimum(self.accepts, 1)


class Policy(Protocol):
    """Attributes:
    spec: canonical spelling.
    max_depth: no layer beyond it; 0 never drafts.
    max_children: children to propose under each expanded node.
    prunes: the verifier chooses among its nodes over the whole batch.
    """

    @property
    def spec(self) -> str: ...

    @property
    def max_depth(self) -> int: ...

    @property
    def max_children(self) -> int: ...

    @property
    def prunes(self) -> bool: ...

    def keep(self, layer: Layer, plan: Plan) -> NDArray[np.bool_]:
        """bool [m]: which candidates join the tree."""
        ...

    def expand(self, layer: Layer, kept: NDArray[np.bool_], plan: Plan) -> NDArray[np.intp]:
        """Indices of kept candidates to run through the draft model next, should another layer be run."""
        ...

    def finish(self, scores: NDArray[np.float32], parents: NDArray[np.int32]) -> NDArray[np.bool_]:
        """bool [n], closed under parents: the last cut of one request's finished tree by path acceptance."""
        ...


class _Growth:
    """What most policies share: expand all that was kept, cut nothing at the end."""

    prunes = False

    def expand(self, layer: Layer, kept: NDArray[np.bool_], plan: Plan) -> NDArray[np.intp]:
        return np.flatnonzero(kept)

    def finish(self, scores: NDArray[np.float32], parents: NDArray[np.int32]) -> NDArray[np.bool_]:
        return np.ones(len(scores), np.bool_)


@dataclass(frozen=True)
class Off(_Growth):
    """Plain autoregressive decoding."""

    spec = "off"
    max_depth = 0
    max_children = 0

    def keep(self, layer: Layer, plan: Plan) -> NDArray[np.bool_]:
        return np.zeros(len(layer.probs), np.bool_)


@dataclass(frozen=True)
class Chain(_Growth):
    """The most probable token, `length` times."""

    length: int
    max_children = 1

    @property
    def spec(self) -> str:
        return f"chain:{self.length}"

    @property
    def max_depth(self) -> int:
        return self.length

    def keep(self, layer: Layer, plan: Plan) -> NDArray[np.bool_]:
        return _top(layer.scores, 1)


@dataclass(frozen=True)
class Static(_Growth):
    """The same shape in every step: `branching[d]` children under each node of depth d."""

    branching: tuple[int, ...]

    @property
    def spec(self) -> str:
        return "static:" + "-".join(map(str, self.branching))

    @property
    def max_depth(self) -> int:
        return len(self.branching)

    @property
    def max_children(self) -> int:
        return max(self.branching)

    def keep(self, layer: Layer, plan: Plan) -> NDArray[np.bool_]:
        return layer.ranks < self.branching[layer.depth - 1]


@dataclass(frozen=True)
class Eagle2(_Growth):
    """EAGLE-2 (arXiv 2406.16858): expand the `topk` best of each layer, then keep the `nodes` best of all."""

    depth: int
    topk: int
    nodes: int

    @property
    def spec(self) -> str:
        return f"eagle2:{self.depth},{self.topk},{self.nodes}"

    @property
    def max_depth(self) -> int:
        return self.depth

    @property
    def max_children(self) -> int:
        return self.topk

    def keep(self, layer: Layer, plan: Plan) -> NDArray[np.bool_]:
        return layer.ranks < self.topk

    def expand(self, layer: Layer, kept: NDArray[np.bool_], plan: Plan) -> NDArray[np.intp]:
        return np.flatnonzero(_top(np.where(kept, layer.scores, -1.0), self.topk) & kept)

    def finish(self, scores: NDArray[np.float32], parents: NDArray[np.int32]) -> NDArray[np.bool_]:
        return _top(scores, self.nodes)


@dataclass(frozen=True)
class SmartPaper(_Growth):
    """SMART to the letter (arXiv 2604.09731): per request, layer by layer.

    Keep u iff alpha * dC_target / dC_spec > C_target / C_spec, with dC_target = c_T * P(u | ancestors) / |paths| and
    dC_spec = lambda + gamma * delta * rho * n^(rho-1) * exp(delta * n^rho), n being the tree so far; the budget is
    split evenly over the batch.
    """

    spec = "smart-paper"
    max_depth = 8
    max_children = PAPER_CHILDREN

    def keep(self, layer: Layer, plan: Plan) -> NDArray[np.bool_]:
        fit = plan.cost.paper or PaperFit(lambda_s=0.0, gamma_s=plain_decode_s(plan.cost), delta=0.01, rho=1.0)
        token_s = plain_decode_s(plan.cost)
        nodes = layer.nodes_so_far + 1  # the root is verified too
        spent_s, node_s = paper_layer_s(fit, nodes)
        target_s = token_s * (1 + layer.path_probs_so_far / layer.paths)
        gain_s = token_s * layer.path_probs / layer.paths
        kept = PAPER_ALPHA * gain_s * spent_s > target_s * node_s
        budget = max(0, PAPER_BUDGET_NODES // max(1, layer.batch) - layer.nodes_so_far)
        return kept & _top(np.where(kept, layer.path_probs, -1.0), budget)


@dataclass(frozen=True)
class Smart(_Growth):
    """Treeline's rule: keep what might be worth its price; the verifier decides over the whole batch."""

    spec = "smart"
    max_depth = MAX_DEPTH
    max_children = SMART_CHILDREN
    prunes = True

    def keep(self, layer: Layer, plan: Plan) -> NDArray[np.bool_]:
        return layer.weight * layer.scores > plan.price * cheapest_node_s(plan.cost)


def parse_policy(spec: str) -> Policy:
    """The policy that `spec` names.

    Raises:
        ValueError: it names none; the message lists the spellings.
    """
    name, _, parameters = spec.strip().partition(":")
    maker = _PARAMETERLESS.get(name) if not parameters else None
    if maker is not None and ":" not in spec:
        return maker()
    try:
        if name == "chain":
            return Chain(_bounded(int(parameters), MAX_DEPTH))
        if name == "static":
            branching = tuple(_bounded(int(part), MAX_CHILDREN) for part in parameters.split("-"))
            _bounded(len(branching), MAX_DEPTH)
            return Static(branching)
        if name == "eagle2":
            depth, topk, nodes = (int(part) for part in parameters.split(","))
            return Eagle2(_bounded(depth, MAX_DEPTH), _bounded(topk, MAX_CHILDREN), _bounded(nodes, MAX_NODES))
    except ValueError:
        pass
    raise ValueError(f"unknown policy '{spec}': one of {SPELLINGS} (depth to {MAX_DEPTH}, children to {MAX_CHILDREN})")


_PARAMETERLESS: dict[str, Callable[[], Policy]] = {"off": Off, "smart-paper": SmartPaper, "smart": Smart}


def _bounded(value: int, most: int) -> int:
    if not 1 <= value <= most:
        raise ValueError
    return value


def _top(scores: NDArray[np.float32], count: int) -> NDArray[np.bool_]:
    """bool [n]: the `count` highest; the earlier of equals, so that a parent goes before its child."""
    chosen = np.zeros(len(scores), np.bool_)
    chosen[np.argsort(-scores, kind="stable")[:count]] = True
    return chosen
