"""What a run of shifts says: how fast trees settle behind a step of the load, and predictions beside a CPU hog."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np
from numpy.typing import NDArray

SIZE_WINDOW_S, LEAST_WINDOW_STEPS = 0.5, 5
"""Tree sizes are smoothed by the median of the steps of so many seconds, and of so many steps at least."""
BAND_NODES, BAND_SHARE = 1.0, 0.25
"""A tree size is at its level if it is no further from it than the larger of these, in nodes and as a share of it."""
ERROR_STEPS = 15
"""Errors are smoothed by the median of so many steps."""
WITHIN = 0.15
"""Predictions whose smoothed relative error is no larger are good."""
RECOVERY_STEPS = 50
"""A slowed-down verifier is to be predicted well again in so many steps."""

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class ShiftStep:
    """One step of a run.

    Attributes:
        phase: which part of the run it belongs to.
        time_s: when it ended, since the run began.
        streams: that were asked for.
        sequences: that decoded; the prompts of others may still have been waited for.
        prefill_tokens: of prompts that were run beside them.
        all_decoding: every stream of this phase has had a token.
        drafted, verified: draft nodes per decoding request.
        predicted_ms: of the whole step, by the plan in force when it began.
        predicted_verify_ms: of its pass, before it ran.
        price: of the plan in force after the step, tokens per second.
    """

    phase: str
    time_s: float
    streams: int
    sequences: int
    prefill_tokens: int
    all_decoding: bool
    drafted: float
    verified: float
    predicted_ms: float
    measured_ms: float
    predicted_verify_ms: float
    verify_ms: float
    price: float


@dataclass(frozen=True)
class LoadRow:
    """One phase of a load step.

    Attributes:
        steps: in which something was decoded.
        seconds, step_ms: how long the phase took, and the median step of its second half.
        all_decoding_s: from the jump until every stream had its first token.
        nodes, band: level of the tree size, and how far from it counts as being there (see `level`).
        settled_s: from the jump until the smoothed tree size stays at its level (see `settled_s`); None if it does not.
        settled_decoding_s: the same from when every stream had its first token.
        swings: how often the smoothed tree size turned round by more than the band, from the jump on (see `swings`).
        outside_share: share of the steps since all streams decode, whose smoothed tree size was not at its level.
        error: median relative error of the predicted step times, over steps without a prompt in them.
    """

    phase: str
    streams: int
    steps: int
    seconds: float
    step_ms: float
    all_decoding_s: float
    nodes: float
    band: float
    settled_s: float | None
    settled_decoding_s: float | None
    swings: int
    outside_share: float
    error: float | None


@dataclass(frozen=True)
class HogRow:
    """One phase of a run with CPU hogs. Only steps in which all streams decode, and no prompt is run, count.

    Attributes:
        step_ms: median.
        slowdown: how much longer steps took than those of the first phase that verified as many nodes: the median of
            these ratios; None where no step did.
        good_after_steps: of the predicted step times: steps from the beginning of the phase until the smoothed
            relative error stays within 15 % (see `good_after_steps`); None if it does not.
        verify_good_after_steps: the same of the verification pass alone, as predicted before it ran.
        first_good_after_steps, verify_first_good_after_steps: until it is within 15 % for the first time.
        outside_share: share of the steps behind the first 50 whose smoothed error is above 15 %; None without any.
        error, verify_error: median relative error of the phase's second half.
    """

    phase: str
    steps: int
    step_ms: float
    slowdown: float | None
    good_after_steps: int | None
    verify_good_after_steps: int | None
    first_good_after_steps: int | None
    verify_first_good_after_steps: int | None
    outside_share: float | None
    error: float
    verify_error: float


def load_rows(steps: Sequence[ShiftStep]) -> list[LoadRow]:
    """A row for every phase of `run_load`'s steps."""
    rows, begun_s = [], 0.0
    for phase, taken in by_phase(steps).items():
        decoding = [step for step in taken if step.sequences]
        times_s = np.asarray([step.time_s - begun_s for step in decoding])
        sizes = smoothed_sizes(times_s, [step.verified for step in decoding])
        all_decoding_s = next(step.time_s for step in taken if step.all_decoding) - begun_s
        ready = times_s >= all_decoding_s
        at, band = level(times_s[ready], sizes[ready])
        settled = settled_s(times_s, sizes, at, band, since_s=all_decoding_s)
        promptless = [step for step in decoding if not step.prefill_tokens]
        rows.append(
            LoadRow(
                phase=phase,
                streams=taken[0].streams,
                steps=len(decoding),
                seconds=taken[-1].time_s - begun_s,
                step_ms=median(step.measured_ms for step in decoding[len(decoding) // 2 :]),
                all_decoding_s=all_decoding_s,
                nodes=at,
                band=band,
                settled_s=settled,
                settled_decoding_s=None if settled is None else max(0.0, settled - all_decoding_s),
                swings=swings(sizes, band),
                outside_share=float((abs(sizes[ready] - at) > band).mean()),
                error=float(np.median(step_errors(promptless))) if promptless else None,
            )
        )
        begun_s = taken[-1].time_s
    return rows


def hog_rows(steps: Sequence[ShiftStep]) -> list[HogRow]:
    """A row for every phase of `run_hogs`' steps, the undisturbed one first."""
    rows: list[HogRow] = []
    usual_ms: dict[int, float] = {}
    for phase, taken in by_phase(steps).items():
        counted = [step for step in taken if plain(step)]
        errors, verify_errors = step_errors(counted), verify_step_errors(counted)
        smooth, verify_smooth = smoothed_errors(errors), smoothed_errors(verify_errors)
        late, half = smooth[RECOVERY_STEPS:], len(counted) // 2
        usual_ms = usual_ms or _ms_by_nodes(counted)
        ratios = [step.measured_ms / usual_ms[_nodes(step)] for step in counted if _nodes(step) in usual_ms]
        rows.append(
            HogRow(
                phase=phase,
                steps=len(counted),
                step_ms=median(step.measured_ms for step in counted),
                slowdown=median(ratios) if ratios else None,
                good_after_steps=good_after_steps(smooth),
                verify_good_after_steps=good_after_steps(verify_smooth),
                first_good_after_steps=first_good_after_steps(smooth),
                verify_first_good_after_steps=first_good_after_steps(verify_smooth),
                outside_share=float((late > WITHIN).mean()) if len(late) else None,
                error=float(np.median(errors[half:])),
                verify_error=float(np.median(verify_errors[half:])),
            )
        )
    return rows


def by_phase(steps: Sequence[ShiftStep]) -> dict[str, list[ShiftStep]]:
    """The steps of each phase, in order."""
    phases: dict[str, list[ShiftStep]] = {}
    for step in steps:
        phases.setdefault(step.phase, []).append(step)
    return phases


def plain(step: ShiftStep) -> bool:
    """Whether all streams decoded, and no prompt was run beside them."""
    return step.sequences == step.streams and not step.prefill_tokens


def smoothed_sizes(times_s: Floats, sizes: Sequence[float]) -> Floats:
    """float64 [n]: the median of the steps of the last 0.5 s up to each one, and of the last 5 steps at least.

    Nothing before the first step is looked at, so the first medians are of fewer steps.
    """
    firsts = np.minimum(
        np.searchsorted(times_s, times_s - SIZE_WINDOW_S), np.arange(len(times_s)) + 1 - LEAST_WINDOW_STEPS
    )
    return np.asarray([np.median(sizes[max(0, first) : end]) for end, first in enumerate(firsts.tolist(), 1)])


def level(times_s: Floats, sizes: Floats) -> tuple[float, float]:
    """(level, band) of a phase: the median of `sizes` over the later half of its time, and the larger of one node and
    25 % of that."""
    at = float(np.median(sizes[times_s >= (times_s[0] + times_s[-1]) / 2]))
    return at, max(BAND_NODES, BAND_SHARE * at)


def settled_s(times_s: Floats, sizes: Floats, at: float, band: float, since_s: float) -> float | None:
    """When `sizes` came within `band` of `at` to stay until the end: the time of the first step from which they do.

    None if they are still outside in the later half of the time from `since_s` on, by which the level was judged: then
    there is no telling that they ever stay.
    """
    outside = np.flatnonzero(abs(sizes - at) > band)
    if not len(outside):
        return 0.0
    last = int(outside[-1])
    if times_s[last] >= (since_s + times_s[-1]) / 2:
        return None
    return float(times_s[last + 1])


def swings(sizes: Floats, band: float) -> int:
    """How often `sizes` turned round: fell by more than `band` behind a rise by more than `band`, or the reverse."""
    turns, direction, low, high = 0, 0, sizes[0], sizes[0]
    for size in sizes.tolist():
        low, high = min(low, size), max(high, size)
        if direction >= 0 and high - size > band:
            turns, direction, low = turns + (direction > 0), -1, size
        elif direction <= 0 and size - low > band:
            turns, direction, high = turns + (direction < 0), 1, size
        if direction > 0:
            low = size
        elif direction < 0:
            high = size
    return turns


def step_errors(steps: Sequence[ShiftStep]) -> Floats:
    """float64 [n]: |predicted - measured| / measured step time."""
    return np.asarray([abs(step.predicted_ms / step.measured_ms - 1) for step in steps])


def verify_step_errors(steps: Sequence[ShiftStep]) -> Floats:
    """float64 [n]: the same of the verification pass, as predicted before it ran."""
    return np.asarray([abs(step.predicted_verify_ms / step.verify_ms - 1) for step in steps])


def smoothed_errors(errors: Floats) -> Floats:
    """float64 [n]: the median of the last 15 steps up to each one; of fewer at the beginning."""
    return np.asarray([np.median(errors[max(0, end - ERROR_STEPS) : end]) for end in range(1, len(errors) + 1)])


def good_after_steps(smooth: Floats) -> int | None:
    """After how many steps the smoothed error stays within 15 % until the end; None if it does not."""
    bad = np.flatnonzero(smooth > WITHIN)
    after = int(bad[-1]) + 1 if len(bad) else 0
    return after if after < len(smooth) else None


def first_good_after_steps(smooth: Floats) -> int | None:
    """After how many steps the smoothed error is within 15 % for the first time."""
    good = np.flatnonzero(smooth <= WITHIN)
    return int(good[0]) if len(good) else None


def _ms_by_nodes(steps: Sequence[ShiftStep]) -> dict[int, float]:
    """Median step time by the nodes that were verified for all requests together."""
    by_nodes: dict[int, list[float]] = {}
    for step in steps:
        by_nodes.setdefault(_nodes(step), []).append(step.measured_ms)
    return {nodes: median(taken_ms) for nodes, taken_ms in by_nodes.items()}


def _nodes(step: ShiftStep) -> int:
    return round(step.verified * step.sequences)
