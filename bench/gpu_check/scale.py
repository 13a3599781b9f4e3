"""How large the parts of the check are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from distill.pipeline import Recipe
from distill.trainer import TrainingPlan
from lm.store import DEFAULT_NAME, cached_models
from treeline.config import DEFAULT_MODEL


@dataclass(frozen=True)
class Scale:
    """How large the parts are.

    Attributes:
        attention: (group, head size, tokens, context) of single attention calls.
        trees: nodes of each sequence in each compared pass; every sequence has a prompt of up to `most_prompt` tokens.
        sampling: (rows, vocabulary).
        product: inputs and outputs of an FP8 matrix product, for each of `product_tokens`.
        shapes: of the models that are timed; `store_tokens` is the size of their KV cache.
        points: (tokens, sequences, context) of timed passes; the second model runs only the first two.
        streams: loads under which policies are compared, for `block_s` each, with `prompt_tokens` and `answer_tokens`.
        repeats: of everything else that is timed.
        target: the model for which a head is trained; None if there is none at hand.
        recipe: of the head, except the layers that it reads; the target writes rounds of `recipe.texts` for about
            `writing_s`.
    """

    device: torch.device
    dtype: torch.dtype
    attention: tuple[tuple[int, int, int, int], ...]
    trees: tuple[list[int], ...]
    most_prompt: int
    sampling: tuple[tuple[int, int], ...]
    product: tuple[int, int]
    product_tokens: tuple[int, ...]
    shapes: tuple[str, str]
    store_tokens: int
    points: tuple[tuple[int, int, int], ...]
    streams: tuple[int, ...]
    block_s: float
    prompt_tokens: int
    answer_tokens: int
    repeats: int
    target: str | None
    recipe: Recipe
    writing_s: float

    @property
    def name(self) -> Literal["cpu", "cuda"]:
        return "cuda" if self.device.type == "cuda" else "cpu"


def on_device() -> Scale:
    heads = ((1, 64), (3, 80), (4, 128), (7, 128), (8, 256))
    calls = ((1, 1024), (8, 8192), (31, 1000), (128, 2048), (512, 512), (1, 32768))
    counts = [(tokens, sequences) for sequences in (1, 8, 64) for tokens in (1, 8, 32, 64, 128, 512)]
    points = [(*each, context) for each in counts if each[0] >= each[1] for context in (64, 1024)]
    return Scale(
        device=torch.device("cuda"),
        dtype=torch.bfloat16,
        attention=tuple((*head, *call) for head in heads for call in calls),
        trees=([1], [5, 1, 9], [1] * 9, [33], [60, 60]),
        most_prompt=40,
        sampling=tuple((rows, 151_936) for rows in (1, 64, 256, 512)),
        product=(4096, 28_672),
        product_tokens=(1, 8, 64, 512),
        shapes=("llama-8b", "qwen3-8b"),
        store_tokens=131_072,
        points=((1, 1, 1024), (32, 1, 1024), *points, (1, 1, 7900), (8, 8, 7900), (32, 1, 7900)),
        streams=(1, 8, 32, 64),
        block_s=2.0,
        prompt_tokens=32,
        answer_tokens=128,
        repeats=20,
        target=DEFAULT_MODEL if DEFAULT_NAME in [path.name for path in cached_models()] else None,
        recipe=Recipe((), texts=256, slots=256, training=TrainingPlan(epochs=2, batch_tokens=8192)),
        writing_s=20.0,
    )


def toy() -> Scale:
    return Scale(
        device=torch.device("cpu"),
        dtype=torch.float32,
        attention=((4, 16, 3, 70),),
        trees=([2, 1],),
        most_prompt=2,
        sampling=((4, 300),),
        product=(256, 64),
        product_tokens=(8,),
        shapes=("llama-tiny", "qwen3-tiny"),
        store_tokens=512,
        points=((2, 1, 20),),
        streams=(1, 2),
        block_s=0.2,
        prompt_tokens=4,
        answer_tokens=16,
        repeats=1,
        target=None,
        recipe=Recipe((), 60, 64, 20, 64, TrainingPlan(epochs=4, batch_tokens=512, depth=2, learning_rate=3e-3)),
        writing_s=0.0,
    )
