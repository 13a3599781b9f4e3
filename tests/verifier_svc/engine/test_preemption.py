"""A cache that is too small for all who run costs time, and no text."""

from __future__ import annotations

from dataclasses import replace
from itertools import count

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from lm.model import LanguageModel
from planner.fast.builtin_plan import builtin_plan
from tests.verifier_svc.doubles import OracleDrafter
from tests.verifier_svc.engine.test_engine import Known, assert_all_free, prompts, tokens_of
from tests.verifier_svc.engine.test_engine import model as model  # a fixture
from tests.verifier_svc.engine.test_grammar import GRAMMARS
from tests.verifier_svc.engine.test_grammar import compile_grammar as compile_grammar  # a fixture
from treeline.config import Config, LimitsConfig, ModelConfig, VerifierConfig
from treeline.errors import InvalidRequestError
from treeline.sampling import SamplingParams
from verifier_svc.engine.engine import Engine
from verifier_svc.engine.request import Chunk, Completion, FinishReason, GenerationRequest
from verifier_svc.speculation.link import LocalLink

BLOCK = 4
SAMPLED = SamplingParams(temperature=0.9, top_p=0.95, repetition_penalty=1.2, frequency_penalty=0.3, seed=6)
SMALL, LARGE = 120, 4096


def engine_of(
    model: LanguageModel, tokens: int, drafter: OracleDrafter | None = None, caching: bool = True, running: int = 8
) -> Engine:
    limits = LimitsConfig(max_running_requests=running, max_context_tokens=256, max_tree_nodes=16, max_tree_depth=6)
    verifier = VerifierConfig(
        target=ModelConfig(dtype="float32"),
        kv_cache_tokens=tokens,
        kv_block_tokens=BLOCK,
        prefill_chunk_tokens=16,
        prefix_caching=caching,
    )
    plan = builtin_plan(limits)
    return Engine(
        model, LocalLink(drafter) if drafter else None, lambda: plan, Config(verifier=verifier, limits=limits)
    )


def finished(engine: Engine, requests: list[GenerationRequest]) -> tuple[dict[str, list], int]:
    """Each request's outputs, and how many preemptions there were."""
    outputs: dict[str, list] = {request.request_id: [] for request in requests}
    for request in requests:
        engine.add(request)
    preempted = steps = 0
    while engine.has_work:
        items, record = engine.step()
        for output in items:
            outputs[output.request_id].append(output.item)
        preempted += record.preempted if record else 0
        steps += 1
        assert steps < 5000, "nobody gets on"
    return outputs, preempted


def requests_of(model: LanguageModel, sampling: SamplingParams, policy: str) -> list[GenerationRequest]:
    return [
        GenerationRequest(f"r{i}", prompt, sampling, 70, ignore_eos=True, logprobs=1, policy=policy, priority=i % 2)
        for i, prompt in enumerate(prompts(model, 6))
    ]


@pytest.mark.parametrize(
    ("sampling", "policy"),
    [(SamplingParams(), "off"), (SAMPLED, "chain:4"), (SamplingParams(), "static:3-2-1"), (SAMPLED, "smart")],
)
def test_the_text_is_that_of_a_large_cache(model, sampling, policy):
    expected, preempted = finished(engine_of(model, LARGE), requests_of(model, sampling, "off"))
    assert not preempted
    known = Known()
    requests = requests_of(model, sampling, policy)
    for request in requests:
        known.add(request.prompt_token_ids, tokens_of(expected[request.request_id]))
    for caching in (True, False):
        drafter = OracleDrafter(known, model.vocab_size)
        engine = engine_of(model, SMALL, drafter, caching)
        outputs, preempted = finished(engine, requests)
        assert preempted > 3
        assert policy == "off" or drafter.drafted_nodes > 100, "trees take what is left"
        assert_all_free(engine, drafter)
        for request in requests:
            same_answer(outputs[request.request_id], expected[request.request_id])


def same_answer(items: list, expected: list) -> None:
    """Text, tokens, log-probabilities and usage."""

    def parts(items: list) -> tuple[str, list[int], list[int]]:
        chunks = [item for item in items if isinstance(item, Chunk)]
        probs = [position.token_id for chunk in chunks for position in chunk.logprobs]
        assert [chunk.first for chunk in chunks] == [True] + [False] * (len(chunks) - 1)
        return "".join(chunk.text for chunk in chunks), tokens_of(items), probs

    assert parts(items) == parts(expected)
    end, wanted = items[-1], expected[-1]
    assert isinstance(end, Completion)
    assert (end.finish_reason, end.matched_stop) == (wanted.finish_reason, wanted.matched_stop)
    assert (end.prompt_tokens, end.completion_tokens) == (wanted.prompt_tokens, wanted.completion_tokens)


def test_stop_strings_across_a_preemption_are_found(model):
    requests = requests_of(model, SamplingParams(), "off")
    whole, _ = finished(engine_of(model, LARGE), requests)
    texts = ["".join(item.text for item in whole[r.request_id] if isinstance(item, Chunk)) for r in requests]
    requests = [replace(r, stop=(text[40:46],)) for r, text in zip(requests, texts, strict=True)]
    expected, _ = finished(engine_of(model, LARGE), requests)
    outputs, preempted = finished(engine_of(model, SMALL), requests)
    assert preempted
    assert any(items[-1].finish_reason is FinishReason.STOP for items in expected.values())
    for request in requests:
        same_answer(outputs[request.request_id], expected[request.request_id])


@pytest.mark.parametrize("sampling", [SamplingParams(), SAMPLED], ids=["greedy", "sampled"])
def test_answers_in_a_grammar_go_on_across_preemption_and_resume(model, compile_grammar, sampling):
    grammar = compile_grammar(GRAMMARS["schema"])
    requests = [replace(r, grammar=grammar, ignore_eos=False) for r in requests_of(model, sampling, "chain:4")]
    whole, _ = finished(engine_of(model, LARGE), [replace(r, policy="off") for r in requests])
    for cut in (0, 7):
        begun = [replace(r, delivered_token_ids=tuple(tokens_of(whole[r.request_id])[:cut])) for r in requests]
        outputs, preempted = finished(engine_of(model, SMALL), begun)
        assert preempted
        for request in begun:
            tokens = tokens_of(outputs[request.request_id])
            assert [*request.delivered_token_ids, *tokens] == tokens_of(whole[request.request_id])


def test_the_last_that_came_of_the_lowest_priority_gives_way(model):
    engine = engine_of(model, SMALL)
    for name, priority in (("first", 0), ("low", -1), ("second", 0), ("high", 1)):
        engine.add(
            GenerationRequest(name, [5] * 12, SamplingParams(), 100, ignore_eos=True, policy="off", priority=priority)
        )
    order, told = [], set()
    while engine.has_work:
        _, record = engine.step()
        assert record is not None
        assert (len(record.gaps), len(record.first_token_s)) == (
            len(record.gap_priority),
            len(record.first_token_priority),
        )
        told |= set(record.gap_priority)
        for sequence in engine.scheduler.waiting:
            if sequence.preemptions and sequence.request.request_id not in order:
                order.append(sequence.request.request_id)
    assert order == ["low", "second", "first"]
    assert told == {-1, 0, 1}


def test_who_fits_alone_always_ends_and_others_are_refused(model):
    engine = engine_of(model, SMALL)
    requests = [GenerationRequest(f"r{i}", [5 + i] * 20, SamplingParams(), 100, ignore_eos=True) for i in range(3)]
    outputs, preempted = finished(engine, requests)
    assert preempted
    assert all(items[-1].completion_tokens == 100 for items in outputs.values())
    with pytest.raises(InvalidRequestError, match="KV cache"):
        engine.add(GenerationRequest("r", [5] * 20, SamplingParams(), 101, policy="off"))


def test_trees_never_cost_a_preemption(model):
    known = Known()
    requests = [
        GenerationRequest(f"r{i}", prompt, SamplingParams(), 15, ignore_eos=True, policy="static:3-2-1")
        for i, prompt in enumerate([[7 + i] * 25 for i in range(3)])
    ]
    expected, _ = finished(engine_of(model, LARGE), requests)
    for request in requests:
        known.add(request.prompt_token_ids, tokens_of(expected[request.request_id]))
    drafter = OracleDrafter(known, model.vocab_size)
    outputs, preempted = finished(engine_of(model, SMALL + 2 * BLOCK, drafter), requests)
    assert drafter.drafted_nodes
    assert not preempted, "three answers just fit"
    for request in requests:
        same_answer(outputs[request.request_id], expected[request.request_id])


def test_to_the_drafter_what_is_computed_again_is_another_request(model):
    """It would otherwise be sent hidden states of one token as those of another."""
    drafter = OracleDrafter(Known(), model.vocab_size)
    engine = engine_of(model, SMALL, drafter)
    for i in range(3):
        request = GenerationRequest(f"r{i}", [5 + i] * 20, SamplingParams(), 60, ignore_eos=True, policy="chain:4")
        engine.add(request)
    sequences = list(engine.scheduler.waiting)
    sessions: list[set[int]] = [set() for _ in sequences]
    while engine.has_work:
        engine.step()
        for seen, sequence in zip(sessions, sequences, strict=True):
            seen.add(sequence.session_id)
    preemptions = [sequence.preemptions for sequence in sequences]
    assert any(preemptions)
    assert [len(seen) - 1 for seen in sessions] == preemptions
    assert not drafter.tokens, "what was given up is released"


def test_twice_as_many_run_at_equal_memory_where_answers_end_early(model):
    """A request may ask for 100 tokens; whole reservations of 20 + 100 let 4 run in 480."""
    prompt = [9] * 20
    free = GenerationRequest("r", prompt, SamplingParams(), 100, ignore_eos=True, policy="off")
    answer = tokens_of(finished(engine_of(model, LARGE), [free])[0]["r"])
    stopping = replace(free, stop_token_ids=frozenset(answer[12:14]))
    engine = engine_of(model, 480, caching=False, running=16)
    for i in range(16):
        engine.add(replace(stopping, request_id=f"r{i}"))
    most = preempted = 0
    while engine.has_work:
        _, record = engine.step()
        most = max(most, len(engine.scheduler.running))
        preempted += record.preempted if record else 0
    assert most >= 2 * (480 // 120)
    assert not preempted


PROMPTS = [[7] * 9, [7] * 9 + [8] * 8, [7] * 17, [1, 2, 3], list(range(30, 55))]
SAMPLINGS = [SamplingParams(), SAMPLED]
LONGEST = 60


class Serving(RuleBasedStateMachine):
    """Requests come, run, are preempted and aborted in a cache that holds little more than the largest one."""

    model: LanguageModel
    answers: dict[tuple[int, int], list[int]]
    """By prompt and sampling; a shorter answer is a beginning of the longest one."""
    caching: bool

    def __init__(self) -> None:
        super().__init__()
        known = Known()
        for (prompt, _), answer in self.answers.items():
            known.add(PROMPTS[prompt], answer)
        self.drafter = OracleDrafter(known, self.model.vocab_size)
        self.open: dict[str, list[int]] = {}
        """The tokens that are still to come, by request."""
        self.names = count()

    @initialize(caching=st.booleans())
    def begin(self, caching: bool) -> None:
        self.engine = engine_of(self.model, 25 + LONGEST + 3 * BLOCK, self.drafter, caching, running=4)

    @rule(
        prompts=st.lists(st.integers(0, len(PROMPTS) - 1), min_size=1, max_size=4),
        sampling=st.integers(0, len(SAMPLINGS) - 1),
        tokens=st.integers(1, LONGEST) | st.just(LONGEST),
        priority=st.integers(-4, 4),
        client=st.sampled_from("ab"),
        policy=st.sampled_from(["off", "chain:4", "static:3-2-1"]),
    )
    def ask(self, prompts: list[int], sampling: int, tokens: int, priority: int, client: str, policy: str) -> None:
        for prompt in prompts:
            request = GenerationRequest(
                f"r{next(self.names)}",
                PROMPTS[prompt],
                SAMPLINGS[sampling],
                tokens,
                ignore_eos=True,
                policy=policy,
                priority=priority,
                client=client,
            )
            self.engine.add(request)
            self.open[request.request_id] = self.answers[prompt, sampling][:tokens]

    @rule(steps=st.integers(1, 20))
    def step(self, steps: int) -> None:
        for _ in range(steps):
            for output in self.engine.step()[0]:
                due = self.open[output.request_id]
                if isinstance(output.item, Completion):
                    assert not due
                    del self.open[output.request_id]
                else:
                    came = output.item.token_ids
                    assert came == due[: len(came)]
                    del due[: len(came)]

    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        if self.open:
            name = data.draw(st.sampled_from(sorted(self.open)))
            (output,) = self.engine.abort([name])
            assert output.item.finish_reason is FinishReason.ABORTED
            del self.open[name]

    @invariant()
    def blocks_are_conserved(self) -> None:
        if not hasattr(self, "engine"):
            return
        cache, scheduler = self.engine.cache, self.engine.scheduler
        assert {s.request.request_id for s in (*scheduler.running, *scheduler.waiting)} == self.open.keys()
        assert all(sequence.cache is None for sequence in scheduler.waiting)
        held = [block for sequence in scheduler.running for block in sequence.kv.blocks]
        shared = [b for s in scheduler.running for b in s.kv.blocks[: s.kv.shared_tokens // BLOCK]]
        assert len(set(held)) == cache.used_blocks == cache.total_blocks - cache.free_blocks
        assert all(held.count(block) == 1 for block in set(held) - set(shared))
        assert all(sequence.kv.length <= sequence.kv.capacity for sequence in scheduler.running)

    def teardown(self) -> None:
        if not hasattr(self, "engine"):
            return
        due = sum(len(tokens) + 1 for tokens in self.open.values())
        for _ in range(3 * due):  # each step brings a token, or a chunk of what is computed again
            self.step(1)
        assert not self.open, "somebody starves"
        self.step(1)
        assert_all_free(self.engine, self.drafter)
        assert self.engine.cache.allocate(self.engine.cache.total_blocks * BLOCK) is not None, "a block leaked"


def test_whatever_comes_blocks_are_conserved_and_texts_stay_right(model):
    keys = [(p, s) for p in range(len(PROMPTS)) for s in range(len(SAMPLINGS))]
    requests = [
        GenerationRequest(f"{p} {s}", PROMPTS[p], SAMPLINGS[s], LONGEST, ignore_eos=True, policy="off") for p, s in keys
    ]
    outputs, _ = finished(engine_of(model, LARGE), requests)
    answers = {key: tokens_of(outputs[f"{key[0]} {key[1]}"]) for key in keys}
    machine = type("ServingModel", (Serving,), {"model": model, "answers": answers})
    run_state_machine_as_test(
        machine, settings=settings(max_examples=8, stateful_step_count=15, deadline=None, derandomize=True)
    )
