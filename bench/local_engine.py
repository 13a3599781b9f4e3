"""The engine, its drafter and its planner in one process, for benchmarks."""

from __future__ import annotations

import time
from dataclasses import replace

from transformers import PreTrainedTokenizerFast

from bench.common import Prompt
from bench.load import Clock
from drafter_svc.drafter import DrafterInfo, TreeDrafter, build_drafter
from drafter_svc.proposer import Proposer
from lm.model import LanguageModel
from lm.store import vocabulary_sha256
from planner.service.loop import PlanMaker, VerifierState
from treeline.config import Config
from treeline.drafting import DraftLink
from treeline.plan import CostCurve, VerifierProfile
from treeline.sampling import SamplingParams
from treeline.step_record import StepRecord
from verifier_svc.engine.engine import Engine
from verifier_svc.engine.request import Chunk, GenerationRequest
from verifier_svc.engine.sequence import Output
from verifier_svc.service.chat import Chat, token_ids_of
from verifier_svc.speculation.link import LocalLink


def encode(tokenizer: PreTrainedTokenizerFast, prompt: Prompt) -> list[int]:
    """A prompt as the user's turn of a chat; as it is for a model without a chat template."""
    chat = Chat([{"role": "user", "content": prompt.text}])
    return token_ids_of(prompt.text if tokenizer.chat_template is None else chat, tokenizer)


class LocalPlanner:
    """The planning loop of one verifier; a new plan after every interval of the configuration, as in the service.

    Attributes:
        plan: the one in force.
    """

    def __init__(self, profile: VerifierProfile, config: Config, clock: Clock = time.perf_counter) -> None:
        self._state = VerifierState(profile, "", clock)
        self._maker = PlanMaker(config.limits, config.planner)
        self._interval_s, self._clock = config.planner.interval_s, clock
        self._renew()

    def observe(self, record: StepRecord) -> None:
        # Only differences of the records' times are read, so they may be of any clock.
        self._state.observe(replace(record, unix_s=self._clock()))
        if self._clock() - self._made_s >= self._interval_s:
            self._renew()

    def _renew(self) -> None:
        self._made_s = self._clock()
        self.plan = self._maker.make(self._state)


class PlannedEngine:
    """Engine, drafter and planner in this process, one thread, and no prefix cache: benchmarks repeat their prompts.

    Attributes:
        last: the record of the last step in which anything ran.
    """

    def __init__(
        self,
        model: LanguageModel,
        config: Config,
        planner: LocalPlanner,
        link: DraftLink,
        clock: Clock = time.perf_counter,
    ) -> None:
        verifier = config.verifier.model_copy(update={"prefix_caching": False})
        uncached = config.model_copy(update={"verifier": verifier})
        self.planner = planner
        self.engine = Engine(model, link, lambda: planner.plan, uncached, clock)
        self.last: StepRecord | None = None

    def step(self) -> list[Output]:
        outputs, record = self.engine.step()
        if record is not None:
            self.last = record
            self.planner.observe(record)
        return outputs


def planned_engine(
    model: LanguageModel, config: Config, curves: tuple[CostCurve, ...], proposer: Proposer | None = None
) -> PlannedEngine:
    """An engine with the drafter that `config` describes, or with one built on `proposer`.

    Raises:
        ConfigError: the draft model or head cannot be loaded.
    """
    if proposer is None:
        sha256 = vocabulary_sha256(model.tokenizer)
        drafter = build_drafter(config.drafter, config.verifier.target, config.limits, sha256)
    else:
        drafter = TreeDrafter(DrafterInfo("proposer"), config.drafter.max_sessions, proposer)
    planner = LocalPlanner(VerifierProfile(curves, drafter.info.layer_s, drafter.info.node_s), config)
    return PlannedEngine(model, config, planner, LocalLink(drafter))


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
