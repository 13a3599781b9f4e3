"""Writes a tiny Llama as a GGUF file, as converters of llama.cpp do."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter, TokenType
from tokenizers import pre_tokenizers
from transformers import PreTrainedModel

_LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_NAMES = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}

HALVES = {
    "Q8_0": {0: 0.0005},
    "Q5_0": {0: 0.003},
    "Q5_1": {0: 0.003, 2: -0.046},
    "Q4_K": {0: 0.0002, 2: 0.0015},
    "Q5_K": {0: 0.0001, 2: 0.0015},
    "Q6_K": {208: 0.00005},
}
"""The float16 numbers of a block: where each lies, and about which value makes weights of 0.05 around 0."""


def random_blocks(name: str, rows: int, columns: int, seed: int = 0) -> np.ndarray:
    """uint8 [rows, bytes] of any codes; the gguf package can write only some formats."""
    values, size = GGML_QUANT_SIZES[GGMLQuantizationType[name]]
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (rows, columns // values, size), np.uint8)
    for at, mean in HALVES[name].items():
        numbers = mean * rng.uniform(0.7, 1.4, (*blocks.shape[:2], 1))
        blocks[:, :, at : at + 2] = numbers.astype(np.float16).view(np.uint8)
    return blocks.reshape(rows, -1)


def write_gguf(model: PreTrainedModel, path: Path, kind: str | None = None) -> None:
    """`model` must be a Llama over the vocabulary of `tiny_tokenizer`; with `kind`, matrices become random blocks."""
    config = model.config
    writer = GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    _add_tokenizer(writer, config.eos_token_id)
    for seed, (name, weights) in enumerate(model.state_dict().items()):
        values = weights.float().numpy()
        if name.endswith("q_proj.weight"):
            values = _interleaved(values, config.num_attention_heads)
        if name.endswith("k_proj.weight"):
            values = _interleaved(values, config.num_key_value_heads)
        if kind is not None and values.ndim == 2:
            blocks = random_blocks(kind, *values.shape, seed)
            writer.add_tensor(_gguf_name(name), blocks, raw_dtype=GGMLQuantizationType[kind])
        else:
            writer.add_tensor(_gguf_name(name), np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_tokenizer(writer: GGUFWriter, eos_token_id: int) -> None:
    specials = ["<eos>", "<pad>", "<user>", "<assistant>"]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(sorted(pre_tokenizers.ByteLevel.alphabet()) + specials)
    writer.add_token_types([TokenType.NORMAL] * 256 + [TokenType.CONTROL] * len(specials))
    writer.add_token_scores([0.0] * (256 + len(specials)))  # Merges are derived from them: there are none.
    writer.add_eos_token_id(eos_token_id)


def _gguf_name(name: str) -> str:
    module = name.removesuffix(".weight")
    if module in _NAMES:
        return f"{_NAMES[module]}.weight"
    _, _, layer, rest = module.split(".", 3)
    return f"blk.{layer}.{_LAYER_NAMES[rest]}.weight"


def _interleaved(weights: np.ndarray, heads: int) -> np.ndarray:
    """GGUF pairs neighbouring rotary dimensions where transformers pairs the two halves of a head."""
    halves = weights.reshape(heads, 2, weights.shape[0] // heads // 2, weights.shape[1])
    return halves.swapaxes(1, 2).reshape(weights.shape)
