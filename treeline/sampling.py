"""Sampling parameters of one request, as every service understands them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class SamplingParams:
    """How the target's next-token distribution is shaped, in this order: repetition penalty, temperature, top-k, top-p.

    Attributes:
        temperature: 0 means greedy.
        top_p: nucleus mass in (0, 1]; 1 keeps everything.
        top_k: keep the k most likely tokens; 0 keeps everything.
        repetition_penalty: > 0; 1 is none (as in CTRL: positive logits are divided by it, negative ones multiplied,
            for each token of the prompt and the output so far).
        seed: 64-bit key of the position-keyed noise.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    seed: int = 0

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def is_argmax(self) -> bool:
        """Whether the token is that of the largest logit as it is."""
        return self.greedy and self.repetition_penalty == 1.0
