"""Other people's policies: each does what its paper or project says."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from functools import cache

import numpy as np
import pytest

from bench.baselines import RANKS, optimal_levels
from drafter_svc.growth import grow
from drafter_svc.proposer import Root
from drafter_svc.sessions import Session
from planner.fast.acceptance import prior
from planner.policies import parse_policy
from tests.drafter_svc.doubles import ScriptedProposer, plan, sequence
from tests.planner.builders import linear_cost, plan_with
from tests.planner.policies.test_policies import PLAN, layer
from treeline.plan import Plan


@pytest.mark.parametrize(
    ("spec", "depth", "children"),
    [("sequoia:16,4", 4, 8), ("opt-tree:12,6", 6, 12), ("opt-tree:50,6,0.7", 6, 16), ("smartspec", 8, 1),
     ("vllm-adaptive", 5, 1), ("sglang-ema", 8, 1), ("cast", 8, 10)],
)  # fmt: skip
def test_spellings(spec, depth, children):
    policy = parse_policy(spec)
    assert (policy.spec, policy.max_depth, policy.max_children, policy.priced) == (spec, depth, children, False)


@pytest.mark.parametrize(
    "spec",
    ["sequoia:8", "sequoia:8,99", "opt-tree:8", "opt-tree:8,4,1", "opt-tree:8,4,x", "opt-tree:8,4,0.5,1", "cast:"],
)
def test_wrong_parameters_are_refused(spec):
    with pytest.raises(ValueError, match="sequoia:NODES,DEPTH"):
        parse_policy(spec)


def test_a_process_without_the_benchmarks_does_not_know_them():
    code = "from planner.policies import parse_policy; parse_policy('smartspec')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "unknown policy 'smartspec'" in done.stderr


def plan_where(kappa: float, **costs: float) -> Plan:
    """A plan whose reached nodes go on to an accepted child with this probability, on a linear cost curve."""
    calibration = prior()
    return plan_with(
        linear_cost(**costs), calibration=replace(calibration, kappa=np.full_like(calibration.kappa, kappa))
    )


def test_opt_tree_stops_where_a_layer_is_worth_too_little():
    policy = parse_policy("opt-tree:3,8")
    first = layer([0.6, 0.2, 0.1, 0.05])
    kept = policy.keep(first, PLAN)
    assert kept.tolist() == [True, True, True, False]
    assert policy.expand(first, kept, PLAN).tolist() == [0, 1, 2]  # 0.9 tokens together
    second = layer([0.5, 0.3], parents=0.6, depth=2)  # 0.48 tokens
    assert policy.expand(second, policy.keep(second, PLAN), PLAN).tolist() == []
    best = policy.finish(np.asarray([0.6, 0.2, 0.54, 0.3], np.float32), np.zeros(4, np.intp))
    assert best.tolist() == [True, False, True, True]


def test_smartspec_shortens_its_chains_as_the_batch_grows_and_stops_when_nothing_pays():
    costs = {"fixed_s": 0.03, "token_s": 0.001, "draft_layer_s": 0.002}
    plan, policy = plan_where(0.8, **costs), parse_policy("smartspec")
    lengths = [policy.layers(plan, batch, False) for batch in (1, 4, 16, 64)]
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[0] > lengths[-1] > 0
    assert policy.layers(plan_where(0.1, **costs), 64, False) == 0


def test_smartspec_is_its_goodput_formula():
    a, batch = 0.7, 8
    plan = plan_where(a, draft_layer_s=0.003, draft_node_s=0.0002, draft_round_trip_s=0.001)
    goodput = [
        (1 - a ** (k + 1)) / (1 - a) / (0.03 + 0.001 * batch * (k + 1) + k * (0.003 + 0.0002 * batch) + (k > 0) * 0.001)
        for k in range(9)
    ]
    assert parse_policy("smartspec").layers(plan, batch, False) == int(np.argmax(goodput))


def test_slo_chain_is_the_best_chain_whose_step_the_budget_allows():
    policy = parse_policy("slo-chain")
    plan = plan_where(0.8, fixed_s=0.03, token_s=0.001, draft_layer_s=0.002)
    free = policy.layers(plan, 4, False)
    assert free == parse_policy("smartspec").layers(plan, 4, False) > 2
    # Of batch 4 and length k: 30 ms, 1 ms for each of 4 (k + 1) tokens, 2 ms for each of k draft layers.
    assert policy.layers(replace(plan, step_budget_s=0.030 + 0.012 + 0.004), 4, False) == 2
    assert policy.layers(replace(plan, step_budget_s=0.001), 4, False) == 0


@pytest.mark.parametrize(("acceptance", "length"), [(0.0, 1), (0.3, 1), (0.5, 2), (0.75, 3), (1.0, 8)])
def test_sglang_settles_one_beyond_the_accepted_length(acceptance, length):
    found = parse_policy("sglang-ema").layers(plan_where(acceptance), 4, False)
    accepted = sum(acceptance**i for i in range(1, found + 1))
    assert found == length
    assert found == min(8, round(accepted) + 1)


def test_vllm_adaptive_always_drafts_and_cuts_a_chain_where_it_costs_more_than_it_brings():
    policy = parse_policy("vllm-adaptive")
    assert policy.layers(plan_where(0.1, draft_layer_s=1.0), 64, False) == 5
    # A token costs 1 ms at 30 tokens/s: it must survive with 0.03.
    assert policy.keep(layer([0.04, 0.01]), PLAN).tolist() == [True, False]
    assert policy.keep(layer([0.02, 0.01]), PLAN).tolist() == [False, False]


def best_by_dynamic_programming(acceptance: tuple[float, ...], nodes: int, depth: int) -> float:
    """Sequoia's recurrence: expected tokens of the best tree of `nodes` nodes below the root."""

    @cache
    def tree(size: int, levels: int) -> float:
        """A subtree of at most `size` nodes, its own root counted."""
        return 1.0 + (forest(size - 1, levels - 1, 0) if levels > 1 else 0.0)

    @cache
    def forest(size: int, levels: int, rank: int) -> float:
        """The children from `rank` on of one node."""
        if size <= 0 or rank == len(acceptance):
            return 0.0
        return max(
            acceptance[rank] * tree(first, levels) + forest(size - first, levels, rank + 1)
            for first in range(1, size + 1)
        )

    return tree(nodes + 1, depth + 1)


@pytest.mark.parametrize("nodes", [1, 4, 11])
@pytest.mark.parametrize("depth", [1, 3])
def test_sequoias_levels_are_those_of_the_best_static_tree(nodes, depth):
    kappa = 0.8
    shares = 1 / np.arange(1, RANKS + 1) ** 2
    acceptance = tuple((kappa * shares / shares.sum()).tolist())
    levels = optimal_levels(kappa, nodes, depth)
    assert sum(count for count, _ in levels) <= nodes
    worth, parents = 1.0, [1.0]
    for count, _ in levels:
        children = sorted((p * a for p in parents for a in acceptance), reverse=True)[:count]
        worth, parents = worth + sum(children), children
    assert worth == pytest.approx(best_by_dynamic_programming(acceptance, nodes, depth))


def test_sequoias_tree_has_the_levels_whatever_the_confidences():
    children = [(token, 1 / 8) for token in range(8)]
    table = {(): children} | {(a,): children for a in range(8)} | {(a, b): children for a in range(8) for b in range(8)}
    a_plan = replace(plan(), calibration=plan_where(0.9).calibration)
    root = Root(Session((0, 1), [0]), sequence("sequoia:12,3", [0]), parse_policy("sequoia:12,3"))
    grown = grow([root], a_plan, ScriptedProposer(table))
    levels = optimal_levels(0.9, 12, 3)
    assert len(grown) == 12
    assert [int((grown.depths == depth).sum()) for depth in (1, 2, 3)] == [count for count, _ in levels]


def test_cast_keeps_fewer_nodes_in_a_larger_batch_and_ends_where_none_pays():
    plan = plan_where(0.8, fixed_s=0.03, token_s=0.001, draft_layer_s=0.002)
    policy, probs = parse_policy("cast"), [0.5, 0.3, 0.1, 0.05, 0.02]
    kept = [int(policy.keep(layer(probs, batch=batch), plan).sum()) for batch in (1, 4, 16, 64)]
    assert kept == sorted(kept, reverse=True)
    assert kept[0] > kept[-1]
    assert not policy.keep(layer([0.01], batch=64), plan).any()
