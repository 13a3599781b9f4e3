from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from planner.policies import Layer, parse_policy, spellings
from tests.planner.builders import linear_cost, plan_with
from treeline.config import VerifierConfig
from treeline.plan import PaperFit


def layer(probs: list[float], ranks: list[int] | None = None, parents: float | list[float] = 1.0, **changes) -> Layer:
    """Candidates below parents of this path acceptance."""
    m = len(probs)
    values = {
        "depth": 1,
        "tree_of": np.zeros(m, np.intp),
        "scores": np.asarray(parents, np.float32) * np.asarray(probs, np.float32),
        "path_probs": np.asarray(probs, np.float32),
        "ranks": np.asarray(ranks if ranks is not None else range(m), np.uint8),
        "sizes": np.zeros(1, np.intp),
        "paths": np.ones(1, np.intp),
        "path_probs_so_far": np.zeros(1),
        "weights": np.ones(1, np.float32),
        "sampled": np.zeros(1, np.bool_),
        "batch": 1,
    } | changes
    return Layer(**values)


PLAN = plan_with(linear_cost(), price=30.0)


@pytest.mark.parametrize(
    ("spec", "depth", "children"),
    [
        ("off", 0, 0),
        ("chain:5", 5, 1),
        ("static:4-2-1", 3, 4),
        ("eagle2:5,4,16", 5, 4),
        ("smart-paper", 32, 6),
        ("smart", 32, 6),
    ],
)
def test_spellings(spec, depth, children):
    policy = parse_policy(spec)
    assert (policy.spec, policy.max_depth, policy.max_children) == (spec, depth, children)
    assert policy.priced == (spec == "smart")


@pytest.mark.parametrize(
    "spec",
    ["", "on", "chain", "chain:", "chain:0", "chain:x", "chain:99", "static:", "static:4-0", "eagle2:1,2",
     "eagle2:5,4,9999", "chain:2,3", "smart:3", "smart:", "off:1", "SMART"],
)  # fmt: skip
def test_what_is_no_policy_is_refused_with_the_spellings(spec):
    with pytest.raises(ValueError, match="eagle2:DEPTH,TOPK,NODES"):
        parse_policy(spec)


@pytest.mark.parametrize(("spec", "meant"), [("smrat", "smart"), ("SMART", "smart"), ("eagle:1,2,3", "eagle2")])
def test_a_mistyped_policy_names_the_one_that_was_meant(spec, meant):
    with pytest.raises(ValueError, match=f"; did you mean {meant}[?]$"):
        parse_policy(spec)


def test_a_chain_keeps_the_best_of_a_layer():
    assert parse_policy("chain:3").keep(layer([0.2, 0.5, 0.3]), PLAN).tolist() == [False, True, False]


def test_a_static_tree_keeps_its_shape_by_rank():
    policy = parse_policy("static:2-1")
    assert policy.keep(layer([0.5, 0.3, 0.1]), PLAN).tolist() == [True, True, False]
    assert policy.keep(layer([0.5, 0.3, 0.6, 0.2], [0, 1, 0, 1], depth=2), PLAN).tolist() == [True, False, True, False]


def test_eagle2_expands_the_best_of_the_layer_and_reranks_all_at_the_end():
    policy = parse_policy("eagle2:3,2,3")
    candidates = layer([0.5, 0.3, 0.6, 0.1], [0, 1, 0, 1], parents=[0.7, 0.7, 0.2, 0.2])
    kept = policy.keep(candidates, PLAN)
    assert kept.all()
    assert policy.expand(candidates, kept, PLAN).tolist() == [0, 1]  # 0.35 and 0.21, against 0.12 and 0.02
    scores = np.asarray([0.7, 0.2, 0.35, 0.21, 0.12], np.float32)
    assert policy.finish(scores, np.zeros(5, np.intp)).tolist() == [True, False, True, True, False]


def test_smart_offers_down_to_half_of_what_a_node_has_to_be_worth():
    # A node costs 1 ms; at 30 tokens/s it is worth verifying if it is accepted with 0.03.
    assert parse_policy("smart").keep(layer([0.5, 0.016, 0.014]), PLAN).tolist() == [True, True, False]
    heavy = layer([0.008, 0.007], weights=np.asarray([2], np.float32))
    assert parse_policy("smart").keep(heavy, PLAN).tolist() == [True, False]


def test_smart_expands_where_a_child_pays_for_drafting_and_verifying():
    plan = replace(PLAN, cost=replace(PLAN.cost, draft_node_s=0.001))
    enough = 30 * (0.001 + 0.001) / float(plan.calibration.kappa[0, 1])
    candidates = layer([0.5, 1.01 * enough, 0.99 * enough])
    assert parse_policy("smart").expand(candidates, np.ones(3, np.bool_), plan).tolist() == [0, 1]
    assert parse_policy("smart").expand(candidates, np.zeros(3, np.bool_), plan).tolist() == []


def test_smart_paper_is_the_papers_formula():
    fit = PaperFit(lambda_s=0.0001, gamma_s=0.02, delta=0.1, rho=0.7)
    cost = linear_cost()
    plan = plan_with(type(cost)(cost.verify, paper=fit))
    probs = [0.9, 0.75, 0.5, 0.05]
    tree = {
        "sizes": np.asarray([3]),
        "paths": np.asarray([2]),
        "path_probs_so_far": np.asarray([0.8]),
    }
    token_s = 0.031
    n = 4
    spent = fit.lambda_s * n + fit.gamma_s * (math.exp(fit.delta * n**fit.rho) - 1)
    slope = fit.lambda_s + fit.gamma_s * fit.delta * fit.rho * n ** (fit.rho - 1) * math.exp(fit.delta * n**fit.rho)
    target = token_s * (1 + 0.8 / 2)
    expected = [0.8 * (token_s * p / 2) / slope > target / spent for p in probs]
    assert parse_policy("smart-paper").keep(layer(probs, **tree), plan).tolist() == expected
    assert any(expected)
    assert not all(expected)


def test_smart_paper_splits_its_budget_evenly_over_the_batch():
    fit = PaperFit(lambda_s=0.0, gamma_s=1e-3, delta=1e-3, rho=1.0)  # nodes cost next to nothing
    cost = linear_cost()
    plan = plan_with(type(cost)(cost.verify, paper=fit))
    probs = [0.9] * 8
    assert parse_policy("smart-paper").keep(layer(probs, batch=100), plan).sum() <= 2


def test_a_server_allows_its_own_policies_unless_the_operator_says_otherwise():
    names = {entry.removesuffix(":") for entry in VerifierConfig().allowed_policies}
    assert names == {"off", "chain", "static", "eagle2", "smart-paper", "smart"}
    assert names <= {spelling.partition(":")[0] for spelling in spellings().split(", ")}
