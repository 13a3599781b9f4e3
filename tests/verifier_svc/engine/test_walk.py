import numpy as np

from treeline.forest import Forest
from treeline.tree import DraftTree
from verifier_svc.engine.walk import all_observed, concatenate, observed, target_walk

#        root
#       5    7
#      6 8    5
TREE = DraftTree.build([5, 7, 6, 8, 5], [-1, -1, 0, 0, 1], [0.6, 0.3, 0.5, 0.2, 0.9], [0, 1, 0, 1, 0])


def test_walk_follows_the_targets_own_tokens_and_ends_with_the_bonus_token():
    walk = target_walk(TREE, [5, 8, 1, 2, 9, 3])
    assert walk.accepted == [0, 3]
    assert walk.tokens == [5, 8, 9]


def test_walk_emits_one_token_when_no_child_carries_it():
    walk = target_walk(TREE, [4, 1, 1, 1, 1, 1])
    assert walk.accepted == []
    assert walk.tokens == [4]


def test_walk_of_an_empty_tree_is_plain_decoding():
    assert target_walk(DraftTree.empty(), [11]).tokens == [11]


def test_a_token_under_another_parent_is_not_taken():
    # 6 exists, but below 5; after 7 the target wants 6.
    walk = target_walk(TREE, [7, 0, 6, 0, 0, 0])
    assert walk.tokens == [7, 6]
    assert walk.accepted == [1]


def test_only_children_of_reached_nodes_are_observed():
    outcomes = observed(TREE, target_walk(TREE, [5, 8, 1, 2, 9, 3]), sampled=True)
    assert outcomes.accepted.tolist() == [True, False, False, True]
    assert outcomes.depths.tolist() == [1, 1, 2, 2]
    np.testing.assert_allclose(outcomes.draft_probs, [0.6, 0.3, 0.5, 0.2])
    assert outcomes.sampled.all()


def test_a_batch_shows_what_each_of_its_pruned_trees_would_alone():
    forest = Forest.of([TREE, DraftTree.empty(), TREE])
    chosen = np.asarray([True, True, False, True, False, True, False, True, False, False])
    trees = forest.select(chosen)
    walks = [target_walk(tree, own) for tree, own in zip(trees, ([5, 8, 0, 2], [1], [5, 6, 3]), strict=True)]
    assert [walk.accepted for walk in walks] == [[0, 2], [], [0, 1]]
    together = all_observed(forest, chosen, walks, [False, True, True])
    alone = [observed(tree, walk, sampled) for tree, walk, sampled in zip(trees, walks, (0, 1, 1), strict=True)]
    for name, column in vars(concatenate(alone)).items():
        np.testing.assert_array_equal(getattr(together, name), column)
    assert together.draft_probs.tolist() == np.asarray([0.6, 0.3, 0.2, 0.6, 0.5], np.float32).tolist()


def test_concatenation_of_nothing_is_empty():
    assert len(concatenate([]).accepted) == 0
