"""What a text that repeats itself goes on with."""

from __future__ import annotations

import numpy as np
import pytest

from planner.fast.acceptance import prior
from planner.fast.rule import path_acceptance
from tests.trees import tree_of
from treeline.forest import ROOT, Forest, Source, checked
from verifier_svc.speculation.prompt_lookup import Allowance, PromptLookup

PRIOR = prior()


def chain(lookup: PromptLookup, token_ids: list[int], nodes: int = 4, session_id: int = 1) -> Forest:
    lookup.read(session_id, token_ids)
    allowance = Allowance(session_id, False, nodes, 32)
    tree = lookup.graft(Forest.empty(1), [allowance], PRIOR)
    assert path_acceptance(tree, np.zeros(1, np.bool_), PRIOR).tolist() == pytest.approx(lookup.worth(allowance, PRIOR))
    return tree


def grafted(trees: list[Forest], texts: list[list[int]], nodes: int = 16, depth: int = 6) -> Forest:
    lookup = PromptLookup()
    for session_id, text in enumerate(texts):
        lookup.read(session_id, text)
    allowances = [Allowance(session_id, False, nodes, depth) for session_id in range(len(texts))]
    return lookup.graft(Forest.join(trees), allowances, PRIOR)


def paths(tree: Forest) -> list[tuple[int, ...]]:
    found: list[tuple[int, ...]] = []
    for token, parent in zip(tree.token_ids.tolist(), tree.parents.tolist(), strict=True):
        found.append((*(found[parent] if parent != ROOT else ()), token))
    return found


def copied(token_ids: list[int], nodes: int = 4) -> list[int]:
    return chain(PromptLookup(), token_ids, nodes).token_ids.tolist()


def test_what_followed_before_is_proposed_again():
    assert copied([1, 2, 3, 4, 5, 6, 9, 2, 3]) == [4, 5, 6, 9]


def test_a_text_that_says_nothing_twice_is_not_drafted():
    assert copied([1, 2, 3, 4, 5]) == []
    assert copied([1, 2, 9, 2]) == [], "a single token is no repetition"
    assert copied([1, 2, 3, 1, 2], nodes=0) == []


def test_the_newest_of_several_places_is_followed():
    assert copied([1, 2, 3, 1, 2, 4, 1, 2], 1) == [4]


def test_a_copy_goes_on_where_it_is_although_its_end_stands_elsewhere_too():
    text = [1, 2, 3, 4, 5, 8, 3, 4, 6, 9, 1, 2, 3, 4]
    assert copied(text, 1) == [5], "four tokens agree there, two in the newer place"


def test_past_the_end_of_the_text_a_loop_goes_on():
    assert copied([7, 1, 2, 1, 2], 5) == [1, 2, 1, 2, 1]


def test_a_growing_text_is_read_on_from_where_it_was():
    lookup, text = PromptLookup(), [1, 2, 3, 4, 5, 6, 1, 2]
    assert chain(lookup, text, 2).token_ids.tolist() == [3, 4]
    assert chain(lookup, [*text, 3, 4], 2).token_ids.tolist() == [5, 6]
    assert not len(chain(lookup, [*text, 3, 4, 9]))
    assert chain(lookup, text, 1, session_id=2).token_ids.tolist() == [3], "each session has a text of its own"
    lookup.forget(1)
    assert not len(chain(lookup, [1, 2, 3]))


def test_the_longer_a_copy_the_surer_it_is():
    short = chain(PromptLookup(), [1, 2, 3, 1, 2], 1)
    long = chain(PromptLookup(), [*range(1, 12), *range(1, 11)], 3)
    assert short.sources.tolist() == [Source.NGRAM]
    assert 0.3 < short.draft_probs[0] < 0.5
    assert 0.85 < long.draft_probs[0] < long.draft_probs[1] < 0.95
    assert long.parents.tolist() == [-1, 0, 1]


TEXT = [1, 2, 3, 4, 5, 6, 9, 2, 3]


def test_the_text_goes_on_below_the_root_beside_the_models_nodes():
    tree = grafted([tree_of([7, 8], [ROOT, 0], [0.6, 0.5])], [TEXT], depth=3)
    assert paths(tree) == [(7,), (7, 8), (4,), (4, 5), (4, 5, 6)]
    assert tree.sources.tolist() == [0, 0, 1, 1, 1]


def test_it_goes_on_below_nodes_whose_path_ends_as_the_text_did_before():
    tree = grafted([tree_of([7, 1, 2], [ROOT, 0, 1], [0.6, 0.5, 0.9])], [[1, 2, 3, 4, 8]], depth=5)
    assert paths(tree) == [(7,), (7, 1), (7, 1, 2), (7, 1, 2, 3), (7, 1, 2, 3, 4)]


def test_a_node_that_both_propose_is_there_once_from_the_surer_one():
    sure, unsure = (grafted([tree_of([4], [ROOT], [prob])], [TEXT], depth=1) for prob in (0.95, 0.05))
    assert (paths(sure), sure.sources.tolist()) == ([(4,)], [Source.MODEL])
    assert (paths(unsure), unsure.sources.tolist()) == ([(4,)], [Source.NGRAM])
    assert unsure.draft_probs[0] > 0.3


def test_every_tree_of_a_batch_gets_its_own_and_stays_within_its_allowance():
    random = np.random.default_rng(4)
    for _ in range(100):
        count = int(random.integers(1, 5))
        texts = [random.integers(0, 4, random.integers(1, 40)).tolist() for _ in range(count)]
        trees = []
        for _ in texts:
            rows: list[tuple[int, int]] = []
            for _ in range(int(random.integers(0, 8))):
                row = int(random.integers(-1, len(rows))), int(random.integers(4))
                rows += [row] if row not in rows else []
            trees.append(tree_of([t for _, t in rows], [p for p, _ in rows], [0.4] * len(rows)))
        forest = grafted(trees, texts, nodes=5, depth=6)
        sizes = np.asarray([len(tree) for tree in trees])
        assert checked(forest, sizes + 5, np.full(count, 8), 4)[1] == 0
        for index, (tree, text) in enumerate(zip(trees, texts, strict=True)):
            alone = grafted([tree], [text], nodes=5, depth=6)
            assert paths(forest.tree(index)) == paths(alone)
            assert paths(alone)[: len(tree)] == paths(tree)


def test_what_a_grammar_forces_is_proposed_within_the_allowance():
    lookup = PromptLookup()
    lookup.read(0, [1, 2], [7, 8, 9])
    tree = lookup.graft(tree_of([7, 5], [ROOT, 0], [0.1, 0.1]), [Allowance(0, False, 1, 3)], PRIOR)
    assert paths(tree) == [(7,), (7, 5), (7, 8)]
    assert tree.draft_probs[[0, 2]].min() > 0.9, "it is surer of 7 than the model"
    assert lookup.graft(Forest.empty(1), [Allowance(0, True, 8, 2)], PRIOR).token_ids.tolist() == [7, 8]
    assert len(lookup.worth(Allowance(0, True, 8, 2), PRIOR)) == 2
    lookup.read(0, [1, 2, 7])
    assert not lookup.worth(Allowance(0, True, 8, 2), PRIOR), "once taken, it is text"
