"""Where the time of an engine's step goes, seen from outside: the parts of one engine, each wrapped by a clock."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from bench.local_engine import PlannedEngine
from treeline.drafting import DraftReply
from verifier_svc.speculation import drafts

PHASES = (
    "schedule",
    "gate",
    "draft messages",
    "draft trees",
    "draft passes",
    "prune",
    "verification pass",
    "sample, walk",
    "commit",
    "stream",
    "other",
)
"""draft messages: what drafter and verifier tell each other, hidden states, trees cut; draft trees: sessions, lookups,
growth; stream: tokens to text; other: packing the pass, the step's record, and whatever no clock sees."""
MODELS = ("draft passes", "verification pass")
PLANNER = "planner"
"""Learning from the step and, now and then, a new plan. In a service this is another process: it is no phase."""


class Stopwatch:
    """Seconds of each phase of the step at hand. What a phase calls counts there, and not in its caller as well.

    Attributes:
        seconds: by phase, since the last `take`.
    """

    def __init__(self, device: torch.device) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._device = device
        self._within: list[float] = []
        """Of each running call, the seconds that its own calls took so far."""

    def take(self) -> dict[str, float]:
        """By phase, all of them, and start anew."""
        taken, self.seconds = self.seconds, defaultdict(float)
        return {phase: taken[phase] for phase in (*PHASES, PLANNER)}

    def timed(self, phase: str, function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        self._within.append(0.0)
        started_s = time.perf_counter()
        try:
            result = function(*arguments, **options)
            if phase in MODELS and self._device.type == "cuda":
                torch.cuda.synchronize(self._device)
        finally:
            taken_s = time.perf_counter() - started_s
            self.seconds[phase] += taken_s - self._within.pop()
            if self._within:
                self._within[-1] += taken_s
        if isinstance(result, DraftReply):
            self._split_drafting(result)
        return result

    def _split_drafting(self, reply: DraftReply) -> None:
        """The drafter times its own passes, layer by layer."""
        passes_s = sum(reply.stats.layer_s)
        self.seconds["draft passes"] += passes_s
        self.seconds["draft trees"] -= passes_s


@contextmanager
def watch(planned: PlannedEngine) -> Iterator[Stopwatch]:
    """Clocks on all parts of this engine; taken off again at the end."""
    engine, stage = planned.engine, planned.engine.draft_stage
    parts: list[tuple[Any, str, str]] = [
        (planned, "step", PLANNER),
        (engine, "step", "other"),
        (engine.scheduler, "schedule", "schedule"),
        (stage, "run", "draft messages"),
        (stage, "_choose", "gate"),
        (stage, "_undrafted", "draft trees"),
        (stage.link, "draft", "draft trees"),
        (drafts, "prune_batch", "prune"),
        (stage.hidden_states, "keep", "draft messages"),
        (engine.model, "forward", "verification pass"),
        (engine, "_walk", "sample, walk"),
        (engine, "_commit", "commit"),
        (engine, "_accept", "stream"),
        (engine, "_outputs", "stream"),
    ]
    stopwatch = Stopwatch(engine.model.device)
    own = [(owner, name, vars(owner)[name]) for owner, name, _ in parts if name in vars(owner)]
    for owner, name, phase in parts:
        setattr(owner, name, partial(stopwatch.timed, phase, getattr(owner, name)))
    try:
        yield stopwatch
    finally:
        for owner, name, _ in parts:
            delattr(owner, name)
        for owner, name, function in own:  # what was no class's method, but there itself
            setattr(owner, name, function)
