"""The plan that holds when there is none: before the first one, and after the last one's lifetime."""

from __future__ import annotations

import math

from planner.fast.acceptance import prior
from treeline.config import LimitsConfig
from treeline.plan import CostCurve, CostModel, Plan

BUILTIN_NODES, BUILTIN_DEPTH = 8, 4
"""Nodes and layers of a request's tree: with its root it fits the tokens that are nearly free."""
FLAT_UP_TO_TOKENS = 8
"""Tokens that a memory-bound pass takes at little more than the cost of one: 8 on a CPU (bench step), more on GPUs."""
PASS_S = 0.03
"""Seconds of the guessed pass. Only ratios matter to the rule, except to drafting costs, which the plan says are 0."""


def builtin_plan(limits: LimitsConfig) -> Plan:
    """Version 0: small trees of quite certain nodes, whatever the device.

    Its cost curve is a guess with a shape, not a measurement: flat to 8 tokens, as memory-bound passes are, then
    proportional to tokens. On it a lone request gets a short tree, and a batch of 8 or more only nodes that are
    accepted more often than not.
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
