"""The engine, its drafter and its planner in one process, for benchmarks."""

from __future__ import annotations

from drafter_svc.drafter import build_drafter
from lm.model import LanguageModel
from lm.store import vocabulary_sha256
from planner.loop import PlanMaker, VerifierState
from planner.signals import Signals
from treeline.config import Config
from treeline.plan import CostCurve, Plan, StepRecord, VerifierProfile
from treeline.sampling import SamplingParams
from verifier_svc.engine import Engine
from verifier_svc.link import LocalLink
from verifier_svc.request import Chunk, GenerationRequest
from verifier_svc.sequence import Output

REPLAN_STEPS = 8


class PlannedEngine:
    """Engine, drafter and planner in this process, one thread, the plan renewed every few steps.

    Attributes:
        records: of all steps so far.
    """

    def __init__(self, model: LanguageModel, config: Config, curves: tuple[CostCurve, ...]) -> None:
        sha256 = vocabulary_sha256(model.tokenizer)
        drafter = build_drafter(config.drafter, config.verifier.target, config.limits, lambda: self._plan, sha256)
        self.engine = Engine(model, LocalLink(drafter), lambda: self._plan, config)
        self._state = VerifierState(VerifierProfile(curves, drafter.info.layer_s, drafter.info.node_s), "")
        self._maker = PlanMaker(config.limits, config.planner)
        self.records: list[StepRecord] = []
        self._signals = Signals(config.planner.signal_max_age_s)
        self._plan: Plan = self._maker.make(self._state, self._signals)

    def step(self) -> list[Output]:
        outputs, record = self.engine.step()
        if record is not None:
            self.records.append(record)
            self._state.observe(record)
            if record.step_id % REPLAN_STEPS == 0:
                self._plan = self._maker.make(self._state, self._signals)
        return outputs


def greedy_answers(
    planned: PlannedEngine, prompts: list[list[int]], policies: list[str], max_tokens: int, batch: int
) -> tuple[list[list[int]], int]:
    """The engine's greedy answers, with the real planner deciding, and how many draft nodes were accepted."""
    answers: dict[str, list[int]] = {str(i): [] for i in range(len(prompts))}
    waiting = list(enumerate(zip(prompts, policies, strict=True)))
    open_requests = accepted = 0
    while waiting or open_requests:
        while waiting and open_requests < batch:
            index, (token_ids, policy) = waiting.pop(0)
            planned.engine.add(GenerationRequest(str(index), token_ids, SamplingParams(), max_tokens, policy=policy))
            open_requests += 1
        for output in planned.step():
            if isinstance(output.item, Chunk):
                answers[output.request_id] += output.item.token_ids
            else:
                open_requests -= 1
                accepted += output.item.speculation.accepted_nodes
    return [answers[str(i)] for i in range(len(prompts))], accepted
