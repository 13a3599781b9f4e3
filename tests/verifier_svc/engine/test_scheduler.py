"""Prompts share steps with decoding, in chunks that others can bear."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import count

import pytest

from lm.model import LanguageModel
from planner.fast.builtin_plan import builtin_plan
from tests.lm.tiny import tiny_llama, tiny_tokenizer
from treeline.config import Config, LimitsConfig, ModelConfig, VerifierConfig
from treeline.plan import CostCurve, CostModel, Plan
from treeline.sampling import SamplingParams
from verifier_svc.engine.engine import Engine
from verifier_svc.engine.request import Completion, GenerationRequest
from verifier_svc.engine.scheduler import AGEING_S, LEAST_CHUNK_TOKENS, MAX_STRETCH

LIMITS = LimitsConfig(max_running_requests=8, max_context_tokens=256, max_tree_nodes=0)
CHUNK, BLOCK, LONG = 64, 4, 150


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return LanguageModel.from_hf(tiny_llama(), tiny_tokenizer())


def plan_of(seconds_of_64: float, version: int = 1, prompt_ratio: float = 1.0) -> Plan:
    """One second up to 4 tokens, then a straight line to these seconds."""
    curve = CostCurve(1, 64, (1, 4, 64), (1.0, 1.0, seconds_of_64))
    return replace(builtin_plan(LIMITS), version=version, cost=CostModel((curve,), prompt_ratio=prompt_ratio))


def chunks(model: LanguageModel, plan: Plan, streams: int, prompts: int = 1) -> list[int]:
    """How the steps share out so many long prompts that come when so many others decode."""
    verifier = VerifierConfig(
        target=ModelConfig(dtype="float32"),
        kv_cache_tokens=1024,
        kv_block_tokens=BLOCK,
        prefill_chunk_tokens=CHUNK,
        prefix_caching=False,
    )
    engine = Engine(model, None, lambda: plan, Config(verifier=verifier, limits=LIMITS))

    def add(name: str, tokens: int) -> None:
        ids = [1 + i % 200 for i in range(tokens)]
        engine.add(GenerationRequest(name, ids, SamplingParams(), 80, ignore_eos=True, policy="off"))

    for index in range(streams):
        add(str(index), 3)
    engine.step()
    for index in range(prompts):
        add(f"long {index}", LONG)
    taken: list[int] = []
    while sum(taken) < LONG:
        record = engine.step()[1]
        assert record is not None
        assert record.sequences == streams  # nobody is left out meanwhile
        taken.append(record.prefill_tokens)
    return taken


def test_a_chunk_is_as_long_as_those_who_decode_can_bear(model):
    line = (6.0 - 1.0) / 60  # seconds a token
    bearable = int(4 + (MAX_STRETCH - 1) / line) - 4
    taken = chunks(model, plan_of(6.0), streams=4)
    assert taken[:-1] == [bearable] * (len(taken) - 1)
    assert LEAST_CHUNK_TOKENS < bearable < CHUNK


def test_a_chunk_of_cheaper_tokens_is_longer(model):
    usual = chunks(model, plan_of(6.0), streams=4)[0]
    assert chunks(model, plan_of(6.0, prompt_ratio=0.5), streams=4)[0] == 2 * usual
    assert chunks(model, plan_of(1.5, prompt_ratio=0.5), streams=4)[0] == CHUNK, "but no longer than configured"


def test_a_chunk_keeps_the_step_budget_and_grows_with_what_waiting_costs(model):
    line = (6.0 - 1.0) / 60
    assert chunks(model, replace(plan_of(6.0), step_budget_s=2.0), streams=4)[0] == int(4 + 1.0 / line) - 4
    assert chunks(model, replace(plan_of(6.0), step_budget_s=0.1), streams=4)[0] == LEAST_CHUNK_TOKENS
    late = replace(plan_of(6.0), wait_factor=1.5)
    assert chunks(model, late, streams=4)[0] == int(4 + (1.5 * MAX_STRETCH - 1) / line) - 4
    assert chunks(model, replace(late, step_budget_s=2.0), streams=4)[0] == int(4 + 1.0 / line) - 4


def test_few_who_decode_wait_longer_for_many_prompts(model):
    line = (41.0 - 1.0) / 60
    bearable = int(4 + (3 * MAX_STRETCH - 1) / line) - 1
    taken = chunks(model, plan_of(41.0), streams=1, prompts=3)
    assert taken[0] == bearable
    assert LEAST_CHUNK_TOKENS < bearable < CHUNK


def test_a_prompt_always_gets_on_by_a_few_tokens(model):
    assert chunks(model, plan_of(1000.0), streams=4)[0] == LEAST_CHUNK_TOKENS


@pytest.mark.parametrize(
    ("streams", "plan"),
    [(0, plan_of(1000.0)), (4, plan_of(1.5)), (4, plan_of(1000.0, version=0))],
    ids=["nobody decodes", "it costs little", "the costs are a guess"],
)
def test_elsewhere_chunks_are_as_long_as_configured(model, streams, plan):
    assert chunks(model, plan, streams) == [CHUNK, CHUNK, LONG - 2 * CHUNK]


def test_a_queue_of_prompts_raises_the_price_of_a_second(model):
    """Three slots: one request decodes, the prompts of two share a step, a third has to wait for a slot."""
    limits = LIMITS.model_copy(update={"max_running_requests": 3})
    plan = plan_of(1000.0)  # at a price that leaves prompts the least chunk
    engine = Engine(model, None, lambda: plan, Config(limits=limits))

    def add(name: str, tokens: int) -> None:
        engine.add(GenerationRequest(name, [5] * tokens, SamplingParams(), 8, ignore_eos=True, policy="off"))

    add("first", 3)
    engine.step()
    for name in ("second", "third", "fourth"):
        add(name, 40)
    batch = engine.scheduler.schedule(plan)
    assert (len(batch.decoding), len(batch.prefilling), batch.prices.startable) == (1, 1, 1)
    assert batch.prices.price(10.0) == pytest.approx(10.0 * (1 + 1))


class Queue:
    """An engine whose time the test sets. `started`: requests in the order of their first tokens."""

    def __init__(self, model: LanguageModel, slots: int = 1) -> None:
        self.now_s = 0.0
        verifier = VerifierConfig(target=ModelConfig(dtype="float32"), kv_block_tokens=BLOCK)
        limits = LIMITS.model_copy(update={"max_running_requests": slots})
        config = Config(limits=limits, verifier=verifier)
        self.engine = Engine(model, None, lambda: plan_of(1.5), config, clock=lambda: self.now_s)
        self.started: list[str] = []
        self.tokens: Counter[str] = Counter()
        self.open: Counter[str] = Counter()
        self._number = count()

    def add(self, client: str, priority: int = 0, tokens: int = 4, **fields: object) -> str:
        name = f"{client} {next(self._number)}"
        self.open[client] += 1
        self.engine.add(
            GenerationRequest(
                name,
                [5, 6],
                SamplingParams(),
                tokens,
                ignore_eos=True,
                policy="off",
                priority=priority,
                client=client,
                **fields,
            )
        )
        return name

    def step(self, step_s: float = 0.1) -> None:
        self.now_s += step_s
        for output in self.engine.step()[0]:
            client = output.request_id.split()[0]
            if isinstance(output.item, Completion):
                self.open[client] -= 1
            else:
                if output.item.first:
                    self.started.append(output.request_id)
                self.tokens[client] += len(output.item.token_ids)


def test_higher_priorities_then_resumed_requests_start_first(model):
    queue = Queue(model)
    new = queue.add("c")
    resumed = queue.add("c", delivered_token_ids=(9,))
    high, low = queue.add("c", 1), queue.add("c", -1)
    order = []
    while queue.engine.has_work:
        queue.step()
        order += [s.request.request_id for s in queue.engine.scheduler.running]
    assert list(dict.fromkeys(order)) == [high, resumed, new, low]


@pytest.mark.parametrize("client", ["own", "same"])
def test_the_lowest_priority_starts_in_time_under_permanent_load_of_the_highest(model, client):
    """Four times a second a request of the highest priority comes, and twice a second one request of all may start."""
    queue = Queue(model)
    for _ in range(4):
        queue.add("same", 4)
    lowest = queue.add(client, -4)
    while lowest not in queue.started:
        for _ in range(2):
            queue.add("same", 4)
        for _ in range(4):
            queue.step(0.125)
        assert queue.now_s < 8 * AGEING_S + 2, "one priority every AGEING_S, then its turn"
    assert queue.now_s > 6 * AGEING_S, "priorities count for a while"


def served(model: LanguageModel, weights: dict[str, float], demand: dict[str, int], steps: int) -> Counter[str]:
    """Tokens of each client, where each keeps so many requests open, of 8 tokens."""
    queue = Queue(model, slots=4)
    for _ in range(steps):
        for client, wanted in demand.items():
            while queue.open[client] < wanted:
                queue.add(client, tokens=8, client_weight=weights.get(client, 1.0))
        queue.step()
    return queue.tokens


def test_one_polite_client_gets_its_share_among_24_greedy_ones(model):
    greedy = {f"greedy{i}": 4 for i in range(24)}
    tokens = served(model, {}, {**greedy, "polite": 1}, 600)
    assert tokens["polite"] >= tokens.total() / 25
    shares = [tokens[name] for name in greedy]
    assert max(shares) - min(shares) <= 16, "two requests of 8 tokens"


def test_shares_are_weighted_and_what_is_not_used_is_given_back(model):
    tokens = served(model, {"heavy": 3.0}, {"heavy": 6, "light": 6}, 400)
    assert tokens["heavy"] / tokens["light"] == pytest.approx(3.0, rel=0.1)
    queue = Queue(model)
    for client in ("long", "short"):  # one asks for ten times as much and is stopped by the same token
        queue.add(client, tokens=4)
    queue.step()
    (first,) = queue.engine.scheduler.running
    turns = queue.engine.scheduler._shares
    before = turns.turn(first.request.client)
    queue.engine.abort([first.request.request_id])
    assert turns.turn(first.request.client) == before - first.remaining_tokens


def test_nobody_pays_later_for_what_nobody_else_wanted(model):
    queue = Queue(model)
    for _ in range(30):
        queue.add("alone")
        while queue.open["alone"]:
            queue.step()
    tokens, queue.tokens = queue.tokens, Counter()
    assert tokens["alone"] == 120
    for _ in range(200):
        for client in ("alone", "late"):
            while queue.open[client] < 3:
                queue.add(client)
        queue.step()
    assert abs(queue.tokens["alone"] - queue.tokens["late"]) <= 12
