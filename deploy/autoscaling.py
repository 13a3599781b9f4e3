"""How many verifiers and drafters the load asks for. Serve averages what the replicas record, and asks every 0.1 s."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ray.serve.config import AutoscalingConfig, AutoscalingContext, AutoscalingPolicy

from treeline.config import ReplicaRange

LOOK_BACK_S = 10.0
"""Statistics are averaged over this long: two windows of the latency quantiles."""
QUEUED = 0.5
"""Mean number of requests without a slot: fewer are short bursts."""
LATE, IN_TIME = 0.5, 0.1
"""Share of the time that an objective is missed: above the first, the planner alone cannot hold it; below the second,
one verifier fewer may hold it."""
ROOMY = 0.6
"""Share of the slots that would be taken with one verifier fewer: the rest is for growth while one starts."""
CROWDED, ALONE = 0.1, 0.01
"""Share of their time that verifiers wait while their drafter drafts for others: a tenth of a step is what trees gain
at high load; a hundredth is negligible."""
IDLE = 0.5
"""Share of the time that the remaining drafters would draft."""

Stats = Mapping[str, Mapping[Any, float]]
"""For each statistic, the mean by replica."""


def scaling(range_: ReplicaRange, policy: str) -> AutoscalingConfig:
    """Serve's settings for `policy`, a function of this module."""
    return AutoscalingConfig(
        min_replicas=range_.min,
        max_replicas=range_.max,
        look_back_period_s=LOOK_BACK_S,
        upscale_delay_s=range_.up_after_s,
        downscale_delay_s=range_.down_after_s,
        policy=AutoscalingPolicy(policy_function=f"{__name__}:{policy}"),
    )


def verifiers(context: AutoscalingContext) -> tuple[int, dict[str, Any]]:
    return verifiers_wanted(context.aggregated_metrics or {}, context.current_num_replicas), {}


def drafters(context: AutoscalingContext) -> tuple[int, dict[str, Any]]:
    return drafters_wanted(context.aggregated_metrics or {}, context.current_num_replicas), {}


def verifiers_wanted(stats: Stats, replicas: int) -> int:
    """By requests and slots; one more while an objective is missed or requests wait, one fewer at a time.

    Args:
        stats: for each verifier "running" and "waiting" requests, its "slots", and "late", the share of the time in
            which an objective was missed.
        replicas: that run now.
    """
    if not stats:
        return replicas
    slots, late = _mean(stats["slots"]), max(stats["late"].values())
    waiting = sum(stats["waiting"].values())
    requests = sum(stats["running"].values()) + waiting
    if waiting > QUEUED or late > LATE:
        return max(replicas + 1, math.ceil(requests / slots))
    if late < IN_TIME and requests <= ROOMY * slots * (replicas - 1):
        return replicas - 1
    return replicas


def drafters_wanted(stats: Stats, replicas: int) -> int:
    """By the share of their time that verifiers wait for a drafter busy with others; one at a time.

    Args:
        stats: for each drafter the verifiers ("streams") that it drafts for, how many of them wait for their turn
            ("queued", a mean), and the share of the time that it drafts ("busy").
        replicas: that run now.
    """
    if not stats:
        return replicas
    streams = sum(stats["streams"].values())
    crowded = sum(stats["queued"].values()) / max(1.0, streams)
    if crowded > CROWDED and replicas < streams:
        return replicas + 1
    if crowded < ALONE and sum(stats["busy"].values()) <= IDLE * (replicas - 1):
        return replicas - 1
    return replicas


def _mean(values: Mapping[Any, float]) -> float:
    return sum(values.values()) / len(values)
