"""The engine, its drafter and its planner in one process, for benchmarks."""

from __future__ import annotations

import time
from dataclasses import dataclass
from itertools import count, cycle

from transformers import PreTrainedTokenizerFast

from bench.common import Prompt
from drafter_svc.drafter import DrafterInfo, TreeDrafter, build_drafter
from drafter_svc.proposer import Proposer
from lm.model import LanguageModel
from lm.store import vocabulary_sha256
from planner.fast.cost import as_decoded, verify_seconds
from planner.service.loop import PlanMaker, VerifierState
from planner.service.signals import Signals
from treeline.config import Config
from treeline.plan import CostCurve, CostModel, StepRecord, VerifierProfile
from treeline.sampling import SamplingParams
from verifier_svc.engine.engine import Engine
from verifier_svc.engine.request import Chunk, Completion, GenerationRequest
from verifier_svc.engine.sequence import Output
from verifier_svc.service.chat import token_ids_of
from verifier_svc.speculation.link import LocalLink


def encode(tokenizer: PreTrainedTokenizerFast, prompt: Prompt) -> list[int]:
    """A prompt as the user's turn of a chat; as it is for a model without a chat template."""
    chat = [{"role": "user", "content": prompt.text}]
    return token_ids_of(prompt.text if tokenizer.chat_template is None else chat, tokenizer)


class LocalPlanner:
    """The planning loop of one verifier; a new plan after every interval of the configuration, as in the service.

    Attributes:
        plan: the one in force.
    """

    def __init__(self, profile: VerifierProfile, config: Config) -> None:
        self._state = VerifierState(profile, "")
        self._maker = PlanMaker(config.limits, config.planner)
        self._signals = Signals(config.planner.signal_max_age_s)
        self._interval_s = config.planner.interval_s
        self._renew()

    def observe(self, record: StepRecord) -> None:
        self._state.observe(record)
        if time.monotonic() - self._made_s >= self._interval_s:
            self._renew()

    def _renew(self) -> None:
        self._made_s = time.monotonic()
        self.plan = self._maker.make(self._state, self._signals)


@dataclass(frozen=True)
class PlannedStep:
    """What a step did, and how many seconds the plan then in force would have given it."""

    record: StepRecord
    predicted_s: float


class PlannedEngine:
    """Engine, drafter and planner in this process, one thread, and no prefix cache: benchmarks repeat their prompts.

    Attributes:
        planner: may be exchanged while no request is open, so that what one has learnt is kept from another.
        steps: all steps so far; may be emptied.
    """

    def __init__(
        self,
        model: LanguageModel,
        config: Config,
        curves: tuple[CostCurve, ...],
        proposer: Proposer | None = None,
    ) -> None:
        """`proposer`: drafts in place of the drafter that `config` describes."""
        self._config = config
        drafter = self._build_drafter(model) if proposer is None else self._drafter_of(proposer)
        self._profile = VerifierProfile(curves, drafter.info.layer_s, drafter.info.node_s)
        self.planner = self.new_planner()
        verifier = config.verifier.model_copy(update={"prefix_caching": False})
        uncached = config.model_copy(update={"verifier": verifier})
        self.engine = Engine(model, LocalLink(drafter), lambda: self.planner.plan, uncached)
        self.steps: list[PlannedStep] = []

    def new_planner(self) -> LocalPlanner:
        """One that knows the device's profile and nothing else."""
        return LocalPlanner(self._profile, self._config)

    def _build_drafter(self, model: LanguageModel) -> TreeDrafter:
        config, sha256 = self._config, vocabulary_sha256(model.tokenizer)
        return build_drafter(config.drafter, config.verifier.target, config.limits, sha256)

    def _drafter_of(self, proposer: Proposer) -> TreeDrafter:
        sessions = self._config.drafter.max_sessions
        return TreeDrafter(DrafterInfo("proposer"), sessions, [proposer])

    def step(self) -> list[Output]:
        cost = self.planner.plan.cost
        outputs, record = self.engine.step()
        if record is not None:
            self.steps.append(PlannedStep(record, predicted_step_s(cost, record)))
            self.planner.observe(record)
        return outputs


def predicted_step_s(cost: CostModel, record: StepRecord) -> float:
    """Seconds that `cost` gives a step which drafts and verifies what this one did."""
    context_tokens = record.context_tokens // max(1, record.sequences)
    tokens = record.tokens - record.prefill_tokens + as_decoded(cost, record.prefill_tokens)
    verify_s = float(verify_seconds(cost, max(1, record.sequences), context_tokens, tokens)[-1])
    layers = record.draft_layer_nodes
    drafting_s = cost.draft_round_trip_s + cost.draft_sequence_s * record.sequences
    drafting_s += cost.draft_layer_s * len(layers) + cost.draft_node_s * sum(layers)
    draft_s = drafting_s if record.drafter_s else 0.0
    return draft_s + verify_s + cost.step_overhead_s


class Streams:
    """So many requests of one policy that run all the time: when one ends, the next prompt follows.

    Args:
        ignore_eos: every answer goes on to `max_tokens`.
    """

    def __init__(
        self,
        planned: PlannedEngine,
        prompts: list[list[int]],
        policy: str,
        max_tokens: int,
        streams: int,
        ignore_eos: bool = False,
    ) -> None:
        self._planned, self._policy, self._max_tokens = planned, policy, max_tokens
        self._prompts, self._streams, self._ignore_eos = cycle(prompts), streams, ignore_eos
        self._ids = count()
        self._open: set[str] = set()

    def add(self, token_ids: list[int]) -> str:
        """One request more than there were; its id."""
        request_id = str(next(self._ids))
        self._planned.engine.add(
            GenerationRequest(
                request_id,
                token_ids,
                SamplingParams(),
                self._max_tokens,
                ignore_eos=self._ignore_eos,
                policy=self._policy,
            )
        )
        self._open.add(request_id)
        return request_id

    def step(self) -> list[Output]:
        """One step of the engine, all streams busy."""
        while len(self._open) < self._streams:
            self.add(next(self._prompts))
        outputs = self._planned.step()
        self._open -= {output.request_id for output in outputs if isinstance(output.item, Completion)}
        return outputs

    def resize(self, streams: int) -> None:
        """So many from the next step on; where these are fewer, the clients that came last leave now."""
        self._streams = streams
        left = sorted(self._open, key=int)[streams:]
        self._planned.engine.abort(left)
        self._open.difference_update(left)

    def close(self) -> None:
        """End all that is open, and let the drafter hear of it."""
        self._planned.engine.abort(self._open)
        self._open.clear()
        self._planned.step()


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
