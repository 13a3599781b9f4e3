"""The rule: which nodes of a whole batch are worth verifying, and whether another layer is worth drafting.

A node u is worth it if w a(u) / dC(u) > price, price = R + mu Q (docs/the-rule.md). Path acceptance a(u) never grows
along a path, so the best m nodes of the batch are the m with the largest w a(u), and they are closed under parents:
looking at every prefix of one sorted list is exact for any cost curve. A step budget forbids the longer prefixes, since
a pass never takes less time with more tokens. The roots alone are always allowed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from planner.fast.acceptance import accepts
from planner.fast.step_prices import StepPrices
from planner.policies import Policy
from treeline.forest import Forest
from treeline.plan import DEPTHS, Calibration, Plan

MAX_ACCEPTANCE = np.float32(1 - 2.0**-16)
"""Cap of a node's acceptance: 256 float32 roundings below 1, so that at any depth (32 at most) a child is worth less
than its parent, and every order by worth is closed under parents."""


class Requests(NamedTuple):
    """The batch's requests as the rule sees them, one entry per tree.

    Attributes:
        weights: float32 [trees]; value of each request's tokens, 1 on average.
        sampled: bool [trees]; false for greedy requests.
        priced: bool [trees]; whether the rule may leave nodes out. Other trees are verified whole.
    """

    weights: NDArray[np.float32]
    sampled: NDArray[np.bool_]
    priced: NDArray[np.bool_]


@dataclass(frozen=True)
class Pruning:
    """The nodes to verify, and why.

    Attributes:
        chosen: bool [nodes] of the forest; closed under parents.
        gains: float32 [nodes]; w a(u).
        price: R + mu Q, tokens per second.
        goodput: weighted tokens per second expected at the chosen size.
        expected_tokens: weighted tokens expected of the step.
        predicted_verify_s: seconds of the pass at the chosen size.
        offered: nodes that could have been left out.
        kept: how many of these were chosen.
        next_gain: the largest gain that was left out; 0 if none was.
        next_s: seconds it would have added to the pass.
        bounded: whether the step budget allowed no more nodes.
    """

    chosen: NDArray[np.bool_]
    gains: NDArray[np.float32]
    price: float
    goodput: float
    expected_tokens: float
    predicted_verify_s: float
    offered: int
    kept: int
    next_gain: float
    next_s: float
    bounded: bool

    @property
    def node_s(self) -> float:
        """Gain of the best node left out, in seconds at the price; 0 if none was left out."""
        return self.next_gain / self.price

    @property
    def reason(self) -> str:
        """One line for people."""
        said = f"kept {self.kept} of {self.offered} nodes at {self.price:.0f} tok/s"
        if fixed := len(self.chosen) - self.offered:
            said += f", {fixed} more by fixed policies"
        if self.kept == self.offered:
            return said
        if self.bounded:
            return f"{said}; the step budget allows no more"
        brings = f"{self.next_gain / self.next_s:.0f} tok/s" if self.next_s > 0 else f"{self.next_gain:.2f} tokens"
        return f"{said}; the next would bring {brings}"


class PricedFrontier(NamedTuple):
    """Nodes of one request that the draft model would run next. `acceptance`: the sum of a(u) over them."""

    policy: Policy
    weight: float
    nodes: int
    acceptance: float
    depth: int
    sampled: bool


def prune_batch(
    forest: Forest, requests: Requests, calibration: Calibration, prices: StepPrices, draft_s: float
) -> Pruning:
    """Choose the nodes to verify: of all prefixes of the nodes, sorted by gain, the one of largest value.

    `requests` are all that decode in this step; their trees may be empty. `draft_s`: seconds that drafting has taken.

    Example: one request, prices.seconds = 30 ms + 1 ms a token, no overhead, draft_s = 0, gains [.8, .5, .02]:
      sizes    0      1      2      3
      expected 1      1.8    2.3    2.32    tokens
      seconds  31     32     33     34      ms
      goodput  32.3   56.3   69.7   68.2    tokens/s, so R = 69.7
      value    -1.16  -0.43  0.00   -0.05   expected - R * seconds, so two nodes are kept
    """
    gains = path_acceptance(forest, requests.sampled, calibration) * requests.weights[forest.tree_of]
    open_nodes = requests.priced[forest.tree_of]
    ranked = np.sort(gains[open_nodes])[::-1]  # sorting values alone is several times faster than argsort
    fixed = len(gains) - len(ranked)
    expected = np.empty(len(ranked) + 1)
    expected[0] = float(requests.weights.sum()) + float(gains.sum()) - float(ranked.sum())
    expected[1:] = ranked
    expected.cumsum(out=expected)
    most = min(len(ranked), prices.nodes_within_budget(draft_s, prices.base_tokens + fixed))
    expected = expected[: most + 1]
    # R is the goodput of a step without prompts; the seconds that a size adds are those of the real pass.
    first = prices.sequences + fixed
    own_s = prices.seconds[first : first + len(expected)] + prices.overhead_s + draft_s
    price = prices.price(float((expected / own_s).max()))
    verify_s = prices.seconds[prices.base_tokens + fixed :][: len(ranked) + 1]
    size = int((expected - price * verify_s[: most + 1]).argmax())
    chosen = np.ones(len(gains), np.bool_)
    chosen[open_nodes] = _best(gains[open_nodes], ranked, size)
    left_out, best_s = size < len(ranked), verify_s.item(size)
    return Pruning(
        chosen=chosen,
        gains=gains,
        price=price,
        goodput=expected.item(size) / (draft_s + prices.overhead_s + best_s),
        expected_tokens=expected.item(size),
        predicted_verify_s=best_s,
        offered=len(ranked),
        kept=size,
        next_gain=ranked.item(size) if left_out else 0.0,
        next_s=verify_s.item(size + 1) - best_s if left_out else 0.0,
        bounded=size == most < len(ranked),
    )


def another_layer(frontiers: list[PricedFrontier], plan: Plan) -> bool:
    """Whether running these nodes through the draft model pays for the whole batch, at the plan's price.

    A node's children gain their total acceptance, and cost drafting the node and verifying at least one of them.
    """
    kappa, gain, nodes = plan.calibration.kappa, 0.0, 0
    for f in frontiers:
        if f.policy.priced:
            gain += f.weight * f.acceptance * kappa.item(int(f.sampled), min(f.depth, DEPTHS - 1))
            nodes += f.nodes
        elif f.depth < f.policy.max_depth:
            return True
    node_s = plan.cost.draft_node_s + plan.cost.node_s
    return gain > plan.price * (plan.cost.draft_layer_s + node_s * nodes)


def path_acceptance(forest: Forest, sampled: NDArray[np.bool_], calibration: Calibration) -> NDArray[np.float32]:
    """float32 [nodes]: a(u) of every node of the forest. `sampled`: bool [trees]."""
    edges = accepts(calibration, forest.sources, forest.depths, forest.draft_probs, sampled[forest.tree_of])
    return forest.path_products(np.minimum(edges, MAX_ACCEPTANCE))


def _best(values: NDArray[np.float32], ranked: NDArray[np.float32], count: int) -> NDArray[np.bool_]:
    """bool [n]: the `count` largest of `values`, ties to the earlier; `ranked` is `values` in descending order."""
    if not count:
        return np.zeros(len(values), np.bool_)
    least = ranked[count - 1]
    best = values >= least
    if count < len(ranked) and ranked[count] == least:
        equal = (values == least).nonzero()[0]
        best[equal[count - np.count_nonzero(best) :]] = False
    return best
