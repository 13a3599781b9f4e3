"""Models of well-known shapes with random weights: the cost of a pass does not depend on the weights' values."""

from __future__ import annotations

import torch
from tokenizers import Tokenizer, models
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast, Qwen3Config

from bench.step.limits import ModelSize
from bench.step.measure import Subject
from bench.step.passes import treeline_passes
from distill.pipeline import head_config
from lm.attention import IMPLEMENTATION
from lm.device import torch_device, torch_dtype
from lm.draft_head import DraftHead, HeadModule
from lm.layers.fuse import fuse_layers
from lm.model import LanguageModel
from treeline.config import ModelConfig
from treeline.errors import ConfigError

SHAPES = {
    "llama-8b": LlamaConfig(
        vocab_size=128_256,
        hidden_size=4096,
        intermediate_size=14_336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=8192,
    ),
    "qwen3-8b": Qwen3Config(
        vocab_size=151_936,
        hidden_size=4096,
        intermediate_size=12_288,
        num_hidden_layers=36,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=8192,
    ),
    "qwen3-tiny": Qwen3Config(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=2048,
    ),
    "llama-tiny": LlamaConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
    ),
}
"""Llama 3.1 8B (arXiv 2407.21783, table 3), Qwen3 8B (arXiv 2505.09388, table 1), and small ones."""

HEAD_VOCAB_SIZE = 32_000
"""Of EAGLE-3's heads for Llama 3 (arXiv 2503.01840)."""


@torch.inference_mode()
def random_model(shape: str, config: ModelConfig) -> LanguageModel:
    """A model of this shape, made on the device and in the dtype that `config` names.

    Raises:
        ConfigError: there is no such shape, or no such device.
    """
    if shape not in SHAPES:
        raise ConfigError(f"shape '{shape}': one of {', '.join(SHAPES)}")
    # Drawing billions of weights takes longer than measuring them: they are made empty, and then filled at once.
    with torch.device("meta"):
        hf = AutoModelForCausalLM.from_config(
            SHAPES[shape], dtype=torch_dtype(config), attn_implementation=IMPLEMENTATION
        )
    device = torch_device(config.device)
    rotary = type(hf.model.rotary_emb)(SHAPES[shape]).to(device)
    hf.to_empty(device=device)
    hf.model.rotary_emb = rotary
    for module in hf.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            module.weight.data.normal_(0, 0.02)
        elif isinstance(getattr(module, "weight", None), nn.Parameter):
            module.weight.data.fill_(1)
    fuse_layers(hf)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"?": 0}, unk_token="?")))
    return LanguageModel.from_hf(hf, tokenizer)


@torch.inference_mode()
def random_head(shape: str, device: torch.device, dtype: torch.dtype) -> DraftHead:
    """A draft head for a target of this shape, as `treeline distill` makes them, of random weights."""
    target = SHAPES[shape]
    config = head_config(target, (1, 2, 3), min(HEAD_VOCAB_SIZE, target.vocab_size))
    with torch.device(device):
        module = HeadModule(config).to(dtype)
        embedding = nn.Embedding(target.vocab_size, target.hidden_size, dtype=dtype)
        output = nn.Linear(target.hidden_size, config.draft_vocab_size, bias=False, dtype=dtype)
        draft_ids = torch.arange(config.draft_vocab_size)
    module.fuse(target.max_position_embeddings)
    return DraftHead(f"{shape}-head", module, embedding, output, draft_ids)


def shape_subject(model: LanguageModel) -> Subject:
    """Our passes over such a model, beside the limit of the machine; it has no peer."""
    size = ModelSize.of(model.hf, model)
    return Subject(
        "target", size, model.max_context_tokens, model.dtype, model.device, {"treeline": treeline_passes(model)}
    )
