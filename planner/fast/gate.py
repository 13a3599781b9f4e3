"""Is drafting worth it in this step, and how much of it? Decided before anything is drafted, from what recent drafts
offered and cost."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from planner.fast.cost import verify_seconds
from planner.fast.rule import BatchState, own_seconds, price_of
from treeline.drafting import ALL_LAYERS
from treeline.plan import DEPTHS, CostModel, Plan

WORTH_BINS = 32
BINS = 1 + WORTH_BINS
WINDOW_REQUESTS = 32.0
"""What drafts offered is averaged over about this many requests' trees."""
LOOK_AGAIN_STEPS = 8
"""After so many drafted steps of the same batch under the same plan these averages are looked at again."""
LAYERS = DEPTHS + 1
"""Lookups, which take no layer of the draft model, and its layers; the last one stands for all further ones. What takes
no layer the verifier can have for nothing, for it looks up as well."""
START_MARGIN = 0.02
"""Drafting that has stopped starts again when it gains this share of plain decoding; so it does not flap."""
PROBE_SHARE = 0.01
"""Most of the time that drafting may take while it does not pay."""
PROBE_REQUESTS = 2
"""A probe, as the very first draft, is of few requests: the others wait while a drafter catches up with their texts."""
CATCH_UP_STEPS = 32
"""What a draft model must run before it can draft for requests that it has not followed is paid by so many steps."""
MAX_LATE = 7
_MOST_WORTH, _LAST_BIN = np.float32(1), np.float32(WORTH_BINS - 1)
_LEAST_WORTH_AT = np.arange(LAYERS) * BINS + WORTH_BINS
"""Each layer's bin of least worth, among the bins of all layers."""


class Supply:
    """What drafting offers a request: how many nodes of which worth, and how many draft-model nodes these took.

    Averages over recent drafts, for every layer of the draft model apart; each over the drafts that were permitted to
    run it. Worth is w a(u), of all drafted nodes, whether they were verified or not.
    """

    def __init__(self) -> None:
        # Nodes and what they gain, by layer and from the worthiest bin on; a first, empty bin lets sums begin at 0.
        self._offered = np.zeros((2, LAYERS * BINS))
        # By layer; lists, since arrays of nine take longer.
        self._requests, self._steps, self._model_nodes, self._runs = ([0.0] * LAYERS for _ in range(4))

    def observe(
        self,
        requests: int,
        layers: int,
        gains: NDArray[np.floating],
        node_layers: NDArray[np.intp],
        layer_nodes: tuple[int, ...],
    ) -> None:
        """One step's drafts, for this many requests, which were permitted so many layers of the draft model.

        Args:
            node_layers: how many layers each of `gains`' nodes took: 0 for what lookups alone proposed.
            layer_nodes: nodes that the draft model ran, by layer.
        """
        seen = min(layers, LAYERS - 1) + 1
        kept = math.exp(-requests / WINDOW_REQUESTS)
        for counts, more in ((self._requests, requests), (self._steps, 1), (self._model_nodes, 0), (self._runs, 0)):
            counts[:seen] = [kept * count + more for count in counts[:seen]]
        self._offered[:, : seen * BINS] *= kept
        for layer, nodes in enumerate(layer_nodes, 1):
            place = min(layer, LAYERS - 1)
            self._runs[place] += 1
            self._model_nodes[place] += nodes
        places = _LEAST_WORTH_AT.take(node_layers, mode="clip")
        places -= (np.sqrt(np.minimum(gains, _MOST_WORTH)) * _LAST_BIN).astype(np.intp)
        offered, worths = self._offered
        offered += np.bincount(places, minlength=len(offered))
        worths += np.bincount(places, gains, len(worths))

    @property
    def known(self) -> bool:
        return self._requests[-1] > 0

    def curves(self, requests: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """(nodes, gain) [LAYERS, BINS] for so many requests, with at most so many layers.

        Both are cumulative from 0 and from the worthiest on.
        """
        share = requests / np.asarray(self._requests)
        offered = self._offered.reshape(2, LAYERS, BINS) * share[:, None]
        nodes, gains = offered.cumsum(axis=1).cumsum(axis=2)
        return nodes, gains

    def draft_s(self, cost: CostModel, requests: int, connected: bool) -> NDArray[np.float64]:
        """Predicted seconds of drafting [LAYERS] with at most so many layers; what takes none is to be had for nothing.

        Args:
            connected: a message goes to the drafter and its layers are run in any case.
        """
        seconds = [0.0]
        layers, nodes, message_s = 0.0, 0.0, 0.0 if connected else cost.draft_round_trip_s
        layer_s = 0.0 if connected else cost.draft_layer_s
        for layer in range(1, LAYERS):
            layers += self._runs[layer] / self._steps[layer]
            nodes += self._model_nodes[layer] / self._requests[layer]
            own_s = cost.draft_sequence_s * requests + cost.draft_node_s * (nodes * requests)
            seconds.append(own_s + message_s + layer_s * layers)
        return np.asarray(seconds)


class Outlook(NamedTuple):
    """What a step is expected to bring, with the drafter or without.

    Attributes:
        drafted, without: goodput, weighted tokens per second.
        gain: what the drafter adds, in tokens, its time paid at the price R + mu Q.
        layers: of the draft model with which it adds most, 1 at least.
        draft_s: predicted seconds of drafting by limit of layers [LAYERS].
    """

    drafted: float
    without: float
    gain: float
    layers: int
    draft_s: NDArray[np.float64]


def outlook(
    supply: Supply,
    requests: int,
    sequences: int,
    state: BatchState,
    plan: Plan,
    connected: bool,
    behind_tokens: int = 0,
) -> Outlook:
    """The rule of `prune_batch`, before there are trees: R over all sizes and layers, and over not drafting at all.

    Args:
        requests: those that would be drafted, out of `sequences` that decode; weights are 1 on average.
        behind_tokens: tokens of these requests that the draft model has not run yet.
    """
    nodes, gains = supply.curves(requests)
    most = state.base_tokens + math.ceil(nodes[-1, -1])
    verify_s = verify_seconds(plan.cost, sequences, state.context_tokens, most)
    draft_s, own_s = supply.draft_s(plan.cost, requests, connected), own_seconds(verify_s, sequences, state, plan)
    charged_s = draft_s
    if behind_tokens:
        charged_s = draft_s.copy()
        charged_s[1:] += plan.cost.draft_node_s * behind_tokens / CATCH_UP_STEPS
    sizes, beside_s = np.arange(len(own_s)), verify_s[state.base_tokens :] - verify_s[state.base_tokens]
    goodputs = (sequences + gains) / (charged_s[:, None] + np.interp(nodes, sizes, own_s))
    price = price_of(goodputs, own_s.item(0), sequences, state.waiting_startable)
    added_s = charged_s[:, None] + np.interp(nodes, sizes[: len(beside_s)], beside_s)
    gain = (gains - price * added_s).max(axis=1)
    layers = 1 + int(gain[1:].argmax())
    best = goodputs.max(axis=1)
    return Outlook(best.item(layers), best.item(0), gain.item(layers) - gain.item(0), layers, draft_s)


class Decision(NamedTuple):
    """For how many requests to draft (0: none), and why not for all, for people.

    Attributes:
        layers: most layers of the draft model.
        expected_s: predicted seconds of drafting; infinite while nothing is known of it.
    """

    requests: int
    reason: str = ""
    layers: int = ALL_LAYERS
    expected_s: float = math.inf


class DraftGate:
    """Opens and closes drafting for the requests that leave it to the planner; one per verifier.

    Now and then, as often as costs PROBE_SHARE of the time, a step is drafted with all layers, whatever pays: while
    the gate is closed, for a few requests. A drafter that is late is left alone for longer each time.
    """

    def __init__(self) -> None:
        self._supply = Supply()
        self._drafting = True
        self._probe_at_s = self._probed_s = 0.0
        self._probed_requests = PROBE_REQUESTS
        self._late = 0
        self._outlook: Outlook | None = None
        self._unseen_steps = 0
        self._seen_plan: Plan | None = None
        self._seen_batch: tuple[float, ...] = ()

    def decide(
        self,
        requests: int,
        sequences: int,
        state: BatchState,
        plan: Plan,
        connected: bool,
        now_s: float,
        behind_tokens: int = 0,
    ) -> Decision:
        """For how many of `requests` to draft now, and how far. Arguments as for `outlook`."""
        if self._late and now_s < self._probe_at_s:
            return Decision(0, "the drafter was late and is left alone for a while")
        if not self._supply.known:
            return Decision(min(requests, PROBE_REQUESTS))
        found = self._look(requests, sequences, state, plan, connected, behind_tokens)
        self._drafting = found.gain > (0.0 if self._drafting else START_MARGIN * sequences)
        self._forgive(requests, now_s)
        # Whoever decodes waits long enough for a step that carries a prompt.
        probing = now_s >= self._probe_at_s and state.base_tokens == sequences
        if self._drafting:
            layers = ALL_LAYERS if probing else found.layers
            return Decision(requests, "", layers, float(found.draft_s[min(layers, LAYERS - 1)]))
        if probing:
            probed = min(requests, PROBE_REQUESTS)
            expected_s = float(self._supply.draft_s(plan.cost, probed, connected)[-1])
            return Decision(probed, "probing", expected_s=expected_s)
        return Decision(0, f"drafting would bring {found.drafted:.0f} tok/s, doing without {found.without:.0f}")

    def _forgive(self, requests: int, now_s: float) -> None:
        """Of the wait for what drafting a crowd took, those who remain have their share to serve."""
        remaining = max(requests, PROBE_REQUESTS)
        if remaining < self._probed_requests:
            self._probe_at_s = now_s + (self._probe_at_s - now_s) * remaining / self._probed_requests
            self._probed_requests = remaining

    def _look(
        self, requests: int, sequences: int, state: BatchState, plan: Plan, connected: bool, behind: int
    ) -> Outlook:
        """The outlook, as it was when last looked at if only some more context, other lengths of prompts and few drafts
        came since."""
        beside = (state.base_tokens > sequences, state.prompts_go_on)
        batch = (requests, sequences, *beside, state.waiting_startable, connected)
        moved = self._unseen_steps >= LOOK_AGAIN_STEPS
        if self._outlook is None or moved or plan is not self._seen_plan or batch != self._seen_batch:
            self._unseen_steps = 0
            self._outlook = outlook(self._supply, requests, sequences, state, plan, connected, behind)
            self._seen_plan, self._seen_batch = plan, batch
        return self._outlook

    def drafted(
        self,
        decision: Decision,
        gains: NDArray[np.floating],
        node_layers: NDArray[np.intp],
        layer_nodes: tuple[int, ...],
        draft_s: float,
        now_s: float,
        caught_up: bool = False,
    ) -> None:
        """Drafts came, as decided: their nodes (as for `Supply.observe`), and the seconds that it all took.

        Args:
            caught_up: the drafter had much to catch up. What a draft costs is seen only in the next one, which a probe
                therefore goes on with.
        """
        self._late = 0
        self._unseen_steps += 1
        self._supply.observe(decision.requests, decision.layers, gains, node_layers, layer_nodes)
        if decision.layers >= LAYERS - 1:
            # A draft that something held up must not put off the next one.
            self._probed_s += min(draft_s, decision.expected_s)
            if not caught_up:
                self._probe_at_s, self._probed_s = now_s + self._probed_s / PROBE_SHARE, 0.0
                self._probed_requests = decision.requests

    def late(self, draft_s: float, now_s: float) -> None:
        """Nothing came within `draft_s`."""
        self._late = min(self._late + 1, MAX_LATE)
        self._probe_at_s = now_s + draft_s * 2**self._late
