"""What the planning of a step costs: the fast path timed on one core, without a model."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

import numpy as np

from planner.calibration import prior
from planner.gate import Supply, outlook
from planner.policies import parse_policy
from planner.rule import BatchState, Candidate, prune_batch
from treeline.plan import CostCurve, CostModel, Plan
from treeline.tree import ROOT, DraftTree

TOKENS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128)
REGIONS = ((1, 64), (8, 64), (32, 64), (1, 768))
MAX_DEPTH = 8
WARM_UP = 20


def run_prune(requests: int, nodes: int, repeats: int, seed: int = 0) -> list[dict]:
    """Rows of median, lowest and highest microseconds: choosing nodes, cutting trees, deciding whether to draft.

    Trees are random, of `nodes` each; the context grows with every repeat, as it does in service.
    """
    random = np.random.default_rng(seed)
    smart, plan = parse_policy("smart"), _plan()
    candidates = [Candidate(_tree(random, nodes), smart, 1.0, bool(i % 2)) for i in range(requests)]

    def state(repeat: int) -> BatchState:
        return BatchState(requests, 256 + repeat, 0.004, 0)

    pruning = prune_batch(candidates, state(0), plan)
    supply = Supply()
    supply.observe(requests, pruning.gains, (requests,) * 4)
    timed: dict[str, Callable[[int], object]] = {
        "prune_batch": lambda repeat: prune_batch(candidates, state(repeat), plan),
        "cut trees": lambda repeat: [c.tree.select(kept) for c, kept in zip(candidates, pruning.keep, strict=True)],
        "gate": lambda repeat: outlook(supply, requests, requests, state(repeat), plan, False),
    }
    return [
        {"what": what, "requests": requests, "nodes": nodes, **_microseconds(function, repeats)}
        for what, function in timed.items()
    ]


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

    cost = CostModel(tuple(curve(*region) for region in REGIONS), draft_layer_s=0.001, draft_node_s=1e-4)
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
