"""Every architecture people serve: tiny random models, four requests at once, trees that know the answer."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from transformers import AutoConfig

from lm.model import LanguageModel
from tests.lm.tiny import VOCAB_SIZE, tiny_model, tiny_tokenizer
from tests.verifier_svc.doubles import OracleDrafter
from tests.verifier_svc.engine.test_engine import Known, engine_for, plain_greedy, run, tokens_of
from treeline.sampling import SamplingParams
from verifier_svc.engine.request import GenerationRequest

MAX_TOKENS = 12
SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": None,
    "eos_token_id": 256,
    "pad_token_id": 257,
}
WIDE = {"head_dim": 16}
WINDOW = {"sliding_window": 5}
MOE = {
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}

KINDS: dict[str, dict[str, Any]] = {
    "llama": {"rope_parameters": YARN},
    "mistral": WINDOW,
    "ministral": WINDOW | WIDE,
    "mixtral": MOE,
    "qwen2": WINDOW | {"use_sliding_window": True, "max_window_layers": 0},
    "qwen2_moe": MOE | {"shared_expert_intermediate_size": 16},
    "qwen3": WIDE,
    "qwen3_moe": MOE | WIDE,
    "gemma": WIDE,
    "gemma2": WIDE | WINDOW,
    "gemma3_text": WIDE | WINDOW,
    "gemma4_text": WIDE | WINDOW | {"global_head_dim": 16},
    "vaultgemma": WIDE | WINDOW,
    "phi": {},
    "phi3": WINDOW,
    "phimoe": MOE,
    "gpt2": GPT,
    "gpt_bigcode": GPT,
    "gpt_neox": {},
    "opt": {"ffn_dim": 32, "word_embed_proj_dim": 32},
    "cohere": {},
    "cohere2": WINDOW | WIDE,
    "granite": {},
    "granitemoe": MOE,
    "starcoder2": WINDOW,
    "stablelm": {},
    "nemotron": {},
    "olmo": {},
    "olmo2": {},
    "olmo3": WINDOW,
    "olmoe": MOE,
    "flex_olmo": MOE,
    "glm": WIDE,
    "glm4": WIDE,
    "glm4_moe": MOE | WIDE,
    "ernie4_5": WIDE,
    "ernie4_5_moe": MOE | {"moe_num_experts": 4, "moe_k": 2},
    "exaone4": WINDOW | {"sliding_window_pattern": 2},
    "smollm3": {},
    "deepseek_v2": MOE | LATENT | {"num_key_value_heads": 4, "topk_method": "greedy", "first_k_dense_replace": 1},
    "deepseek_v3": MOE | LATENT | {"num_key_value_heads": 4, "first_k_dense_replace": 1},
    "minicpm3": LATENT | {"num_key_value_heads": 4},
    "dots1": MOE,
    "minimax_m2": MOE | WIDE,
    "hunyuan_v1_dense": WIDE,
    "hunyuan_v1_moe": MOE | WIDE,
    "seed_oss": WIDE,
    "apertus": {},
    "arcee": {},
    "bitnet": {},
    "jais2": {},
    "internlm3": WIDE,
    "nanochat": {},
    "persimmon": {},
    "biogpt": {},
    "ministral3": {},
    "youtu": LATENT | {"num_key_value_heads": 4},
    "doge": {},
    "ctrl": {},
    "falcon": {},
    "falcon, grouped": {"new_decoder_architecture": True, "num_kv_heads": 2},
    "falcon, biased": {"alibi": True, "multi_query": False},
    "bloom": {},
    "mpt": {},
    "mpt, clipped": {"attn_config": {"clip_qkv": 0.5, "softmax_scale": 0.2}},
    "mpt, 3 heads": {"num_attention_heads": 3, "hidden_size": 24},
    "gptj": GPT | {"rotary_dim": 4},
    "codegen": GPT | {"rotary_dim": 4},
    "gpt_neo": {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": 5},
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_with_trees_writes_what_transformers_writes(kind: str) -> None:
    config = AutoConfig.for_model(kind.partition(",")[0], **SHAPE | KINDS[kind])
    model = LanguageModel.from_hf(tiny_model(config), tiny_tokenizer())
    rng, known, requests = np.random.default_rng(1), Known(), []
    for length in (1, 4, 9, 17):
        prompt = rng.integers(3, 250, length).tolist()
        known.add(prompt, plain_greedy(model, prompt, MAX_TOKENS))
        requests.append(
            GenerationRequest(
                f"r{length}", prompt, SamplingParams(), MAX_TOKENS, ignore_eos=True, policy="static:2-1-1"
            )
        )
    engine = engine_for(model, OracleDrafter(known, VOCAB_SIZE))
    outputs = run(engine, requests)
    assert [tokens_of(outputs[request.request_id]) for request in requests] == [answer for _, answer in known.answers]
    assert sum(outputs[request.request_id][-1].speculation.accepted_nodes for request in requests) > 0
