"""Policies side by side, with drafts of a given quality: is `smart` anywhere slower than the best of the others?"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from bench.common import Prompt
from bench.gpu_check.scale import Scale
from bench.step.shapes import random_model
from bench.sweep import Result, Settings, run_sweep
from bench.synthetic import parse_acceptance
from lm.model import LanguageModel
from treeline.config import Config, ModelConfig, VerifierConfig

POLICIES = ("off", "chain:2", "chain:4", "eagle2:6,10,60", "smart")
ACCEPTANCE = "0.75,0.1,0.05/0.7,0.1,0.05"
"""By rank, in the first layer and in all deeper ones: close to what EAGLE-3 reports for chats (arXiv 2503.01840)."""
LEAST_SHARE = 0.98
"""Of the best other policy's tokens per second, at every load."""
PROMPTS = 64
FIRST_TOKEN = 3
"""Smaller ones may end a text."""


def arms(scale: Scale) -> dict[str, Any]:
    """Tokens per second of each policy at each load; every text is compared with the target's known one."""
    from bench.systems import systems_over  # Imports the engine, which the other parts do without.

    on_cuda = scale.device.type == "cuda"
    target = ModelConfig(device=scale.name, dtype="bfloat16" if on_cuda else "float32")
    model = random_model(scale.shapes[0], target)
    count_upwards(model)
    config = Config(verifier=VerifierConfig(target=target))
    rng, room = np.random.default_rng(0), scale.prompt_tokens + scale.answer_tokens
    starts = rng.integers(FIRST_TOKEN, model.vocab_size - room, PROMPTS).tolist()
    prompts = {
        Prompt(str(index), "counting", ""): list(range(start, start + scale.prompt_tokens))
        for index, start in enumerate(starts)
    }
    settings = Settings(POLICIES, scale.streams, (), 1, scale.answer_tokens, scale.block_s, seed=0)
    swept = systems_over(model, config, prompts, max(scale.streams), scale.answer_tokens, parse_acceptance(ACCEPTANCE))
    results = [run.result for run in run_sweep(swept, list(prompts), settings) if run.result is not None]
    wrong = [
        f"a text of {result.block.policy} is not the target's"
        for result in results
        for answer in result.answers
        if answer.token_ids != [prompts[answer.request.prompt][-1] + 1 + i for i in range(len(answer.token_ids))]
    ]
    if on_cuda:
        wrong += _slow(results)
        wrong += [f"{model.passes.slow} passes ran uncaptured or packed"] if model.passes.slow else []
    return {"rows": [_row(result) for result in results], "counts": dict(model.passes.counts), "wrong": wrong}


@torch.inference_mode()
def count_upwards(model: LanguageModel) -> None:
    """Make token t be followed by t + 1 however sums are rounded; passes cost what they do with random weights.

    The top two of random logits are close: a text would change with the sizes of its passes, and planted drafts would
    no longer be right.
    """
    hf: Any = model.hf
    embedding = hf.get_input_embeddings().weight
    embedding.normal_()
    hf.get_output_embeddings().weight.copy_(embedding.roll(1, 0))
    for layer in hf.model.layers:
        for product in (layer.o_proj, layer.down_proj):
            product.weight.mul_(0.01)


def _slow(results: list[Result]) -> list[str]:
    """Where `smart` is slower than it may be."""
    found = []
    for streams in sorted({result.block.load for result in results}):
        rates = {r.block.policy: r.measured.tokens_per_s for r in results if r.block.load == streams}
        smart = rates.pop("smart")
        best = max(rates, key=rates.__getitem__)
        if smart < LEAST_SHARE * rates[best]:
            found.append(f"smart reaches {smart / rates[best]:.2f} of {best} at {streams:g} streams")
    return found


def _row(result: Result) -> dict[str, Any]:
    return {"policy": result.block.policy, "streams": result.block.load, **vars(result.measured)}
