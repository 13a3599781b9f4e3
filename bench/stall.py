"""A long prompt arrives while others stream: how long does any of them wait for its next token?"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain, cycle, islice
from statistics import median

from bench.local_engine import PlannedEngine, Streams
from verifier_svc.engine.request import Chunk
from verifier_svc.engine.sequence import Output

DECODE_STEPS = 20
"""Steps before the prompt arrives, whose median is the unit of a wait; as many before them only warm up."""


@dataclass(frozen=True)
class StallRow:
    """Medians over rounds, with the extremes of the wait.

    Attributes:
        decode_step_ms: of a step without a prompt in it, before the long one arrived.
        longest_wait_steps: the longest time between two chunks of any stream, in such steps.
        prompt_steps: steps that the prompt was spread over.
        ttft_ms: the long prompt's time to first token.
    """

    policy: str
    streams: int
    prompt_tokens: int
    decode_step_ms: float
    longest_wait_steps: float
    longest_wait_steps_min: float
    longest_wait_steps_max: float
    prompt_steps: float
    ttft_ms: float


@dataclass(frozen=True)
class _Arrival:
    """One arrival of the long prompt, in seconds."""

    decode_step_s: float
    longest_wait_s: float
    prompt_steps: int
    ttft_s: float


def long_text(prompts: list[list[int]], tokens: int) -> list[int]:
    """A prompt of exactly so many tokens, put together from real ones."""
    return list(islice(cycle(chain.from_iterable(prompts)), tokens))


def run_stall(
    planned: PlannedEngine,
    prompts: list[list[int]],
    long_prompt: list[int],
    policies: list[str],
    streams: int,
    rounds: int,
    max_tokens: int,
    on_progress: Callable[[str], None] = lambda what: None,
) -> list[StallRow]:
    """Let `long_prompt` arrive `rounds` times for each policy, policies in turns.

    Args:
        max_tokens: of each stream's answers; so many that none ends while the prompt is run.
        on_progress: called with what comes next.
    """
    found: dict[str, list[_Arrival]] = {policy: [] for policy in policies}
    planners = {policy: planned.new_planner() for policy in policies}
    for round_ in range(rounds):
        for policy in policies:
            on_progress(f"{policy}, long prompt, round {round_ + 1}")
            planned.planner = planners[policy]
            load = Streams(planned, prompts, policy, max_tokens, streams, ignore_eos=True)
            found[policy].append(_arrival(load, streams, long_prompt))
            load.close()
    return [_row(policy, streams, len(long_prompt), arrivals) for policy, arrivals in found.items()]


def _arrival(load: Streams, streams: int, long_prompt: list[int]) -> _Arrival:
    decode_s: list[float] = []
    last_s: dict[str, float] = {}
    while len(decode_s) < 2 * DECODE_STEPS:
        started_s = time.perf_counter()
        outputs = load.step()
        now_s = time.perf_counter()
        if len(last_s) >= streams:  # all of them decode
            decode_s.append(now_s - started_s)
        last_s |= dict.fromkeys(_received(outputs), now_s)
    arrived_s, longest_s, steps = time.perf_counter(), 0.0, 0
    late = load.add(long_prompt)
    while late not in last_s:
        received = _received(load.step())
        now_s, steps = time.perf_counter(), steps + 1
        longest_s = max([longest_s, *(now_s - last_s[stream] for stream in received if stream in last_s)])
        last_s |= dict.fromkeys(received, now_s)
    return _Arrival(median(decode_s[DECODE_STEPS:]), longest_s, steps, now_s - arrived_s)


def _received(outputs: list[Output]) -> list[str]:
    """Who got tokens."""
    return [output.request_id for output in outputs if isinstance(output.item, Chunk)]


def _row(policy: str, streams: int, prompt_tokens: int, arrivals: list[_Arrival]) -> StallRow:
    waits = [arrival.longest_wait_s / arrival.decode_step_s for arrival in arrivals]
    return StallRow(
        policy=policy,
        streams=streams,
        prompt_tokens=prompt_tokens,
        decode_step_ms=1e3 * median(arrival.decode_step_s for arrival in arrivals),
        longest_wait_steps=median(waits),
        longest_wait_steps_min=min(waits),
        longest_wait_steps_max=max(waits),
        prompt_steps=median(arrival.prompt_steps for arrival in arrivals),
        ttft_ms=1e3 * median(arrival.ttft_s for arrival in arrivals),
    )
