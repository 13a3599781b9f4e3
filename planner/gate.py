"""Is drafting worth it in this step? Decided before anything is drafted, from what recent drafts offered and cost."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from planner.cost import verify_seconds
from planner.rule import BatchState, price_of
from treeline.plan import CostModel, Plan

WORTH_BINS = 32
WINDOW_REQUESTS = 32.0
"""What drafts offered is averaged over about this many requests' trees."""
START_MARGIN = 0.02
"""Drafting that has stopped starts again when it gains this share of plain decoding; so it does not flap."""
PROBE_SHARE = 0.01
"""Most of the time that drafting may take while it does not pay."""
PROBE_REQUESTS = 8
MAX_LATE = 7


class Supply:
    """What drafting offers a request: how many nodes of which worth, and how many draft-model layers and nodes it took.

    Averages over recent drafts. Worth is w a(u), of all drafted nodes, whether they were verified or not.
    """

    def __init__(self) -> None:
        self._requests = self._steps = self._layers = self._model_nodes = 0.0
        self._nodes, self._gains = np.zeros(WORTH_BINS), np.zeros(WORTH_BINS)

    def observe(self, requests: int, gains: NDArray[np.floating], layer_nodes: tuple[int, ...]) -> None:
        """One step's drafts, for this many requests."""
        kept = math.exp(-requests / WINDOW_REQUESTS)
        bins = (np.sqrt(np.minimum(gains, 1.0)) * (WORTH_BINS - 1)).astype(np.intp)
        self._nodes = kept * self._nodes + np.bincount(bins, minlength=WORTH_BINS)
        self._gains = kept * self._gains + np.bincount(bins, weights=gains, minlength=WORTH_BINS)
        self._requests = kept * self._requests + requests
        self._steps = kept * self._steps + 1
        self._layers = kept * self._layers + len(layer_nodes)
        self._model_nodes = kept * self._model_nodes + sum(layer_nodes)

    @property
    def known(self) -> bool:
        return self._requests > 0

    def curve(self, requests: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """(nodes, gain) [WORTH_BINS + 1] for so many requests, cumulative from 0 and from the worthiest on."""
        share = requests / self._requests
        nodes, gains = np.cumsum(self._nodes[::-1]) * share, np.cumsum(self._gains[::-1]) * share
        return np.concatenate(([0.0], nodes)), np.concatenate(([0.0], gains))

    def draft_s(self, cost: CostModel, requests: int, connected: bool) -> float:
        """Predicted seconds of drafting; `connected`: a message goes to the drafter and a layer is run in any case."""
        layers = self._layers / self._steps
        shared_s = cost.draft_round_trip_s + cost.draft_layer_s * layers
        nodes = self._model_nodes / self._requests * requests
        return (0.0 if connected else shared_s) + cost.draft_sequence_s * requests + cost.draft_node_s * nodes


@dataclass(frozen=True)
class Outlook:
    """What a step is expected to bring, drafted or not.

    Attributes:
        drafted, plain: goodput, weighted tokens per second.
        gain: what drafting adds, in tokens, its time paid at the price R + mu Q.
    """

    drafted: float
    plain: float
    gain: float


def outlook(supply: Supply, requests: int, sequences: int, state: BatchState, plan: Plan, connected: bool) -> Outlook:
    """The rule of `prune_batch`, before there are trees: R over all sizes, drafted, and over not drafting at all.

    Args:
        requests: those that would be drafted, out of `sequences` that decode; weights are 1 on average.
    """
    nodes, gains = supply.curve(requests)
    most = state.base_tokens + math.ceil(nodes[-1])
    pass_s = plan.cost.step_overhead_s + verify_seconds(plan.cost, sequences, state.context_tokens, most)
    draft_s = supply.draft_s(plan.cost, requests, connected)
    # Not the prompts' time, but the trees' beside prompts.
    promptless_s = draft_s + np.interp(sequences + nodes, np.arange(most + 1), pass_s)
    drafted, plain_s = sequences + gains, float(pass_s[sequences])
    price = price_of(drafted, promptless_s, plain_s, sequences, state.waiting_startable)
    seconds = draft_s + np.interp(state.base_tokens + nodes, np.arange(most + 1), pass_s)
    gain = float((gains - price * (seconds - pass_s[state.base_tokens])).max())
    return Outlook(float((drafted / promptless_s).max()), sequences / plain_s, gain)


@dataclass(frozen=True)
class Decision:
    """How many requests to draft for (0: none), and why not all, for people."""

    requests: int
    reason: str = ""


class DraftGate:
    """Opens and closes drafting for the requests that leave it to the planner; one per verifier.

    While closed, a few requests are drafted now and then: as often as costs PROBE_SHARE of the time. A drafter that is
    late is left alone for longer each time.
    """

    def __init__(self) -> None:
        self._supply = Supply()
        self._drafting = True
        self._probe_at_s = 0.0
        self._late = 0

    def decide(
        self, requests: int, sequences: int, state: BatchState, plan: Plan, connected: bool, now_s: float
    ) -> Decision:
        """For how many of `requests` to draft now. Arguments as for `outlook`."""
        if self._late and now_s < self._probe_at_s:
            return Decision(0, "the drafter was late and is left alone for a while")
        if not self._supply.known:
            return Decision(requests)
        found = outlook(self._supply, requests, sequences, state, plan, connected)
        self._drafting = found.gain > (0.0 if self._drafting else START_MARGIN * sequences)
        if self._drafting:
            return Decision(requests)
        if now_s >= self._probe_at_s:
            return Decision(min(requests, PROBE_REQUESTS), "probing")
        return Decision(0, f"drafting would bring {found.drafted:.0f} tok/s, plain decoding {found.plain:.0f}")

    def drafted(
        self, requests: int, gains: NDArray[np.floating], layer_nodes: tuple[int, ...], draft_s: float, now_s: float
    ) -> None:
        """Drafts came: the worth of their nodes, the draft model's layers, and the seconds that it all took."""
        self._late = 0
        self._supply.observe(requests, gains, layer_nodes)
        self._probe_at_s = now_s + draft_s / PROBE_SHARE

    def late(self, draft_s: float, now_s: float) -> None:
        """Nothing came within `draft_s`."""
        self._late = min(self._late + 1, MAX_LATE)
        self._probe_at_s = now_s + draft_s * 2**self._late
