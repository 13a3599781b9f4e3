"""Is the text exactly the target's own? The engine's greedy answers against those of transformers' `generate`."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from bench.common import Prompt, Row
from bench.local_engine import encode, greedy_answers, planned_engine
from bench.peers.transformers import generate_one_by_one
from bench.step.passes import load_transformers
from lm.model import LanguageModel
from lm.store import load_tokenizer, resolve_model
from treeline.config import Config, DrafterConfig, ModelConfig, VerifierConfig
from verifier_svc.service.profile import profile_verification

POLICIES = ("off", "chain:4", "static:4-2-1", "eagle2:4,4,12", "smart-paper", "smart")
BATCH = 8
PROFILE_CACHE_TOKENS = 2048


@dataclass(frozen=True)
class Difference:
    """The first place where an answer is not the reference's.

    Attributes:
        logit_gap: by how much the reference's token beats ours in transformers' own logits; near 0 is a tie.
    """

    prompt: str
    position: int
    logit_gap: float


@torch.inference_mode()
def difference(hf: Any, prompt: Prompt, token_ids: list[int], answer: list[int], ours: list[int]) -> Difference | None:
    """Where `ours` first leaves `answer`, which transformers' `hf` gave to `token_ids`; None if it does not."""
    pairs = itertools.zip_longest(answer, ours)
    position = next((i for i, (theirs, mine) in enumerate(pairs) if theirs != mine), None)
    if position is None:
        return None
    if position >= min(len(answer), len(ours)):
        return Difference(prompt.id, position, float("inf"))
    logits = hf(torch.tensor([token_ids + answer[:position]])).logits[0, -1].float()
    return Difference(prompt.id, position, float(logits[answer[position]] - logits[ours[position]]))


def truncated_drafter(spec: str, layers: int, folder: Path) -> Path:
    """A draft model for any target, made without training: its first layers under its own head. Poor, but real."""
    source = resolve_model(spec)
    hf = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, local_files_only=True)
    hf.model.layers = hf.model.layers[:layers]
    hf.config.num_hidden_layers = layers
    hf.save_pretrained(folder)
    load_tokenizer(source).save_pretrained(folder)
    return folder


def run_lossless(
    target: ModelConfig,
    drafters: dict[str, DrafterConfig],
    prompts: list[Prompt],
    max_tokens: int,
    policies: tuple[str, ...] = POLICIES,
    on_progress: Callable[[str], None] = lambda what: None,
) -> list[Row]:
    """Every drafter with every policy alone, then all policies mixed in batches of 8: one row each."""
    on_progress("reference")
    model = LanguageModel.load(target)
    hf = load_transformers(target.model, model)
    encoded = [encode(model.tokenizer, prompt) for prompt in prompts]
    answers = generate_one_by_one(hf, max_tokens)(encoded, 1)
    on_progress("device profile")
    curves = profile_verification(model, model.new_cache(PROFILE_CACHE_TOKENS, 16))
    rows: list[Row] = []
    for name, drafter in drafters.items():
        for batch, policy in [*((1, policy) for policy in policies), (BATCH, "mixed")]:
            on_progress(f"{name}, {policy}, batch {batch}")
            config = Config(verifier=VerifierConfig(target=target), drafter=drafter)
            chosen = [policies[i % len(policies)] if policy == "mixed" else policy for i in range(len(prompts))]
            ours, accepted = greedy_answers(planned_engine(model, config, curves), encoded, chosen, max_tokens, batch)
            found = [
                difference(hf, prompt, token_ids, answer, mine)
                for prompt, token_ids, answer, mine in zip(prompts, encoded, answers, ours, strict=True)
            ]
            differences = [d for d in found if d is not None]
            rows.append(
                {
                    "drafter": name,
                    "policy": policy,
                    "batch": batch,
                    "prompts": len(prompts),
                    "identical": len(prompts) - len(differences),
                    "tokens": sum(map(len, ours)),
                    "accepted_nodes": accepted,
                    "largest_logit_gap": max((d.logit_gap for d in differences), default=0.0),
                    "differences": [vars(d) for d in differences],
                }
            )
    return rows
