"""What a pass costs, by its number of tokens: ours beside transformers' and beside the limit of the machine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial

import torch

from bench.common import Row, spread
from bench.step.limits import MachineLimit, ModelSize, Point, measure_limit, timed_s
from bench.step.passes import (
    Pass,
    PassMaker,
    head_passes,
    load_transformers,
    transformers_passes,
    treeline_passes,
)
from lm.draft_head import DraftHead
from lm.model import LanguageModel
from treeline.config import ModelConfig

TOKENS = (1, 2, 4, 8, 16, 32, 64)
SEQUENCES = (1, 4, 8, 16)
CONTEXTS = (128, 1024)
QUICK = (Point(1, 1, 128), Point(8, 1, 128), Point(32, 1, 128), Point(8, 8, 128))


def grid() -> list[Point]:
    """All combinations in which every sequence has a token."""
    return [Point(t, s, c) for c in CONTEXTS for s in SEQUENCES for t in TOKENS if t >= s]


@dataclass(frozen=True)
class Subject:
    """Something whose passes are measured.

    Attributes:
        model: "target" or "drafter".
        size: what the limit is computed from; None leaves it out.
        max_context_tokens: points beyond it are left out.
        dtype, device: of its weights.
        makers: by system, what makes its passes; "treeline", and "transformers" where it has such a pass.
    """

    model: str
    size: ModelSize | None
    max_context_tokens: int
    dtype: torch.dtype
    device: torch.device
    makers: dict[str, PassMaker]


def model_subject(name: str, config: ModelConfig) -> Subject:
    """A language model, ours and transformers' own copy of it.

    Raises:
        ConfigError: it cannot be loaded.
    """
    from bench.step.bound import bound_answer  # Imports the service, which random shapes do without.

    ours = LanguageModel.load(config)
    theirs = load_transformers(config.model, ours)
    makers = {
        "treeline": treeline_passes(ours, bound_answer(ours)),
        "transformers": transformers_passes(theirs, ours.layers),
    }
    size = ModelSize.of(theirs, ours)
    return Subject(name, size, ours.max_context_tokens, ours.dtype, ours.device, makers)


def head_subject(head: DraftHead, max_context_tokens: int) -> Subject:
    """A draft head. Its rows have no limit and no peer."""
    return Subject("drafter", None, max_context_tokens, head.dtype, head.device, {"treeline": head_passes(head)})


@dataclass(frozen=True)
class StepResult:
    """`rows`: one per subject and point; medians of the repeats in milliseconds, with extremes."""

    limit: MachineLimit
    rows: list[Row]

    def limit_json(self) -> dict[str, float | None]:
        """The machine's limits, and the least time of the target's first row."""
        first = next((row["limit_ms"] for row in self.rows if row["model"] == "target"), None)
        return asdict(self.limit) | {"pass_ms": first}


def run_step(
    subjects: list[Subject],
    points: list[Point],
    repeats: int,
    on_progress: Callable[[str], None] = lambda what: None,
) -> StepResult:
    """Measure the machine in the target's dtype, then every subject at every point its context allows.

    Args:
        subjects: the target first.
        repeats: timed passes of each system and point, taken in turns; one more before them only warms up.
        on_progress: called with what comes next, once before the limits and once before each subject's point.
    """
    on_progress("limits")
    limit = measure_limit(subjects[0].dtype, subjects[0].device)
    rows = []
    for subject in subjects:
        for point in points:
            on_progress(f"{subject.model}, {point.tokens} tokens")
            if point.context + point.tokens > subject.max_context_tokens:
                continue
            rows.append(_measure(subject, point, limit, repeats))
    return StepResult(limit, rows)


def _measure(subject: Subject, point: Point, limit: MachineLimit, repeats: int) -> Row:
    passes = {system: make(point) for system, make in subject.makers.items()}
    taken_ms: dict[str, list[float]] = {system: [] for system in passes}
    for repeat in range(1 + repeats):
        for system, measured in passes.items():
            elapsed_s = timed_s(measured.run, subject.device)
            measured.reset()
            if repeat:
                taken_ms[system].append(1e3 * elapsed_s)
    return {
        "model": subject.model,
        **asdict(point),
        **spread("ours_ms", taken_ms["treeline"]),
        **spread("transformers_ms", taken_ms.get("transformers", [])),
        "limit_ms": None if subject.size is None else limit.pass_ms(subject.size, point),
        **spread("grammar_ms", _grammar_ms(passes["treeline"], subject.device, repeats)),
    }


def _grammar_ms(measured: Pass, device: torch.device, repeats: int) -> list[float]:
    """What masks add to choosing tokens if every sequence is bound by a grammar, measured in turns."""
    if measured.choose_bound is None:
        return []
    logits, plain, bound = measured.forward(), measured.choose, measured.choose_bound
    measured.reset()
    taken_s = [[timed_s(partial(each, logits), device) for each in (plain, bound)] for _ in range(1 + repeats)]
    return [1e3 * (with_masks - without) for without, with_masks in taken_s[1:]]
