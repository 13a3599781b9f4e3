"""The device profile: what is measured, and that it is measured once."""

from __future__ import annotations

import json
import logging

import numpy as np
import pytest
import torch

from lm.cuda.layout import BUCKETS, bucket
from lm.model import LanguageModel
from tests.lm.helpers import pad_passes
from tests.lm.tiny import tiny_llama, tiny_tokenizer
from verifier_svc.service import profile, profile_cache
from verifier_svc.service.profile import profile_verification
from verifier_svc.service.profile_cache import keep_profiles, stored_profiles, verification_profile


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    torch.manual_seed(0)
    return LanguageModel.from_hf(tiny_llama(), tiny_tokenizer())


@pytest.fixture
def folder(monkeypatch, tmp_path):
    monkeypatch.setenv("TREELINE_CACHE", str(tmp_path))
    return tmp_path


def measured(monkeypatch) -> list[int]:
    """Grows by one with every measurement."""
    calls: list[int] = []

    def count(model, cache):
        calls.append(1)
        return profile_verification(model, cache)

    monkeypatch.setattr(profile_cache, "profile_verification", count)
    return calls


def test_a_profile_of_passes_that_ran_slowly_is_not_kept(model, folder, monkeypatch, caplog):
    monkeypatch.setattr(type(model.passes), "slow", property(lambda passes: passes.counts["native"]))
    cache = model.new_cache(512, 16)
    assert verification_profile(model, cache)
    assert not list(folder.rglob("*.json"))
    assert "not stored" in caplog.text


def test_profiles_of_another_node_need_no_measurement(model, folder, monkeypatch):
    cache = model.new_cache(512, 16)
    curves = verification_profile(model, cache)
    sent = stored_profiles()
    monkeypatch.setenv("TREELINE_CACHE", str(folder / "another"))
    calls = measured(monkeypatch)
    keep_profiles({**sent, "../../outside.json": "{}"})
    assert verification_profile(model, cache) == curves
    assert not calls
    assert not (folder / "outside.json").exists()


def test_curves_are_monotone_and_leave_the_cache_idle(model):
    cache = model.new_cache(2048, 4)
    curves = profile_verification(model, cache)
    assert [(c.sequences, c.context_tokens) for c in curves] == [(1, 64), (8, 64)]
    for curve in curves:
        assert curve.tokens[0] == curve.sequences
        assert list(curve.tokens) == sorted(set(curve.tokens))
        assert (np.diff(curve.seconds) >= 0).all()
        assert min(curve.seconds) > 0
    assert cache.used_blocks == 0


def test_the_smallest_cache_can_be_profiled(model):
    (curve,) = profile_verification(model, model.new_cache(64, 16))
    assert (curve.sequences, curve.context_tokens) == (1, 32)


def test_a_step_is_found_where_it_is(model, monkeypatch):
    def step_at_20(model, cache, sequences, context_tokens, tokens):
        return 0.02 + 0.02 * (tokens > 20)

    monkeypatch.setattr(profile, "timed_pass_s", step_at_20)
    curve = profile_verification(model, model.new_cache(2048, 4))[0]
    assert {20, 21} <= set(curve.tokens)


def test_padded_passes_cost_by_their_bucket(monkeypatch):
    def by_bucket(model, cache, sequences, context_tokens, tokens):
        asked.append(tokens)
        return 0.01 + 0.001 * bucket(tokens)

    asked: list[int] = []
    padded = LanguageModel.from_hf(tiny_llama(), tiny_tokenizer())
    pad_passes(padded.passes)
    monkeypatch.setattr(profile, "timed_pass_s", by_bucket)
    monkeypatch.setattr(padded, "max_context_tokens", 1024)
    curve = profile_verification(padded, padded.new_cache(4096, 16))[0]
    assert set(asked) == set(BUCKETS)
    tokens = np.arange(1, BUCKETS[-1] + 1)
    expected = [0.01 + 0.001 * bucket(int(n)) for n in tokens]
    np.testing.assert_allclose(np.interp(tokens, curve.tokens, curve.seconds), expected)


def test_a_profile_is_measured_once_and_again_on_demand(model, folder, monkeypatch):
    calls = measured(monkeypatch)
    cache = model.new_cache(1024, 4)
    first = verification_profile(model, cache)
    assert verification_profile(model, cache) == first
    assert len(calls) == 1
    verification_profile(model, cache, refresh=True)
    assert len(calls) == 2
    verification_profile(model, model.new_cache(512, 4))
    assert len(calls) == 3, "another cache has other regions"
    assert not list(folder.glob("profiles/.*")), "nothing half-written is left"


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"identity": 1}', "other", "curve", "\xff"])
def test_what_is_stale_or_damaged_is_ignored_with_one_line(model, folder, monkeypatch, caplog, damage):
    calls = measured(monkeypatch)
    cache = model.new_cache(1024, 4)
    verification_profile(model, cache)
    (path,) = folder.glob("profiles/*.json")
    stored = json.loads(path.read_text())
    if damage == "other":
        stored["identity"]["threads"] += 1
        path.write_text(json.dumps(stored))
    elif damage == "curve":
        stored["curves"][0]["seconds"][0] = -1.0
        path.write_text(json.dumps(stored))
    else:
        path.write_bytes(damage.encode("latin-1"))
    with caplog.at_level(logging.WARNING):
        curves = verification_profile(model, cache)
    assert len(calls) == 2
    assert len(caplog.records) == 1
    assert "measuring again" in caplog.text
    assert verification_profile(model, cache) == curves


def test_a_folder_that_cannot_be_written_only_warns(model, tmp_path, monkeypatch, caplog):
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("TREELINE_CACHE", str(blocked))
    assert verification_profile(model, model.new_cache(1024, 4))
    assert "cannot be stored" in caplog.text
