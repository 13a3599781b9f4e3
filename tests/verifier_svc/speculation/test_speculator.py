"""The drafting half of a step: who is asked, what it costs, whose nodes are kept."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lm.model import LanguageModel
from planner.fast.acceptance import prior
from planner.fast.gate import PROBE_REQUESTS
from tests.lm.tiny import tiny_llama, tiny_tokenizer
from tests.trees import tree_of
from treeline.config import Config, DrafterConfig, LimitsConfig, ModelConfig, VerifierConfig
from treeline.drafting import DraftReply, DraftRequest
from treeline.forest import Forest
from treeline.plan import CostCurve, CostModel, Plan
from treeline.sampling import SamplingParams
from verifier_svc.engine.detokenizer import Detokenizer
from verifier_svc.engine.engine import Engine
from verifier_svc.engine.request import Chunk, GenerationRequest
from verifier_svc.engine.sequence import MAX_URGENCY, Sequence

LIMITS = LimitsConfig(max_running_requests=16, max_context_tokens=256, max_tree_nodes=16, max_tree_depth=6)
CONFIG = Config(
    verifier=VerifierConfig(target=ModelConfig(dtype="float32"), kv_cache_tokens=4096, kv_block_tokens=4),
    limits=LIMITS,
)


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    torch.manual_seed(0)
    return LanguageModel.from_hf(tiny_llama(), tiny_tokenizer())


def plan(fixed_s: float, token_s: float, **cost: float) -> Plan:
    tokens = tuple(range(1, 129))
    curve = CostCurve(1, 64, tokens, tuple(fixed_s + token_s * n for n in tokens))
    return Plan(1, 0.0, 60.0, CostModel((curve,), **cost), prior(), 0.0, 16, 6)


class ChainLink:
    """A drafter that gives every request the same chain of quite likely nodes, and notes whom it was asked about."""

    connected = ready = True
    features = None

    def __init__(self) -> None:
        self.asked: list[int] = []
        self.weights: list[list[float]] = []
        self.limits_s: list[float] = []

    def refresh(self) -> None:
        pass

    def draft(self, request: DraftRequest, timeout_s: float) -> DraftReply:
        if request.sequences:
            self.asked.append(len(request.sequences))
            self.weights.append([sequence.weight for sequence in request.sequences])
            self.limits_s.append(timeout_s)
        tree = tree_of([5, 6, 7, 8], [-1, 0, 1, 2], [0.7] * 4)
        fits = [s.max_nodes >= 4 and s.max_depth >= 4 for s in request.sequences]
        forest = Forest.join([Forest.empty(0), *(tree if each else Forest.empty(1) for each in fits)])
        return DraftReply(request.step_id, forest)

    def close(self) -> None:
        pass


def steps(engine: Engine, requests: list[GenerationRequest], count: int) -> list:
    """Everything that so many steps after the prompts' brought."""
    for request in requests:
        engine.add(request)
    engine.step()
    return [output for _ in range(count) for output in engine.step()[0]]


def request(name: str, **changes) -> GenerationRequest:
    values = {"prompt_token_ids": [5, 6, 7], "sampling": SamplingParams(), "max_tokens": 100, "ignore_eos": True}
    return GenerationRequest(name, **{**values, **changes})


def test_where_drafting_cannot_pay_it_stops_and_every_step_is_predicted(model):
    link = ChainLink()
    engine = Engine(model, link, lambda: plan(0.0001, 0.004, draft_round_trip_s=0.05), CONFIG)
    for i in range(12):
        engine.add(request(f"r{i}", explain=True))
    records = [engine.step()[1] for _ in range(20)]
    assert max(link.asked) == PROBE_REQUESTS, "the first step taught that it does not pay"
    undrafted = [record for record in records if not record.prefill_tokens and not record.drafted_nodes]
    assert undrafted
    assert all(record.predicted_verify_s == pytest.approx(0.0001 + 0.004 * 12) for record in undrafted)
    assert all(record.draft_s == 0 for record in undrafted)


class Clock:
    """Seconds that pass only when somebody asks for the time."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        self.now_s += 0.01
        return self.now_s


def test_idle_times_do_not_hasten_probes(model):
    link, clock = ChainLink(), Clock()
    engine = Engine(model, link, lambda: plan(0.0001, 0.004, draft_round_trip_s=0.05), CONFIG, clock)
    for i in range(30):
        engine.add(request(f"r{i}", max_tokens=4))
        while engine.has_work:
            engine.step()
        clock.now_s += 1000.0
    assert len(link.asked) < 6, "of 30 requests, which would each be probed"


def test_fixed_policies_are_drafted_where_smart_ones_are_not(model):
    link = ChainLink()
    engine = Engine(model, link, lambda: plan(0.0001, 0.1, draft_sequence_s=0.05), CONFIG, Clock())
    steps(engine, [request("fixed", policy="chain:4"), *(request(f"r{i}") for i in range(3))], 6)
    assert link.asked[:2] == [1 + PROBE_REQUESTS, 1]  # in the first step nothing is known yet
    assert link.asked.count(1) > link.asked.count(1 + PROBE_REQUESTS)


def test_requests_without_a_tree_count_in_the_rule(model):
    """One smart request among eleven that are off: its nodes are priced by the whole batch's goodput."""
    link = ChainLink()
    engine = Engine(
        model, link, lambda: plan(0.001, 0.004), CONFIG.model_copy(update={"drafter": DrafterConfig(kind="head")})
    )
    engine.add(request("smart"))
    for i in range(11):
        engine.add(request(f"off{i}", policy="off"))
    engine.step()
    _, record = engine.step()
    # R is at least 12 tokens in 49 ms, so a node of 4 ms must bring 0.98 tokens; alone it would be worth it at 0.8.
    assert record.drafted_nodes == 4
    assert record.verified_nodes == 0


def sequence(model: LanguageModel, target_ms: float | None, tokens: int) -> Sequence:
    asked = request("r", target_ms=target_ms)
    text = Detokenizer(model.tokenizer.backend_tokenizer, ())
    made = Sequence(asked, 1, None, text, [5, 6, 7] + [9] * tokens, arrived_s=0.0)
    made.first_token_s = 10.0
    return made


def test_urgency_grows_with_the_tokens_behind_and_is_bounded(model):
    assert sequence(model, None, 1).urgency(100.0) == 1.0
    ahead, behind = sequence(model, 100.0, 21), sequence(model, 100.0, 9)
    assert ahead.urgency(11.0) == 1.0  # 10 tokens are due, 20 came
    assert behind.urgency(11.2) == pytest.approx(2.0)  # 12 are due, 8 came
    assert behind.urgency(11.6) == pytest.approx(4.0)
    assert behind.urgency(100.0) == MAX_URGENCY


def test_a_request_behind_its_target_gets_more_nodes_and_is_told_how_it_stands(model):
    link = ChainLink()
    engine = Engine(model, link, lambda: plan(0.010, 0.006), CONFIG)
    outputs = steps(engine, [request("late", target_ms=0.1, explain=True), request("calm", explain=True)], 6)
    late, calm = (
        [o.item.explanation for o in outputs if o.request_id == name and isinstance(o.item, Chunk)]
        for name in ("late", "calm")
    )
    assert sum(step.verified_nodes for step in late) > sum(step.verified_nodes for step in calm)
    assert "target 0.1: missed" in late[-1].reason
    assert "target" not in calm[-1].reason
    assert sum(link.weights[0]) == pytest.approx(2), "1 on average"
    engine.abort(["late", "calm"])


def test_whether_a_target_was_met_is_known_at_the_end(model):
    def met(target_ms: float | None) -> bool | None:
        outputs = steps(
            Engine(model, None, lambda: plan(0.01, 0.001), CONFIG), [request("r", max_tokens=4, target_ms=target_ms)], 6
        )
        return outputs[-1].item.target_met

    assert met(60000.0) is True
    assert met(0.1) is False
    assert met(None) is None


class LateLink(ChainLink):
    """Answers once, then never in time; its first answer tells what to expect."""

    def __init__(self) -> None:
        super().__init__()
        self.released: list[int] = []

    def draft(self, request: DraftRequest, timeout_s: float) -> DraftReply | None:
        self.released += request.released
        reply = super().draft(request, timeout_s)
        return reply if len(self.limits_s) == 1 else None


def test_a_late_draft_is_given_up_early_and_its_session_released(model):
    link = LateLink()
    engine = Engine(model, link, lambda: plan(0.010, 0.0002, draft_round_trip_s=0.001), CONFIG)
    engine.add(request("r"))
    for _ in range(60):
        engine.step()
    first, second, *more = link.limits_s
    assert first == CONFIG.verifier.draft_timeout_s, "nothing is known yet"
    assert second < 0.1
    assert more == sorted(more), "what comes late again and again was predicted wrong"
    engine.abort(["r"])
    assert engine.has_work
    engine.step()
    assert link.released == [1]
    assert not engine.has_work


def test_a_request_that_was_only_ever_drafted_late_is_released_too(model):
    link = LateLink()
    link.limits_s.append(0.0)  # even the first answer is late
    engine = Engine(model, link, lambda: plan(0.010, 0.0002), CONFIG)
    steps(engine, [request("r")], 3)
    assert link.asked
    engine.abort(["r"])
    engine.step()
    assert link.released == [1]


def test_a_drafter_that_has_much_to_catch_up_is_waited_for_longer(model):
    link = ChainLink()
    engine = Engine(model, link, lambda: plan(0.010, 0.0002, draft_node_s=0.0005), CONFIG)
    steps(engine, [request("r")], 3)
    usual_s = link.limits_s[-1]
    steps(engine, [request("long", prompt_token_ids=[5, 6, 7, 8] * 40)], 30)
    assert max(link.limits_s[1:]) > usual_s + 4 * 160 * 0.0005


def test_a_text_that_repeats_itself_is_drafted_without_the_drafter(model):
    engine = Engine(model, AbsentLink(), lambda: plan(0.010, 0.0001), CONFIG)
    engine.add(request("r", prompt_token_ids=[5, 6, 7, 8, 9] * 4, explain=True))
    records = [engine.step()[1] for _ in range(12)]
    engine.add(request("long", prompt_token_ids=list(range(5, 105)), max_tokens=1))
    records += [engine.step()[1] for _ in range(12)]
    assert any(record.verified_nodes for record in records if not record.prefill_tokens)
    assert any(record.verified_nodes for record in records if record.prefill_tokens)
    assert all(record.draft_s == 0 for record in records), "it is not the drafter's time"


def test_a_copy_that_does_not_pay_does_not_pay_beside_a_prompt_either(model):
    engine = Engine(model, AbsentLink(), lambda: plan(0.010, 0.010), CONFIG)
    engine.add(request("r", prompt_token_ids=[5, 6, 7, 8, 9] * 4))
    engine.step()
    engine.add(request("long", prompt_token_ids=list(range(5, 105)), max_tokens=1))
    records = [engine.step()[1] for _ in range(4)]
    assert any(record.prefill_tokens and record.sequences for record in records)
    assert not any(record.verified_nodes for record in records)


def test_a_copy_that_brings_less_than_trees_cost_beside_the_pass_is_left(model):
    brought, share = [], 0.02
    for fixed_s in np.linspace(0.0, 0.1, 51).tolist():
        priced = plan(fixed_s, 0.01, lookup_s=share * (fixed_s + 0.01))
        engine = Engine(model, AbsentLink(), lambda priced=priced: priced, CONFIG)
        engine.add(request("r", prompt_token_ids=[5, 6, 7, 8, 9] * 4))
        records = [engine.step()[1] for _ in range(12)]
        brought += [record.goodput * (fixed_s + 0.01) for record in records if record.verified_nodes]
    assert 1 + share < min(brought) < 1.1


@pytest.mark.parametrize(("kind", "policy"), [("head", "smart"), ("auto", "off")])
def test_texts_are_not_copied_where_that_was_not_asked_for(model, kind, policy):
    config = CONFIG.model_copy(update={"drafter": DrafterConfig(kind=kind)})
    engine = Engine(model, AbsentLink(), lambda: plan(0.010, 0.0001), config)
    engine.add(request("r", prompt_token_ids=[5, 6, 7, 8, 9] * 4, policy=policy))
    assert not any(engine.step()[1].drafted_nodes for _ in range(12))


class AbsentLink(ChainLink):
    """A drafter that is away."""

    ready = False
