"""Report of a drafter's trials: summaries, the cost of passes, the predicted speed-up."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from statistics import median
from typing import Any

from bench.drafter.trial import BLOCK_TOKENS, DrafterTrial, Tally
from drafter_svc.drafter import TreeDrafter
from lm.model import LanguageModel
from verifier_svc.service.profile import timed_pass_s

CONTEXT_TOKENS = 128
TIMED_NODES = 8
TIMED_ROUNDS = 10


def pass_costs(model: LanguageModel, drafter: TreeDrafter) -> dict[str, float]:
    """Seconds of a draft pass over 8 nodes and of target passes over 1, 6 and 17 tokens, interleaved, medians."""
    cache = model.new_cache(256, BLOCK_TOKENS)
    seconds: dict[str, list[float]] = defaultdict(list)
    for _ in range(TIMED_ROUNDS):
        for tokens in (1, 6, 17):
            seconds[f"target_{tokens}"].append(timed_pass_s(model, cache, 1, CONTEXT_TOKENS, tokens))
        layer_s, node_s = drafter.measure()
        seconds["draft_8"].append(layer_s + TIMED_NODES * node_s)
    return {name: median(values) for name, values in seconds.items()}


def predicted_speedup(accepted_length: float, tokens: int, layers: int, costs: dict[str, float]) -> float:
    """If steps draft `layers` layers and verify `tokens` tokens: E * C(1) / (C(tokens) + drafting)."""
    return accepted_length * costs["target_1"] / (costs[f"target_{tokens}"] + layers * costs["draft_8"])


@dataclass(frozen=True)
class Evaluation:
    """The findings about a drafter and its parts.

    Attributes:
        target: its name.
        summaries: by kind of drafter.
        by_category: the same by kind, then by category of prompt.
        costs_s: of passes (see `pass_costs`).
    """

    target: str
    summaries: dict[str, dict[str, Any]]
    by_category: dict[str, dict[str, dict[str, Any]]]
    costs_s: dict[str, float]

    @property
    def pass_ratio(self) -> float:
        """Cost of a draft pass over 8 nodes, in target passes over 1 token."""
        return self.costs_s["draft_8"] / self.costs_s["target_1"]


def evaluation(model: LanguageModel, trials: dict[str, DrafterTrial], kind: str) -> Evaluation:
    """Evaluates the trials of several kinds of drafter; costs are those of `kind`."""
    costs_s = pass_costs(model, trials[kind].drafter)

    def described(tally: Tally) -> dict[str, Any]:
        summary = tally.summary()
        lengths = summary["accepted_length"]
        speedups = {
            "chain:5": predicted_speedup(lengths["chain:5"], 6, 5, costs_s),
            "tree:16": predicted_speedup(lengths["tree:16"], 17, 6, costs_s),
        }
        return summary | {"predicted_speedup": speedups}

    by_kind = {
        name: {category: described(tally) for category, tally in trial.tallies.items()}
        for name, trial in trials.items()
    }
    summaries = {name: tallies.pop("") for name, tallies in by_kind.items()}
    return Evaluation(model.name, summaries, by_kind, costs_s)
