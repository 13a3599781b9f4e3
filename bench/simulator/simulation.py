"""The simulation of one policy under one load: replicas, arrivals, and what came of them."""

from __future__ import annotations

import heapq
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

import bench.baselines  # noqa: F401 - registers its policies
from bench.simulator.conditions import STEADY, TARGET_OF_PLAIN, Conditions
from bench.simulator.counts import Counts, Result
from bench.simulator.devices import Device
from bench.simulator.load import Load, arrivals
from bench.simulator.replica import Replica, Step
from bench.simulator.slots import PREFILL_CHUNK_TOKENS, Request
from bench.simulator.tables import Tables
from bench.simulator.worlds import WORLDS, AcceptanceLaw, Draws, World
from planner.fast.cost import pass_s
from planner.policies import parse_policy
from planner.service.loop import PlanMaker, VerifierState
from treeline.config import Config
from treeline.plan import CostModel

WARM_UP = 0.25
"""This share of the steps is not counted: batches fill and calibration settles."""
SLOTS = 64


@dataclass(frozen=True)
class Scenario:
    """What is common to all policies and loads.

    Attributes:
        steps: verification steps over all replicas.
        every_step: planners see every step, as in service, and not one per plan.
    """

    device: Device
    law: AcceptanceLaw
    steps: int
    seed: int
    replicas: int = 1
    prompt_tokens: int = 256
    output_tokens: int = 256
    conditions: Conditions = STEADY
    every_step: bool = False


class Fleet:
    """Replicas, the requests that come to them, and the clock; a step at a time.

    Attributes:
        replicas: verifiers, each with a drafter and a planner.
        now_s: when the last step began.
    """

    def __init__(self, scenario: Scenario, policy_spec: str, load: Load) -> None:
        policy, slots = parse_policy(policy_spec), int(load.amount) if load.closed else SLOTS
        random = np.random.default_rng([scenario.seed, 1])
        tables = Tables(policy, _worlds(scenario.law, scenario.seed), scenario.replicas)
        maker, fresh = PlanMaker(Config().limits, Config().planner), VerifierState(scenario.device.profile, "")
        conditions = scenario.conditions
        self.replicas = [
            Replica(
                scenario.device, policy, tables, slots, maker, fresh,
                np.random.default_rng([scenario.seed, 2, index]), conditions.overlap, conditions.target_share > 0,
                scenario.every_step,
            )
            for index in range(scenario.replicas)
        ]  # fmt: skip
        self.now_s = 0.0
        self._scenario, self._closed = scenario, load.closed
        self._requests = _requests(scenario, random)
        self._events: list[tuple[float, int]] = []  # when a replica's step ends
        self._busy = np.zeros(scenario.replicas, np.bool_)
        self._requests_at = np.zeros(scenario.replicas, np.int64)
        self._times: Iterator[float] = iter(())
        if load.closed:
            for index in range(scenario.replicas):
                for _ in range(slots):
                    self._arrive(index, 0.0)
        else:
            mean_per_s = load.amount * plain_requests_per_s(scenario) * scenario.replicas
            self._times = arrivals(load, mean_per_s, random)
        self._arrival_s = next(self._times, math.inf)

    def step(self, progress: float) -> Step | None:
        """The next step of any replica; None if one had nothing to do. progress: share of all steps that are done."""
        while not self._events or self._arrival_s <= self._events[0][0]:
            self._arrive(int(self._requests_at.argmin()), self._arrival_s)  # the least loaded one
            self._arrival_s = next(self._times)
        self.now_s, index = heapq.heappop(self._events)
        replica = self.replicas[index]
        replica.slowdown = self._scenario.conditions.slowdown(self.now_s, index, progress)
        step = replica.step(self.now_s)
        if step is None:
            self._busy[index] = False
            return None
        heapq.heappush(self._events, (step.end_s, index))
        if step.finished is not None:
            self._requests_at[index] -= len(step.finished.itl_s)
            if self._closed:
                for _ in step.finished.itl_s:
                    self._arrive(index, step.end_s)
        return step

    def set_streams(self, streams: int) -> None:
        """From now on so many closed-loop streams per replica; others hang up, new ones ask at once."""
        for index, replica in enumerate(self.replicas):
            replica.waiting.clear()
            replica.slots.drop(streams)
            self._requests_at[index] = replica.slots.count
            for _ in range(streams - replica.slots.count):
                self._arrive(index, self.now_s)

    def _arrive(self, index: int, now_s: float) -> None:
        self.replicas[index].waiting.append(next(self._requests)._replace(arrived_s=now_s))
        self._requests_at[index] += 1
        if not self._busy[index]:
            self._busy[index] = True
            heapq.heappush(self._events, (now_s, index))


def simulate(scenario: Scenario, policy_spec: str, load: Load) -> Result:
    """Run one policy under one load. The same seed gives the same result, and all policies the same worlds."""
    started_s = time.process_time()
    fleet, counts = Fleet(scenario, policy_spec, load), Counts()
    warm, counted_from_s = int(WARM_UP * scenario.steps), 0.0
    for done in range(scenario.steps):
        step = fleet.step(done / scenario.steps)
        if done == warm:
            counted_from_s = fleet.now_s
        if step is not None and done >= warm:
            counts.add(step)
    return counts.result(policy_spec, load.spec, fleet.now_s - counted_from_s, time.process_time() - started_s)


def plain_requests_per_s(scenario: Scenario) -> float:
    """What one replica serves without speculation, all slots full; its prompts' passes included."""
    context_tokens = scenario.prompt_tokens + scenario.output_tokens // 2
    cost = CostModel(scenario.device.profile.verify)
    plain_s, chunk_s = (pass_s(cost, SLOTS, context_tokens, tokens) for tokens in (SLOTS, PREFILL_CHUNK_TOKENS))
    decode_s = (plain_s + scenario.device.step_overhead_s) * scenario.output_tokens / SLOTS
    return 1 / (decode_s + (chunk_s - plain_s) * scenario.prompt_tokens / PREFILL_CHUNK_TOKENS)


@lru_cache(maxsize=1)
def _worlds(law: AcceptanceLaw, seed: int) -> list[World]:
    """All policies meet the same ones, and what lies below a node is made once for all that run in this process."""
    draws = Draws(law, seed)
    return [World(draws, index) for index in range(WORLDS)]


def _requests(scenario: Scenario, random: np.random.Generator) -> Iterator[Request]:
    """Prompts and answers of geometric length around their means."""
    plain_s = pass_s(CostModel(scenario.device.profile.verify), 1, 0, 1) + scenario.device.step_overhead_s
    while True:
        prompts = 16 + random.geometric(1 / max(1, scenario.prompt_tokens - 16), 256)
        outputs = 1 + random.geometric(1 / max(1, scenario.output_tokens - 1), 256)
        targeted = random.random(256) < scenario.conditions.target_share
        targets_s = np.where(targeted, TARGET_OF_PLAIN * plain_s, math.inf)
        for prompt, output, target_s in zip(prompts.tolist(), outputs.tolist(), targets_s.tolist(), strict=True):
            yield Request(0.0, prompt, output, target_s)
