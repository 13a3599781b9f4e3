"""Whether drafting opens and closes as it should, against a world with a clock of its own."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest

from planner.fast.gate import MAX_DOUBLINGS, PROBE_REQUESTS, PROBE_SHARE, DraftGate, Offer
from tests.planner.builders import linear_cost, plan_with, prices_of
from treeline.plan import CostModel

SATURATED = linear_cost(fixed_s=0.001, token_s=0.004, draft_round_trip_s=0.002, draft_layer_s=0.004)
IDLE = linear_cost(fixed_s=0.03, token_s=0.0005, draft_round_trip_s=0.002, draft_layer_s=0.004)
WORTHY = np.asarray([0.7, 0.5, 0.3])


def offer(gains: np.ndarray, requests: int) -> Offer:
    """Every request gets a chain of these nodes."""
    return Offer(requests, np.tile(gains, requests), (requests,) * len(gains))


def gate_that_saw(gains: np.ndarray, requests: int = 1) -> DraftGate:
    gate = DraftGate()
    for _ in range(40):
        gate.drafted(offer(gains, requests), 0.01, False)
    return gate


def drafts(gate: DraftGate, cost: CostModel, requests: int = 1, waiting: int = 0) -> int:
    """For how many requests it would draft."""
    prices = prices_of(plan_with(cost), requests, startable=waiting)
    return gate.decide(requests, prices, 0.0).requests


def test_drafting_pays_exactly_while_its_goodput_is_above_plain_decodings():
    """In turns for each round trip: the best of all sizes with its drafting, against none."""
    for round_trip_s in np.linspace(0.0, 0.06, 61).tolist():
        cost = replace(IDLE, draft_round_trip_s=round_trip_s)
        draft_s = round_trip_s + 3 * 0.004
        sizes = [(1 + WORTHY[:m].sum()) / (0.03 + 0.0005 * (1 + m) + draft_s) for m in range(4)]
        assert drafts(gate_that_saw(WORTHY), cost) == int(max(sizes) > 1 / 0.0305)


def test_what_was_offered_is_scaled_to_the_requests_at_hand():
    cost = linear_cost(fixed_s=0.03, token_s=0.001)
    gate = gate_that_saw(np.asarray([0.8, 0.04]), requests=4)
    assert drafts(gate, cost, 16) == 16
    assert drafts(gate, linear_cost(fixed_s=0.001, token_s=0.01), 16) == 0


def test_waiting_requests_make_drafting_dearer():
    cost = replace(IDLE, draft_round_trip_s=0.01)
    assert drafts(gate_that_saw(WORTHY), cost) == 1
    assert drafts(gate_that_saw(WORTHY), cost, waiting=8) == 0


def test_drafting_that_the_step_budget_has_no_room_for_is_left_out():
    """A plain pass takes 30.5 ms, drafting 14 ms as before, 6 ms with one layer."""
    for budget_s, requests in ((0.05, 1), (0.04, 1), (0.036, 0)):
        prices = prices_of(plan_with(IDLE, step_budget_s=budget_s), 1)
        assert gate_that_saw(WORTHY).decide(1, prices, 0.0).requests == requests


@dataclass
class World:
    """Steps under one gate. Drafting costs what the plan says and offers every request the same nodes."""

    gate: DraftGate
    now_s: float = 0.0
    draft_s: float = 0.0

    def run(self, seconds: float, sequences: int, cost: CostModel, gains: np.ndarray) -> list[int]:
        """Requests drafted in each step."""
        self.draft_s, asked, until_s = 0.0, [], self.now_s + seconds
        prices = prices_of(plan_with(cost), sequences)
        while self.now_s < until_s:
            decision = self.gate.decide(sequences, prices, self.now_s)
            asked.append(requests := decision.requests)
            step_s = 0.03
            if requests:
                draft_s = cost.draft_round_trip_s + len(gains) * cost.draft_layer_s
                self.gate.drafted(offer(gains, requests), draft_s, False)
                self.draft_s += draft_s
                step_s += draft_s
            self.gate.worked(step_s)
            self.now_s += step_s
        return asked


def test_at_saturation_drafting_stops_but_for_cheap_probes_and_finds_its_way_back():
    world = World(DraftGate())
    assert world.run(2.0, 1, IDLE, WORTHY).count(0) == 0
    saturated = world.run(60.0, 32, SATURATED, WORTHY)
    assert world.draft_s < 1.2 * PROBE_SHARE * 60.0
    assert 10 < sum(map(bool, saturated)) < 50
    assert set(saturated) == {0, PROBE_REQUESTS}
    assert world.run(2.0, 1, IDLE, WORTHY).count(0) == 0


def test_probes_find_out_that_the_text_has_become_easy():
    world, cost = World(DraftGate()), replace(IDLE, draft_layer_s=0.001)
    world.run(5.0, 16, cost, np.asarray([0.001]))
    assert world.run(5.0, 16, cost, np.asarray([0.001])).count(16) == 0
    world.run(5.0, 16, cost, WORTHY)
    assert world.run(1.0, 16, cost, WORTHY).count(0) == 0


def test_a_probe_that_had_much_to_catch_up_goes_on_with_one_that_has_not():
    gate, asked = gate_that_saw(WORTHY, 16), []
    gate.worked(1000.0)
    for _ in range(8):
        asked.append(drafts(gate, SATURATED, 32))
        if asked[-1]:
            gate.drafted(offer(WORTHY, PROBE_REQUESTS), 0.01, catching_up=len(asked) == 1)
    assert asked == [PROBE_REQUESTS, PROBE_REQUESTS, 0, 0, 0, 0, 0, 0]


def test_a_step_that_carries_a_prompt_is_not_probed():
    gate = gate_that_saw(WORTHY, 16)
    gate.worked(1000.0)
    prices = prices_of(plan_with(SATURATED), 32, prompt_tokens=16)
    assert not gate.decide(32, prices, 0.0).requests
    assert gate.decide(32, prices_of(plan_with(SATURATED), 32), 0.0).reason == "probing"


def test_what_drafting_a_crowd_took_hardly_puts_off_the_next_probe():
    """After a draft of 1 s for 32, a probe of 2 is expected to take a sixteenth of it."""
    gate = gate_that_saw(WORTHY, 16)
    gate.drafted(offer(WORTHY, 32), 1.0, False)
    assert not drafts(gate, SATURATED, 32)
    gate.worked(1.01 / 16 / PROBE_SHARE)
    assert drafts(gate, SATURATED, 32) == PROBE_REQUESTS


def test_near_the_break_even_drafting_does_not_flap():
    gate, random = gate_that_saw(WORTHY), np.random.default_rng(0)
    low, high = 0.0, 0.2
    for _ in range(40):  # the round trip at which drafting just pays
        middle = (low + high) / 2
        pays = drafts(gate_that_saw(WORTHY), replace(IDLE, draft_round_trip_s=middle)) > 0
        low, high = (middle, high) if pays else (low, middle)
    switches, before = 0, True
    for _ in range(300):
        now = drafts(gate, replace(IDLE, draft_round_trip_s=low * random.uniform(0.99, 1.01))) > 0
        switches += now != before
        before = now
    assert switches <= 2


def test_a_drafter_that_is_late_is_left_alone_for_longer_each_time():
    gate, now_s, waits = gate_that_saw(WORTHY), 0.0, []
    prices = prices_of(plan_with(IDLE), 1)
    for _ in range(4):
        gate.late(1.0, now_s)
        asked_s = now_s
        while not gate.decide(1, prices, now_s).requests:
            now_s += 0.1
        waits.append(now_s - asked_s)
    assert waits == pytest.approx([2, 4, 8, 16], abs=0.2)
    gate.drafted(offer(WORTHY, 1), 0.01, False)
    assert gate.lates == 0
    assert gate.decide(1, prices, now_s).requests == 1
    for _ in range(20):
        gate.late(1.0, now_s)
    assert gate.lates == MAX_DOUBLINGS
