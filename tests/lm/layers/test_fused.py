"""Fused layers compute what the layers of transformers do."""

from __future__ import annotations

from copy import deepcopy

import numpy as np
import pytest
import torch
from transformers import GemmaConfig, LlamaConfig, PreTrainedConfig, Qwen2Config

from lm.features import FeatureTap
from lm.layers.fuse import fuse_layers
from lm.layers.fused import FusedLayer
from lm.model import LanguageModel
from lm.packed import PackedSequence
from tests.lm.helpers import WAYS, compute, path_to, prefill, random_parents, random_tokens, reference_logits
from tests.lm.tiny import _GEMMA, _SHAPE, CONFIGS, tiny_model, tiny_tokenizer

YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 128}
FUSABLE: dict[str, PreTrainedConfig] = {
    "llama": CONFIGS["llama"],
    "llama-biased-yarn": LlamaConfig(**_SHAPE, attention_bias=True, hidden_act="gelu", rope_parameters=YARN),
    "mistral-sliding": CONFIGS["mistral-sliding"],
    "qwen2": CONFIGS["qwen2"],
    "qwen3": CONFIGS["qwen3"],
    "gemma": GemmaConfig(**_GEMMA),
    "gemma2-softcap": CONFIGS["gemma2-softcap"],
    "gemma3-mixed": CONFIGS["gemma3-mixed"],
    "qwen2-mixed": Qwen2Config(**_SHAPE, use_sliding_window=True, sliding_window=5, max_window_layers=1),
}


@pytest.fixture(autouse=True, params=WAYS)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    compute(request.param, monkeypatch)


@pytest.mark.parametrize("kind", FUSABLE)
def test_a_tree_behind_a_prompt_equals_transformers(kind: str) -> None:
    hf = tiny_model(FUSABLE[kind])
    fused = deepcopy(hf)
    fuse_layers(fused)
    assert all(isinstance(layer, FusedLayer) for layer in fused.base_model.layers)
    model = LanguageModel.from_hf(fused, tiny_tokenizer())
    rng = np.random.default_rng(0)
    context, nodes, parents = random_tokens(rng, 21), random_tokens(rng, 12), random_parents(rng, 12)
    cache = model.new_cache(128, 4)
    sequence = prefill(model, cache, context, 16)
    logits = model.forward([PackedSequence(sequence, nodes, parents)], cache)
    for node, row in enumerate(logits):
        path = [nodes[ancestor] for ancestor in path_to(parents, node)]
        torch.testing.assert_close(row, reference_logits(hf, context + path)[-1], rtol=1e-4, atol=2e-5)


def test_their_hidden_states_can_be_read_off() -> None:
    hf = tiny_model("llama")
    fused = deepcopy(hf)
    fuse_layers(fused)
    tokens = random_tokens(np.random.default_rng(1), 9)
    states = []
    for each in (hf, fused):
        model = LanguageModel.from_hf(each, tiny_tokenizer())
        tap = FeatureTap(each, (1, 2, 3))
        cache = model.new_cache(16, 4)
        model.forward([PackedSequence(cache.allocate(9), tokens)], cache)
        states.append(tap.take())
    torch.testing.assert_close(states[1], states[0], rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("kind", ["phi3-sliding", "gpt-neox", "gpt2"])
def test_other_models_stay_as_they_are(kind: str) -> None:
    hf = tiny_model(kind)
    before = list(hf.modules())
    fuse_layers(hf)
    assert list(hf.modules()) == before
