"""What one step of a batch costs, and what a second of it is worth: built once per step.

The gate, the rule, the scheduler and the speculator (for prompt lookup) read these prices.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from planner.fast.cost import as_decoded, verify_seconds
from treeline.config import MAX_TREE_DEPTH
from treeline.plan import CostModel, Plan


@dataclass(frozen=True)
class StepPrices:
    """Seconds and prices of one step, from one plan and one batch.

    Attributes:
        sequences: B, the requests that decode.
        prompt_tokens: prompt tokens of the step, as decoded tokens of the same cost.
        startable: Q, requests that could start when the step ends.
        wait_cost: cost of delaying these and the step's own prompts, in decoding requests; Q by default.
        cost: the plan's.
        seconds: float64 [n]; of a pass over 0 .. n - 1 tokens, roots, nodes and prompt tokens alike.
        budget_s: longest step that draft nodes may make.
    """

    sequences: int
    prompt_tokens: int
    startable: int
    wait_cost: float
    cost: CostModel
    seconds: NDArray[np.float64]
    budget_s: float = math.inf

    @classmethod
    def of(
        cls,
        plan: Plan,
        sequences: int,
        context_tokens: int,
        startable: int,
        max_nodes: int,
        prompt_tokens: int = 0,
        prompts: int = 0,
    ) -> StepPrices:
        """
        Args:
            context_tokens: mean committed tokens per sequence.
            max_nodes: most draft nodes of the whole step.
            prompt_tokens: prompt tokens of the step, not yet converted.
            prompts: requests that these belong to.
        """
        prompt_tokens = as_decoded(plan.cost, prompt_tokens)
        most = sequences + prompt_tokens + max_nodes
        seconds = verify_seconds(plan.cost, max(1, sequences), context_tokens, most)
        wait_cost = waiting_cost(plan.wait_factor, startable, prompts)
        return cls(sequences, prompt_tokens, startable, wait_cost, plan.cost, seconds, plan.step_budget_s)

    @property
    def overhead_s(self) -> float:
        """What a step takes besides drafting and the pass."""
        return self.cost.step_overhead_s

    @property
    def base_tokens(self) -> int:
        """Tokens of the pass before any draft node."""
        return self.sequences + self.prompt_tokens

    @property
    def undrafted_s(self) -> float:
        """Seconds of the pass without draft nodes."""
        return self.seconds.item(self.base_tokens)

    @cached_property
    def plain_s(self) -> float:
        """Seconds of a step that decodes one token of each sequence.

        Without prompts: they are run whatever is decoded, so what a second is worth does not depend on them.
        """
        return self.seconds.item(self.sequences) + self.overhead_s

    @cached_property
    def second(self) -> float:
        """Price of a second, tokens/s, while nothing is drafted; drafts that pay raise it."""
        return self.price(0.0)

    def price(self, goodput: float) -> float:
        """R + mu Q: R is `goodput` or plain decoding's, whichever is higher; mu Q is R / B times `wait_cost`."""
        if not self.sequences:
            return 0.0
        return max(goodput, self.sequences / self.plain_s) * (1 + self.wait_cost / self.sequences)

    def nodes_within_budget(self, draft_s: float, base_tokens: int) -> int:
        """Most draft nodes beyond `base_tokens` that fit the step budget after `draft_s` of drafting."""
        left_s = self.budget_s - draft_s - self.overhead_s
        return max(0, int(self.seconds[base_tokens:].searchsorted(left_s, side="right")) - 1)

    @cached_property
    def layers_within_budget(self) -> int:
        """Most draft layers, at least one, that fit the step budget together with verifying one node per layer and
        sequence: deeper drafts take the seconds that their nodes would need."""
        if self.budget_s == math.inf:
            return MAX_TREE_DEPTH
        cost, layers = self.cost, np.arange(1, MAX_TREE_DEPTH + 1)
        layer_s = cost.draft_layer_s + cost.draft_node_s * self.sequences
        draft_s = cost.draft_round_trip_s + cost.draft_sequence_s * self.sequences + layer_s * layers
        tokens = np.minimum(self.base_tokens + self.sequences * layers, len(self.seconds) - 1)
        return max(1, int((draft_s + self.seconds[tokens] + self.overhead_s <= self.budget_s).sum()))

    def added_s(self, nodes: NDArray[np.float64]) -> NDArray[np.float64]:
        """float64, as `nodes`: seconds that so many draft nodes, fractions allowed, add to the pass."""
        from_base = self.seconds[self.base_tokens :]
        return np.interp(nodes, np.arange(len(from_base)), from_base) - from_base[0]

    def surplus(self, gains: list[float]) -> float:
        """The most tokens that any number of nodes bring beyond the price of the seconds that they add to the pass.

        The price is `second`. With drafts that pay it rises, so this is an upper bound.

        Args:
            gains: w a(u) of each node, in descending order.
        """
        added_s = self.seconds[self.base_tokens + 1 :][: len(gains)] - self.undrafted_s
        return float((np.cumsum(gains[: len(added_s)]) - self.second * added_s).max(initial=0.0))


def waiting_cost(wait_factor: float, startable: int, prompts: int) -> float:
    """Cost of one step's delay to requests without a first token, in decoding requests.

    At factor 1 each of `startable` counts as one, and the running `prompts` as none: their step is under way. A factor
    above 1 means that first tokens come too late; then both count.
    """
    return wait_factor * (startable + prompts) - prompts
