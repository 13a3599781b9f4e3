"""The gate: whether drafting pays in this step, decided before anything is drafted, from recent drafts."""

from __future__ import annotations

import math
from collections import deque
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from planner.fast.step_prices import StepPrices

WINDOW_REQUESTS = 32
"""Trees that the gate remembers: 2 steps of 16 streams, or 16 probes. With fewer it follows single texts; with more it
is slow to notice that texts have become easier to draft."""
START_MARGIN = 0.02
"""Gain, as a share of plain decoding's tokens, at which a closed gate opens. A judgement: the gate must not flap over
gains too small to measure, and rounds of sweeps differ by more (0.95 to 1.03 times `off` at 16 streams, README.md)."""
PROBE_SHARE = 0.01
"""Largest share of the working time that probes take while the gate is closed: half of START_MARGIN."""
PROBE_REQUESTS = 2
"""Requests in a probe, and in the first drafts. One would measure a single text; the whole batch waits for each."""
MAX_DOUBLINGS = 7
"""Consecutive late drafts that still double the pause: up to 128 waits, two minutes at the time-out of 1 s."""


class Decision(NamedTuple):
    """For how many requests to draft (0: none), and why not for all.

    Attributes:
        expected_s: predicted seconds of drafting; infinite before the first draft.
    """

    requests: int
    reason: str = ""
    expected_s: float = math.inf


class Offer(NamedTuple):
    """What one draft offered. `gains` float [nodes]: w a(u) of the draft model's own nodes, verified or not."""

    requests: int
    gains: NDArray[np.floating]
    layer_nodes: tuple[int, ...]


class DraftGate:
    """Opens and closes drafting for the requests whose policy is priced; one per verifier.

    The gate replays the trees of about the last WINDOW_REQUESTS requests at this step's prices, scaled to the present
    batch. Drafting pays if the gain of the best number of nodes, less the price of the seconds that the nodes and the
    drafting take, is above zero; above START_MARGIN if the gate is closed. While it is closed, probes for
    PROBE_REQUESTS requests spend PROBE_SHARE of the working time, to notice when that changes. After a late draft the
    gate pauses drafting, twice as long each time.

    Attributes:
        lates: consecutive drafts that came too late.
    """

    def __init__(self) -> None:
        self.lates = 0
        self._offers: deque[Offer] = deque()
        self._gains = np.zeros(1)  # cumulative, over all offers' nodes, best first
        self._requests = 0  # in all offers
        self._open = True
        self._probing = False
        self._credit_s = 0.0  # what probes may spend; negative: what working time must earn first
        self._paused_until_s = 0.0

    def decide(self, requests: int, prices: StepPrices, now_s: float) -> Decision:
        """For how many of the `requests` to draft in this step."""
        if now_s < self._paused_until_s:
            return Decision(0, "the drafter was late: drafting is paused")
        probed = min(requests, PROBE_REQUESTS)
        if not self._offers:
            return Decision(probed, "first drafts")
        draft_s = self._draft_s(requests, prices)
        scale = requests / self._requests
        nodes = np.arange(len(self._gains), dtype=np.float64) * scale
        nodes = nodes[nodes <= prices.nodes_within_budget(draft_s, prices.base_tokens)]
        gain = float((scale * self._gains[: len(nodes)] - prices.second * prices.added_s(nodes)).max())
        gain -= prices.second * draft_s
        self._open = gain > (0.0 if self._open else START_MARGIN * prices.sequences)
        if self._open:
            return Decision(requests, "", draft_s)
        # A step with prefill is slow already.
        if (self._probing or self._credit_s >= 0) and not prices.prompt_tokens:
            self._probing = True
            return Decision(probed, "probing", self._draft_s(probed, prices))
        return Decision(0, f"drafting would lose {-gain:.1f} of {prices.sequences} tokens")

    def drafted(self, offer: Offer, draft_s: float, catching_up: bool) -> None:
        """Learn from a draft that came in time.

        Args:
            draft_s: seconds that it took.
            catching_up: the drafter ran many committed tokens first. A probe then continues with the next draft, whose
                seconds show what drafting costs. Without this, 4 streams simulated on 2 cores' curves are 10 % slower.
        """
        self.lates = 0
        self._offers.append(offer)
        self._requests += offer.requests
        while self._requests - self._offers[0].requests >= WINDOW_REQUESTS:
            self._requests -= self._offers.popleft().requests
        gains = np.sort(np.concatenate([each.gains for each in self._offers]))[::-1]
        self._gains = np.concatenate(([0.0], gains.cumsum(dtype=np.float64)))
        # A gate that closes waits for its first probe as if this draft had been one.
        owed_s = draft_s * min(1.0, PROBE_REQUESTS / offer.requests)
        self._credit_s = self._credit_s - owed_s if self._probing else -owed_s
        self._probing = self._probing and catching_up

    def late(self, waited_s: float, now_s: float) -> None:
        """No draft came within `waited_s`: pause drafting."""
        self.lates = min(self.lates + 1, MAX_DOUBLINGS)
        self._paused_until_s = now_s + waited_s * 2**self.lates

    def worked(self, step_s: float) -> None:
        """A step took this long: probes earn their share of it."""
        self._credit_s = min(0.0, self._credit_s + PROBE_SHARE * step_s)

    def _draft_s(self, requests: int, prices: StepPrices) -> float:
        """Predicted seconds of drafting for so many requests, with the recent mean width and depth, cut to the step's
        budget."""
        layers = sum(len(offer.layer_nodes) for offer in self._offers) / len(self._offers)
        nodes = sum(sum(offer.layer_nodes) for offer in self._offers) / self._requests
        cost, cut = prices.cost, min(1.0, prices.layers_within_budget / max(1.0, layers))
        own_s = (cost.draft_sequence_s + cost.draft_node_s * nodes * cut) * requests
        return cost.draft_round_trip_s + cost.draft_layer_s * layers * cut + own_s
