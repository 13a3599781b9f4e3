"""A draft head made on the device: the one part that computes gradients."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from bench.gpu_check.scale import Scale
from distill.pipeline import Recipe, default_feature_layers, train_head, write_texts
from distill.trainer import Progress
from lm.model import LanguageModel
from treeline.config import ModelConfig


def training(scale: Scale) -> dict[str, Any]:
    """Tokens per second of generation and of training, the loss, and the head's accuracy on held-out texts.

    The target writes as many texts as fit `scale.writing_s`: a first round shows how long one takes.
    """
    if scale.target is None:
        return {"skipped": "the default model is not in the cache", "wrong": []}
    target = ModelConfig(model=scale.target, device=scale.name)
    with torch.inference_mode(False), TemporaryDirectory() as name:
        folder, model, told = Path(name), LanguageModel.load(target), list[int]()

        def write(model: LanguageModel, recipe: Recipe) -> None:
            write_texts(model, recipe, [], folder, lambda texts, tokens: told.append(tokens))

        started_s = time.perf_counter()
        first = replace(scale.recipe, feature_layers=default_feature_layers(model))
        write(model, first)
        rounds = max(1, int(scale.writing_s / (time.perf_counter() - started_s)))
        recipe = replace(first, texts=rounds * first.texts)
        write(model, recipe)
        written_s, slow = time.perf_counter() - started_s, model.passes.slow
        del model  # Training needs its memory.
        seen: list[Progress] = []
        started_s = time.perf_counter()
        held_out = train_head(target, recipe, folder, seen.append)
        trained_s = time.perf_counter() - started_s
    losses = [progress.loss for progress in seen]
    part = max(1, len(losses) // 4)
    before, after = (sum(some) / part for some in (losses[:part], losses[-part:]))
    wrong = [] if after < before else [f"the head's loss went from {before:.2f} to {after:.2f}"]
    wrong += [f"{slow} of the target's passes ran uncaptured or packed"] if slow else []
    return {
        "texts": recipe.texts,
        "written_tokens": told[-1],
        "written_per_s": told[-1] / written_s,
        "trained_tokens": seen[-1].tokens,
        "trained_per_s": seen[-1].tokens / trained_s,
        "loss": [before, after],
        "top1": held_out.top1,
        "top4": held_out.top4,
        "wrong": wrong,
    }
