"""The controller of latency objectives: from measured quantiles to the longest step and the price of waiting.

It is a pure function, called for every plan. Two facts make it stable without tuning to a device:

- The 95th percentile of inter-token latency is k times that of step seconds, both over the same window. k is about the
  inverse of the tokens per step and changes slowly, so `objective / k` is the step to aim at. While a change of the
  budget passes through the measuring window, both quantiles lag together and the aim does not move.
- The budget is not an integral of errors. Steps bound it from above and plain decoding from below, and it moves towards
  its aim at a bounded rate.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, replace

from planner.service.latency import of_class
from treeline.config import ObjectivesConfig, PlannerConfig

INTER_TOKEN, FIRST_TOKEN = "inter_token_p95", "time_to_first_token_p95"

AIM = 0.95
"""Share of the objective to aim at: quantiles of 5 s scatter by about 5 %."""
SHRINK, RELAX = 2.0, 1.1
"""Fastest change of the budget per second, as ratios. Users feel a miss, so the budget may halve in a second; a
relaxed budget should be measured for a window of 5 s before it has grown by half (1.1^5 = 1.6)."""
FLOOR_S = 10.0
"""Plain decoding for this long, with the objective still missed, shows that it cannot be reached: two windows of 5 s,
so that no step with a tree is in the second one."""
RETURN, REACH_RELAX = 0.95, 1.002
"""An unreachable objective is tried again once a plain step is 5 % shorter than the one that missed. That limit rises
by 0.2 % a second (12 % a minute), in case a busy neighbour has gone."""
WAIT_GAIN, WAIT_RATIO = 0.1, 2.0
"""A time to first token of r times its objective multiplies the price of waiting by r^0.1 a second, r up to 2. Seen
through a window of 5 s and scrapes of 1 s, an integral gain of 0.1 / s keeps a phase margin of 50 degrees."""
MAX_WAIT = 4.0
"""Beyond this, a step with prompts would take as long as nine plain ones (2.25 times 4), and streams seem to stall."""


@dataclass(frozen=True)
class Seen:
    """What is known of one verifier now.

    Attributes:
        itl_p95_s, ttft_p95_s: measured; None if nothing fresh was.
        step_p95_s: what its steps took over the same seconds, weighted by their tokens; None without steps.
        plain_s: predicted seconds of a step that decodes the present batch plainly.
        delayed: requests without a first token: queued, or in prefill.
    """

    itl_p95_s: float | None
    ttft_p95_s: float | None
    step_p95_s: float | None
    plain_s: float
    delayed: int


@dataclass(frozen=True)
class Control:
    """The controller's two outputs, and what it remembers.

    Attributes:
        step_budget_s: longest step that trees and prompt chunks may make; infinite: none.
        wait_factor: how many times its ordinary price a waiting request costs, 1 to MAX_WAIT.
        unreachable: names of objectives that cannot be reached.
        free_s: step seconds when the budget was first set; a budget that grows this long is lifted.
        reach_s: plain steps longer than this miss the objective.
        floor_s: for how long plain decoding has missed it.
    """

    step_budget_s: float = math.inf
    wait_factor: float = 1.0
    unreachable: tuple[str, ...] = ()
    free_s: float = math.inf
    reach_s: float = math.inf
    floor_s: float = 0.0


def regulate(objectives: ObjectivesConfig, seen: Seen, before: Control, elapsed_s: float) -> Control:
    """The next control, `elapsed_s` after `before`. An objective that is not set, or not measured, controls nothing."""
    after = _budget(objectives.inter_token_p95_ms, seen, before, elapsed_s)
    return _waiting(objectives.time_to_first_token_p95_ms, seen, after, elapsed_s)


def classes(config: PlannerConfig) -> list[tuple[int | None, ObjectivesConfig]]:
    """Which requests have objectives of their own: all (None), and those of some priorities."""
    return [(None, config.objectives), *config.objectives_by_priority.items()]


def goals(priority: int | None, objectives: ObjectivesConfig) -> tuple[tuple[str, float | None], ...]:
    """The two signals of a class of requests, each with its objective in milliseconds if it has one."""
    return (
        (of_class(INTER_TOKEN, priority), objectives.inter_token_p95_ms),
        (of_class(FIRST_TOKEN, priority), objectives.time_to_first_token_p95_ms),
    )


def tightest(controls: Collection[Control]) -> Control:
    """What holds the objectives of all classes: the shortest step budget, the highest price of waiting."""
    lost = tuple(name for control in controls for name in control.unreachable)
    budget_s = min(control.step_budget_s for control in controls)
    return Control(budget_s, max(control.wait_factor for control in controls), lost)


def _budget(objective_ms: float | None, seen: Seen, before: Control, elapsed_s: float) -> Control:
    """`before` with the next step budget; `_waiting` then judges time to first token."""
    if objective_ms is None or seen.itl_p95_s is None or seen.step_p95_s is None:
        return Control(wait_factor=before.wait_factor, reach_s=before.reach_s)
    objective_s = objective_ms / 1000
    missed = seen.itl_p95_s > objective_s
    reach_s = min(objective_s, before.reach_s * REACH_RELAX**elapsed_s)
    released = Control(wait_factor=before.wait_factor, reach_s=reach_s)
    if seen.plain_s > reach_s * (RETURN if INTER_TOKEN in before.unreachable else 1.0):
        return replace(released, unreachable=(INTER_TOKEN,))
    aim_s = AIM * objective_s * seen.step_p95_s / seen.itl_p95_s
    start_s, free_s = before.step_budget_s, before.free_s
    if missed:
        if start_s == math.inf:
            free_s = seen.step_p95_s
        start_s = min(start_s, seen.step_p95_s)
    elif start_s == math.inf:
        return released
    budget_s = max(seen.plain_s, start_s * _clip(aim_s / start_s, SHRINK**-elapsed_s, RELAX**elapsed_s))
    if budget_s >= free_s and not missed:
        return released
    floor_s = before.floor_s + elapsed_s if missed and budget_s <= seen.plain_s else 0.0
    if floor_s >= FLOOR_S:
        return replace(released, reach_s=RETURN * seen.plain_s, unreachable=(INTER_TOKEN,))
    return Control(budget_s, before.wait_factor, (), free_s, reach_s, floor_s)


def _waiting(objective_ms: float | None, seen: Seen, control: Control, elapsed_s: float) -> Control:
    """`control` with the next factor on what waiting costs."""
    if objective_ms is None or seen.ttft_p95_s is None:
        return replace(control, wait_factor=1.0)
    ratio = 1000 * seen.ttft_p95_s / objective_ms if seen.delayed else 0.0
    change = _clip(ratio, 1 / WAIT_RATIO, WAIT_RATIO) ** (WAIT_GAIN * elapsed_s)
    factor = _clip(control.wait_factor * change, 1.0, MAX_WAIT)
    lost = (FIRST_TOKEN,) if factor == MAX_WAIT and ratio > 1 else ()
    return replace(control, wait_factor=factor, unreachable=control.unreachable + lost)


def _clip(value: float, least: float, most: float) -> float:
    return max(least, min(most, value))
