"""What a step costs outside the models: the real engine, its steps taken apart."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import median

from bench.local_engine import PlannedEngine, Streams
from bench.stopwatch import MODELS, PHASES, PLANNER, Stopwatch, watch

WARM_UP_STEPS = 8
SAMPLING = "sample, walk"


@dataclass(frozen=True)
class EngineRow:
    """One phase of the steps of one policy with so many running requests.

    Attributes:
        ms: median over the steps.
        share: of the time of all these steps together.
    """

    policy: str
    sequences: int
    phase: str
    ms: float
    share: float


@dataclass(frozen=True)
class Overhead:
    """What steps spent beside computing.

    Attributes:
        steps: that only decoded, with all requests running.
        step_ms, verified_nodes: median of a step, and mean draft nodes verified for each request in it.
        outside_models_share: of the time of all steps: all but the passes of drafter and target.
        bookkeeping_share: all but these passes and the choice of tokens: scheduling, planning, pruning, messages,
            trees, commit, text.
        planner_ms: mean milliseconds a step that the planning loop takes, which a service runs in another process.
    """

    policy: str
    sequences: int
    steps: int
    step_ms: float
    verified_nodes: float
    outside_models_share: float
    bookkeeping_share: float
    planner_ms: float


def run_engine(
    planned: PlannedEngine,
    prompts: list[list[int]],
    policies: list[str],
    sequences: list[int],
    steps: int,
    max_tokens: int,
    on_progress: Callable[[str], None] = lambda what: None,
) -> tuple[list[EngineRow], list[Overhead]]:
    """Take apart `steps` steps of every policy at every load.

    Args:
        on_progress: called with what comes next.
    """
    rows, overheads = [], []
    with watch(planned) as stopwatch:
        for running in sequences:
            for policy in policies:
                on_progress(f"{policy}, {running} sequences")
                planned.planner = planned.new_planner()
                load = Streams(planned, prompts, policy, max_tokens, running)
                taken = list(_decode_steps(planned, stopwatch, load, running, steps))
                load.close()
                rows += _rows(policy, running, [seconds for seconds, _ in taken])
                overheads.append(_overhead(policy, running, taken))
    return rows, overheads


def _decode_steps(
    planned: PlannedEngine, stopwatch: Stopwatch, load: Streams, sequences: int, steps: int
) -> Iterator[tuple[dict[str, float], int]]:
    """(seconds by phase, verified nodes) of steps without a prompt in them, all requests running, once warmed up."""
    seen = 0
    while seen < WARM_UP_STEPS + steps:
        stopwatch.take()
        load.step()
        record = planned.steps.pop().record
        if record.sequences == sequences and not record.prefill_tokens:
            seen += 1
            if seen > WARM_UP_STEPS:
                yield stopwatch.take(), record.verified_nodes


def _rows(policy: str, sequences: int, taken: list[dict[str, float]]) -> list[EngineRow]:
    total_s = sum(seconds[phase] for seconds in taken for phase in PHASES)
    return [
        EngineRow(
            policy,
            sequences,
            phase,
            1e3 * median(seconds[phase] for seconds in taken),
            sum(seconds[phase] for seconds in taken) / total_s,
        )
        for phase in PHASES
    ]


def _overhead(policy: str, sequences: int, taken: list[tuple[dict[str, float], int]]) -> Overhead:
    steps_s = [sum(seconds[phase] for phase in PHASES) for seconds, _ in taken]

    def share(*apart: str) -> float:
        return 1 - sum(seconds[phase] for seconds, _ in taken for phase in apart) / sum(steps_s)

    return Overhead(
        policy=policy,
        sequences=sequences,
        steps=len(taken),
        step_ms=1e3 * median(steps_s),
        verified_nodes=sum(nodes for _, nodes in taken) / len(taken) / sequences,
        outside_models_share=share(*MODELS),
        bookkeeping_share=share(*MODELS, SAMPLING),
        planner_ms=1e3 * sum(seconds[PLANNER] for seconds, _ in taken) / len(taken),
    )
