"""A batch's trees together against each of them alone."""

from __future__ import annotations

import numpy as np
import pytest

from tests.planner.builders import random_tree
from treeline.forest import Forest
from treeline.tree import ROOT, DraftTree, Source

NAMES = ("token_ids", "parents", "draft_probs", "ranks", "sources")


def forests(count: int) -> list[list[DraftTree]]:
    """Random trees, some empty, of nodes from several sources."""
    random = np.random.default_rng(0)
    made = []
    for _ in range(count):
        trees = [random_tree(random, 12) for _ in range(int(random.integers(1, 6)))]
        for tree in trees:
            tree.sources[:] = random.choice([Source.MODEL, Source.NGRAM], len(tree))
            tree.ranks[:] = random.integers(0, 4, len(tree))
        made.append(trees)
    return made


def closed(tree: DraftTree, random: np.random.Generator) -> np.ndarray:
    """A random set of nodes that holds the parents of all its nodes."""
    keep = random.random(len(tree)) < 0.7
    for node, parent in enumerate(tree.parents.tolist()):
        keep[node] &= parent == ROOT or keep[parent]
    return keep


def model_layers(tree: DraftTree) -> list[int]:
    layers: list[int] = []
    for node, parent in enumerate(tree.parents.tolist()):
        above = 0 if parent == ROOT else layers[parent]
        layers.append(above if tree.sources[node] == Source.NGRAM else max(above, int(tree.depths[node])))
    return layers


def test_depths_products_and_layers_are_those_of_each_tree():
    random = np.random.default_rng(1)
    for trees in forests(100):
        forest = Forest.of(trees)
        factors = random.uniform(0.1, 1.0, len(forest.tree_of)).astype(np.float32)
        ends = np.cumsum(forest.sizes)[:-1]
        np.testing.assert_array_equal(forest.depths, np.concatenate([tree.depths for tree in trees]))
        alone = [tree.path_products(own) for tree, own in zip(trees, np.split(factors, ends), strict=True)]
        np.testing.assert_allclose(forest.path_products(factors), np.concatenate(alone), rtol=1e-5)
        assert forest.model_layers().tolist() == [layer for tree in trees for layer in model_layers(tree)]
        assert forest.tree_of.tolist() == [i for i, tree in enumerate(trees) for _ in range(len(tree))]


def test_what_is_selected_of_each_tree_is_what_it_would_select_alone():
    random = np.random.default_rng(2)
    for trees in forests(100):
        keeps = [closed(tree, random) for tree in trees]
        for tree, keep, cut in zip(trees, keeps, Forest.of(trees).select(np.concatenate(keeps)), strict=True):
            alone = tree.select(keep)
            for name in NAMES:
                np.testing.assert_array_equal(getattr(cut, name), getattr(alone, name))
                assert getattr(cut, name).dtype == getattr(alone, name).dtype


def test_a_node_whose_parent_is_dropped_is_refused():
    trees = [DraftTree.build([1], [-1]), DraftTree.build([1, 2], [-1, 0])]
    with pytest.raises(ValueError, match="parent"):
        Forest.of(trees).select(np.asarray([True, False, True]))
