"""Packing: masks, positions, slots and wanted rows of a ragged batch."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lm.kv_cache import KVCache, LayerShape
from lm.packed import PackedSequence, ancestry, pack
from tests.lm.helpers import path_to, random_parents


def new_cache() -> KVCache:
    return KVCache([LayerShape(1, 2, 2)], 64, 4, torch.float32, torch.device("cpu"))


@pytest.mark.parametrize("seed", range(8))
def test_ancestry_is_the_path_of_each_node(seed: int) -> None:
    rng = np.random.default_rng(seed)
    parents = random_parents(rng, int(rng.integers(1, 40)))
    depths, paths = ancestry(parents)
    for node in range(len(parents)):
        path = path_to(parents, node)
        assert depths[node] == len(path) - 1
        assert [other for other in range(len(parents)) if paths[node] >> other & 1] == path


def test_positions_slots_and_rows_of_a_ragged_batch() -> None:
    cache = new_cache()
    prompt, tree = cache.allocate(8), cache.allocate(16)
    assert prompt is not None
    assert tree is not None
    tree.length, tree.scratch = 5, 2
    parents = np.array([-1, 0, 0, 1, 3], np.int32)
    batch = pack(
        [
            PackedSequence(prompt, [7, 8, 9], None, "last"),
            PackedSequence(tree, [1, 2, 3], parents, "all"),
        ]
    )
    assert batch.token_ids.tolist() == [7, 8, 9, 1, 2, 3]
    assert batch.positions.tolist() == [0, 1, 2, 6, 7, 8]
    assert batch.slots.tolist() == [0, 1, 2, 8 + 7, 8 + 8, 8 + 9]
    assert batch.rows.tolist() == [2, 3, 4, 5]
    assert batch.spans[1].visible.tolist() == [
        [True, False, True, False, False],
        [True, True, False, True, False],
        [True, True, False, True, True],
    ]


@pytest.mark.parametrize(
    ("token_ids", "parents", "scratch", "message"),
    [
        ([], None, 0, "without new tokens"),
        ([1], None, 2, "causal run"),
        ([1, 2], [-1], 0, "parents"),
        ([1, 2], [-1, 1], 0, "before its child"),
        ([1, 2], [-2, 0], 0, "before its child"),
        ([1] * 9, None, 0, "exceed"),
    ],
)
def test_what_is_no_tree_or_does_not_fit_is_refused(
    token_ids: list[int], parents: list[int] | None, scratch: int, message: str
) -> None:
    sequence = new_cache().allocate(8)
    assert sequence is not None
    sequence.scratch = scratch
    with pytest.raises(ValueError, match=message):
        pack([PackedSequence(sequence, token_ids, None if parents is None else np.array(parents, np.int32))])
