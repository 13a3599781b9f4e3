from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
import pytest

from drafter_svc.growth import grow
from drafter_svc.proposer import GrowingTree
from drafter_svc.sessions import Session
from planner.fast.acceptance import prior
from planner.policies import parse_policy
from planner.policies.sequoia import optimal_shape
from tests.drafter_svc.doubles import ScriptedProposer, plan, sequence

RANKS = (0.6, 0.18, 0.09, 0.05, 0.02, 0.01, 0.01, 0.0)


def best_by_dynamic_programming(acceptance: tuple[float, ...], nodes: int, depth: int) -> float:
    """The paper's recurrence: expected tokens of the best tree of `nodes` nodes below the root."""

    @cache
    def tree(size: int, levels: int) -> float:
        """A subtree of at most `size` nodes, its own root counted."""
        return 1.0 + (forest(size - 1, levels - 1, 0) if levels > 1 else 0.0)

    @cache
    def forest(size: int, levels: int, rank: int) -> float:
        """The children from `rank` on of one node."""
        if size <= 0 or rank == len(acceptance):
            return 0.0
        shares = (
            acceptance[rank] * tree(first, levels) + forest(size - first, levels, rank + 1)
            for first in range(1, size + 1)
        )
        return max(shares)

    return tree(nodes + 1, depth + 1)


def worth(shape: tuple[np.ndarray, ...], acceptance: tuple[float, ...]) -> float:
    total = 1.0
    for depth, paths in enumerate(shape, start=1):
        for path in paths.tolist():
            total += float(np.prod([acceptance[path >> (4 * level) & 15] for level in range(depth)]))
    return total


@pytest.mark.parametrize("nodes", [1, 4, 11, 24])
@pytest.mark.parametrize("depth", [1, 3, 6])
def test_no_tree_of_the_size_is_worth_more(nodes, depth):
    shape = optimal_shape(RANKS, nodes, depth)
    assert sum(map(len, shape)) <= nodes
    assert worth(shape, RANKS) == pytest.approx(best_by_dynamic_programming(RANKS, nodes, depth))


def test_the_shape_is_a_tree_whose_children_come_by_rank():
    shape = optimal_shape(RANKS, 40, 6)
    for depth in range(1, 6):
        assert {path >> 4 for path in shape[depth].tolist()} <= set(shape[depth - 1].tolist())
    for paths in shape:
        assert all(path & 15 == 0 or path - 1 in paths.tolist() for path in paths.tolist())


def grown(by_rank: tuple[float, ...], spec: str):
    a_plan = replace(plan(), calibration=replace(prior(), by_rank=np.asarray([by_rank, by_rank], np.float32)))
    children = [(token, 1 / 8) for token in range(8)]
    table = {(): children} | {(a,): children for a in range(8)} | {(a, b): children for a in range(8) for b in range(8)}
    tree = GrowingTree(Session(1, [0]), sequence(spec, [0]), parse_policy(spec))
    return grow([tree], a_plan, [], ScriptedProposer(table))[0]


def test_the_grown_tree_has_the_shape_whatever_the_confidences():
    tree = grown(RANKS, "sequoia:12,3")
    shape = optimal_shape(RANKS, 12, 3)
    assert len(tree) == 12
    assert [int((tree.depths == depth).sum()) for depth in (1, 2, 3)] == [len(paths) for paths in shape]


def test_the_shape_follows_what_was_measured():
    sure, unsure = grown((0.95, 0.01, 0.01, 0, 0, 0, 0, 0), "sequoia:3,3"), grown((0.13,) * 8, "sequoia:3,3")
    assert sure.depths.tolist() == [1, 2, 3]
    assert unsure.depths.tolist() == [1, 1, 1]
