from dataclasses import replace

import numpy as np
import pytest

from drafter_svc.candidates import merge
from drafter_svc.growth import grow
from drafter_svc.proposer import Children, GrowingTree
from drafter_svc.sessions import Session
from planner.policies import parse_policy
from tests.drafter_svc.doubles import ScriptedProposer, grown, paths, plan, sequence
from treeline.drafting import DraftSequence
from treeline.sampling import SamplingParams
from treeline.tree import ROOT, DraftTree, Source

TOKENS = [1, 2, 3]


def full_table(depth: int, probs: list[float], prefix: tuple[int, ...] = ()) -> dict:
    """Under every path the tokens 0, 1, .. with these probabilities."""
    if depth == 0:
        return {}
    table = {prefix: list(enumerate(probs))}
    for token in range(len(probs)):
        table |= full_table(depth - 1, probs, (*prefix, token))
    return table


def grow_one(policy: str, model=None, lookup=None, max_nodes: int = 32, a_plan=None, **more):
    return grown(lookup, model, Session(1, TOKENS), sequence(policy, TOKENS, max_nodes, **more), a_plan)


def test_chain_takes_first_choices_and_runs_the_model_once_a_layer():
    model = ScriptedProposer(full_table(6, [0.6, 0.3]))
    tree = grow_one("chain:4", model)
    assert paths(tree) == {(0,), (0, 0), (0, 0, 0), (0, 0, 0, 0)}
    assert model.asked == [[()], [(0,)], [(0, 0)], [(0, 0, 0)]]


def test_static_has_its_shape():
    tree = grow_one("static:3-2-1", ScriptedProposer(full_table(4, [0.5, 0.3, 0.1])))
    assert np.bincount(tree.depths).tolist() == [0, 3, 6, 6]
    assert tree.ranks.max() == 2


def test_eagle2_expands_the_best_and_keeps_the_best():
    model = ScriptedProposer(full_table(4, [0.6, 0.3, 0.05]))
    tree = grow_one("eagle2:3,2,5", model)
    assert [len(asked) for asked in model.asked] == [1, 2, 2]
    assert len(tree) == 5
    assert {(0,), (0, 0), (1,)} <= paths(tree)


@pytest.mark.parametrize("policy", ["smart", "smart-paper"])
def test_policies_that_price_grow_within_limits(policy):
    tree = grow_one(policy, ScriptedProposer(full_table(8, [0.7, 0.2, 0.05])), max_nodes=12)
    tree.check(vocab_size=3)
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


def test_both_sources_become_one_tree():
    model = ScriptedProposer({(): [(5, 0.6), (6, 0.2)], (5,): [(7, 0.5)]})
    lookup = ScriptedProposer({(): [(6, 0.9), (8, 0.4)], (6,): [(9, 0.9)]}, Source.NGRAM)
    tree = grow_one("static:4-4", model, lookup)
    assert paths(tree) == {(5,), (6,), (8,), (5, 7), (6, 9)}
    by_token = dict(zip(tree.token_ids.tolist(), tree.sources.tolist(), strict=True))
    assert by_token == {5: Source.MODEL, 6: Source.NGRAM, 8: Source.NGRAM, 7: Source.MODEL, 9: Source.NGRAM}
    ranks = {t: r for t, r, p in zip(tree.token_ids.tolist(), tree.ranks, tree.parents, strict=True) if p == ROOT}
    assert ranks == {6: 0, 5: 1, 8: 2}


def test_a_chain_of_both_sources_stays_a_chain():
    model = ScriptedProposer({(): [(5, 0.6)], (5,): [(7, 0.5)], (6,): [(1, 0.9)]})
    lookup = ScriptedProposer({(): [(6, 0.9)], (6,): [(9, 0.3)]}, Source.NGRAM)
    assert paths(grow_one("chain:2", model, lookup)) == {(6,), (6, 1)}


def test_merge_keeps_the_higher_calibrated_acceptance_not_the_higher_probability():
    a_plan = plan()
    acceptance = a_plan.calibration.acceptance.copy()
    acceptance[Source.NGRAM] *= 0.1
    calibration = plan(acceptance=acceptance).calibration
    merged = merge(
        [
            (0, Source.MODEL, Children([ROOT, ROOT], [4, 5], [0.5, 0.3], [0, 1])),
            (0, Source.NGRAM, Children([ROOT], [4], [0.9], [0])),
        ],
        np.asarray([1]),
        1,
        np.asarray([False]),
        calibration,
    )
    assert merged.token_ids.tolist() == [4, 5]
    assert merged.sources.tolist() == [Source.MODEL, Source.MODEL]
    assert merged.probs.tolist() == pytest.approx([0.5, 0.3])


def test_lookups_go_on_alone_when_the_model_has_nothing():
    model = ScriptedProposer({(): [(5, 0.9)]})
    lookup = ScriptedProposer({(): [(5, 0.8)], (5,): [(6, 0.8)], (5, 6): [(7, 0.8)]}, Source.NGRAM)
    tree = grow_one("chain:4", model, lookup)
    assert paths(tree) == {(5,), (5, 6), (5, 6, 7)}
    assert len(model.asked) == 2


def test_one_tree_out_of_many_ends_without_the_others():
    model = ScriptedProposer({(): [(5, 0.9)], (5,): [(6, 0.9)]})
    trees = [GrowingTree(Session(i, TOKENS), sequence(p, TOKENS), parse_policy(p)) for i, p in enumerate(POLICIES)]
    assert [len(tree) for tree in grow(trees, plan(), [], model)] == [1, 0, 2, 2]
    assert [len(asked) for asked in model.asked] == [3, 2, 2]


POLICIES = ["chain:1", "off", "chain:4", "eagle2:3,1,8"]


def test_probabilities_too_small_for_float32_still_make_a_valid_tree():
    tree = grow_one("chain:1", ScriptedProposer({(): [(5, 1e-60)]}))
    tree.check(vocab_size=6)


def test_lookups_go_on_alone_when_another_layer_does_not_pay():
    table = full_table(5, [0.9, 0.05])
    lookup = ScriptedProposer({(): [(0, 0.9)], (0,): [(0, 0.9)], (0, 0): [(0, 0.9)]}, Source.NGRAM)
    model = ScriptedProposer(table)
    tree = grow_one("smart", model, lookup, a_plan=plan(price=1.0, layer_s=1e6))
    assert model.asked == [[()]]
    assert paths(tree) == {(0,), (1,), (0, 0), (0, 0, 0)}
    # A fixed policy beside it makes the layers run anyway.
    assert len(grow_one("chain:4", model, a_plan=plan(price=1.0, layer_s=1e6))) == 4


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

        def _children(self, tree: GrowingTree, nodes: list[int]) -> Children:
            self.table = tables[self.source][tree.session.session_id]
            return super()._children(tree, nodes)

    tables = {source: [table(range(5), 5) for _ in range(12)] for source in (Source.MODEL, Source.NGRAM)}
    specs = ALL_POLICIES + ALL_POLICIES[:4] if policy == "mixed" else [policy] * 12
    sequences = [
        sequence(
            spec, TOKENS, int(random.integers(0, 14)), SamplingParams(temperature=float(index % 2)), index,
            max_depth=int(random.integers(2, 7)), max_layers=int(random.integers(1, 5)),
            weight=float(random.choice([0.5, 1.0, 2.0])),
        )
        for index, spec in enumerate(specs)
    ]  # fmt: skip

    def grow_these(some: list[DraftSequence]) -> list[DraftTree]:
        model, lookup = OfSessions({}), OfSessions({}, Source.NGRAM)
        trees = [GrowingTree(Session(s.session_id, TOKENS), s, parse_policy(s.policy)) for s in some]
        for proposer in (model, lookup):
            proposer.begin([])
        return grow(trees, replace(a_plan, price=0.0 if policy == "smart" else 40.0), [lookup], model)

    # The paper splits its budget over the batch, which is large enough here.
    together, alone = grow_these(sequences), [grow_these([one])[0] for one in sequences]
    assert [tree_columns(tree) for tree in together] == [tree_columns(tree) for tree in alone]
    assert sum(map(len, together)) > 20
    for tree, wanted in zip(together, sequences, strict=True):
        tree.check(vocab_size=5)
        assert len(tree) <= wanted.max_nodes


def tree_columns(tree: DraftTree) -> list[list]:
    return [column.tolist() for column in (tree.token_ids, tree.parents, tree.draft_probs, tree.ranks, tree.sources)]
