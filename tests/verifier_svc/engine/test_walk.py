import numpy as np

from tests.trees import tree_of
from treeline.forest import Forest
from verifier_svc.engine.walk import Walk, observed, target_walks

#        root
#       5    7
#      6 8    5
TREE = tree_of([5, 7, 6, 8, 5], [-1, -1, 0, 0, 1], [0.6, 0.3, 0.5, 0.2, 0.9])


def walk(own_tokens: list[int]) -> Walk:
    return target_walks(TREE, own_tokens)[0]


def test_walk_follows_the_targets_own_tokens_and_ends_with_the_bonus_token():
    assert walk([5, 8, 1, 2, 9, 3]) == Walk([0, 3], [5, 8, 9])


def test_walk_emits_one_token_when_no_child_carries_it():
    assert walk([4, 1, 1, 1, 1, 1]) == Walk([], [4])


def test_walk_of_an_empty_tree_is_plain_decoding():
    assert target_walks(Forest.empty(1), [11]) == [Walk([], [11])]


def test_a_token_under_another_parent_is_not_taken():
    # 6 exists, but below 5; after 7 the target wants 6.
    assert walk([7, 0, 6, 0, 0, 0]) == Walk([1], [7, 6])


def test_only_children_of_reached_nodes_are_observed():
    outcomes = observed(TREE, np.ones(5, np.bool_), [walk([5, 8, 1, 2, 9, 3])], [True])
    assert outcomes.accepted.tolist() == [True, False, False, True]
    assert outcomes.depths.tolist() == [1, 1, 2, 2]
    assert outcomes.first.tolist() == [True, False, True, False]
    np.testing.assert_allclose(outcomes.draft_probs, [0.6, 0.3, 0.5, 0.2])
    assert outcomes.sampled.all()


def test_a_batch_shows_what_each_of_its_pruned_trees_would_alone():
    forest = Forest.join([TREE, Forest.empty(1), TREE])
    chosen = np.asarray([True, True, False, True, False, True, False, True, False, False])
    kept = forest.select(chosen)
    owns = ([5, 8, 0, 2], [1], [5, 6, 3])
    walks = target_walks(kept, [token for own in owns for token in own])
    assert walks == [target_walks(kept.tree(index), own)[0] for index, own in enumerate(owns)]
    assert [walk.accepted for walk in walks] == [[0, 2], [], [0, 1]]
    together = observed(forest, chosen, walks, [False, True, True])
    alone = [
        observed(tree, np.ones(len(tree), np.bool_), [walk], [sampled])
        for tree, walk, sampled in zip(map(kept.tree, range(3)), walks, (False, True, True), strict=True)
    ]
    for name, column in vars(together).items():
        np.testing.assert_array_equal(column, np.concatenate([getattr(one, name) for one in alone]))
    assert together.draft_probs.tolist() == np.asarray([0.6, 0.3, 0.2, 0.6, 0.5], np.float32).tolist()
