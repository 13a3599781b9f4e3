from __future__ import annotations

import json
import math

import numpy as np
import pytest

from bench.simulator.conditions import STEADY, Conditions
from bench.simulator.counts import FOLDED_STEPS, Counts
from bench.simulator.dealing import DEALT_STEPS, DRAWN, Dealer
from bench.simulator.devices import PRESETS, Device, measured, preset
from bench.simulator.load import arrivals, parse_load
from bench.simulator.replica import Step
from bench.simulator.report import markdown, rows, summary
from bench.simulator.simulation import Fleet, Scenario, simulate
from bench.simulator.slots import Request, Slots
from bench.simulator.tables import Tables
from bench.simulator.worlds import (
    EAGLE3_LIKE,
    MAX_DEPTH,
    OUTCOMES,
    WORLDS,
    AcceptanceLaw,
    Draws,
    World,
    law_from_trace,
)
from planner.policies import parse_policy
from treeline.errors import ConfigError
from treeline.plan import CostCurve, VerifierProfile
from treeline.tree import ROOT

TOKENS = tuple(range(1, 129))
CURVES = {
    "convex": tuple(0.03 + 0.0004 * n + 2e-5 * n * n for n in TOKENS),
    "staircase": tuple(0.02 + 0.012 * math.ceil(n / 16) for n in TOKENS),
}


def scenario(shape: str, steps: int = 400, **changes) -> Scenario:
    profile = VerifierProfile((CostCurve(1, 64, TOKENS, CURVES[shape]),), 0.003, 0.0001)
    device = Device(shape, profile, 0.0003, 0.001)
    return Scenario(device, EAGLE3_LIKE, steps, 0, output_tokens=128, prompt_tokens=64, **changes)


def test_worlds_follow_the_law():
    law = AcceptanceLaw(((0.6, 0.2, 0.05), (0.3, 0.1, 0.02)), 2.0, 1.0)
    random = np.random.default_rng(0)
    drawn = law.draw(1, 4000, random)
    np.testing.assert_allclose(drawn.mean(0), law.acceptance[0], atol=0.02)
    assert (np.diff(drawn, axis=1) <= 1e-9).all()
    assert drawn.sum(1).max() < 1
    draws = Draws(law, 0)
    worlds = [World(draws, index) for index in range(400)]
    below_first = [world.children(world.children(ROOT)[0]) for world in worlds]
    firsts = np.asarray([world.on_path(np.asarray([0]))[:, 0] for world in worlds])
    seconds = np.asarray([w.on_path(np.asarray([c[0]]))[:, 0] for w, c in zip(worlds, below_first, strict=True)])
    assert firsts.mean() == pytest.approx(0.6, abs=0.05)
    assert seconds.sum() / firsts.sum() == pytest.approx(0.3, abs=0.05)
    assert not (seconds & ~firsts).any()


def test_a_world_is_the_same_in_whatever_order_it_is_asked():
    draws = Draws(EAGLE3_LIKE, 1)
    one, other = World(draws, 2), World(draws, 2)
    first, second = one.children(ROOT)[:2]
    below = one.children(first), one.children(second)
    other.children(ROOT)
    assert other.children(second) == below[0]  # numbers follow the asking
    np.testing.assert_array_equal(one.on_path(np.asarray(below[1])), other.on_path(np.asarray(below[0])))


def test_a_trace_gives_back_the_law_it_was_drawn_from(tmp_path):
    random = np.random.default_rng(0)
    lines = []
    for _ in range(500):
        probs = EAGLE3_LIKE.draw(1, 1, random)[0, :3]
        chosen = int(np.searchsorted(np.cumsum(probs), random.random()))
        outcomes = {"depth": [1] * 3, "rank": [0, 1, 2], "prob": (probs * 1.2).tolist()}
        lines.append(json.dumps({"outcomes": {**outcomes, "accepted": [rank == chosen for rank in range(3)]}}))
    (tmp_path / "trace.jsonl").write_text("\n".join(lines))
    law = law_from_trace(tmp_path / "trace.jsonl")
    np.testing.assert_allclose(law.acceptance[0][:3], EAGLE3_LIKE.acceptance[0][:3], atol=0.05)
    assert law.over_confidence == pytest.approx(1.2, abs=0.15)


@pytest.mark.parametrize("content", ["", "[]", '{"outcomes": {}}', "no json"])
def test_what_is_no_trace_is_one_line(tmp_path, content):
    (tmp_path / "trace.jsonl").write_text(content)
    with pytest.raises(ConfigError, match=r"trace\.jsonl"):
        law_from_trace(tmp_path / "trace.jsonl")


def test_presets_are_staircases_over_a_memory_floor():
    for name in PRESETS:
        curve = preset(name).profile.verify[0]
        assert curve.seconds[0] == curve.seconds[1]
        assert list(curve.seconds) == sorted(curve.seconds)
        assert curve.seconds[-1] > 2 * curve.seconds[0]
    with pytest.raises(ConfigError, match="llama-8b@h100"):
        preset("llama-8b@abacus")


def test_measured_curves_are_read_and_anything_else_is_refused(tmp_path):
    file = tmp_path / "curves.json"
    file.write_text(json.dumps([{"sequences": 1, "context_tokens": 64, "tokens": [1, 8], "seconds": [0.02, 0.03]}]))
    assert measured(file, 0.005, 0.001).profile.verify[0].seconds == (0.02, 0.03)
    file.write_text("[]")
    with pytest.raises(ConfigError, match="treeline profile"):
        measured(file, 0.005, 0.001)


@pytest.mark.parametrize("spec", ["poisson:2", "bursty:2", "diurnal:2"])
def test_arrivals_keep_their_mean_rate(spec):
    times = arrivals(parse_load(spec), 5.0, np.random.default_rng(0))
    taken = [next(times) for _ in range(9000)]
    assert taken == sorted(taken)
    assert 9000 / taken[-1] == pytest.approx(5.0, rel=0.08)


@pytest.mark.parametrize("spec", ["", "0", "-1", "1.5", "poisson:x", "steady:1"])
def test_what_is_no_load_is_refused(spec):
    with pytest.raises(ConfigError, match="poisson:"):
        parse_load(spec)


def test_the_same_seed_gives_the_same_numbers():
    once, again = (simulate(scenario("convex", 200), "smart", parse_load("2")) for _ in range(2))
    assert (once.tokens_per_s, once.tree_nodes) == (again.tokens_per_s, again.tree_nodes)


def test_requests_meet_the_same_however_many_steps_are_dealt_at_once():
    fleet, draws, requests = Fleet(scenario("convex"), "eagle2:4,4,12", parse_load("4")), Draws(EAGLE3_LIKE, 0), 4
    tables = Tables(parse_policy("eagle2:4,4,12"), [World(draws, index) for index in range(WORLDS)], 1)
    table = tables.table(fleet.replicas[0].plan, requests, 4)
    dealer = Dealer(np.random.default_rng(0))
    fates = np.random.default_rng(0).integers(WORLDS * OUTCOMES, size=DRAWN)
    for step in range(DEALT_STEPS + 2):
        hand = dealer.hand(table, requests)
        drawn = hand.drawn(MAX_DEPTH)
        accepted = drawn.accepted(np.ones(len(drawn.nodes), np.bool_), requests)
        expected = table.emitted[fates[requests * step :][:requests]]
        np.testing.assert_array_equal(accepted + 1, expected)
        np.testing.assert_array_equal(hand.emitted, expected)
        assert hand.layer_nodes()[-1] == len(drawn.nodes) == 12 * requests
        assert len(hand.drawn(1).nodes) == np.count_nonzero(drawn.depths == 1)


def test_a_request_that_got_several_tokens_waited_less_for_each():
    counts, waits_s, steps = Counts(), [], FOLDED_STEPS + 7
    for index in range(steps):
        wait_s = 0.01 + 0.001 * (index % 5)
        counts.add(Step(0.0, wait_s, 3, np.asarray([1, 4, 0]), 0.01, None, 0, [], None))
        waits_s += [wait_s] + [wait_s / 4] * 4
    result = counts.result("smart", "3", 10.0, 0.0)
    assert (result.tokens_per_s, result.mean_batch, result.tree_nodes) == (steps * 5 / 10.0, 3.0, 1.0)
    low, high = np.quantile(waits_s, [0.5, 0.95], method="inverted_cdf")
    assert (result.itl_s_p50, result.itl_s_p95) == pytest.approx((low, high))


def test_plain_decoding_costs_what_the_curve_says():
    result = simulate(scenario("convex"), "off", parse_load("1"))
    assert result.itl_s_p50 == pytest.approx(CURVES["convex"][0] + 0.001, rel=0.03)
    assert (result.tree_nodes, result.accepted_length) == (0.0, 1.0)


FIXED = ("off", "chain:2", "chain:4", "eagle2:4,4,12", "eagle2:6,10,60")


@pytest.mark.parametrize("shape", CURVES)
def test_a_fixed_tree_falls_below_plain_decoding_as_the_batch_grows_and_smart_does_not(shape):
    speed = {}
    for load in ("1", "32"):
        for policy in ("off", "eagle2:6,8,32", "smart"):
            speed[load, policy] = simulate(scenario(shape), policy, parse_load(load)).tokens_per_s
    assert speed["1", "eagle2:6,8,32"] > 1.2 * speed["1", "off"]
    assert speed["32", "eagle2:6,8,32"] < speed["32", "off"]
    assert speed["1", "smart"] > speed["1", "off"]
    assert speed["32", "smart"] >= 0.98 * speed["32", "off"]


@pytest.mark.slow
@pytest.mark.parametrize("load", ["1", "8", "32"])
@pytest.mark.parametrize("shape", CURVES)
def test_smart_is_as_fast_as_the_best_fixed_setting_at_every_load(shape, load):
    steps = 4000 if load == "32" else 1000  # prompts take most of the time there, and their lengths scatter
    speed = {p: simulate(scenario(shape, steps), p, parse_load(load)).tokens_per_s for p in (*FIXED, "smart")}
    assert speed["smart"] >= 0.98 * speed["off"]
    assert speed["smart"] >= 0.97 * max(speed[policy] for policy in FIXED)


def test_smart_is_as_fast_as_a_good_fixed_setting_between_the_extremes():
    speed = {p: simulate(scenario("convex"), p, parse_load("8")).tokens_per_s for p in ("off", "chain:2", "smart")}
    assert speed["smart"] >= 0.98 * speed["off"]
    assert speed["smart"] >= 0.97 * speed["chain:2"]


def test_open_arrivals_noise_drift_and_weights_run_over_many_replicas():
    conditions = Conditions(noisy_factor=2.0, drift_factor=1.3, target_share=0.3)
    shaken = scenario("staircase", 600, replicas=3, conditions=conditions)
    result = simulate(shaken, "smart", parse_load("bursty:0.6"))
    assert result.tokens_per_s > 0
    assert 0 < result.ttft_s_p50 <= result.ttft_s_p95
    assert 0 < result.itl_s_p50 <= result.itl_s_p95


def test_tree_sizes_settle_within_two_seconds_of_a_step_of_the_load_and_back():
    fleet = Fleet(served("llama-8b@h100"), "smart", parse_load("32"))
    sizes = {}
    for streams in (1, 32, 1):
        fleet.set_streams(streams)
        sizes[streams] = halves = settled(fleet, 2.0, 4.0)
        assert halves.std() < 0.15 * halves.mean(), f"{streams} streams: it oscillates"
    assert sizes[32].mean() < 0.3 * sizes[1].mean()


def settled(fleet: Fleet, after_s: float, until_s: float) -> np.ndarray:
    """Verified nodes per request in every half second from `after_s` to `until_s` from now."""
    begun_s, nodes, requests = fleet.now_s, np.zeros(int(2 * until_s)), np.zeros(int(2 * until_s))
    while (place := int(2 * (fleet.now_s - begun_s))) < len(nodes):
        step = fleet.step(0.0)
        assert step is not None
        nodes[place] += step.nodes
        requests[place] += len(step.tokens)
    return (nodes / requests)[int(2 * after_s) :]


@pytest.mark.parametrize("load", ["1", "32"])
def test_predictions_are_right_again_within_50_steps_of_a_hog_that_halves_the_verifiers_speed(load):
    fleet = Fleet(served("llama-8b@h100", Conditions(hog_factor=2.0)), "smart", parse_load(load))
    before, hogged = ([fleet.step(progress) for _ in range(400)] for progress in (0.0, 1.0))
    for steps, from_step in ((before, 200), (hogged, 50)):
        decoded = [step for step in steps[from_step:] if step is not None and not step.prefill_tokens]
        assert max(abs(step.predicted_s / step.verify_s - 1) for step in decoded) < 0.15


def served(device: str, conditions: Conditions = STEADY) -> Scenario:
    """A planner that sees every step, as in service."""
    return Scenario(preset(device), EAGLE3_LIKE, 1, 0, conditions=conditions, every_step=True)


def test_a_request_behind_its_target_weighs_more_and_weights_are_one_on_average():
    slots = Slots(4)
    for target_s in (0.01, math.inf, 0.2):
        slots.admit(Request(0.0, 10, 100, target_s))
    assert slots.prefill() == (30, 3)
    assert slots.begin(3, 1.0) == [1.0] * 3
    slots.emit(slots.left[:3], np.asarray([4, 4, 4]))
    late, free, early = slots.weights(slice(0, 3), 1.5).tolist()
    assert late == pytest.approx(8 * free)
    assert early == free
    assert late + free + early == pytest.approx(3)
    assert slots.context_tokens == 30 + 3 + 12
    slots.drop(1)
    assert (slots.count, slots.context_tokens) == (1, 15)


def test_a_step_that_overlaps_drafting_costs_the_longer_of_the_two():
    overlapped = scenario("convex", conditions=Conditions(overlap=True))
    chained = simulate(overlapped, "chain:4", parse_load("8"))
    assert chained.mean_batch == pytest.approx(4, abs=0.3)
    draft_s, verify_s = 0.0003 + 4 * 0.003 + 16 * 0.0001, CURVES["convex"][20 - 1]
    assert draft_s < verify_s
    one_after_the_other = simulate(scenario("convex"), "chain:4", parse_load("4"))
    assert chained.tokens_per_s == pytest.approx(
        one_after_the_other.tokens_per_s * (draft_s + verify_s + 0.001) / (verify_s + 0.001), rel=0.1
    )


def test_hundreds_of_replicas_share_what_arrives():
    many = scenario("convex", 900, replicas=300)
    made = simulate(many, "off", parse_load("poisson:0.2"))
    assert made.mean_batch < 8
    assert made.tokens_per_s > 0


def test_the_report_compares_with_off_and_names_the_best_fixed_setting():
    loads, policies = [parse_load("1"), parse_load("2")], ["off", "chain:2", "smart"]
    results = [simulate(scenario("convex", 200), policy, load) for load in loads for policy in policies]
    made = [{"conditions": "steady", **row} for row in rows(results, loads, policies)]
    assert [row["policy"] for row in made] == [*policies, "oracle-fixed"] * 2
    assert made[0]["speedup"] == 1.0
    assert made[3]["setting"] in ("off", "chain:2")
    assert made[3]["speedup"] == max(made[0]["speedup"], made[1]["speedup"])
    assert f"oracle-fixed ({made[3]['setting']})" in markdown(made)
    assert f"| steady | 1 | {made[2]['speedup']:.2f} | {made[2]['speedup'] / made[3]['speedup']:.2f} |" in summary(made)
