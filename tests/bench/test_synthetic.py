"""Drafts of a given quality: as good as asked for at each rank and depth, and the text stays the target's."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch

from bench.local_engine import greedy_answers, planned_engine
from bench.synthetic import SyntheticProposer, parse_acceptance
from lm.model import LanguageModel
from tests.lm.tiny import tiny_llama, tiny_tokenizer
from treeline.config import Config, LimitsConfig, ModelConfig, VerifierConfig
from treeline.errors import ConfigError
from treeline.plan import CostCurve
from treeline.step_record import StepRecord

PROMPTS = [[1, 2, 3], [10, 20, 30, 40], [7], [90, 80]]
TOKENS = 120
CONFIG = Config(
    verifier=VerifierConfig(target=ModelConfig(dtype="float32"), kv_cache_tokens=2048, kv_block_tokens=16),
    limits=LimitsConfig(max_running_requests=4, max_context_tokens=256, max_tree_nodes=16, max_tree_depth=4),
)
CURVES = (CostCurve(1, 64, (1, 64), (0.01, 0.02)),)


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    hf = tiny_llama()
    hf.generation_config.eos_token_id = hf.config.eos_token_id = None
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    return LanguageModel.from_hf(hf, tokenizer)


@pytest.fixture(scope="module")
def answers(model) -> list[list[int]]:
    config = CONFIG.model_copy(update={"drafter": CONFIG.drafter.model_copy(update={"kind": "ngram"})})
    found, _ = greedy_answers(planned_engine(model, config, CURVES), PROMPTS, ["off"] * 4, TOKENS, 4)
    assert [len(answer) for answer in found] == [TOKENS] * 4
    return found


def run(model, answers, acceptance: str, policy: str) -> list[StepRecord]:
    """The steps in which an engine answers all prompts with these drafts, its answers checked."""
    known = {tuple(prompt): answer for prompt, answer in zip(PROMPTS, answers, strict=True)}
    proposer = SyntheticProposer(parse_acceptance(acceptance), known, model.vocab_size)
    planned, records = planned_engine(model, CONFIG, CURVES, proposer), list[StepRecord]()
    observe = planned.planner.observe

    def recorded(record: StepRecord) -> None:
        records.append(record)
        observe(record)

    planned.planner.observe = recorded
    torch.manual_seed(0)
    assert greedy_answers(planned, PROMPTS, [policy] * 4, TOKENS, 4)[0] == answers
    return records


def accepted_per_step(steps: list[StepRecord]) -> float:
    records = [record for record in steps if record.verified_nodes]
    return sum(record.accepted_nodes for record in records) / sum(record.sequences for record in records)


def test_perfect_drafts_are_accepted_whole_and_bad_ones_never(model, answers):
    assert accepted_per_step(run(model, answers, "1.0", "chain:3")) > 2.9  # fewer only at the ends
    assert accepted_per_step(run(model, answers, "0.0,0.0", "static:2-2")) == 0


def test_acceptance_is_what_was_asked_for_by_depth_and_rank(model, answers):
    records = run(model, answers, "0.6,0.2/0.3,0.4", "static:2-2")
    reached, accepted = Counter[tuple[int, int]](), Counter[tuple[int, int]]()
    for record in records:
        outcomes = record.outcomes
        places = list(zip(outcomes.depths.tolist(), (~outcomes.first).astype(int).tolist(), strict=True))
        reached.update(places)
        accepted.update(place for place, hit in zip(places, outcomes.accepted, strict=True) if hit)
    for place, wanted in {(1, 0): 0.6, (1, 1): 0.2, (2, 0): 0.3, (2, 1): 0.4}.items():
        deviation = np.sqrt(wanted * (1 - wanted) / reached[place])
        assert accepted[place] / reached[place] == pytest.approx(wanted, abs=3 * deviation), place


def test_every_policy_grows_these_trees(model, answers):
    for policy in ("eagle2:3,3,8", "smart-paper", "smart"):
        assert accepted_per_step(run(model, answers, "0.7,0.2", policy)) > 0.5, policy


@pytest.mark.parametrize("text", ["", "a", "0.7,0.5", "-0.1", "0.5/", "0.5//0.1"])
def test_what_are_no_probabilities_is_refused(text):
    with pytest.raises(ConfigError, match="probabilities by rank"):
        parse_acceptance(text)
