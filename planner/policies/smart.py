"""The rule that this project is about, and the paper it comes from."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from planner.fast.cost import paper_layer_s, plain_decode_s
from planner.policies.base import Layer, Policy, places_by_score
from treeline.config import MAX_TREE_DEPTH
from treeline.plan import DEPTHS, PaperFit, Plan

CHILDREN = 6
"""Most children proposed under a node. Of the shipped head's accepted children 64, 21, 10 and 5 % were its first to
fourth choice (`eval-drafter`); two more are for drafters that are less sure."""
SPARE = 0.5
"""The drafter offers nodes down to this share of the verifier's last threshold. The verifier must leave some out, or it
never learns what the next one would gain. Simulated H100, 64 streams, two seeds: with 1 smart is 2 to 3 % slower,
with 0 up to 2 % (3 % at 32 streams)."""
PAPER_ALPHA = 0.8
"""Alpha of the paper: the best of its ablation."""
PAPER_BUDGET_NODES = 200
"""B of the paper, for the whole batch: the best of its ablation at batch 16."""


@dataclass(frozen=True)
class SmartPaper(Policy):
    """SMART to the letter (arXiv 2604.09731): per request, layer by layer.

    Keep u iff alpha * dC_target / dC_spec > C_target / C_spec, with dC_target = c_T * P(u | ancestors) / |paths| and
    dC_spec = lambda + gamma * delta * rho * n^(rho-1) * exp(delta * n^rho), n being the tree so far; the budget is
    split evenly over the batch.
    """

    spec = "smart-paper"
    max_depth = MAX_TREE_DEPTH
    max_children = CHILDREN

    def keep(self, layer: Layer, plan: Plan) -> NDArray[np.bool_]:
        fit = plan.cost.paper or PaperFit(lambda_s=0.0, gamma_s=plain_decode_s(plan.cost), delta=0.01, rho=1.0)
        token_s = plain_decode_s(plan.cost)
        spent_s, node_s = paper_layer_s(fit, layer.sizes + 1)  # the root is verified too
        target_s = token_s * (1 + layer.path_probs_so_far / layer.paths)
        budget = np.maximum(0, PAPER_BUDGET_NODES // max(1, layer.batch) - layer.sizes)
        trees = layer.tree_of
        gain_s = token_s * layer.path_probs / layer.paths[trees]
        kept = PAPER_ALPHA * gain_s * spent_s[trees] > (target_s * node_s)[trees]
        return kept & (places_by_score(np.where(kept, layer.path_probs, np.float32(-1)), trees) < budget[trees])


@dataclass(frozen=True)
class Smart(Policy):
    """Treeline's rule: keep the nodes that may be worth their price; the verifier decides over the whole batch."""

    spec = "smart"
    max_depth = MAX_TREE_DEPTH
    max_children = CHILDREN
    priced = True

    def keep(self, layer: Layer, plan: Plan) -> NDArray[np.bool_]:
        return layer.weights[layer.tree_of] * layer.scores > SPARE * plan.price * plan.cost.node_s

    def expand(self, layer: Layer, kept: NDArray[np.bool_], plan: Plan) -> NDArray[np.intp]:
        """Nodes whose best child would pay for being drafted and verified."""
        kappa = plan.calibration.kappa[layer.sampled.astype(np.intp), min(layer.depth, DEPTHS - 1)]
        node_s = plan.cost.draft_node_s + plan.cost.node_s
        return (kept & ((layer.weights * kappa)[layer.tree_of] * layer.scores > plan.price * node_s)).nonzero()[0]
