"""Synthetic drafts: what a drafter would propose below a root, how sure it would be, and what the target would say."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from drafter_svc.proposer import Children, GrowingTree
from treeline.errors import ConfigError
from treeline.tree import ROOT

WORLDS = 64
OUTCOMES = 16
"""Independent answers of the target to each world."""
DRAWS = 4096
HASH, HASHES = 0x9E3779B97F4A7C15, 2**64 - 1
MAX_DEPTH = 8
MAX_RANKS = 8
LEAST_PROB, MOST_PROB = 1e-6, 0.999
SHRINK = 50.0
MOST_MASS = 0.98


@dataclass(frozen=True)
class AcceptanceLaw:
    """How often the target accepts, and how sure the drafter is.

    Attributes:
        acceptance: [depths][ranks]: mean probability that the target accepts the choice of this rank below an accepted
            node; non-increasing by rank, its sum below 1. The last depth stands for all deeper ones.
        concentration: of the Beta distribution of the first choice's probability: small for a drafter that is either
            sure or not, large for one that is always equally sure.
        over_confidence: the drafter claims so many times the true probability.
    """

    acceptance: tuple[tuple[float, ...], ...]
    concentration: float
    over_confidence: float

    def draw(self, depth: int, count: int, random: np.random.Generator) -> NDArray[np.float64]:
        """float64 [count, ranks]: true acceptance of the children of so many nodes; its mean is that of `depth`."""
        means = np.asarray(self.acceptance[min(depth, len(self.acceptance)) - 1])
        first, rest = means[0], 1 - means[0]
        # The first choice is never less likely than the second, which shares what the first one leaves.
        least = means[1] / (rest + means[1]) if len(means) > 1 else 0.0
        mean = (first - least) / (1 - least)
        share = random.beta(max(1e-3, mean * self.concentration), max(1e-3, (1 - mean) * self.concentration), count)
        drawn = least + (1 - least) * share[:, None]
        return np.concatenate((drawn, means[1:] * (1 - drawn) / rest), axis=1)


EAGLE3_LIKE = AcceptanceLaw(((0.72, 0.12, 0.05, 0.03, 0.015, 0.01, 0.005, 0.005),), 1.5, 1.2)
"""An assumption, not a measurement: a head whose first choice is right in 72 of 100 places, at any depth."""


class Draws:
    """What may lie below a node, drawn in bulk: DRAWS kinds of node for every depth.

    Attributes:
        true, claimed: float64 [MAX_DEPTH, DRAWS, ranks]; acceptance of the children, and what the drafter says of it.
        chosen: uint8 [MAX_DEPTH, DRAWS, OUTCOMES]; the child that the target goes to, `ranks` if to none.
    """

    def __init__(self, law: AcceptanceLaw, seed: int) -> None:
        random = np.random.default_rng([seed, 0])
        self.true = np.stack([law.draw(depth + 1, DRAWS, random) for depth in range(MAX_DEPTH)])
        self.claimed = np.clip(self.true * law.over_confidence, LEAST_PROB, MOST_PROB)
        fates = random.random((MAX_DEPTH, DRAWS, 1, OUTCOMES))
        self.chosen = (fates > self.true.cumsum(-1)[..., None]).sum(2).astype(np.uint8)


class World:
    """The tree below one root as the drafter and the target would know it; made node by node as it is asked for.

    Nodes are numbered as they are made; what lies below a node depends on its path alone, so every policy meets the
    same worlds.
    """

    def __init__(self, draws: Draws, index: int) -> None:
        self._draws = draws
        self._ranks = np.arange(draws.true.shape[-1], dtype=np.uint8)
        self._root = (index * HASH, 0)
        self._nodes: list[tuple[int, int]] = []  # hash of the path, depth
        self._through = np.zeros((len(self._ranks), OUTCOMES), np.bool_)  # by node; with room for more
        self._probs: list[float] = []
        self._children: dict[int, range] = {}

    def children(self, node: int) -> range:
        """Numbers of the node's children, first choice first."""
        if node not in self._children:
            path, depth = self._root if node == ROOT else self._nodes[node]
            kind = min(depth, MAX_DEPTH - 1), (path * HASH >> 20) % DRAWS
            first, ranks = len(self._nodes), len(self._ranks)
            if first == len(self._through):
                self._through = np.concatenate([self._through, np.zeros_like(self._through)])
            children = self._through[first : first + ranks]
            np.equal(self._draws.chosen[kind], self._ranks[:, None], out=children)
            if node != ROOT:
                children &= self._through[node]
            self._nodes += [((path * 31 + rank) & HASHES, depth + 1) for rank in range(1, ranks + 1)]
            self._probs += self._draws.claimed[kind].tolist()
            self._children[node] = range(first, len(self._nodes))
        return self._children[node]

    def propose(self, tree: GrowingTree, nodes: list[int]) -> Children:
        """Children of some nodes of a growing tree, whose token ids are this world's node numbers."""
        proposed, most = Children(), tree.policy.max_children
        for node in nodes:
            children = self.children(ROOT if node == ROOT else tree.token_ids[node])[:most]
            proposed.parents.extend([node] * len(children))
            proposed.token_ids.extend(children)
            proposed.probs.extend(self._probs[children.start : children.stop])
            proposed.ranks.extend(range(len(children)))
        return proposed

    def on_path(self, nodes: NDArray[np.int32]) -> NDArray[np.bool_]:
        """bool [OUTCOMES, n]: whether the target goes through these nodes."""
        return self._through[nodes].T


def law_from_trace(path: Path) -> AcceptanceLaw:
    """The acceptance law of a recorded trace.

    A trace has one JSON object a line; of each, only `outcomes` is read: columns `depth` (from 1), `rank` (from 0),
    `prob` and `accepted` of the verified nodes whose parent was accepted.

    Raises:
        ConfigError: it cannot be read, or holds too few outcomes.
    """
    columns: dict[str, list[float]] = {"depth": [], "rank": [], "prob": [], "accepted": []}
    try:
        for line in path.read_text().splitlines():
            outcomes = json.loads(line)["outcomes"]
            for name, values in columns.items():
                values += outcomes[name]
        depths, ranks = (np.asarray(columns[name], np.intp) for name in ("depth", "rank"))
        probs, accepted = (np.asarray(columns[name], np.float64) for name in ("prob", "accepted"))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path}: every line must hold outcomes with {', '.join(columns)} ({error})") from None
    if len({len(values) for values in columns.values()}) > 1:
        raise ConfigError(f"{path}: columns of outcomes differ in length")
    first = ranks == 0
    if first.sum() < SHRINK or not accepted.any():
        raise ConfigError(f"{path}: too few outcomes")
    cells = np.minimum(depths, MAX_DEPTH) - 1, np.minimum(ranks, MAX_RANKS - 1)
    seen, hits = np.zeros((MAX_DEPTH, MAX_RANKS)), np.zeros((MAX_DEPTH, MAX_RANKS))
    np.add.at(seen, cells, 1.0)
    np.add.at(hits, cells, accepted)
    pooled = hits.sum(0) / np.maximum(seen.sum(0), 1.0)
    acceptance = np.minimum.accumulate((hits + SHRINK * pooled) / (seen + SHRINK), axis=1)
    acceptance *= np.minimum(1.0, MOST_MASS / acceptance.sum(1, keepdims=True))
    mean, spread = float(probs[first].mean()), float(probs[first].var())
    concentration = max(0.2, mean * (1 - mean) / max(spread, 1e-4) - 1)
    rows = tuple(tuple(row) for row in acceptance.tolist())
    return AcceptanceLaw(rows, concentration, float(probs.sum() / accepted.sum()))
