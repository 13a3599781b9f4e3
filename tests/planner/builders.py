"""Plans, curves and records for planner tests."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from planner.fast.acceptance import prior
from planner.fast.rule import Pruning, Requests, prune_batch
from planner.fast.step_prices import StepPrices
from planner.policies import Policy
from tests.trees import tree_of
from treeline.forest import Forest
from treeline.plan import CostCurve, CostModel, Plan
from treeline.step_record import NodeOutcomes, StepRecord


def plan_with(cost: CostModel, price: float = 0.0, **changes: object) -> Plan:
    values = {"version": 1, "created_unix_s": 0.0, "lifetime_s": 10.0, "calibration": prior(), "max_nodes": 32}
    return Plan(cost=cost, price=price, max_depth=8, **{**values, **changes})  # type: ignore[arg-type]


def linear_cost(fixed_s: float = 0.03, token_s: float = 0.001, **changes: float) -> CostModel:
    tokens = tuple(range(1, 129))
    curve = CostCurve(1, 64, tokens, tuple(fixed_s + token_s * n for n in tokens))
    return CostModel(verify=(curve,), node_s=token_s, **changes)  # type: ignore[arg-type]


def random_tree(random: np.random.Generator, most: int) -> Forest:
    n = int(random.integers(0, most + 1))
    parents = [int(random.integers(-1, i)) if i else -1 for i in range(n)]
    return tree_of(list(range(n)), parents, random.uniform(0.01, 1.0, n).tolist())


class Drafted(NamedTuple):
    """A request and its tree."""

    tree: Forest
    policy: Policy
    weight: float
    sampled: bool


@dataclass(frozen=True)
class Pruned(Pruning):
    """`keep`: bool [n] per request: `chosen`, tree by tree."""

    keep: list[np.ndarray]


def prices_of(plan: Plan, sequences: int, prompt_tokens: int = 0, startable: int = 0) -> StepPrices:
    return StepPrices.of(plan, sequences, 64, startable, 32 * sequences, prompt_tokens)


def prune(
    drafted: list[Drafted], plan: Plan, draft_s: float = 0.0, prompt_tokens: int = 0, startable: int = 0
) -> Pruned:
    forest = Forest.join([one.tree for one in drafted])
    requests = Requests(
        np.asarray([one.weight for one in drafted], np.float32),
        np.asarray([one.sampled for one in drafted]),
        np.asarray([one.policy.priced for one in drafted]),
    )
    prices = prices_of(plan, len(drafted), prompt_tokens, startable)
    pruning = prune_batch(forest, requests, plan.calibration, prices, draft_s)
    ends = np.cumsum(forest.sizes)[:-1]
    return Pruned(**vars(pruning), keep=np.split(pruning.chosen, ends))


def outcomes(draft_probs: np.ndarray, accepted: np.ndarray, depth: int = 1) -> NodeOutcomes:
    n = len(accepted)
    return NodeOutcomes(
        np.zeros(n, np.uint8),
        np.full(n, depth, np.uint8),
        np.ones(n, np.bool_),
        np.zeros(n, np.bool_),
        np.asarray(draft_probs, np.float32),
        np.asarray(accepted, np.bool_),
    )


def record(**changes: object) -> StepRecord:
    """A plain decoding step of one sequence, with changes."""
    values: dict = {
        "step_id": 1,
        "unix_s": 1000.0,
        "plan_version": 1,
        "sequences": 1,
        "tokens": 1,
        "prefill_tokens": 0,
        "context_tokens": 64,
        "drafted_nodes": 0,
        "verified_nodes": 0,
        "accepted_nodes": 0,
        "emitted_tokens": 1,
        "running": 1,
        "waiting": 0,
        "startable": 0,
        "draft_s": 0.0,
        "drafter_s": 0.0,
        "draft_layer_nodes": (),
        "verify_s": 0.031,
        "predicted_verify_s": 0.0,
        "step_s": 0.032,
        "goodput": 0.0,
        "price": 0.0,
    }
    return StepRecord(**{**values, **changes})
