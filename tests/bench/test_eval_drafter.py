"""The evaluation of drafters, on answers whose best draft is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bench.common import Prompt
from bench.drafter.report import pass_costs, predicted_speedup
from bench.drafter.trial import Answer, AnswerWriter, DrafterTrial, reliability
from drafter_svc.drafter import DrafterInfo, TreeDrafter
from drafter_svc.head_proposer import HeadProposer
from lm.model import LanguageModel
from tests.lm.tiny import tiny_llama, tiny_tokenizer
from tests.lm.tiny_head import FEATURE_LAYERS, reference_logits, target_features, tiny_draft_ids, tiny_head
from treeline.step_record import NodeOutcomes


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return LanguageModel.from_hf(tiny_llama(), tiny_tokenizer())


def ngram_drafter() -> TreeDrafter:
    return TreeDrafter(DrafterInfo("none"), 8, None)


def test_a_text_that_repeats_is_drafted_to_the_end():
    period = [11, 12, 13, 14, 15, 16]
    trial = DrafterTrial(ngram_drafter(), True)
    trial.run(Answer("loop", 18, period * 8, None))
    summary = trial.tallies[""].summary()
    assert summary["top1"] == summary["top4"] == 1.0
    assert summary["accepted_length"]["chain:5"] > 5
    assert summary["acceptance_by_depth"]["1"] == 1.0
    assert trial.tallies["loop"].summary() == summary


def test_a_text_without_repetition_is_not_drafted_at_all():
    trial = DrafterTrial(ngram_drafter(), True)
    trial.run(Answer("new", 10, list(range(40)), None))
    summary = trial.tallies[""].summary()
    assert summary["top1"] == summary["top4"] == 0.0
    assert summary["accepted_length"] == {"chain:5": 1.0, "tree:16": 1.0}


def test_a_heads_first_choices_are_counted_as_recomputed(model):
    head = tiny_head(model.hf)
    cache = head.new_cache(2048, 16)

    def build() -> TreeDrafter:
        return TreeDrafter(DrafterInfo("head"), 8, HeadProposer(head, cache, 64))

    answer = AnswerWriter(model, FEATURE_LAYERS, 12).answer(Prompt("1", "any", "hello there"))
    assert answer.features is not None
    assert len(answer.features) == len(answer.token_ids) - 1
    got = answer.features.view(np.int16)
    wanted = target_features(model.hf, answer.token_ids).bfloat16()
    assert np.mean(got == wanted[:-1].view(torch.int16).numpy()) > 0.9
    trial = DrafterTrial(build(), False)
    trial.run(answer)
    hits = [0, 0]
    for root in range(answer.prompt_tokens, len(answer.token_ids) - 1):
        logits = reference_logits(model.hf, answer.token_ids[: root + 1], [])
        best = tiny_draft_ids()[logits.topk(4).indices].tolist()
        hits[0] += best[0] == answer.token_ids[root + 1]
        hits[1] += answer.token_ids[root + 1] in best
    assert [trial.tallies[""].top1, trial.tallies[""].top4] == hits
    assert trial.tallies[""].positions == len(answer.token_ids) - 1 - answer.prompt_tokens
    assert cache.used_blocks == 0


def test_reliability_counts_what_was_accepted_at_each_probability():
    probs = np.array([0.05, 0.05, 0.95, 0.95], np.float32)
    accepted = np.array([False, True, True, True])
    zeros = np.zeros(4, np.uint8)
    result = reliability([NodeOutcomes(zeros, zeros + 1, accepted | True, accepted & False, probs, accepted)])
    assert [row["accepted"] for row in result["reliability"]] == [0.5, 1.0]
    assert result["ece"] == pytest.approx((0.45 + 0.05) / 2)


def test_costs_and_speedup(model):
    head = tiny_head(model.hf)
    drafter = TreeDrafter(DrafterInfo("head"), 8, HeadProposer(head, head.new_cache(512, 16), 64))
    costs = pass_costs(model, drafter)
    assert set(costs) == {"target_1", "target_6", "target_17", "draft_8"}
    assert min(costs.values()) > 0
    assert predicted_speedup(3.0, 6, 5, {"target_1": 1.0, "target_6": 1.0, "draft_8": 0.1}) == pytest.approx(2.0)
