"""Whether drafting opens and closes as it should, against a world with a clock of its own."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest

from planner.fast.gate import PROBE_REQUESTS, PROBE_SHARE, Decision, DraftGate, Supply, outlook
from planner.fast.rule import BatchState
from tests.planner.builders import linear_cost, plan_with
from treeline.drafting import ALL_LAYERS
from treeline.plan import Plan

SATURATED = linear_cost(fixed_s=0.001, token_s=0.004, draft_round_trip_s=0.002, draft_layer_s=0.004)
IDLE = linear_cost(fixed_s=0.03, token_s=0.0005, draft_round_trip_s=0.002, draft_layer_s=0.004)
WORTHY = np.asarray([0.7, 0.5, 0.3])


def supply_of(gains: np.ndarray, requests: int = 1, layers: tuple[int, ...] = (1, 1, 1)) -> Supply:
    """Every request's nodes are a chain, each of a layer of its own; of lookups alone if the model runs no layer."""
    supply = Supply()
    for _ in range(100):
        supply.observe(requests, ALL_LAYERS, np.tile(gains, requests), chains(gains, requests, layers), layers)
    return supply


def chains(gains: np.ndarray, requests: int, layers: tuple[int, ...]) -> np.ndarray:
    return np.tile(np.arange(1, len(gains) + 1) if layers else np.zeros(len(gains), int), requests)


def state(sequences: int, waiting: int = 0) -> BatchState:
    return BatchState(sequences, 64, 0.0, waiting)


def test_the_outlook_is_the_rule_over_what_drafts_offer():
    plan = plan_with(IDLE)
    found = outlook(supply_of(WORTHY), 1, 1, state(1), plan, False)
    draft_s = 0.002 + 3 * 0.004
    sizes = [(1 + WORTHY[:m].sum()) / (0.03 + 0.0005 * (1 + m) + draft_s) for m in range(4)]
    assert found.drafted == pytest.approx(max(sizes), rel=0.01)
    assert found.without == pytest.approx(1 / 0.0305)
    assert found.gain > 0


def test_what_is_offered_is_scaled_to_the_requests_at_hand():
    nodes, gains = supply_of(WORTHY, requests=4).curves(32)
    assert nodes[-1, -1] == pytest.approx(96)
    assert gains[:4, -1] == pytest.approx([0, 32 * 0.7, 32 * 1.2, 32 * 1.5])
    assert (np.diff(nodes) >= 0).all()


def test_a_drafter_that_finds_no_more_than_lookups_do_is_not_worth_its_round_trip():
    plan = plan_with(replace(IDLE, draft_layer_s=0.0))
    assert outlook(supply_of(np.asarray([0.9, 0.8]), layers=()), 1, 1, state(1), plan, False).gain < 0
    assert outlook(supply_of(np.asarray([0.9, 0.8])), 1, 1, state(1), plan, False).gain > 0


def test_the_way_to_the_drafter_is_free_for_those_who_join_others():
    plan = plan_with(replace(IDLE, draft_round_trip_s=0.05))
    assert outlook(supply_of(WORTHY), 1, 1, state(1), plan, False).gain < 0
    assert outlook(supply_of(WORTHY), 1, 1, state(1), plan, True).gain > 0


def test_waiting_requests_make_drafting_dearer():
    supply, plan = supply_of(WORTHY), plan_with(replace(IDLE, draft_round_trip_s=0.01))
    assert outlook(supply, 1, 1, state(1), plan, False).gain > 0
    assert outlook(supply, 1, 1, state(1, waiting=8), plan, False).gain < 0


@dataclass
class World:
    """Steps under one gate. Drafting costs what the plan says, and offers every request the same nodes."""

    gate: DraftGate
    now_s: float = 0.0
    draft_s: float = 0.0
    drafted_steps: int = 0

    def run(self, seconds: float, sequences: int, plan: Plan, gains: np.ndarray) -> list[int]:
        """Requests drafted in each step."""
        self.draft_s, asked, until_s = 0.0, [], self.now_s + seconds
        while self.now_s < until_s:
            decision = self.gate.decide(sequences, sequences, state(sequences), plan, False, self.now_s)
            asked.append(requests := decision.requests)
            self.now_s += 0.03
            if requests:
                layers = min(3, decision.layers)
                cost = plan.cost.draft_round_trip_s + layers * plan.cost.draft_layer_s
                self.now_s += cost
                self.draft_s += cost
                drafted = gains[:layers]
                node_layers = chains(drafted, requests, (1,))
                offered, ran = np.tile(drafted, requests), (requests,) * layers
                self.gate.drafted(decision, offered, node_layers, ran, cost, self.now_s)
        return asked


def test_at_saturation_drafting_stops_but_for_cheap_probes_and_finds_its_way_back():
    world = World(DraftGate())
    assert world.run(2.0, 1, plan_with(IDLE), WORTHY).count(0) == 0
    saturated = world.run(60.0, 32, plan_with(SATURATED), WORTHY)
    assert world.draft_s < 1.2 * PROBE_SHARE * 60.0
    assert 0 < sum(map(bool, saturated)) < 50
    assert set(saturated[2:]) == {0, PROBE_REQUESTS}
    assert world.run(2.0, 1, plan_with(IDLE), WORTHY).count(0) == 0


def test_a_probe_that_had_much_to_catch_up_goes_on_with_one_that_has_not():
    gate, plan = DraftGate(), plan_with(SATURATED)
    asked, now_s = [], 0.0
    for _ in range(8):
        decision = gate.decide(32, 32, state(32), plan, False, now_s)
        asked.append(decision.requests)
        now_s += 0.01
        if decision.requests:
            caught_up = len([count for count in asked if count]) % 2 == 1
            gate.drafted(decision, np.zeros(0), np.zeros(0, int), (2,), 0.01, now_s, caught_up)
    assert asked == [PROBE_REQUESTS, PROBE_REQUESTS, 0, 0, 0, 0, 0, 0]


def test_a_step_that_carries_a_prompt_is_not_probed():
    gate, plan = DraftGate(), plan_with(SATURATED)
    gate.drafted(Decision(32), np.tile(WORTHY, 32), chains(WORTHY, 32, (1,)), (32,) * 3, 0.014, 0.0)
    assert not gate.decide(32, 32, state(32)._replace(base_tokens=48), plan, False, 10.0).requests
    assert gate.decide(32, 32, state(32), plan, False, 10.0).reason == "probing"


def test_probes_find_out_that_the_text_has_become_easy():
    world = World(DraftGate())
    plan = plan_with(replace(IDLE, draft_layer_s=0.0))
    world.run(5.0, 16, plan, np.asarray([0.01]))
    assert world.run(5.0, 16, plan, np.asarray([0.01])).count(16) == 0
    world.run(3.0, 16, plan, WORTHY)
    assert world.run(1.0, 16, plan, WORTHY).count(0) == 0


LOOKUPS_FIRST = np.asarray([0, 0, 0, 1, 2, 3])
"""Layers that the nodes of one request took: three found by lookups, and one of each layer of the model."""


def test_the_drafter_is_worth_what_it_brings_beyond_lookups():
    gains = np.asarray([0.9, 0.8, 0.7, 0.6, 0.5, 0.45])
    supply = Supply()
    supply.observe(8, ALL_LAYERS, np.tile(gains, 8), np.tile(LOOKUPS_FIRST, 8), (8, 8, 8))
    plan = plan_with(replace(IDLE, draft_layer_s=0.0001))
    found = outlook(supply, 8, 8, state(8), plan, False)
    assert (found.layers, found.gain > 0) == (3, True)
    assert found.without == pytest.approx(8 * (1 + gains[:3].sum()) / (0.03 + 0.0005 * 32), rel=0.01)
    assert outlook(supply, 8, 8, state(8), plan_with(replace(IDLE, draft_layer_s=0.1)), False).gain < 0


def test_a_model_that_has_much_to_catch_up_must_bring_more():
    gains = np.asarray([0.9, 0.8, 0.7, 0.6, 0.5, 0.45])
    supply, plan = Supply(), plan_with(replace(IDLE, draft_layer_s=1e-5, draft_node_s=0.0001))
    supply.observe(8, ALL_LAYERS, np.tile(gains, 8), np.tile(LOOKUPS_FIRST, 8), (8, 8, 8))
    assert outlook(supply, 8, 8, state(8), plan, False, behind_tokens=8).gain > 0
    assert outlook(supply, 8, 8, state(8), plan, False, behind_tokens=400_000).gain < 0


def test_a_first_draft_that_went_much_too_far_closes_nothing():
    """Before costs and acceptance are known the drafter grows trees that no step could pay for."""
    gate, plan = DraftGate(), plan_with(replace(IDLE, draft_node_s=0.001))
    ran = (2, 12, 34, 32, 12, 7)
    gains = np.repeat([0.6, 0.1, 0.02, 0.01, 0.005, 0.001], ran)
    node_layers = np.repeat(np.arange(1, 7), ran)
    first = gate.decide(7, 7, state(7), plan, False, 0.0)
    assert first.requests == PROBE_REQUESTS
    gate.drafted(first, gains, node_layers, ran, 0.1, 0.5)
    then = gate.decide(7, 7, state(7), plan, False, 0.5)
    assert (then.requests, then.layers) == (7, 1)
    assert then.expected_s == pytest.approx(0.002 + 0.004 + 7 * 0.001)


def test_layers_that_are_not_run_are_remembered_and_tried_again():
    world, now_and_then = World(DraftGate()), replace(IDLE, draft_layer_s=0.02)
    plan = plan_with(now_and_then)
    gains = np.asarray([0.8, 0.05, 0.02])
    world.run(2.0, 4, plan, gains)
    decisions = []
    for _ in range(400):
        decisions.append(decision := world.gate.decide(4, 4, state(4), plan, False, world.now_s))
        layers = min(3, decision.layers)
        offered, node_layers = np.tile(gains[:layers], 4), np.tile(np.arange(1, layers + 1), 4)
        world.now_s += 0.1
        world.gate.drafted(decision, offered, node_layers, (4,) * layers, layers * 0.02, world.now_s)
    assert {decision.layers for decision in decisions} == {1, ALL_LAYERS}
    assert 4 < sum(decision.layers == ALL_LAYERS for decision in decisions) < 16


def test_a_draft_that_something_held_up_does_not_put_off_the_next_probe():
    gate, plan = DraftGate(), plan_with(SATURATED)
    gate.drafted(Decision(32), np.tile(WORTHY, 32), chains(WORTHY, 32, (1,)), (32,) * 3, 0.014, 0.0)
    probe = gate.decide(32, 32, state(32), plan, False, 10.0)
    assert probe.reason == "probing"
    gate.drafted(probe, np.tile(WORTHY, 8), chains(WORTHY, 8, (1,)), (8,) * 3, 5.0, 15.0)
    assert gate.decide(32, 32, state(32), plan, False, 17.0).reason == "probing"


def test_what_drafting_a_crowd_took_hardly_puts_off_the_probes_of_the_few_who_remain():
    busy = linear_cost(0.15, 0.001, draft_round_trip_s=0.002, draft_layer_s=0.002, draft_sequence_s=0.008)
    dear, gains = plan_with(replace(SATURATED, draft_round_trip_s=1.0)), np.asarray([0.9, 0.8, 0.7])

    def waited_s(remaining: int) -> float:
        """From a draft of all layers for 16, since when nothing pays any more, to a probe of those who remain."""
        gate, now_s, decision = DraftGate(), 0.0, Decision(0)
        while decision.requests < 16 or decision.layers < ALL_LAYERS:
            now_s += 0.2
            decision = gate.decide(16, 16, state(16), plan_with(busy), False, now_s)
            if requests := decision.requests:
                nodes, draft_s = chains(gains, requests, (1,)), 0.008 + 0.008 * requests
                gate.drafted(decision, np.tile(gains, requests), nodes, (requests,) * 3, draft_s, now_s)
        closed_s = now_s
        while not gate.decide(remaining, remaining, state(remaining), dear, False, now_s).requests:
            now_s += 0.05
        return now_s - closed_s

    assert waited_s(16) == pytest.approx(0.136 / PROBE_SHARE, rel=0.1)
    assert waited_s(1) < 2.0


def test_near_the_break_even_drafting_does_not_flap():
    supply, gate, random = supply_of(WORTHY), DraftGate(), np.random.default_rng(0)
    gate.drafted(Decision(1), WORTHY, chains(WORTHY, 1, (1,)), (1, 1, 1), 0.01, 0.0)
    low, high = 0.0, 0.2
    for _ in range(40):  # the round trip at which drafting just pays
        middle = (low + high) / 2
        pays = outlook(supply, 1, 1, state(1), plan_with(replace(IDLE, draft_round_trip_s=middle)), False).gain > 0
        low, high = (middle, high) if pays else (low, middle)
    switches, before = 0, True
    for step in range(300):
        plan = plan_with(replace(IDLE, draft_round_trip_s=low * random.uniform(0.99, 1.01)))
        drafts = gate.decide(1, 1, state(1), plan, False, 1e-6 * step).requests > 0
        switches += drafts != before
        before = drafts
    assert switches <= 2


def test_a_drafter_that_is_late_is_left_alone_for_longer_each_time():
    gate, plan, now_s, waits = DraftGate(), plan_with(IDLE), 0.0, []
    for _ in range(4):
        gate.late(1.0, now_s)
        asked_s = now_s
        while not gate.decide(1, 1, state(1), plan, False, now_s).requests:
            now_s += 0.1
        waits.append(now_s - asked_s)
    assert waits == pytest.approx([2, 4, 8, 16], abs=0.2)
    gate.drafted(Decision(1), WORTHY, chains(WORTHY, 1, (1,)), (1, 1, 1), 0.01, now_s)
    assert gate.decide(1, 1, state(1), plan, False, now_s).requests == 1
