"""From a target to its draft head: write, train, save. Each step resumes from what is on disk."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from distill.batches import Corpus
from distill.corpus import CorpusMeta, CorpusWriter
from distill.trainer import HeldOut, Progress, Trainer, TrainingPlan
from distill.writer import Writer
from lm.checkpoints.eagle3 import EAGLE_ROPE_THETA, HeadConfig
from lm.device import torch_device
from lm.draft_head import HeadModule, load_plain, save_head, shared_layers
from lm.model import LanguageModel
from lm.store import load_tokenizer, resolve_model, vocabulary_sha256
from treeline.config import ModelConfig
from treeline.errors import ConfigError

TEXT_FOLDER, CHECKPOINT = "text", "checkpoint.pt"
INITIAL_SCALE = 0.3
"""Of fc's initial weights, besides the identity for the final states."""


@dataclass(frozen=True)
class Recipe:
    """All settings of a head.

    Attributes:
        feature_layers: 0-based target layers whose output the head reads, besides that of the last one.
        texts: how many the target writes.
        max_tokens: longest text, template included.
        slots: texts written at a time.
        draft_vocab_size: tokens that the head can propose.
    """

    feature_layers: tuple[int, ...]
    texts: int = 8000
    max_tokens: int = 320
    slots: int = 96
    draft_vocab_size: int = 8192
    training: TrainingPlan = field(default_factory=TrainingPlan)


def default_feature_layers(model: LanguageModel) -> tuple[int, ...]:
    """A low layer, and those after one and two thirds of the target's depth (as EAGLE-3, section 3.1)."""
    depth = len(model.layers)
    return (1, depth // 3 - 1, 2 * depth // 3 - 1) if depth >= 9 else ()


def write_texts(
    model: LanguageModel,
    recipe: Recipe,
    prompts: list[str],
    folder: Path,
    on_progress: Callable[[int, int], None],
) -> None:
    """Let the target write the texts missing in `folder`/text.

    Args:
        prompts: user turns that are answered first, before the target makes up its own.
        on_progress: called with (texts, tokens) on disk or about to be.

    Raises:
        ConfigError: the folder's texts have other settings, or the model's chat template cannot be used.
    """
    meta = CorpusMeta(
        target=model.name,
        vocabulary_sha256=vocabulary_sha256(model.tokenizer),
        feature_layers=recipe.feature_layers,
        max_tokens=recipe.max_tokens,
        seed=recipe.training.seed,
        prompts_sha256=hashlib.sha256("\0".join(prompts).encode()).hexdigest() if prompts else "",
    )
    corpus = CorpusWriter(folder / TEXT_FOLDER, meta)
    missing = [index for index in range(recipe.texts) if index not in corpus.done]
    if not missing:
        return
    boundaries = [layer + 1 for layer in recipe.feature_layers]
    tap = model.tap((*boundaries, len(model.layers) + 1))
    writer = Writer(model, tap, recipe.slots, recipe.max_tokens, recipe.training.seed)
    turns = [model.tokenizer(prompt, add_special_tokens=False).input_ids for prompt in prompts]
    texts, tokens = len(corpus.done), corpus.tokens
    for text in writer.write(missing, turns):
        corpus.add(text)
        texts, tokens = texts + 1, tokens + len(text.token_ids)
        on_progress(texts, tokens)
    corpus.flush()


def train_head(
    target: ModelConfig,
    recipe: Recipe,
    folder: Path,
    on_progress: Callable[[Progress], None],
) -> HeldOut:
    """Train on `folder`/text, write the head into `folder`, and measure it on held-out texts.

    Raises:
        ConfigError: there are too few texts to train on.
    """
    corpus = Corpus(folder / TEXT_FOLDER)
    if not corpus.training or not corpus.held_out:
        raise ConfigError(f"{len(corpus.training)} texts are too few to train on; write more")
    torch.manual_seed(recipe.training.seed)
    hf = load_plain(target).to(torch_device(target.device))  # type: ignore[arg-type]
    embedding: Any = hf.get_input_embeddings()
    draft_ids = corpus.frequent_tokens(recipe.draft_vocab_size, embedding.num_embeddings)
    _, output = shared_layers(hf, draft_ids)
    vocabulary = vocabulary_sha256(load_tokenizer(resolve_model(target.model)))
    final_norm = final_norm_of(hf)
    shape = hf.config.get_text_config()
    read = (*(layer + 1 for layer in recipe.feature_layers), shape.num_hidden_layers)
    config = head_config(shape, read, recipe.draft_vocab_size, vocabulary)
    module = initial_module(config, final_norm)
    weights = (embedding.weight.detach(), output.weight.detach(), final_norm)
    trainer = Trainer(module, *weights, corpus, recipe.training, folder / CHECKPOINT)
    held_out = trainer.run(on_progress)
    save_head(folder, module, output.weight, draft_ids)
    return held_out


def head_config(
    target: PreTrainedConfig, feature_layers: tuple[int, ...], draft_vocab_size: int, vocabulary_sha256: str = ""
) -> HeadConfig:
    """A head of the target's own proportions. `feature_layers`: as `FeatureTap` counts them."""
    rope = getattr(target, "rope_parameters", None) or {}
    return HeadConfig(
        hidden_size=target.hidden_size,
        intermediate_size=target.intermediate_size,
        heads=target.num_attention_heads,
        kv_heads=target.num_key_value_heads,
        head_dim=getattr(target, "head_dim", None) or target.hidden_size // target.num_attention_heads,
        norm_eps=getattr(target, "rms_norm_eps", 1e-6),
        rope={"rope_type": "default", "rope_theta": rope.get("rope_theta", EAGLE_ROPE_THETA)},
        feature_layers=feature_layers,
        target_hidden_size=target.hidden_size,
        target_vocab_size=target.vocab_size,
        draft_vocab_size=draft_vocab_size,
        norm_before_residual=True,
        fc_norm=True,
        vocabulary_sha256=vocabulary_sha256,
    )


@torch.no_grad()
def final_norm_of(hf: PreTrainedModel) -> Tensor:
    """Factors [hidden] of the target's final norm.

    Raises:
        ConfigError: it has no such norm, or it does more than multiply.
    """
    norm: Any = getattr(hf.base_model, "norm", None)
    if norm is None or getattr(norm, "bias", None) is not None:
        raise ConfigError(f"no head can be made for {type(hf).__name__}: its final norm is not an RMSNorm")
    ones = torch.ones(hf.config.get_text_config().hidden_size, device=hf.device, dtype=norm.weight.dtype)
    return norm(ones)


@torch.no_grad()
def initial_module(config: HeadConfig, final_norm: Tensor) -> HeadModule:
    """A head that at first passes the final states on: its layer adds nothing yet, its norm is the target's own."""
    module = HeadModule(config).to(final_norm.device)
    layer: Any = module.layers[0]
    layer.self_attn.o_proj.weight.zero_()
    layer.mlp.down_proj.weight.zero_()
    module.norm.weight.copy_(final_norm)
    module.fc.weight.mul_(INITIAL_SCALE)
    module.fc.weight[:, -config.hidden_size :] += torch.eye(config.hidden_size, device=final_norm.device)
    return module
