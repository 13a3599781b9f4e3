"""What one step of a batch costs and what a second of it is worth, built once per step.

Gate, lookup, rule and scheduler take these prices instead of reading the plan's curves again.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from planner.fast.cost import as_decoded, verify_seconds
from treeline.plan import Plan


@dataclass(frozen=True)
class StepPrices:
    """Seconds and prices of one step, from one plan and one batch.

    Attributes:
        sequences: B, the requests that decode.
        prompt_tokens: prompt tokens of the step, as decoded tokens of the same cost.
        waiting: Q, waiting requests that could start when the step ends.
        overhead_s: what a step takes besides drafting and the pass.
        seconds: float64 [n]; of a pass over 0 .. n - 1 tokens, roots, nodes and prompt tokens alike.
    """

    sequences: int
    prompt_tokens: int
    waiting: int
    overhead_s: float
    seconds: NDArray[np.float64]

    @classmethod
    def of(
        cls, plan: Plan, sequences: int, context_tokens: int, waiting: int, max_nodes: int, prompt_tokens: int = 0
    ) -> StepPrices:
        """
        Args:
            context_tokens: mean committed tokens per sequence.
            max_nodes: most draft nodes of the whole step.
            prompt_tokens: prompt tokens of the step, as they are counted.
        """
        prompt_tokens = as_decoded(plan.cost, prompt_tokens)
        most = sequences + prompt_tokens + max_nodes
        seconds = verify_seconds(plan.cost, max(1, sequences), context_tokens, most)
        return cls(sequences, prompt_tokens, waiting, plan.cost.step_overhead_s, seconds)

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
        """R + mu Q: R is `goodput` or plain decoding's, whichever is higher, and each waiting request costs R / B."""
        if not self.sequences:
            return 0.0
        return max(goodput, self.sequences / self.plain_s) * (1 + self.waiting / self.sequences)

    def added_s(self, nodes: NDArray[np.float64]) -> NDArray[np.float64]:
        """float64, as `nodes`: seconds that so many draft nodes, fractions allowed, add to the pass."""
        from_base = self.seconds[self.base_tokens :]
        return np.interp(nodes, np.arange(len(from_base)), from_base) - from_base[0]

    def least_gain(self, margin: float) -> float:
        """Tokens that the best node of any set must gain if the set is to pay, with `margin` tokens to spare.

        k nodes gain at most k times the best one's gain, so it must be (margin + price * added_s(k)) / k for some k.
        """
        added_s = self.seconds[self.base_tokens + 1 :] - self.undrafted_s
        gains = (margin + self.second * added_s) / np.arange(1, len(added_s) + 1)
        return float(gains.min(initial=np.inf))
