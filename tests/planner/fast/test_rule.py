from __future__ import annotations

import math
from itertools import product
from zlib import crc32

import numpy as np
import pytest

from planner.fast.acceptance import accepts
from planner.fast.cost import verify_seconds
from planner.fast.rule import MAX_ACCEPTANCE, PricedFrontier, another_layer
from planner.policies import parse_policy
from tests.planner.builders import Drafted, linear_cost, plan_with, prices_of, prune, random_tree
from tests.trees import tree_of
from treeline.forest import ROOT, Forest
from treeline.plan import CostCurve, CostModel

SMART, CHAIN = parse_policy("smart"), parse_policy("chain:4")
SHAPES = ("convex", "staircase", "non-monotone")


def closed_subsets(tree: Forest) -> list[tuple[int, ...]]:
    """Every set of nodes that holds the parents of all its nodes."""
    found = []
    parents = tree.parents.tolist()
    for bits in product((False, True), repeat=len(tree)):
        if all(not kept or parents[node] == ROOT or bits[parents[node]] for node, kept in enumerate(bits)):
            found.append(tuple(node for node, kept in enumerate(bits) if kept))
    return found


def path_scores(candidate: Drafted, plan) -> np.ndarray:
    tree = candidate.tree
    edges = accepts(plan.calibration, tree.sources, tree.depths, tree.draft_probs, candidate.sampled)
    return tree.path_products(edges).astype(np.float64)


def curve(random: np.random.Generator, shape: str) -> CostCurve:
    tokens = np.arange(1, 40)
    if shape == "convex":
        seconds = 0.02 + 0.0004 * tokens + random.uniform(1e-6, 4e-5) * tokens**2
    elif shape == "staircase":
        width = int(random.integers(2, 7))
        seconds = 0.01 + random.uniform(0.002, 0.01) * np.ceil(tokens / width)
    else:
        seconds = 0.02 + random.uniform(0.0, 0.01, len(tokens)).cumsum() / 3 + random.uniform(0, 0.02, len(tokens))
    return CostCurve(1, 64, tuple(tokens.tolist()), tuple(seconds.tolist()))


@pytest.mark.parametrize(
    ("shape", "instances"),
    [*((shape, 400) for shape in SHAPES), *(pytest.param(shape, 3400, marks=pytest.mark.slow) for shape in SHAPES)],
)
def test_the_rule_equals_brute_force_over_all_closed_forests(shape, instances):
    random = np.random.default_rng(crc32(shape.encode()))
    for _ in range(instances):
        candidates = [
            Drafted(
                random_tree(random, 4 if count == 3 else 5),
                SMART if random.random() < 0.8 else CHAIN,
                float(random.choice([0.5, 1.0, 2.0])),
                bool(random.integers(2)),
            )
            for count in [int(random.integers(1, 4))]
            for _ in range(count)
        ]
        budget_s = math.inf if random.random() < 0.5 else float(random.uniform(0.01, 0.05))
        plan = plan_with(CostModel((curve(random, shape),), step_overhead_s=0.001), step_budget_s=budget_s)
        prompt_tokens, waiting = int(random.integers(0, 5)), int(random.integers(0, 3))
        check_against_brute_force(candidates, plan, 0.002, prompt_tokens, waiting)


def check_against_brute_force(
    candidates: list[Drafted], plan, draft_s: float, prompt_tokens: int, waiting: int
) -> None:
    scores = [path_scores(c, plan) for c in candidates]
    base = sum(c.weight for c in candidates)
    choices = [closed_subsets(c.tree) if c.policy.priced else [tuple(range(len(c.tree)))] for c in candidates]
    seconds = verify_seconds(plan.cost, len(candidates), 64, 64) + draft_s + 0.001
    base_tokens = len(candidates) + prompt_tokens
    forests = []
    for forest in product(*choices):
        gain = sum(
            c.weight * np.minimum(s[list(kept)], MAX_ACCEPTANCE).sum()
            for c, s, kept in zip(candidates, scores, forest, strict=True)
        )
        forests.append((base + gain, base_tokens + sum(map(len, forest))))
    fewest = min(tokens for _, tokens in forests)  # what decodes plainly is allowed whatever it takes
    forests = [(g, tokens) for g, tokens in forests if tokens == fewest or seconds[tokens] <= plan.step_budget_s]
    # Prompts are run whatever is decoded: a second is worth what it is worth without them.
    plain_s = float(verify_seconds(plan.cost, len(candidates), 64, 64)[len(candidates)]) + 0.001
    drafted = max(gain / seconds[tokens - prompt_tokens] for gain, tokens in forests)
    price = max(drafted, len(candidates) / plain_s) * (1 + waiting / len(candidates))
    best_value = max(gain - price * seconds[tokens] for gain, tokens in forests)

    pruning = prune(candidates, plan, draft_s, prompt_tokens, waiting)
    assert pruning.price == pytest.approx(price, rel=1e-5)
    kept_gain, kept_nodes = base, 0
    for candidate, keep, score in zip(candidates, pruning.keep, scores, strict=True):
        candidate.tree.select(keep)  # raises unless closed under parents
        kept_gain += candidate.weight * np.minimum(score[keep], MAX_ACCEPTANCE).sum()
        kept_nodes += int(keep.sum())
        if not candidate.policy.priced:
            assert keep.all()
    assert base_tokens + kept_nodes == fewest or seconds[base_tokens + kept_nodes] <= plan.step_budget_s
    value = kept_gain - price * seconds[base_tokens + kept_nodes]
    assert value == pytest.approx(best_value, rel=1e-5, abs=1e-5)
    assert pruning.expected_tokens == pytest.approx(kept_gain, rel=1e-5)


def test_of_equal_nodes_the_earlier_are_kept():
    tokens = tuple(range(1, 17))
    cost = CostModel((CostCurve(1, 64, tokens, tuple(0.03 if n <= 4 else 0.06 for n in tokens)),))
    tree = tree_of(list(range(6)), [-1, -1, -1, -1, 0, 1], [0.05] * 4 + [0.9] * 2)
    pruning = prune([Drafted(tree, SMART, 1.0, False)], plan_with(cost))
    assert pruning.keep[0].tolist() == [True, True, True, False, False, False]


def test_a_staircase_is_climbed_past_a_node_that_does_not_pay_by_itself():
    # 1 to 8 tokens cost the same, the ninth costs a lot; each node alone is worth little.
    tokens = tuple(range(1, 17))
    cost = CostModel((CostCurve(1, 64, tokens, tuple(0.03 if n <= 8 else 0.06 for n in tokens)),))
    tree = tree_of(list(range(12)), [-1] * 12, [0.05] * 12)
    pruning = prune([Drafted(tree, SMART, 1.0, False)], plan_with(cost))
    assert int(pruning.keep[0].sum()) == 7


def test_waiting_requests_raise_the_price_and_shrink_the_tree():
    plan = plan_with(linear_cost())
    tree = tree_of(list(range(8)), [-1, 0, 1, 2, 3, 4, 5, 6], [0.8] * 8)
    candidates = [Drafted(tree, SMART, 1.0, False)]
    alone = prune(candidates, plan)
    queued = prune(candidates, plan, startable=8)
    assert queued.price > alone.price
    assert queued.keep[0].sum() < alone.keep[0].sum()


def test_a_step_that_is_dear_enough_verifies_nothing():
    tree = tree_of([1, 2], [-1, 0], [0.3, 0.3])
    plan = plan_with(linear_cost(fixed_s=0.001, token_s=0.05))
    pruning = prune([Drafted(tree, SMART, 1.0, False)], plan)
    assert not pruning.keep[0].any()
    assert "kept 0 of 2" in pruning.reason


def test_higher_weight_takes_nodes_from_lower():
    tree = tree_of(list(range(6)), [-1, 0, 1, 2, 3, 4], [0.7] * 6)
    plan = plan_with(linear_cost(token_s=0.004))
    heavy, light = prune([Drafted(tree, SMART, 4.0, False), Drafted(tree, SMART, 0.25, False)], plan).keep
    assert heavy.sum() > light.sum()


def test_a_prompt_in_the_step_makes_nodes_no_cheaper():
    # The pass gets dearer by the token from 64 tokens on: a prompt makes it long, and its nodes dear.
    tokens = (1, 64, 512)
    plan = plan_with(CostModel((CostCurve(1, 64, tokens, (0.02, 0.02, 0.244)),)))
    tree = tree_of(list(range(4)), [-1, 0, 1, 2], [0.45] * 4)
    candidates = [Drafted(tree, SMART, 1.0, False)] * 4
    alone = prune(candidates, plan)
    beside = prune(candidates, plan, prompt_tokens=400)
    assert beside.price == pytest.approx(alone.price)
    assert all(keep.all() for keep in alone.keep)
    worthy = path_scores(candidates[0], plan) > alone.price * 0.0005
    assert not worthy.all()
    for keep in beside.keep:
        np.testing.assert_array_equal(keep, worthy)


@pytest.mark.parametrize("shape", SHAPES)
def test_nodes_that_pay_are_never_refused_before_they_are_looked_at(shape):
    random, refused, instances = np.random.default_rng(crc32(shape.encode())), 0, 300
    for _ in range(instances):
        candidates = [Drafted(random_tree(random, 5), SMART, 1.0, False) for _ in range(3)]
        plan = plan_with(CostModel((curve(random, shape),), step_overhead_s=0.001))
        prompt_tokens, waiting = int(random.integers(0, 5)), int(random.integers(0, 3))
        pruning = prune(candidates, plan, prompt_tokens=prompt_tokens, startable=waiting)
        prices, margin = prices_of(plan, 3, prompt_tokens, waiting), float(random.uniform(0, 0.2))
        brings = pruning.expected_tokens - 3 - pruning.price * (pruning.predicted_verify_s - prices.undrafted_s)
        gains = sorted((score for one in candidates for score in path_scores(one, plan).tolist()), reverse=True)
        refuses = prices.surplus(gains) <= margin
        assert not refuses or brings <= margin + 1e-6
        refused += refuses
    assert 0 < refused < instances


def test_drafts_that_do_not_pay_make_time_no_cheaper():
    tree = tree_of([1], [-1], [0.3])
    pruning = prune([Drafted(tree, SMART, 1.0, False)], plan_with(linear_cost()), draft_s=1.0)
    assert pruning.price == pytest.approx(1 / 0.031)


def test_the_best_node_left_out_says_what_a_node_has_to_be_worth():
    tree = tree_of(list(range(6)), [-1, 0, 1, 2, 3, 4], [0.7] * 6)
    plan = plan_with(linear_cost(token_s=0.01))
    pruning = prune([Drafted(tree, SMART, 1.0, False)], plan)
    kept = int(pruning.keep[0].sum())
    worth = path_scores(Drafted(tree, SMART, 1.0, False), plan)[kept]
    assert 0 < kept < 6
    assert pruning.node_s * pruning.price == pytest.approx(worth, rel=1e-5)
    everything = prune([Drafted(tree, SMART, 1.0, False)], plan_with(linear_cost()))
    assert everything.node_s == 0.0


def test_nothing_drafted_is_plain_decoding():
    plan = plan_with(linear_cost())
    pruning = prune([Drafted(Forest.empty(1), SMART, 1.0, False)], plan)
    assert pruning.expected_tokens == 1.0
    assert pruning.predicted_verify_s == pytest.approx(0.031)


def frontier(policy, scores: list[float], depth: int = 1) -> PricedFrontier:
    return PricedFrontier(policy, 1.0, len(scores), sum(scores), depth, False)


def test_another_layer_is_run_while_it_brings_more_than_its_price():
    plan = plan_with(linear_cost(draft_layer_s=0.005, draft_node_s=0.0005), price=60.0)
    kappa = float(plan.calibration.kappa[0, 1])
    enough = 60.0 * (0.005 + 0.0005 + 0.001) / kappa  # a layer, a node drafted, and its child verified
    assert another_layer([frontier(SMART, [enough * 1.01])], plan)
    assert not another_layer([frontier(SMART, [enough * 0.99])], plan)


def test_fixed_policies_grow_to_their_own_depth():
    plan = plan_with(linear_cost(draft_layer_s=10.0), price=60.0)
    assert another_layer([frontier(CHAIN, [0.01], depth=3)], plan)
    assert not another_layer([frontier(CHAIN, [0.01], depth=4)], plan)
