from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from treeline.tree import ROOT, DraftTree

#        root
#       5    7
#      6 8    5
TREE = DraftTree.build([5, 7, 6, 8, 5], [-1, -1, 0, 0, 1], [0.5, 0.3, 0.5, 0.2, 0.9], [0, 1, 0, 1, 0])


def test_depths_count_from_the_roots_children():
    assert TREE.depths.tolist() == [1, 1, 2, 2, 2]


def test_path_products_multiply_down_the_path():
    np.testing.assert_allclose(TREE.path_products(TREE.draft_probs), [0.5, 0.3, 0.25, 0.1, 0.27], rtol=1e-6)


def test_selection_renumbers_parents():
    kept = TREE.select(np.asarray([False, True, False, False, True]))
    assert kept.token_ids.tolist() == [7, 5]
    assert kept.parents.tolist() == [ROOT, 0]
    np.testing.assert_allclose(kept.draft_probs, [0.3, 0.9])


def test_selection_must_be_closed_under_parents():
    with pytest.raises(ValueError, match="parent was dropped"):
        TREE.select(np.asarray([False, True, True, False, False]))


def test_an_empty_tree_is_a_tree():
    empty = DraftTree.empty()
    assert len(empty) == 0
    assert len(empty.depths) == 0
    empty.check(vocab_size=1)


@pytest.mark.parametrize(
    ("column", "values", "problem"),
    [
        ("token_ids", [5, 7, 6, 8, 10], "vocabulary"),
        ("token_ids", [5, 7, 6, 8, -1], "vocabulary"),
        ("token_ids", [5, 5, 6, 8, 5], "same token"),
        ("parents", [-1, -1, 3, 0, 1], "before its child"),
        ("parents", [-1, -2, 0, 0, 1], "before its child"),
        ("draft_probs", [0.5, 0.3, 0.0, 0.2, 0.9], "outside"),
        ("draft_probs", [0.5, 0.3, np.nan, 0.2, 0.9], "outside"),
        ("ranks", [0], "length"),
    ],
)
def test_what_is_no_tree_is_found_out(column, values, problem):
    TREE.check(vocab_size=10)
    dtype = getattr(TREE, column).dtype
    with pytest.raises(ValueError, match=problem):
        replace(TREE, **{column: np.asarray(values, dtype)}).check(vocab_size=10)
