"""The simulation of one policy under one load: replicas, arrivals, and what came of them."""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from bench.simulator.devices import Device
from bench.simulator.load import Load, arrivals
from bench.simulator.replica import PREFILL_CHUNK_TOKENS, Replica, Request, Step
from bench.simulator.tables import Tables
from bench.simulator.worlds import AcceptanceLaw, World
from planner.cost import verify_seconds
from planner.loop import PlanMaker
from planner.policies import parse_policy
from treeline.config import Config
from treeline.plan import CostModel

WORLDS = 64
WARM_UP = 0.25
"""This share of the steps is not counted: batches fill and calibration settles."""
SLOTS = 64
NOISY_PERIOD_S = 20.0
NOISY_SHARE = 0.25


@dataclass(frozen=True)
class Scenario:
    """What is common to all policies and loads.

    Attributes:
        steps: verification steps over all replicas.
        noisy_factor: a neighbour slows each replica's passes by this for a quarter of the time.
        drift_factor: passes cost this much more at the end than at the start.
        heavy_share: share of requests whose tokens weigh four times as much.
    """

    device: Device
    law: AcceptanceLaw
    steps: int
    seed: int
    replicas: int = 1
    prompt_tokens: int = 256
    output_tokens: int = 256
    noisy_factor: float = 1.0
    drift_factor: float = 1.0
    heavy_share: float = 0.0


@dataclass(frozen=True)
class Result:
    """One policy under one load. Tokens per second of all replicas; latencies in seconds, NaN where there were none."""

    policy: str
    load: str
    tokens_per_s: float
    steps: int
    mean_batch: float
    tree_nodes: float
    accepted_length: float
    ttft_s_p50: float
    ttft_s_p95: float
    itl_s_p50: float
    itl_s_p95: float


class _Counts:
    """What is counted of the steps after the warm-up."""

    def __init__(self) -> None:
        self.steps = self.sequences = self.nodes = self.tokens = 0
        self._ttft_s: list[float] = []
        self._waits_s: list[float] = []
        self._token_counts: list[int] = []

    def add(self, step: Step) -> None:
        self.steps += 1
        self.sequences += len(step.tokens)
        self.nodes += step.nodes
        self.tokens += int(step.tokens.sum()) + len(step.first_token_s)
        self._ttft_s += step.first_token_s
        counts = np.bincount(step.tokens)
        for tokens in np.flatnonzero(counts).tolist():
            self._waits_s.append(step.step_s / tokens)
            self._token_counts.append(tokens * int(counts[tokens]))

    def result(self, policy: str, load: str, seconds: float) -> Result:
        ttft = np.quantile(self._ttft_s, [0.5, 0.95]).tolist() if self._ttft_s else [math.nan, math.nan]
        itl = _weighted_quantiles(self._waits_s, self._token_counts, [0.5, 0.95])
        sequences = max(1, self.sequences)
        decoded = self.tokens - len(self._ttft_s)
        return Result(
            policy, load, self.tokens / seconds if seconds else 0.0, self.steps, self.sequences / max(1, self.steps),
            self.nodes / sequences, decoded / sequences, *ttft, *itl,
        )  # fmt: skip


def simulate(scenario: Scenario, policy_spec: str, load: Load) -> Result:
    """Run one policy under one load. The same seed gives the same result, and all policies the same worlds."""
    policy = parse_policy(policy_spec)
    random = np.random.default_rng([scenario.seed, 1])
    worlds = [World(scenario.law, (scenario.seed, 0, index)) for index in range(WORLDS)]
    tables, maker = Tables(policy, worlds), PlanMaker(Config().limits, Config().planner)
    slots = int(load.amount) if load.closed else SLOTS
    replicas = [
        Replica(scenario.device, policy, tables, slots, maker, np.random.default_rng([scenario.seed, 2, index]))
        for index in range(scenario.replicas)
    ]
    requests = _requests(scenario, random)
    events: list[tuple[float, int]] = []  # when a replica's step ends
    times: Iterator[float] = iter(())
    if load.closed:
        for index, replica in enumerate(replicas):
            replica.waiting.extend(next(requests)._replace(arrived_s=0.0) for _ in range(slots))
            heapq.heappush(events, (0.0, index))
    else:
        times = arrivals(load, load.amount * plain_requests_per_s(scenario) * scenario.replicas, random)
    busy = [load.closed] * len(replicas)
    arrival_s, counts = next(times, math.inf), _Counts()
    warm, counted_from_s, now_s = int(WARM_UP * scenario.steps), 0.0, 0.0
    for done in range(scenario.steps):
        now_s, index, arrival_s = _next_event(events, replicas, busy, requests, times, arrival_s)
        if done == warm:
            counted_from_s = now_s
        replicas[index].slowdown = _slowdown(scenario, now_s, index, done)
        step = replicas[index].step(now_s)
        if step is None:
            busy[index] = False
            continue
        if load.closed:
            replicas[index].waiting.extend(next(requests)._replace(arrived_s=step.end_s) for _ in step.finished)
        heapq.heappush(events, (step.end_s, index))
        if done >= warm:
            counts.add(step)
    return counts.result(policy_spec, load.spec, now_s - counted_from_s)


def plain_requests_per_s(scenario: Scenario) -> float:
    """What one replica serves without speculation, all slots full; its prompts' passes included."""
    context_tokens = scenario.prompt_tokens + scenario.output_tokens // 2
    seconds = verify_seconds(CostModel(scenario.device.profile.verify), SLOTS, context_tokens, PREFILL_CHUNK_TOKENS)
    decode_s = (float(seconds[SLOTS]) + scenario.device.step_overhead_s) * scenario.output_tokens / SLOTS
    prefill_s = (
        (float(seconds[PREFILL_CHUNK_TOKENS]) - float(seconds[SLOTS])) * scenario.prompt_tokens / (PREFILL_CHUNK_TOKENS)
    )
    return 1 / (decode_s + prefill_s)


def _next_event(
    events: list[tuple[float, int]],
    replicas: list[Replica],
    busy: list[bool],
    requests: Iterator[Request],
    times: Iterator[float],
    arrival_s: float,
) -> tuple[float, int, float]:
    """(time, replica) of the next step, and of the next arrival; those before it join the least loaded replica."""
    while not events or arrival_s <= events[0][0]:
        index = min(range(len(replicas)), key=lambda i: replicas[i].requests)
        replicas[index].waiting.append(next(requests)._replace(arrived_s=arrival_s))
        if not busy[index]:
            busy[index] = True
            heapq.heappush(events, (arrival_s, index))
        arrival_s = next(times, math.inf)
    now_s, index = heapq.heappop(events)
    return now_s, index, arrival_s


def _requests(scenario: Scenario, random: np.random.Generator) -> Iterator[Request]:
    """Prompts and answers of geometric length around their means."""
    while True:
        prompts = 16 + random.geometric(1 / max(1, scenario.prompt_tokens - 16), 256)
        outputs = 1 + random.geometric(1 / max(1, scenario.output_tokens - 1), 256)
        weights = np.where(random.random(256) < scenario.heavy_share, 4.0, 1.0)
        for prompt, output, weight in zip(prompts.tolist(), outputs.tolist(), weights.tolist(), strict=True):
            yield Request(0.0, prompt, output, weight)


def _slowdown(scenario: Scenario, now_s: float, index: int, done: int) -> float:
    drift = 1 + (scenario.drift_factor - 1) * done / scenario.steps
    offset_s = index * NOISY_PERIOD_S * 0.618  # neighbours of different replicas are noisy at different times
    noisy = (now_s + offset_s) % NOISY_PERIOD_S < NOISY_SHARE * NOISY_PERIOD_S
    return drift * (scenario.noisy_factor if noisy else 1.0)


def _weighted_quantiles(values: list[float], weights: list[int], q: list[float]) -> list[float]:
    if not values:
        return [math.nan] * len(q)
    order = np.argsort(values)
    cumulative = np.cumsum(np.asarray(weights)[order])
    places = np.searchsorted(cumulative, np.asarray(q) * cumulative[-1])
    return np.asarray(values)[order][places].tolist()
