"""What fits into a step."""

from __future__ import annotations

import math

import pytest

from tests.planner.builders import linear_cost, plan_with, prices_of
from treeline.config import MAX_TREE_DEPTH


@pytest.mark.parametrize(
    ("budget_ms", "layers"), [(math.inf, MAX_TREE_DEPTH), (60.1, 3), (59.9, 2), (53.1, 2), (52.9, 1), (40, 1)]
)
def test_drafts_are_as_deep_as_a_node_of_each_layer_and_request_fits(budget_ms, layers):
    """Four requests: 34 ms without drafts, 5 ms before the first layer; a layer takes 3 ms and its nodes 4 ms."""
    cost = linear_cost(0.03, 0.001, draft_round_trip_s=0.001, draft_sequence_s=0.001, draft_layer_s=0.002,
                       draft_node_s=0.00025)  # fmt: skip
    prices = prices_of(plan_with(cost, step_budget_s=budget_ms / 1000), 4)
    assert prices.layers_within_budget == layers
