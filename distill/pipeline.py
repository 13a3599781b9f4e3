"""From a target to its draft head: write, train, save. Each part goes on from what is on disk."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from distill.batches import Corpus
from distill.corpus import CorpusMeta, CorpusWriter
from distill.trainer import HeldOut, Progress, Trainer, TrainingPlan
from distill.writer import Writer
from lm.device import torch_device
from lm.draft_head import HeadConfig, HeadModule, load_plain, save_head, shared_layers
from lm.features import FeatureTap
from lm.model import LanguageModel
from lm.store import load_tokenizer, model_name, resolve_model, vocabulary_sha256
from treeline.config import ModelConfig
from treeline.errors import ConfigError

TEXT_FOLDER, CHECKPOINT = "text", "checkpoint.pt"
INITIAL_SCALE = 0.3
"""Of what does not hand the final states through."""


@dataclass(frozen=True)
class Recipe:
    """All that decides what comes out.

    Attributes:
        feature_layers: target layers that the head reads besides the final states.
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
    layers: int = 1
    training: TrainingPlan = field(default_factory=TrainingPlan)


def default_feature_layers(model: LanguageModel) -> tuple[int, ...]:
    """A low one, and those behind a third and two thirds of the target's depth (as EAGLE-3, section 3.1)."""
    depth = len(model.layers)
    return (1, depth // 3 - 1, 2 * depth // 3 - 1) if depth >= 9 else ()


def write_texts(
    model: LanguageModel,
    recipe: Recipe,
    prompts: list[str],
    folder: Path,
    on_progress: Callable[[int, int], None],
) -> None:
    """Let the target write what is missing in `folder`/text.

    Args:
        prompts: users' turns that are answered first, before the target makes up its own.
        on_progress: told (texts, tokens) on disk or about to be.

    Raises:
        ConfigError: the folder holds texts written otherwise, or the model's chat template cannot be used.
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
    tap = FeatureTap(model.hf, recipe.feature_layers)
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
    """Train on `folder`/text, write the head into `folder`, and say how it does on held-out texts.

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
    module = initial_module(hf, head_config(hf, model_name(target.model), vocabulary, recipe))
    trainer = Trainer(
        module, embedding.weight.detach(), output.weight.detach(), corpus, recipe.training, folder / CHECKPOINT
    )
    held_out = trainer.run(on_progress)
    save_head(folder, module, draft_ids)
    return held_out


def head_config(hf: PreTrainedModel, name: str, vocabulary: str, recipe: Recipe) -> HeadConfig:
    """A head of the target's own proportions."""
    config = hf.config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or {}
    return HeadConfig(
        target=name,
        vocabulary_sha256=vocabulary,
        feature_layers=recipe.feature_layers,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        layers=recipe.layers,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        rope_theta=rope.get("rope_theta", 10_000.0),
        norm_eps=getattr(config, "rms_norm_eps", 1e-6),
        draft_vocab_size=recipe.draft_vocab_size,
    )


@torch.no_grad()
def initial_module(hf: PreTrainedModel, config: HeadConfig) -> HeadModule:
    """A head that at first hands the final states through: its layers add nothing yet, and its output norm is the
    target's own."""
    module = HeadModule(config).to(hf.device)
    layers: Any = module.body.layers
    for layer in layers:
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
    norm: Any = getattr(hf.base_model, "norm", None)
    if norm is not None and norm.weight.shape == module.body.norm.weight.shape:
        module.body.norm.weight.copy_(norm.weight)
    for linear in (module.project, module.join):
        linear.weight.mul_(INITIAL_SCALE)
        linear.weight[:, -config.hidden_size :] += torch.eye(config.hidden_size, device=hf.device)
    return module
