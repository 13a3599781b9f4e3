"""Families without transformers' attention interface are loaded from files, and give transformers' logits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoConfig

from lm.layers.older import FAMILIES
from lm.model import LanguageModel
from lm.packed import PackedSequence
from tests.lm.helpers import random_tokens, reference_logits
from tests.lm.tiny import CONFIGS, tiny_model, tiny_tokenizer
from tests.verifier_svc.engine.test_architectures import KINDS, SHAPE
from treeline.config import ModelConfig


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_folder_is_loaded_as_transformers_loads_it(tmp_path: Path, kind: str) -> None:
    reference = tiny_model(AutoConfig.for_model(kind, **SHAPE | KINDS[kind]))
    reference.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    model = LanguageModel.load(ModelConfig(model=str(tmp_path), dtype="float32", device="cpu"))
    cache, tokens = model.new_cache(64, 16), random_tokens(np.random.default_rng(0), 24)
    sequence = cache.allocate(24)
    assert sequence is not None
    logits = model.forward([PackedSequence(sequence, tokens)], cache)
    torch.testing.assert_close(logits, reference_logits(reference, tokens), rtol=1e-4, atol=1e-4)


def test_biases_of_far_positions_are_exact_in_bfloat16() -> None:
    """From 512 on, bfloat16 holds every fourth position alone; transformers adds these biases in float32."""
    hf = tiny_model(CONFIGS["mpt-alibi"], dtype=torch.bfloat16)
    model = LanguageModel.from_hf(hf, tiny_tokenizer())
    cache, tokens = model.new_cache(1024, 16), random_tokens(np.random.default_rng(0), 900)
    sequence = cache.allocate(900)
    assert sequence is not None
    logits = model.forward([PackedSequence(sequence, tokens, None, "last")], cache)
    expected = reference_logits(hf, tokens)[-1:]
    assert (logits - expected).abs().max() < 0.03 * expected.abs().max()
