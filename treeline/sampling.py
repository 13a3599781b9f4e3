"""Sampling parameters of a request."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class SamplingParams:
    """How the target's next-token distribution is shaped.

    They apply in this order: logit bias; repetition, frequency and presence penalty; temperature; top-k, top-p, min-p.

    Attributes:
        temperature: 0 means greedy.
        top_p: nucleus mass in (0, 1]; 1 keeps everything.
        top_k: keep the k most likely tokens; 0 keeps everything.
        repetition_penalty: > 0; 1 is none (as in CTRL: positive logits are divided by it, negative ones multiplied,
            for each token of the prompt and the output so far).
        seed: 64-bit key of the position-keyed noise.
        presence_penalty, frequency_penalty: subtracted from the logits of the answer's tokens so far, once per token,
            and once per occurrence; 0 is none.
        min_p: drop tokens less likely than this times the most likely one; 0 drops none.
        logit_bias: added to the logits of these token ids.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    seed: int = 0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    min_p: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict, hash=False)

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def is_argmax(self) -> bool:
        """Whether the token is the argmax of the unchanged logits."""
        return self.greedy and not self.penalises and not self.logit_bias

    @property
    def penalises(self) -> bool:
        """Whether earlier tokens change the next one's logits."""
        return self.repetition_penalty != 1.0 or self.counts_answer

    @property
    def counts_answer(self) -> bool:
        """Whether it matters how often a token occurs in the answer."""
        return self.presence_penalty != 0.0 or self.frequency_penalty != 0.0
