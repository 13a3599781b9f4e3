"""A tiny random draft head over a tiny random target."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lm.attention import AttentionOptions
from lm.draft_head import DraftHead, HeadConfig, HeadModule, shared_layers

FEATURE_LAYERS = (0,)
DRAFT_VOCAB_SIZE = 100


def tiny_head_module(hf: PreTrainedModel, seed: int = 0) -> HeadModule:
    config = HeadConfig(
        target="tiny",
        vocabulary_sha256="",
        feature_layers=FEATURE_LAYERS,
        hidden_size=hf.config.hidden_size,
        intermediate_size=64,
        layers=1,
        heads=6,
        kv_heads=2,
        rope_theta=10_000.0,
        norm_eps=1e-5,
        draft_vocab_size=DRAFT_VOCAB_SIZE,
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


class _Dense:
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
        out = module(inputs, states[None, :known], torch.arange(known)[None], _Dense())[0]
        states = torch.cat((states[:known], out[-1:]))
    return output(out[-1])


@torch.inference_mode()
def target_features(hf: PreTrainedModel, tokens: list[int]) -> Tensor:
    """float32 [tokens, width], rounded to bfloat16 as they are on their way to a drafter."""
    implementation = hf.config._attn_implementation
    hf.set_attn_implementation("eager")
    try:
        hidden = hf(torch.tensor([tokens]), output_hidden_states=True).hidden_states
    finally:
        hf.set_attn_implementation(implementation)
    parts = [hidden[layer + 1][0] for layer in FEATURE_LAYERS] + [hidden[-1][0]]
    return torch.cat(parts, dim=-1).bfloat16().float()
