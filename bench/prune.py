"""What the planning of a step costs: the fast path timed on one core, without a model."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from statistics import median

import numpy as np

from drafter_svc.growth import grow
from drafter_svc.proposer import Children, GrowingTree
from drafter_svc.sessions import Session
from planner.fast.acceptance import prior
from planner.fast.gate import Decision, DraftGate
from planner.fast.rule import BatchState, Candidate, Frontier, another_layer, prune_batch
from planner.policies import parse_policy
from treeline.drafting import DraftSequence
from treeline.forest import Forest
from treeline.plan import CostCurve, CostModel, Plan
from treeline.sampling import SamplingParams
from treeline.tree import ROOT, DraftTree, Source

TOKENS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128)
REGIONS = ((1, 64), (8, 64), (32, 64), (1, 768))
MAX_DEPTH = 8
WARM_UP = 20
CHILDREN_PROBS = (0.6, 0.2, 0.1, 0.05, 0.02, 0.01)


def run_prune(requests: Sequence[int], nodes: Sequence[int], repeats: int, seed: int = 0) -> Iterator[dict]:
    """Rows of median, lowest and highest microseconds, for every number of requests and of each one's nodes.

    Timed are all decisions of a step: whether to draft (gate; while drafting it learns from every step's drafts, and so
    has to look again), whether to draft another layer (asked once a layer), which nodes to verify (prune_batch), and
    cutting the trees to these; and the growth of trees of at most so many nodes, layer by layer, from children that are
    at hand. The other trees are random; the context grows with every repeat, as it does in service.
    """
    random = np.random.default_rng(seed)
    for batch in requests:
        for size in nodes:
            for what, function in _decisions(random, batch, size).items():
                yield {"what": what, "requests": batch, "nodes": size, **_microseconds(function, repeats)}


def _decisions(random: np.random.Generator, requests: int, nodes: int) -> dict[str, Callable[[int], object]]:
    """What a step decides, each as a function of how often it was asked."""
    smart, plan = parse_policy("smart"), _plan()
    forest = Forest.of([_tree(random, nodes) for _ in range(requests)])
    candidates = [Candidate(smart, 1.0, bool(i % 2)) for i in range(requests)]
    frontiers = [Frontier(smart, 1.0, 8, float(random.uniform(1, 4)), 2, c.sampled) for c in candidates]

    def state(repeat: int) -> BatchState:
        return BatchState(requests, 256 + repeat, 0.004, 0)

    pruning, gate = prune_batch(forest, candidates, state(0), plan), DraftGate()

    def decide(repeat: int) -> Decision:
        return gate.decide(requests, requests, state(repeat), plan, False, 0.0)

    def drafted(repeat: int) -> None:
        gate.drafted(Decision(requests), pruning.gains, forest.model_layers(), (requests,) * MAX_DEPTH, 0.004, 0.0)

    def learn_and_decide(repeat: int) -> Decision:
        drafted(repeat)
        return decide(repeat)

    def grow_trees(repeat: int) -> list[DraftTree]:
        sequence = DraftSequence(0, 0, [0], SamplingParams(), smart.spec, nodes, MAX_DEPTH)
        return grow([GrowingTree(Session(0, [0]), sequence, smart) for _ in range(requests)], plan, [], AtHand())

    drafted(0)
    return {
        "gate": decide,
        "gate, drafting": learn_and_decide,
        "another_layer": lambda repeat: another_layer(frontiers, plan),
        "prune_batch": lambda repeat: prune_batch(Forest.of(forest.trees), candidates, state(repeat), plan),
        "cut trees": lambda repeat: forest.select(pruning.chosen),
        "grow trees": grow_trees,
    }


class AtHand:
    """Proposes the same children below every node, in no time."""

    source = Source.SYNTHETIC

    def begin(self, sessions: list[Session]) -> None:
        pass

    def propose(self, wanted: list[tuple[GrowingTree, list[int]]]) -> list[Children]:
        return [_children(tuple(nodes)) for _, nodes in wanted]

    def release(self, session_id: int) -> None:
        pass


@cache
def _children(nodes: tuple[int, ...]) -> Children:
    count = len(CHILDREN_PROBS)
    parents = [node for node in nodes for _ in range(count)]
    ranks = list(range(count)) * len(nodes)
    return Children(parents, ranks, list(CHILDREN_PROBS) * len(nodes), ranks)


def _microseconds(function: Callable[[int], object], repeats: int) -> dict[str, float]:
    taken = []
    for repeat in range(WARM_UP + repeats):
        started_s = time.perf_counter()
        function(repeat)
        taken.append((time.perf_counter() - started_s) * 1e6)
    taken = taken[WARM_UP:]
    return {"us": median(taken), "us_min": min(taken), "us_max": max(taken)}


def _plan() -> Plan:
    def curve(sequences: int, context: int) -> CostCurve:
        tokens = tuple(n for n in TOKENS if n >= sequences)
        return CostCurve(
            sequences, context, tokens, tuple(0.02 + 1e-6 * context + 8e-4 * max(0, n - 8) for n in tokens)
        )

    cost = CostModel(tuple(curve(*region) for region in REGIONS), draft_layer_s=0.001, draft_node_s=1e-4, node_s=8e-4)
    return Plan(1, 0.0, 60.0, cost, prior(), 100.0, 64, MAX_DEPTH)


def _tree(random: np.random.Generator, nodes: int) -> DraftTree:
    """Random children of random earlier nodes, MAX_DEPTH deep at most."""
    parents, depths = list[int](), list[int]()
    while len(parents) < nodes:
        parent = int(random.integers(ROOT, len(parents)))
        depth = 1 if parent == ROOT else depths[parent] + 1
        if depth <= MAX_DEPTH:
            parents.append(parent)
            depths.append(depth)
    return DraftTree.build(list(range(nodes)), parents, random.uniform(0.01, 1.0, nodes).tolist())
