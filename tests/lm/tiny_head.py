"""A tiny random draft head over a tiny random target."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lm.attention import AttentionOptions
from lm.checkpoints.eagle3 import HeadConfig
from lm.draft_head import DraftHead, HeadModule, shared_layers

FEATURE_LAYERS = (1, 3)
"""Behind the first layer of two, and behind the final norm."""
DRAFT_VOCAB_SIZE = 100


def tiny_head_module(hf: PreTrainedModel, seed: int = 0) -> HeadModule:
    config = HeadConfig(
        hidden_size=hf.config.hidden_size,
        intermediate_size=64,
        heads=6,
        kv_heads=2,
        head_dim=8,
        norm_eps=1e-5,
        rope={"rope_type": "default", "rope_theta": 10_000.0},
        feature_layers=FEATURE_LAYERS,
        target_hidden_size=hf.config.hidden_size,
        target_vocab_size=hf.config.vocab_size,
        draft_vocab_size=DRAFT_VOCAB_SIZE,
        fc_norm=True,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = HeadModule(config).eval()
        for parameter in module.parameters():
            if parameter.dim() > 1:
                parameter.data.normal_(0, 0.15)
    return module


def tiny_draft_ids() -> Tensor:
    """Every second token of the vocabulary, so that columns and token ids differ."""
    return torch.arange(0, 2 * DRAFT_VOCAB_SIZE, 2)


def tiny_head(hf: PreTrainedModel, seed: int = 0) -> DraftHead:
    embedding, output = shared_layers(hf, tiny_draft_ids())
    return DraftHead("tiny-head", tiny_head_module(hf, seed), embedding, output, tiny_draft_ids())


class CausalAttention:
    """Plain causal attention over one sequence."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, options: AttentionOptions) -> Tensor:
        q, k, v = (part.transpose(0, 1) for part in (query, key, value))
        mixed = nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=options.scale, enable_gqa=True
        )
        return mixed.transpose(0, 1)


@torch.inference_mode()
def reference_logits(hf: PreTrainedModel, tokens: list[int], path: list[int], first: int = 1) -> Tensor:
    """What a tiny head says below `path`, draft tokens behind `tokens`: float32 [draft_vocab], recomputed from nothing.

    The head knows the tokens from index `first` on.
    """
    module, (embedding, output) = tiny_head_module(hf), shared_layers(hf, tiny_draft_ids())
    features = target_features(hf, tokens)
    states: Any = module.states(features[first - 1 : -1])
    run = [*tokens[first:], *path]
    for known in range(len(tokens) - first, len(run) + 1):
        inputs = embedding(torch.tensor(run[:known]))[None]
        out, final = module(inputs, states[None, :known], torch.arange(known)[None], CausalAttention())
        states = torch.cat((states[:known], out[0, -1:]))
    return output(final[0, -1])


@torch.inference_mode()
def target_features(hf: PreTrainedModel, tokens: list[int]) -> Tensor:
    """float32 [tokens, width], rounded to bfloat16 as they are on their way to a drafter."""
    implementation = hf.config._attn_implementation
    hf.set_attn_implementation("eager")
    try:
        hidden = hf(torch.tensor([tokens]), output_hidden_states=True).hidden_states
    finally:
        hf.set_attn_implementation(implementation)
    return torch.cat([hidden[1][0], hidden[-1][0]], dim=-1).bfloat16().float()
