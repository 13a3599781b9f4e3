from dataclasses import replace

import numpy as np
import pytest

from drafter_svc.growth import grow
from drafter_svc.proposer import Root
from drafter_svc.sessions import Session
from planner.policies import parse_policy
from tests.drafter_svc.doubles import ScriptedProposer, grown, paths, plan, sequence
from treeline.drafting import DraftSequence
from treeline.forest import Forest, checked
from treeline.sampling import SamplingParams

TOKENS = [1, 2, 3]


def full_table(depth: int, probs: list[float], prefix: tuple[int, ...] = ()) -> dict:
    """Under every path the tokens 0, 1, .. with these probabilities."""
    if depth == 0:
        return {}
    table = {prefix: list(enumerate(probs))}
    for token in range(len(probs)):
        table |= full_table(depth - 1, probs, (*prefix, token))
    return table


def grow_one(policy: str, model, max_nodes: int = 32, a_plan=None, **more):
    return grown(model, Session((0, 1), TOKENS), sequence(policy, TOKENS, max_nodes, **more), a_plan)


def test_chain_takes_first_choices_and_runs_the_model_once_a_layer():
    model = ScriptedProposer(full_table(6, [0.6, 0.3]))
    tree = grow_one("chain:4", model)
    assert paths(tree) == {(0,), (0, 0), (0, 0, 0), (0, 0, 0, 0)}
    assert model.asked == [[()], [(0,)], [(0, 0)], [(0, 0, 0)]]


def test_static_has_its_shape():
    tree = grow_one("static:3-2-1", ScriptedProposer(full_table(4, [0.5, 0.3, 0.1])))
    assert np.bincount(tree.depths).tolist() == [0, 3, 6, 6]


def test_eagle2_expands_the_best_and_keeps_the_best():
    model = ScriptedProposer(full_table(4, [0.6, 0.3, 0.05]))
    tree = grow_one("eagle2:3,2,5", model)
    assert [len(asked) for asked in model.asked] == [1, 2, 2]
    assert len(tree) == 5
    assert {(0,), (0, 0), (1,)} <= paths(tree)


@pytest.mark.parametrize("policy", ["smart", "smart-paper"])
def test_policies_that_price_grow_within_limits(policy):
    tree = grow_one(policy, ScriptedProposer(full_table(8, [0.7, 0.2, 0.05])), max_nodes=12)
    assert checked(tree, np.asarray([64]), np.asarray([32]), 3)[1] == 0
    assert 0 < len(tree) <= 12
    assert (0,) in paths(tree)


def test_smart_does_not_keep_what_does_not_pay():
    free = grow_one("smart", ScriptedProposer(full_table(8, [0.9, 0.05])), a_plan=plan(price=0.0))
    dear = grow_one("smart", ScriptedProposer(full_table(8, [0.9, 0.05])), a_plan=plan(price=1e9, layer_s=1.0))
    assert len(dear) < len(free)


def test_smart_runs_the_model_only_where_a_child_would_be_worth_its_place():
    a_plan = plan(price=100.0)
    a_plan = replace(a_plan, cost=replace(a_plan.cost, node_s=0.003))  # a node has to be worth 0.3
    model = ScriptedProposer(full_table(8, [0.7, 0.35, 0.05]))
    tree = grow_one("smart", model, a_plan=a_plan)
    assert model.asked[:2] == [[()], [(0,), (1,)]]
    assert (1,) in paths(tree)
    assert (2,) not in paths(tree)
    # What is offered goes further down than what is expanded: the verifier is to have a choice.
    expanded = {path for asked in model.asked for path in asked}
    assert paths(tree) - expanded


def test_off_and_exhausted_allowances_grow_nothing():
    model = ScriptedProposer(full_table(3, [0.9]))
    assert len(grow_one("off", model)) == 0
    assert len(grow_one("chain:3", model, max_nodes=0)) == 0
    assert len(grow_one("chain:3", model, max_depth=0)) == 0
    assert model.asked == []


def test_depth_limit_of_the_request():
    assert grow_one("chain:6", ScriptedProposer(full_table(6, [0.9])), max_depth=2).depths.max() == 2


def test_node_limit_keeps_the_best_paths():
    tree = grow_one("static:2-2-2", ScriptedProposer(full_table(4, [0.9, 0.05])), max_nodes=3)
    assert paths(tree) == {(0,), (0, 0), (0, 0, 0)}


def test_a_full_chain_stops_running_the_model():
    model = ScriptedProposer(full_table(6, [0.9]))
    assert len(grow_one("chain:6", model, max_nodes=3)) == 3
    assert len(model.asked) == 3


def test_one_tree_out_of_many_ends_without_the_others():
    model = ScriptedProposer({(): [(5, 0.9)], (5,): [(6, 0.9)]})
    roots = [Root(Session((0, i), TOKENS), sequence(p, TOKENS), parse_policy(p)) for i, p in enumerate(POLICIES)]
    assert grow(roots, plan(), model).sizes.tolist() == [1, 0, 2, 2]
    assert [len(asked) for asked in model.asked] == [3, 2, 2]


POLICIES = ["chain:1", "off", "chain:4", "eagle2:3,1,8"]


def test_probabilities_too_small_for_float32_still_make_a_valid_tree():
    tree = grow_one("chain:1", ScriptedProposer({(): [(5, 1e-60)]}))
    assert checked(tree, np.asarray([64]), np.asarray([32]), 6)[1] == 0


ALL_POLICIES = [
    "chain:3",
    "static:3-2-1",
    "eagle2:4,3,9",
    "smart-paper",
    "smart",
]


@pytest.mark.parametrize("policy", [*ALL_POLICIES, "mixed"])
def test_trees_that_grow_together_come_out_as_each_would_alone(policy):
    random = np.random.default_rng(5)
    a_plan = plan(price=40.0)
    a_plan = replace(a_plan, cost=replace(a_plan.cost, node_s=0.002))

    def table(tokens: range, depth: int, prefix: tuple[int, ...] = ()) -> dict:
        """Some tokens under some paths, with falling probabilities."""
        if depth == 0 or random.random() < 0.1:
            return {}
        chosen = random.permutation(tokens)[: random.integers(1, 4)].tolist()
        found = {prefix: list(zip(chosen, sorted(random.dirichlet(np.ones(5)))[::-1], strict=False))}
        for token in chosen:
            found |= table(tokens, depth - 1, (*prefix, token))
        return found

    class OfSessions(ScriptedProposer):
        """A table for each session."""

        def choices(self, root: Root, path: tuple[int, ...]) -> list[tuple[int, float]]:
            return tables[root.sequence.session_id].get(path, [])

    tables = [table(range(5), 5) for _ in range(12)]
    specs = ALL_POLICIES + ALL_POLICIES[:4] if policy == "mixed" else [policy] * 12
    sequences = [
        sequence(
            spec, TOKENS, int(random.integers(0, 14)), SamplingParams(temperature=float(index % 2)), index,
            max_depth=int(random.integers(2, 7)),
            weight=float(random.choice([0.5, 1.0, 2.0])),
        )
        for index, spec in enumerate(specs)
    ]  # fmt: skip

    def grow_these(some: list[DraftSequence]) -> list[Forest]:
        roots = [Root(Session((0, s.session_id), TOKENS), s, parse_policy(s.policy)) for s in some]
        forest = grow(roots, replace(a_plan, price=0.0 if policy == "smart" else 40.0), OfSessions({}))
        return [forest.tree(index) for index in range(len(some))]

    # The paper splits its budget over the batch, which is large enough here.
    together, alone = grow_these(sequences), [grow_these([one])[0] for one in sequences]
    assert [tree_columns(tree) for tree in together] == [tree_columns(tree) for tree in alone]
    assert sum(map(len, together)) > 20
    for tree, wanted in zip(together, sequences, strict=True):
        assert checked(tree, np.asarray([wanted.max_nodes]), np.asarray([wanted.max_depth]), 5)[1] == 0


def tree_columns(tree: Forest) -> list[list]:
    return [column.tolist() for column in (tree.token_ids, tree.parents, tree.draft_probs, tree.sources)]
