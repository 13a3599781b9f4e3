"""The slow loop and the fast path together, in a world of known costs whose clock is the test's."""

from __future__ import annotations

import numpy as np
import pytest

from planner.fast.cost import verify_seconds
from planner.policies import parse_policy
from planner.policies.smart import SPARE
from planner.service.loop import PlanMaker, VerifierState
from tests.planner.builders import Drafted, prune, record
from tests.trees import tree_of
from treeline.config import LimitsConfig, PlannerConfig
from treeline.forest import ROOT, Forest
from treeline.plan import CostCurve, CostModel, Plan, VerifierProfile

SMART = parse_policy("smart")
INTERVAL_S = 0.25
DRAFT_S = 0.004
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128)
CURVES = tuple(
    CostCurve(sequences, 64, tuple(n for n in TOKENS if n >= sequences), tuple(
        0.02 + 0.0001 * sequences + 0.0012 * max(0, n - 8) for n in TOKENS if n >= sequences
    ))
    for sequences in (1, 8, 32)
)  # fmt: skip
TRUTH = CostModel(CURVES)


def bushy_tree() -> Forest:
    """Two children under every node of a path, five layers deep."""
    parents, probs, on_path = [], [], ROOT
    for _ in range(5):
        parents += [on_path, on_path]
        on_path = len(parents) - 2
        probs += [0.7, 0.2]
    return tree_of(list(range(10)), parents, probs)


class World:
    """One verifier under its planner. `now_s` only moves as steps take their time."""

    def __init__(self, seed: int = 0) -> None:
        self.now_s, self._planned_s = 1000.0, 0.0
        self._random = np.random.default_rng(seed)
        self._state = VerifierState(VerifierProfile(CURVES), "")
        self._maker = PlanMaker(LimitsConfig(), PlannerConfig())
        self.plan: Plan = self._maker.make(self._state)
        self.sizes: list[tuple[float, float]] = []
        """(when, nodes per request) of each step."""

    def run(self, seconds: float, sequences: int) -> None:
        until_s = self.now_s + seconds
        while self.now_s < until_s:
            self._step(sequences)
            if self.now_s - self._planned_s >= INTERVAL_S:
                self._planned_s = self.now_s
                self.plan = self._maker.make(self._state)

    def sizes_since(self, since_s: float) -> np.ndarray:
        return np.asarray([size for when, size in self.sizes if when >= since_s])

    def _step(self, sequences: int) -> None:
        tree = bushy_tree()
        worth = tree.path_products(tree.draft_probs) > SPARE * self.plan.price * self.plan.cost.node_s
        candidates = [Drafted(tree.select(worth), SMART, 1.0, False)] * sequences
        pruning = prune(candidates, self.plan, DRAFT_S)
        nodes = sum(int(keep.sum()) for keep in pruning.keep)
        tokens = sequences + nodes
        noise = self._random.lognormal(0, 0.05)
        verify_s = noise * float(verify_seconds(TRUTH, sequences, 64, tokens)[tokens])
        emitted = sequences + int(self._random.binomial(sequences * 3, 0.4)) if nodes else sequences
        self.now_s += verify_s + DRAFT_S + 0.001
        self._state.observe(
            record(unix_s=self.now_s, sequences=sequences, running=sequences, tokens=tokens, verified_nodes=nodes,
                   context_tokens=64 * sequences, emitted_tokens=emitted, draft_s=DRAFT_S, verify_s=verify_s,
                   predicted_verify_s=pruning.predicted_verify_s, node_s=pruning.node_s,
                   step_s=verify_s + DRAFT_S + 0.001)
        )  # fmt: skip
        self.sizes.append((self.now_s, nodes / sequences))


def test_after_a_step_of_the_load_and_back_tree_sizes_settle_within_two_seconds():
    world = World()
    world.run(5.0, 1)
    alone = world.sizes_since(1002.0).mean()
    for sequences in (32, 1):
        stepped_s = world.now_s
        world.run(6.0, sequences)
        settled = world.sizes_since(stepped_s + 2.0)
        assert settled.std() < 0.15 * max(1.0, settled.mean()), "it oscillates"
        halves = np.array_split(settled, 2)
        assert halves[0].mean() == pytest.approx(halves[1].mean(), rel=0.1), "it has not settled"
        if sequences == 32:
            assert settled.mean() < 0.7 * alone
        else:
            assert settled.mean() == pytest.approx(alone, rel=0.1)


def test_the_price_hardly_moves_under_a_steady_load():
    world = World()
    world.run(3.0, 4)
    prices = []
    for _ in range(40):
        world.run(INTERVAL_S, 4)
        prices.append(world.plan.price)
    assert np.std(prices) < 0.1 * np.mean(prices)


def test_the_price_is_never_below_what_plain_decoding_reaches():
    state, maker = VerifierState(VerifierProfile(CURVES), ""), PlanMaker(LimitsConfig(), PlannerConfig())
    for step in range(20):  # drafting went badly: long steps for a token each
        state.observe(record(unix_s=1000.0 + step, sequences=8, tokens=8, verify_s=0.021, draft_s=0.5, step_s=0.53))
    plan = maker.make(state)
    assert plan.price == pytest.approx(8 / (0.021 + 0.009), rel=0.1)


def test_requests_that_wait_for_the_step_to_end_raise_the_price():
    state, maker = VerifierState(VerifierProfile(CURVES), ""), PlanMaker(LimitsConfig(), PlannerConfig())
    state.observe(record(sequences=2, running=4, tokens=2, waiting=2, startable=2, verify_s=0.0202, step_s=0.0202))
    plan = maker.make(state)
    assert plan.price == pytest.approx(2 * 2 / 0.0202, rel=0.1)
    assert "4 waiting" in plan.reason


def test_nodes_are_dearer_where_the_batch_fills_the_hardware():
    world = World()
    world.run(2.0, 1)
    alone = world.plan.price * world.plan.cost.node_s
    world.run(2.0, 32)
    crowded = world.plan.price * world.plan.cost.node_s
    assert crowded > 2 * alone


def test_a_verifier_that_left_nothing_out_would_have_had_more_at_what_the_pass_costs_there():
    state, maker = VerifierState(VerifierProfile(CURVES), ""), PlanMaker(LimitsConfig(), PlannerConfig())
    assert maker.make(state).cost.node_s == pytest.approx(0.0, abs=1e-9)
    state.observe(record(sequences=8, tokens=32, verify_s=0.0496, step_s=0.0496, emitted_tokens=20))
    assert maker.make(state).cost.node_s == pytest.approx(0.0012, rel=0.1)
    state.observe(record(unix_s=1010.0, sequences=8, tokens=32, verify_s=0.0496, step_s=0.0496, node_s=0.003))
    assert maker.make(state).cost.node_s == pytest.approx(0.003, rel=0.01)
