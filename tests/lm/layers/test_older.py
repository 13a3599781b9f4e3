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
from tests.lm.tiny import tiny_model, tiny_tokenizer
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
