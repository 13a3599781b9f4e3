"""The ground shifts under the real engine: streams come and go at once, and a neighbour takes the processor."""

from __future__ import annotations

import time
from collections.abc import Callable

from bench.local_engine import PlannedEngine, Streams
from bench.shifts_hogs import cpu_hogs
from bench.shifts_report import ERROR_STEPS, WITHIN, ShiftStep, plain, smoothed_errors, step_errors
from treeline.errors import ConfigError
from verifier_svc.engine.request import Chunk

POLICY = "smart"
ALONE, CROWD, ALONE_AGAIN = "one stream", "all streams", "one again"
UNDISTURBED, HOGS, HOGS_GONE = "undisturbed", "hogs", "hogs gone"
MOST_WARM_UP = 4
"""The undisturbed part is at most so many times as long as asked for, while predictions are not good yet."""
MOST_STEPS = 20
"""Times the steps asked for: if a prompt is run in nearly all of them, there is nothing to be measured."""


class _Run:
    """Steps of one load under one planner that starts anew, with their times."""

    def __init__(self, planned: PlannedEngine, prompts: list[list[int]], max_tokens: int, streams: int) -> None:
        planned.planner = planned.new_planner()
        self._planned, self._streams = planned, streams
        self._load = Streams(planned, prompts, POLICY, max_tokens, streams)
        self._begun_s = time.perf_counter()
        self._answered: set[str] = set()

    @property
    def now_s(self) -> float:
        return time.perf_counter() - self._begun_s

    def resize(self, streams: int) -> None:
        self._streams = streams
        self._load.resize(streams)

    def step(self, phase: str) -> ShiftStep:
        outputs = self._load.step()
        self._answered |= {output.request_id for output in outputs if isinstance(output.item, Chunk)}
        taken = self._planned.steps.pop()
        record, requests = taken.record, max(1, taken.record.sequences)
        return ShiftStep(
            phase=phase,
            time_s=self.now_s,
            streams=self._streams,
            sequences=record.sequences,
            prefill_tokens=record.prefill_tokens,
            all_decoding=len(self._answered) >= self._streams,
            drafted=record.drafted_nodes / requests,
            verified=record.verified_nodes / requests,
            predicted_ms=1e3 * taken.predicted_s,
            measured_ms=1e3 * record.step_s,
            predicted_verify_ms=1e3 * record.predicted_verify_s,
            verify_ms=1e3 * record.verify_s,
            price=self._planned.planner.plan.price,
        )

    def close(self) -> None:
        self._load.close()
        self._planned.steps.clear()


def run_load(
    planned: PlannedEngine,
    prompts: list[list[int]],
    streams: int,
    seconds: float,
    max_tokens: int,
    on_progress: Callable[[str], None] = lambda what: None,
) -> list[ShiftStep]:
    """One stream, then `streams` at once, then one again; each for `seconds` from when all of them decode.

    Args:
        max_tokens: of each answer; a stream whose answer ends goes on with the next prompt.
        on_progress: called with what comes next.
    """
    run, steps = _Run(planned, prompts, max_tokens, 1), list[ShiftStep]()
    for phase, count in ((ALONE, 1), (CROWD, streams), (ALONE_AGAIN, 1)):
        on_progress(phase)
        run.resize(count)
        until_s = None
        while until_s is None or run.now_s < until_s:
            steps.append(run.step(phase))
            if until_s is None and steps[-1].all_decoding:
                until_s = run.now_s + seconds
    run.close()
    return steps


def run_hogs(
    planned: PlannedEngine,
    prompts: list[list[int]],
    streams: int,
    hogs: int,
    steps: int,
    max_tokens: int,
    on_progress: Callable[[str], None] = lambda what: None,
) -> list[ShiftStep]:
    """`streams` undisturbed, then beside so many CPU hogs, then undisturbed again; for `steps` steps each.

    The first part goes on until predictions are good, for four times as many steps at most. Steps with a prompt in them
    are returned, but not counted. Other arguments as for `run_load`.

    Raises:
        ConfigError: answers are so short for so many streams that nearly every step has a prompt in it.
    """
    run = _Run(planned, prompts, max_tokens, streams)
    on_progress(UNDISTURBED)
    taken = _counted_steps(run, UNDISTURBED, steps)
    for _ in range(MOST_WARM_UP - 1):
        if _predicts_well(taken):
            break
        taken += _counted_steps(run, UNDISTURBED, steps)
    on_progress(HOGS)
    with cpu_hogs(hogs):
        taken += _counted_steps(run, HOGS, steps)
    on_progress(HOGS_GONE)
    taken += _counted_steps(run, HOGS_GONE, steps)
    run.close()
    return taken


def _counted_steps(run: _Run, phase: str, count: int) -> list[ShiftStep]:
    """Steps until `count` of them had all streams decode and no prompt."""
    taken, counted = list[ShiftStep](), 0
    while counted < count:
        if len(taken) >= MOST_STEPS * count:
            raise ConfigError("a prompt is run in nearly every step: ask for fewer streams, or for longer answers")
        taken.append(run.step(phase))
        counted += plain(taken[-1])
    return taken


def _predicts_well(steps: list[ShiftStep]) -> bool:
    errors = step_errors([step for step in steps if plain(step)][-ERROR_STEPS:])
    return bool(smoothed_errors(errors)[-1] <= WITHIN)
