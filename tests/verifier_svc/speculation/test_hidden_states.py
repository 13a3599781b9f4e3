"""What a draft head is given of the target: the right rows for the right tokens, each once, whatever happens."""

from __future__ import annotations

from collections import deque
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from lm.model import LanguageModel
from planner.fast.builtin_plan import builtin_plan
from tests.lm.tiny import tiny_llama, tiny_tokenizer
from tests.lm.tiny_head import FEATURE_LAYERS, target_features
from tests.verifier_svc.doubles import OracleDrafter
from tests.verifier_svc.engine.test_engine import CONFIG, LIMITS, Known, plain_greedy, prompts, run, tokens_of
from treeline.config import LimitsConfig
from treeline.drafting import DraftReply, DraftRequest, FeatureSpec
from treeline.sampling import SamplingParams
from verifier_svc.engine.engine import Engine
from verifier_svc.engine.request import GenerationRequest
from verifier_svc.speculation import hidden_states
from verifier_svc.speculation.hidden_states import HiddenStates
from verifier_svc.speculation.link import LocalLink

WIDTH = 96


class FeatureReader(OracleDrafter):
    """An oracle that keeps the features it is sent, by session and by the index of the token they belong to."""

    features = FeatureSpec(FEATURE_LAYERS, WIDTH)

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.read: dict[int, dict[int, np.ndarray]] = {}
        self.rows = 0

    def draft(self, request: DraftRequest) -> DraftReply:
        reply = super().draft(request)
        for sequence in request.sequences:
            if sequence.session_id not in reply.held:
                rows = self.read.setdefault(sequence.session_id, {})
                first = sequence.length - len(sequence.features) - 1
                rows.update({first + i: row for i, row in enumerate(sequence.features)})
                self.rows += len(sequence.features)
        return reply


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return LanguageModel.from_hf(tiny_llama(), tiny_tokenizer())


def requests_for(known: Known, model: LanguageModel, count: int) -> list[GenerationRequest]:
    requests = []
    for index, prompt in enumerate(prompts(model, count)):
        known.add(prompt, plain_greedy(model, prompt, 24))
        requests.append(GenerationRequest(f"r{index}", prompt, SamplingParams(), 24, ignore_eos=True, policy="chain:4"))
    return requests


def check_rows(model: LanguageModel, rows: dict[int, np.ndarray], tokens: list[int]) -> None:
    wanted = target_features(model.hf, tokens)
    for index, row in rows.items():
        got = torch.from_numpy(row.view(np.int16)).view(torch.bfloat16).float()
        torch.testing.assert_close(got, wanted[index], rtol=2e-2, atol=2e-2)


def test_every_token_before_the_root_is_sent_once_with_the_targets_own_features(model):
    known = Known()
    requests = requests_for(known, model, 6)
    drafter = FeatureReader(known, model.vocab_size)
    engine = Engine(model, LocalLink(drafter), lambda: builtin_plan(LIMITS), CONFIG)
    outputs = run(engine, requests)
    for session_id, (prompt, answer) in enumerate(known.answers, start=1):
        assert tokens_of(outputs[f"r{session_id - 1}"]) == answer
        rows = drafter.read[session_id]
        assert sorted(rows) == list(range(max(rows) + 1)), "a token's features never came"
        assert max(rows) > len(prompt)
        check_rows(model, rows, prompt + answer)
    assert drafter.rows == sum(map(len, drafter.read.values())), "features were sent twice"
    assert not engine.speculator.exchange.hidden_states._rows


@pytest.mark.parametrize("unread_tokens", [1, 7, 1000])
def test_features_of_steps_without_drafts_come_when_the_drafter_is_asked_again(model, monkeypatch, unread_tokens):
    monkeypatch.setattr(hidden_states, "UNREAD_TOKENS", unread_tokens)
    known = Known()
    requests = requests_for(known, model, 4)
    drafter = FeatureReader(known, model.vocab_size)
    link = LocalLink(drafter)
    link.ready = False
    engine = Engine(model, link, lambda: builtin_plan(LIMITS), CONFIG)
    kept = engine.speculator.exchange.hidden_states

    def come_late(step: int) -> None:
        assert kept._unread.tokens < unread_tokens, "unread passes pile up"
        if step == 9:
            engine.abort(["r1"])
            assert 2 not in kept._rows
        link.ready = step > 12

    run(engine, requests, on_step=come_late)
    assert sorted(drafter.read) == [1, 3, 4], "the second one ended before the drafter came"
    for session_id, rows in drafter.read.items():
        prompt, answer = known.answers[session_id - 1]
        assert sorted(rows) == list(range(max(rows) + 1)), "a token's features never came"
        assert max(rows) > len(prompt) + 5
        check_rows(model, rows, prompt + answer)
    assert not kept._rows
    assert not kept._unread.wanted


def test_of_a_long_time_without_drafts_the_last_features_are_kept(model, monkeypatch):
    monkeypatch.setattr(hidden_states, "WINDOW_TOKENS", 10)
    monkeypatch.setattr(hidden_states, "UNREAD_TOKENS", 6)
    known = Known()
    (request,) = requests_for(known, model, 1)
    drafter = FeatureReader(known, model.vocab_size)
    link = LocalLink(drafter)
    link.ready = False
    engine = Engine(model, link, lambda: builtin_plan(LIMITS), CONFIG)
    run(engine, [request], on_step=lambda step: setattr(link, "ready", step > 16))
    rows, ((prompt, answer),) = drafter.read[1], known.answers
    assert min(rows) > len(prompt)
    assert sorted(rows) == list(range(min(rows), max(rows) + 1))
    check_rows(model, rows, prompt + answer)


def test_a_drafter_that_lost_a_session_gets_its_features_again(model):
    known = Known()
    (request,) = requests_for(known, model, 1)
    drafter = FeatureReader(known, model.vocab_size)
    engine = Engine(model, LocalLink(drafter), lambda: builtin_plan(LIMITS), CONFIG)

    def lose(step: int) -> None:
        if step == 4:
            drafter.lose(1)
            drafter.read.clear()

    run(engine, [request], on_step=lose)
    ((prompt, answer),) = known.answers
    assert sorted(drafter.read[1])[0] == 0
    check_rows(model, drafter.read[1], prompt + answer)


def test_a_prefix_from_the_cache_has_no_features_and_the_rest_has(model):
    known = Known()
    (request,) = requests_for(known, model, 1)
    prompt = request.prompt_token_ids * 3
    known.add(prompt, plain_greedy(model, prompt, 24))
    drafter = FeatureReader(known, model.vocab_size)
    engine = Engine(model, LocalLink(drafter), lambda: builtin_plan(LIMITS), CONFIG)
    for name in ("first", "again"):
        request = GenerationRequest(name, prompt, SamplingParams(), 24, ignore_eos=True, policy="chain:4")
        completion = run(engine, [request])[name][-1]
    assert completion.cached_tokens > 0
    rows, answer = drafter.read[2], known.answers[-1][1]
    assert sorted(rows) == list(range(completion.cached_tokens, max(rows) + 1))
    check_rows(model, rows, prompt + answer)


def test_a_message_stays_within_its_limit_and_the_rest_comes_later(model):
    known = Known()
    requests = requests_for(known, model, 8)
    drafter = FeatureReader(known, model.vocab_size)
    engine = Engine(model, LocalLink(drafter), lambda: builtin_plan(LIMITS), CONFIG)
    engine.speculator.exchange.hidden_states._budget_bytes = 8 * 2 * WIDTH
    for request in requests:
        engine.add(request)
    while engine.has_work:
        engine.step()
    assert all(drafter.read[session_id] for session_id in range(1, 9))


@pytest.mark.parametrize(("requests", "hidden"), [(64, 4096), (32, 8192)])
def test_a_step_of_many_requests_to_a_large_target_fits_one_message(model, requests, hidden):
    """Each of them accepts the deepest tree; a head that misses a token starts over."""
    tokens = LimitsConfig().max_tree_depth + 1
    states, rows = HiddenStates(model), [np.zeros(3 * hidden, np.uint16)] * tokens
    states._rows = {session: deque(rows) for session in range(requests)}
    sequences = [SimpleNamespace(session_id=session, token_ids=[0] * tokens) for session in range(requests)]
    assert [len(features) for features in states.unsent(sequences)] == [tokens] * requests


def test_a_drafter_that_comes_back_as_it_was_costs_no_capture(model, monkeypatch):
    """What was captured reads the tap: it is let go only for a drafter that reads other layers."""
    forgotten: list[int] = []
    monkeypatch.setattr(model.passes, "forget_captured", lambda: forgotten.append(1))
    engine = Engine(model, LocalLink(FeatureReader(Known(), model.vocab_size)), lambda: builtin_plan(LIMITS), CONFIG)
    states, spec = engine.speculator.exchange.hidden_states, FeatureReader(Known(), model.vocab_size).features
    before = len(forgotten)
    for _ in range(3):
        states.follow(None)
        states.follow(spec)
    assert len(forgotten) == before
    states.follow(FeatureSpec((1,), model.hf.config.hidden_size * 2))
    assert len(forgotten) == before + 1


def test_a_drafter_that_reads_another_width_gets_none(model, caplog):
    known = Known()
    drafter = FeatureReader(known, model.vocab_size)
    drafter.features = FeatureSpec(FEATURE_LAYERS, 7)
    engine = Engine(model, LocalLink(drafter), lambda: builtin_plan(LIMITS), CONFIG)
    run(engine, requests_for(known, model, 1))
    assert not drafter.rows
    assert "reads 7 features" in caplog.text
