"""Which models are served, what is refused, and the real default model against transformers' own generate."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, LlamaConfig

from lm.features import FeatureTap
from lm.kv_cache import LayerShape
from lm.model import LanguageModel
from lm.packed import PackedSequence
from lm.store import resolve_model
from tests.lm.helpers import reference_logits
from tests.lm.tiny import CONFIGS, VOCAB_SIZE, tiny_llama, tiny_model, tiny_tokenizer
from treeline.config import ModelConfig
from treeline.errors import ConfigError
from treeline.sampling import SamplingParams

SMALL: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


@pytest.mark.parametrize(
    ("kind", "more", "reason"),
    [
        ("mamba", {}, "recurrent state"),
        ("qwen3_next", {}, "recurrent state"),
        ("falcon_h1", {}, "recurrent state"),
        ("lfm2", {"layer_types": ["conv", "full_attention"]}, "layers of type conv"),
        ("llama4_text", {"head_dim": 8, "num_local_experts": 2}, "chunked_attention"),
        ("gpt_oss", {"head_dim": 8, "num_local_experts": 4}, "s_aux"),
        ("mpt", {"attn_config": {"qk_ln": True}}, r"qk_ln \(True\)"),
        ("mpt", {"attn_config": {"alibi": False}}, r"alibi \(False\)"),
        ("mpt", {"attn_config": {"alibi_bias_max": 16}}, r"alibi_bias_max \(16\)"),
        ("mpt", {"no_bias": False}, r"no_bias \(False\)"),
        ("mpt", {"expansion_ratio": 2}, r"expansion_ratio \(2\)"),
        ("falcon", {"alibi": True}, "share keys"),
        ("xglm", {"d_model": 32, "attention_heads": 4, "num_layers": 2, "ffn_dim": 32}, "attention interface"),
        ("diffllama", {}, "attends more than once"),
        (
            "bart",
            {"d_model": 32, "decoder_layers": 2, "decoder_ffn_dim": 32, "decoder_attention_heads": 4},
            "positions",
        ),
        ("gemma", {"head_dim": 8, "use_bidirectional_attention": True}, "not causal"),
    ],
)
def test_what_a_tree_cannot_share_is_refused_in_one_line(kind: str, more: dict[str, Any], reason: str) -> None:
    config = AutoConfig.for_model(kind, **{**SMALL, **more})
    hf = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with pytest.raises(ConfigError, match=f"{type(hf).__name__} is not supported.*{reason}") as caught:
        LanguageModel.from_hf(hf, tiny_tokenizer())
    assert "\n" not in str(caught.value)


def test_layers_of_different_head_shapes_are_served() -> None:
    config = AutoConfig.for_model("gemma4_text", **{**SMALL, "head_dim": 8, "global_head_dim": 16})
    model = LanguageModel.from_hf(tiny_model(config), tiny_tokenizer())
    assert set(model.layers) == {LayerShape(2, 8, 8), LayerShape(2, 16, 16)}
    tokens = np.random.default_rng(0).integers(0, 64, 20).tolist()
    cache = model.new_cache(64, 4)
    sequence = cache.allocate(20)
    logits = [model.forward([PackedSequence(sequence, tokens[:12])], cache)]
    cache.commit([(sequence, list(range(12)))])
    logits.append(model.forward([PackedSequence(sequence, tokens[12:])], cache))
    torch.testing.assert_close(torch.cat(logits), reference_logits(model.hf, tokens), rtol=1e-4, atol=5e-5)


def test_facts_about_a_model() -> None:
    model = LanguageModel.from_hf(tiny_llama(), tiny_tokenizer())
    assert (model.vocab_size, model.max_context_tokens, model.architecture) == (VOCAB_SIZE, 512, "LlamaForCausalLM")
    assert model.eos_token_ids == {256}
    assert (model.device.type, model.dtype) == ("cpu", torch.float32)
    hf = tiny_llama()
    hf.generation_config.eos_token_id = [7, 9]
    assert LanguageModel.from_hf(hf, tiny_tokenizer()).eos_token_ids == {7, 9, 256}


@pytest.mark.parametrize(
    ("written", "sampling"),
    [
        ({}, SamplingParams()),
        ({"temperature": 0.6, "top_p": 0.9}, SamplingParams(top_p=0.9)),
        ({"do_sample": True, "temperature": 0.6, "top_k": 20}, SamplingParams(0.6, top_k=20)),
        ({"do_sample": True, "repetition_penalty": 1.05}, SamplingParams(1.0, repetition_penalty=1.05)),
    ],
)
def test_sampling_is_what_the_generation_config_asks_for(written: dict[str, Any], sampling: SamplingParams) -> None:
    hf = tiny_llama()
    hf.generation_config = GenerationConfig(**written)
    assert LanguageModel.from_hf(hf, tiny_tokenizer()).sampling == sampling


@pytest.mark.parametrize("rope_type", ["dynamic", "longrope"])
def test_the_context_ends_where_one_sequence_would_change_the_frequencies_of_all(rope_type: str) -> None:
    rope = {"rope_type": rope_type, "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}
    if rope_type == "longrope":
        rope |= {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
    config = LlamaConfig(**{**SMALL, "max_position_embeddings": 128}, rope_parameters=rope)
    assert LanguageModel.from_hf(tiny_model(config), tiny_tokenizer()).max_context_tokens == 32


def test_two_models_and_caches_do_not_share_anything() -> None:
    """Nothing is global: passes over two models interleave freely."""
    models = [LanguageModel.from_hf(tiny_model(kind), tiny_tokenizer()) for kind in ("llama", "gemma2-softcap")]
    caches = [model.new_cache(32, 4) for model in models]
    sequences = [cache.allocate(8) for cache in caches]
    tokens = [3, 1, 4, 1, 5]
    for index, token in enumerate(tokens):
        for model, cache, sequence in zip(models, caches, sequences, strict=True):
            logits = model.forward([PackedSequence(sequence, [token])], cache)
            cache.commit([(sequence, [0])])
            expected = reference_logits(model.hf, tokens[: index + 1])[-1:]
            torch.testing.assert_close(logits, expected, rtol=1e-4, atol=2e-5)


def test_cuda_that_is_not_there_is_one_clear_line() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    with pytest.raises(ConfigError, match="cuda"):
        LanguageModel.load(ModelConfig(device="cuda"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("kind", list(CONFIGS))
def test_cuda_equals_cpu(kind: str) -> None:
    tokens, parents = [5, 6, 7, 8], np.array([-1, 0, 0, 1], np.int32)
    rows = []
    for device in ("cpu", "cuda"):
        model = LanguageModel.from_hf(tiny_model(kind).to(device), tiny_tokenizer())
        cache = model.new_cache(64, 4)
        sequence = cache.allocate(32)
        model.forward([PackedSequence(sequence, list(range(20)))], cache)
        cache.commit([(sequence, list(range(20)))])
        rows.append(model.forward([PackedSequence(sequence, tokens, parents)], cache).cpu())
    torch.testing.assert_close(rows[0], rows[1], rtol=1e-3, atol=1e-3)


def test_the_default_model_writes_what_transformers_writes() -> None:
    try:
        folder = resolve_model("default")
    except ConfigError as error:
        pytest.skip(str(error))
    model = LanguageModel.load(ModelConfig(dtype="float32", device="cpu", arithmetic="float32"))
    questions = ["What is the capital of France?", "Write one sentence about the sea."]
    prompts = [
        model.tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, return_dict=False
        )
        for question in questions
    ]
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    expected = [
        reference.generate(torch.tensor([prompt]), min_new_tokens=16, max_new_tokens=16, do_sample=False)[0].tolist()
        for prompt in prompts
    ]
    cache = model.new_cache(256, 16)
    texts = [list(prompt) for prompt in prompts]
    sequences = [cache.allocate(len(text) + 16) for text in texts]
    for _ in range(16):
        new = [text[sequence.length :] for text, sequence in zip(texts, sequences, strict=True)]
        logits = model.forward([PackedSequence(s, n, None, "last") for s, n in zip(sequences, new, strict=True)], cache)
        logits = logits.index_fill(1, torch.tensor([*model.eos_token_ids]), -torch.inf)  # As min_new_tokens does.
        cache.commit([(sequence, list(range(len(n)))) for sequence, n in zip(sequences, new, strict=True)])
        for text, token in zip(texts, logits.argmax(-1).tolist(), strict=True):
            text.append(token)
    assert texts == expected


def test_what_else_is_in_a_bfloat16_pass_does_not_change_a_token() -> None:
    """On the CPU, a root's logits are the same bits alone and with any number of nodes behind it."""
    model = LanguageModel.from_hf(tiny_llama().bfloat16(), tiny_tokenizer())
    cache = model.new_cache(256, 16)
    sequence = cache.allocate(160)
    assert sequence is not None
    prompt = list(range(3, 60))
    model.forward([PackedSequence(sequence, prompt, None, "none")], cache)
    cache.commit([(sequence, list(range(len(prompt))))])
    alone = None
    for nodes in (0, 1, 2, 5, 11, 40):
        parents = np.asarray([-1] + [0] * nodes, np.int32)
        logits = model.forward([PackedSequence(sequence, [7, *range(100, 100 + nodes)], parents)], cache)[0]
        sequence.scratch = 0
        alone = logits if alone is None else alone
        assert torch.equal(logits, alone)


def test_readers_of_the_same_layers_share_a_tap_until_the_last_one_closes_it() -> None:
    model = LanguageModel.from_hf(tiny_llama(), tiny_tokenizer())
    cache = model.new_cache(64, 16)

    def features(tap: FeatureTap) -> int:
        sequence = cache.allocate(3)
        model.forward([PackedSequence(sequence, [5, 6, 7])], cache)
        cache.free(sequence)
        return sum(part.shape[0] for part in tap.parts())

    first, second = model.tap((1, 3)), model.tap((1, 3))
    first.close()
    assert features(second) == 2 * 3  # behind one layer and behind the final norm
    second.close()
    assert features(second) == 0
    third = model.tap((1, 3))
    assert features(third) == 2 * 3
    other = model.tap((2,))
    assert features(other) == 3
    assert not third.is_open
