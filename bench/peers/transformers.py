"""transformers as a peer: `generate` plain and assisted, and its continuous batching."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
from transformers import ContinuousBatchingConfig

from bench.peers.compare import Answerer, Answers, MissingPeerError

PROMPT_LOOKUP_TOKENS = 10
"""The number that transformers' own documentation uses."""
PAGE_TOKENS = 256


def generate_one_by_one(hf: Any, max_tokens: int, **options: Any) -> Answerer:
    """`generate`, one request after the other: assisted generation takes no more than one."""

    @torch.inference_mode()
    def answer(prompts: list[list[int]], concurrency: int) -> Answers:
        answers = []
        for prompt in prompts:
            ids = torch.tensor([prompt], device=hf.device)
            mask = torch.ones_like(ids)
            out: Any = hf.generate(ids, attention_mask=mask, max_new_tokens=max_tokens, do_sample=False, **options)
            answers.append(out[0, len(prompt) :].tolist())
        return answers

    return answer


def continuous_batching(hf: Any, max_tokens: int) -> Answerer:
    """`generate_batch` with as many requests at a time as asked for and just the KV cache that they need."""
    greedy = deepcopy(hf.generation_config)
    assert greedy is not None
    greedy.do_sample = False

    def answer(prompts: list[list[int]], concurrency: int) -> Answers:
        longest = max(map(len, prompts)) + max_tokens
        config = ContinuousBatchingConfig(
            page_size=PAGE_TOKENS,
            num_blocks=concurrency * -(-longest // PAGE_TOKENS) + 1,
            max_batch_tokens=max(PAGE_TOKENS, concurrency),
            max_requests_per_batch=concurrency,
        )
        try:
            done = hf.generate_batch(prompts, greedy, continuous_batching_config=config, max_new_tokens=max_tokens)
        except (RuntimeError, ValueError, ImportError, TypeError) as error:
            raise MissingPeerError(f"generate_batch: {error}") from error
        failed = [output.error for output in done.values() if output.error is not None]
        if failed or len(done) < len(prompts):
            raise MissingPeerError(f"generate_batch: {failed[0] if failed else 'ended without its answers'}")
        return [output.generated_tokens for output in done.values()]

    return answer
