"""One policy under one load on a virtual clock: the real engine, drafter and planner over fake models."""

from __future__ import annotations

import gc
import math
import multiprocessing
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from typing import Any, cast

import numpy as np
import torch

import bench.baselines  # noqa: F401 - registers its policies
from bench.common import Prompt
from bench.load import Loop, Request, Window, closed_loop, measure, open_loop, poisson_arrivals
from bench.local_engine import LocalPlanner, PlannedEngine
from bench.simulator.acceptance import AcceptanceLaw
from bench.simulator.devices import Device
from bench.simulator.virtual import (
    KEY_TOKENS,
    FakeDraftModel,
    FakeTarget,
    FakeText,
    VirtualClock,
    prompt_of,
)
from bench.systems import LocalSystem
from drafter_svc.drafter import DrafterInfo, TreeDrafter
from drafter_svc.model_proposer import ModelProposer
from lm.model import LanguageModel
from planner.fast.cost import pass_s
from treeline.config import Config, DrafterConfig, LimitsConfig, ObjectivesConfig, PlannerConfig, VerifierConfig
from treeline.drafting import DraftReply, DraftRequest
from treeline.errors import ConfigError
from treeline.plan import CostModel, Plan
from verifier_svc.speculation.link import LocalLink

OFF = "off"
WARM_UP = 0.25
"""Share of a cell's time that is not counted: the cost model and the calibration settle."""
OPEN_SLOTS = 64
"""Requests that run at once under open arrivals."""
MOST_MEANS = 4
"""Lengths are geometric, cut at this many times their mean, so that the KV cache has room for all."""
BLOCK_TOKENS = 16
MOST_SPEEDUP = 4
"""Over plain decoding: the number of requests allows for it."""


@dataclass(frozen=True)
class Load:
    """A closed loop of `amount` streams, or Poisson arrivals at `amount` times what plain decoding can serve."""

    closed: bool
    amount: float

    @property
    def spec(self) -> str:
        return f"{self.amount:g}" if self.closed else f"poisson:{self.amount:g}"


def parse_load(spec: str) -> Load:
    """'8' or 'poisson:0.7'.

    Raises:
        ConfigError: it is neither.
    """
    kind, colon, amount = spec.rpartition(":")
    try:
        load = Load(not colon, float(amount))
    except ValueError:
        load = Load(True, 0)
    whole = not load.closed or load.amount == int(load.amount)
    if kind not in ("", "poisson") or not 0 < load.amount <= 1024 or not whole:
        raise ConfigError(f"load '{spec}': a number of streams, or poisson:SHARE of plain decoding's capacity")
    return load


@dataclass(frozen=True)
class Scenario:
    """What all policies and loads have in common.

    Attributes:
        steps: of plain decoding with all streams busy; every policy runs for as long as these take.
        objectives: held by the planner; requests that meet them are counted.
    """

    device: Device
    law: AcceptanceLaw
    steps: int
    seed: int = 0
    prompt_tokens: int = 256
    output_tokens: int = 256
    objectives: ObjectivesConfig = field(default_factory=ObjectivesConfig)


@dataclass(frozen=True)
class Simulated:
    """One policy under one load.

    Attributes:
        steps: of the engine, warm-up included.
        cpu_s: processor seconds that the simulation itself took.
    """

    policy: str
    load: Load
    window: Window
    steps: int
    cpu_s: float


class _DistantLink(LocalLink):
    """A local drafter whose every draft takes a round trip."""

    def __init__(self, drafter: TreeDrafter, round_trip_s: float, clock: VirtualClock) -> None:
        super().__init__(drafter)
        self._round_trip_s, self._clock = round_trip_s, clock

    def draft(self, request: DraftRequest, timeout_s: float) -> DraftReply | None:
        self._clock.advance(self._round_trip_s)
        return super().draft(request, timeout_s)


class VirtualEngine(PlannedEngine):
    """A planned engine over fake models.

    Attributes:
        clock: of all its parts.
        text: what draft model and target produce.
        target: the fake target; its `slowdown` may be changed at any time.
        steps: made so far.
    """

    def __init__(self, scenario: Scenario, slots: int) -> None:
        device, profile = scenario.device, scenario.device.profile
        self.clock, self.steps = VirtualClock(), 0
        self.text = FakeText(scenario.law, scenario.seed)
        self.target = FakeTarget(self.text, self.clock, CostModel(profile.verify), scenario.seed)
        config = _config(scenario, slots)
        planner = LocalPlanner(profile, config, self.clock)
        draft_model: Any = FakeDraftModel(self.text, self.clock, profile.draft_layer_s, profile.draft_node_s)
        cache = draft_model.new_cache(config.drafter.kv_cache_tokens, BLOCK_TOKENS)
        proposer = ModelProposer(draft_model, cache, config.limits.max_tree_nodes)
        info = DrafterInfo("fake", layer_s=profile.draft_layer_s, node_s=profile.draft_node_s)
        drafter = TreeDrafter(info, config.drafter.max_sessions, proposer)
        link = _DistantLink(drafter, device.draft_round_trip_s, self.clock)
        super().__init__(cast(LanguageModel, self.target), config, planner, link, self.clock)
        self._step_overhead_s = device.step_overhead_s
        self.engine.plan = self._begun_step

    def _begun_step(self) -> Plan:
        """The plan. The engine asks for it once per step, so the step's overhead is charged here."""
        self.steps += 1
        self.clock.advance(self._step_overhead_s)
        return self.planner.plan


def simulate(scenario: Scenario, policy: str, load: Load) -> Simulated:
    """Run one policy under one load. The same arguments give the same result."""
    torch.set_num_threads(1)  # The fakes' tensors are small: more threads would only wait for each other.
    started_s = time.process_time()
    streams = int(load.amount) if load.closed else OPEN_SLOTS
    engine = VirtualEngine(scenario, streams)
    seconds = scenario.steps * _plain_step_s(scenario, streams)
    requests, token_ids = _requests(scenario, policy, streams)
    system = LocalSystem(engine, token_ids, engine.clock.advance)

    def loop(requests: Sequence[Request], share: float) -> Window:
        if load.closed:
            return _run(closed_loop(system, requests, streams, share * seconds, engine.clock))
        rate = load.amount * _plain_requests_per_s(scenario)
        due_s = [at_s for at_s in poisson_arrivals(rate, len(requests), scenario.seed) if at_s <= share * seconds]
        return _run(open_loop(system, requests[: len(due_s)], due_s, engine.clock))

    half = len(requests) // 2
    loop(requests[:half], WARM_UP)
    window = loop(requests[half:], 1 - WARM_UP)
    return Simulated(policy, load, window, engine.steps, time.process_time() - started_s)


def simulate_all(scenario: Scenario, policies: Sequence[str], loads: Sequence[Load]) -> Iterator[Simulated]:
    """All cells as they end, in parallel over the cores."""
    cells = [(policy, load) for load in loads for policy in policies]
    workers = min(len(cells), os.cpu_count() or 1)
    if workers == 1:
        yield from (simulate(scenario, policy, load) for policy, load in cells)
        return
    # Spawned, not forked: a fork would inherit locks held by threads that it does not have.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, initializer=gc.disable)
    try:
        # The last ones first: many streams take longest, and should not start last.
        futures = [pool.submit(simulate, scenario, policy, load) for policy, load in reversed(cells)]
        for future in as_completed(futures):
            yield future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def rows(
    results: Sequence[Simulated], loads: Sequence[Load], policies: Sequence[str], objectives: ObjectivesConfig
) -> list[dict[str, Any]]:
    """One row per load and policy, in the order given.

    speedup: over `off`; in tokens per second in a closed loop, in median inter-token latency under open arrivals, where
    the arrivals set the tokens per second. None without `off`.
    met: share of the finished requests that met the objectives. None without objectives.
    """
    found = {(result.load, result.policy): measure(result.window) for result in results}
    work = {(result.load, result.policy): result for result in results}
    made = []
    for load in loads:
        off = found.get((load, OFF))
        for policy in policies:
            here, done = found[load, policy], work[load, policy]
            speedup = None
            if off and load.closed:
                speedup = here.tokens_per_s / off.tokens_per_s
            elif off and here.itl_ms_p50 and off.itl_ms_p50:
                speedup = off.itl_ms_p50 / here.itl_ms_p50
            made.append(
                {
                    "policy": policy,
                    "load": load.spec,
                    **asdict(here),
                    "speedup": speedup,
                    "met": share_met(done.window, objectives),
                    "steps": done.steps,
                    "cpu_s": done.cpu_s,
                }
            )
    return made


def share_met(window: Window, objectives: ObjectivesConfig) -> float | None:
    """Share of the window's finished requests whose first token and whose own 95th percentile of inter-token latency
    came within the objectives; None without objectives, or without such requests."""
    longest_first_s = (objectives.time_to_first_token_p95_ms or math.inf) / 1000
    longest_gap_s = (objectives.inter_token_p95_ms or math.inf) / 1000
    finished = [answer for answer in window.answers if answer.finished and answer.sent_s >= window.opened_s]
    if not finished or min(longest_first_s, longest_gap_s) == math.inf:
        return None
    met = 0
    for answer in finished:
        gaps_s = [gap_s for _, gap_s, count in answer.gaps for _ in range(count)]
        in_time = not gaps_s or float(np.quantile(gaps_s, 0.95)) <= longest_gap_s
        met += in_time and answer.arrivals[0][0] - answer.sent_s <= longest_first_s
    return met / len(finished)


def _run(loop: Loop) -> Window:
    """Run a loop to its end, without turns."""
    while True:
        try:
            next(loop)
        except StopIteration as end:
            window: Window = end.value
            return window


def _config(scenario: Scenario, slots: int) -> Config:
    longest = MOST_MEANS * (scenario.prompt_tokens + scenario.output_tokens)
    limits = LimitsConfig(max_running_requests=slots, max_context_tokens=longest)
    room = slots * (longest + limits.max_tree_nodes + BLOCK_TOKENS)
    return Config(
        limits=limits,
        planner=PlannerConfig(objectives=scenario.objectives),
        verifier=VerifierConfig(kv_cache_tokens=room, kv_block_tokens=BLOCK_TOKENS),
        # The draft model is built by hand. The kind only turns prompt lookup off: fake texts do not repeat themselves.
        drafter=DrafterConfig(kind="head", max_sessions=2 * slots, kv_cache_tokens=2 * room),
    )


def _plain_step_s(scenario: Scenario, streams: int) -> float:
    """Seconds of a step without drafts, all streams in the middle of their answers."""
    context_tokens = scenario.prompt_tokens + scenario.output_tokens // 2
    cost = CostModel(scenario.device.profile.verify)
    return pass_s(cost, streams, context_tokens, streams) + scenario.device.step_overhead_s


def _plain_requests_per_s(scenario: Scenario) -> float:
    """Requests per second of plain decoding with all slots full, prefill included."""
    chunk, cost = VerifierConfig().prefill_chunk_tokens, CostModel(scenario.device.profile.verify)
    prompt_s = (pass_s(cost, 1, 0, chunk) - pass_s(cost, 1, 0, 1)) * scenario.prompt_tokens / chunk
    return 1 / (_plain_step_s(scenario, OPEN_SLOTS) * scenario.output_tokens / OPEN_SLOTS + prompt_s)


def _requests(scenario: Scenario, policy: str, streams: int) -> tuple[list[Request], dict[Prompt, list[int]]]:
    """More requests than can be answered in the time, and their prompts; the same for every policy."""
    random = np.random.default_rng([scenario.seed, 2])
    count = 4 * streams + math.ceil(2 * MOST_SPEEDUP * scenario.steps * streams / scenario.output_tokens)
    prompt_tokens = _lengths(scenario.prompt_tokens, KEY_TOKENS, count, random)
    output_tokens = _lengths(scenario.output_tokens, 2, count, random)
    prompts = {Prompt(str(i), "fake", ""): prompt_of(i + 1, tokens) for i, tokens in enumerate(prompt_tokens)}
    requests = [Request(p.id, p, tokens, policy) for p, tokens in zip(prompts, output_tokens, strict=True)]
    return requests, prompts


def _lengths(mean: int, least: int, count: int, random: np.random.Generator) -> list[int]:
    return np.minimum(least + random.geometric(1 / max(1, mean - least), count), MOST_MEANS * mean).tolist()
