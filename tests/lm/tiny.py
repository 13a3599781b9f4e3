"""Tiny random models of every family that the runtime must serve, and a tiny tokenizer."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    MptConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

VOCAB_SIZE = 260
"""256 bytes, then four special tokens."""
EOS = "<eos>"

_SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": None,
    "eos_token_id": 256,
    "pad_token_id": 257,
}

_GEMMA: dict[str, Any] = {**_SHAPE, "head_dim": 16, "sliding_window": 5, "query_pre_attn_scalar": 16}
_UNGROUPED = {name: value for name, value in _SHAPE.items() if name != "num_key_value_heads"}

CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**_SHAPE),
    "qwen2": Qwen2Config(**_SHAPE),
    "qwen3": Qwen3Config(**_SHAPE, head_dim=16),
    "mistral-sliding": MistralConfig(**_SHAPE, sliding_window=7),
    "phi3-sliding": Phi3Config(**_SHAPE, sliding_window=7),
    "gemma2-softcap": Gemma2Config(**_GEMMA, attn_logit_softcapping=2.0, final_logit_softcapping=5.0),
    "gemma3-mixed": Gemma3TextConfig(**_GEMMA, layer_types=["sliding_attention", "full_attention"]),
    "gpt-neox": GPTNeoXConfig(**_UNGROUPED),
    "mpt-alibi": MptConfig(**_UNGROUPED),
    "gpt2": GPT2Config(
        vocab_size=VOCAB_SIZE, n_embd=48, n_layer=2, n_head=6, n_positions=512, bos_token_id=None, eos_token_id=256
    ),
}


def tiny_model(kind: str | PreTrainedConfig, seed: int = 0, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A random model, the same for the same seed, with logits spread widely enough that greedy choices are no ties."""
    config = deepcopy(CONFIGS[kind] if isinstance(kind, str) else kind)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.data.normal_(0, 0.15)
        model.get_output_embeddings().weight.data.normal_(0, 0.5)
    return model.to(dtype)


def tiny_llama(seed: int = 0, **sizes: int) -> PreTrainedModel:
    return tiny_model(LlamaConfig(**_SHAPE | sizes), seed)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, with a chat template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS, pad_token="<pad>")
    fast.add_special_tokens({"additional_special_tokens": ["<user>", "<assistant>"]})
    fast.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    return fast
