"""The built-in plan: in force before the first plan arrives and after the last one has expired."""

from __future__ import annotations

import math

from planner.fast.acceptance import prior
from treeline.config import LimitsConfig
from treeline.plan import CostCurve, CostModel, Plan

BUILTIN_NODES, BUILTIN_DEPTH = 8, 4
"""Most nodes and layers of a tree: one request's pass then stays near FLAT_UP_TO_TOKENS."""
FLAT_UP_TO_TOKENS = 8
"""Tokens that a memory-bound pass runs at little more than the cost of one: 8 on a CPU (`bench step`), more on GPUs."""
PASS_S = 0.03
"""Seconds of the guessed pass: any value, since drafting costs are 0 here and the rule compares ratios."""


def builtin_plan(limits: LimitsConfig) -> Plan:
    """Version 0: small trees of likely nodes, on any device.

    The cost curve is a guess: flat up to 8 tokens, as memory-bound passes are, then proportional to tokens. Under it a
    single request gets a short tree, and a batch of 8 or more gets only nodes that are probably accepted.
    """
    tokens = (1, FLAT_UP_TO_TOKENS, 256)
    seconds = (PASS_S, PASS_S * 1.2, PASS_S * 1.2 * 256 / FLAT_UP_TO_TOKENS)
    return Plan(
        version=0,
        created_unix_s=0.0,
        lifetime_s=math.inf,
        cost=CostModel(verify=(CostCurve(1, 64, tokens, seconds),)),
        calibration=prior(),
        price=0.0,
        max_nodes=min(BUILTIN_NODES, limits.max_tree_nodes),
        max_depth=min(BUILTIN_DEPTH, limits.max_tree_depth),
        reason="built in: no plan has been received",
    )
