"""A batch's trees together against each of them alone, and what comes over a network."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from tests.planner.builders import random_tree
from tests.trees import tree_of
from treeline.forest import COLUMNS, ROOT, Forest, Source, checked, forest_from_proto, forest_to_proto
from treeline.v1 import drafting_pb2 as pb

#        root
#       5    7
#      6 8    5
TREE = tree_of([5, 7, 6, 8, 5], [-1, -1, 0, 0, 1], [0.5, 0.3, 0.5, 0.2, 0.9])


def forests(count: int) -> list[Forest]:
    """Random trees, some empty, of nodes from several sources."""
    random = np.random.default_rng(0)
    made = []
    for _ in range(count):
        forest = Forest.join([random_tree(random, 12) for _ in range(int(random.integers(1, 6)))])
        forest.sources[:] = random.choice([Source.MODEL, Source.NGRAM], len(forest))
        made.append(forest)
    return made


def paths(tree: Forest) -> list[list[int]]:
    """Of every node of one tree, the nodes down to it."""
    found: list[list[int]] = []
    for node, parent in enumerate(tree.parents.tolist()):
        found.append([*(found[parent] if parent != ROOT else []), node])
    return found


def test_depths_and_products_are_those_of_each_tree():
    random = np.random.default_rng(1)
    for forest in forests(100):
        factors = random.uniform(0.1, 1.0, len(forest)).astype(np.float32)
        trees = [forest.tree(index) for index in range(len(forest.sizes))]
        assert forest.tree_of.tolist() == [i for i, tree in enumerate(trees) for _ in range(len(tree))]
        assert forest.depths.tolist() == [len(path) for tree in trees for path in paths(tree)]
        own = [factors[a : a + n] for a, n in zip(forest.starts, forest.sizes, strict=True)]
        alone = [f[path].prod() for tree, f in zip(trees, own, strict=True) for path in paths(tree)]
        np.testing.assert_allclose(forest.path_products(factors), alone, rtol=1e-5)


def test_what_is_selected_of_each_tree_is_what_it_would_select_alone():
    random = np.random.default_rng(2)
    for forest in forests(100):
        keep = random.random(len(forest)) < 0.7
        for node, above in enumerate(forest.jumps[0][1:].tolist()):
            keep[node] &= above == 0 or keep[above - 1]
        kept, first = forest.select(keep), 0
        for index, size in enumerate(forest.sizes.tolist()):
            tree, own = forest.tree(index), keep[first : first + size]
            first += size
            chains = [[tree.token_ids[n] for n in path] for path in paths(tree) if own[path[-1]]]
            cut = kept.tree(index)
            assert [[cut.token_ids[n] for n in path] for path in paths(cut)] == chains
            assert cut.draft_probs.tolist() == tree.draft_probs[own].tolist()
        assert {name: getattr(kept, name).dtype for name in COLUMNS} == {n: np.dtype(d) for n, d in COLUMNS.items()}


def test_a_node_whose_parent_is_dropped_is_refused():
    with pytest.raises(ValueError, match="parent"):
        Forest.join([TREE, TREE]).select(np.asarray([True] * 5 + [False, True, True, False, False]))


def test_trees_keep_their_order_among_empty_ones():
    spread = Forest.join([TREE, TREE]).spread([1, 4], 6)
    assert spread.sizes.tolist() == [0, 5, 0, 0, 5, 0]
    assert spread.tree(4).token_ids.tolist() == TREE.token_ids.tolist()
    assert spread.depths.tolist() == [1, 1, 2, 2, 2] * 2


def test_a_forest_arrives_as_it_was_sent():
    sent = Forest.join([TREE, Forest.empty(2), TREE])
    got = forest_from_proto(pb.Forest.FromString(forest_to_proto(sent).SerializeToString()))
    for name in ("sizes", *COLUMNS):
        assert getattr(got, name).dtype == getattr(sent, name).dtype
        assert getattr(got, name).tolist() == getattr(sent, name).tolist()


def check(forest: Forest, nodes: int = 64, depth: int = 8) -> tuple[Forest, int]:
    trees = len(forest.sizes)
    return checked(forest, np.full(trees, nodes), np.full(trees, depth), 10)


@pytest.mark.parametrize(
    ("column", "values"),
    [
        ("token_ids", [5, 7, 6, 8, 10]),
        ("token_ids", [5, 7, 6, 8, -1]),
        ("token_ids", [5, 5, 6, 8, 5]),
        ("token_ids", [5, 7, 8, 8, 5]),
        ("parents", [-1, -1, 3, 0, 1]),
        ("parents", [-1, -2, 0, 0, 1]),
        ("parents", [-1, -1, 0, 0, 1000]),
        ("draft_probs", [0.5, 0.3, 0.0, 0.2, 0.9]),
        ("draft_probs", [0.5, 0.3, np.nan, 0.2, 0.9]),
        ("draft_probs", [0.5, 0.3, 1.5, 0.2, 0.9]),
        ("draft_probs", [0.5, 0.3, np.inf, 0.2, 0.9]),
        ("sources", [0, 0, 3, 0, 0]),
        ("sources", [0, 0, 255, 0, 0]),
    ],
)
def test_a_bad_tree_costs_that_tree_alone(column, values):
    assert check(Forest.join([TREE, TREE]))[1] == 0
    bad = replace(TREE, **{column: np.asarray(values, COLUMNS[column])})
    got, refused = check(Forest.join([TREE, bad, TREE]))
    assert (got.sizes.tolist(), refused) == ([5, 0, 5], 1)
    assert got.tree(2).token_ids.tolist() == TREE.token_ids.tolist()


def test_a_tree_beyond_its_allowance_is_refused():
    deep = tree_of([1, 2, 3], [-1, 0, 1])
    got, refused = checked(
        Forest.join([TREE, TREE, deep, deep]), np.asarray([4, 5, 9, 9]), np.asarray([9, 2, 3, 2]), 10
    )
    assert (got.sizes.tolist(), refused) == ([0, 5, 3, 0], 2)


@pytest.mark.parametrize("cut", ["token_ids", "parents", "draft_probs", "sources"])
def test_columns_of_different_lengths_are_no_forest(cut):
    message = forest_to_proto(TREE)
    setattr(message, cut, getattr(message, cut)[:-1])
    with pytest.raises(ValueError, match=r"length|size"):
        forest_from_proto(message)
    message = forest_to_proto(TREE)
    message.sizes[0] = 2**32 - 1
    with pytest.raises(ValueError, match="length"):
        forest_from_proto(message)
